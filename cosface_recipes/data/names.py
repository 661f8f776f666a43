"""Names of identities and files: Unicode writes one name in several ways, archives of macOS mostly in NFD."""

from __future__ import annotations

import unicodedata
from pathlib import Path

FORMS = ("NFC", "NFD")


def identity(name: str) -> str:
    r"""The form of a name that is the same of all that are one identity.

    >>> identity("Jose\u0301") == identity("Jos\u00e9")
    True
    """
    return unicodedata.normalize("NFC", name)


def below(folder: Path, name: str) -> Path:
    """The path of a name below a folder, as the file system spells it; as it is written where there is none."""
    paths = [folder / name, *(folder / unicodedata.normalize(form, name) for form in FORMS)]
    return next((path for path in paths if path.exists()), paths[0])
