"""Names of identities and files: Unicode writes one name in several ways, archives of macOS mostly in NFD."""

from __future__ import annotations

import unicodedata
from pathlib import Path


def identity(name: str) -> str:
    r"""The form of a name that is the same of all that are one identity.

    >>> identity("Jose\u0301") == identity("Jos\u00e9")
    True
    """
    return unicodedata.normalize("NFC", name)


def below(folder: Path, name: str) -> Path:
    """The path of a name below a folder, as the file system spells it; as it is written where there is none."""
    if name.isascii():  # which is written in one way: nothing to look for, in lists of hundreds of thousands
        return folder / name
    spellings = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return next((folder / spelled for spelled in spellings if (folder / spelled).exists()), folder / name)
