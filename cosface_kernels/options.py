"""What the op may be asked for beyond plain LMCL, in one record that travels from the op to the kernels.

The op's schema is flat; `ops.py` gathers its optional arguments into an `Options` and hands it to the backend. A
new option is a field here, an argument of the ops with the same name and default, and a field of `Options` in
csrc/lmcl.h.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Options:
    """The defaults are plain LMCL over all classes.

    Attributes:
        classes: (S,) int64, the rows of the weight that take part, ascending, on the weight's device; the targets
            are positions in it, and dw is (S, D). None: all rows.
        cache_bytes: memory that forward may fill for backward with what backward would compute again.
    """

    classes: Tensor | None = None
    cache_bytes: int = 0

    def cache_size(self, x: Tensor, w: Tensor) -> int:
        """Bytes that a cache takes: cache_bytes, or fewer if that is more than all the cosines need."""
        return 0

    def refusal(self, supported: Collection[str] = ()) -> str | None:
        """Why a backend that knows only the `supported` options cannot take these, or None."""
        for field in fields(self):
            value = getattr(self, field.name)
            differs = isinstance(value, Tensor) or value != field.default
            if differs and field.name not in supported:
                return f"option {field.name!r} is not on this backend yet."
        return None


PLAIN = Options()


def empty_cache(x: Tensor) -> Tensor:
    """What forward returns where there is no cache."""
    return x.new_empty(0, dtype=torch.uint8)
