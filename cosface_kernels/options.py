"""What the op may be asked for beyond plain LMCL, in one record that travels from the op to the kernels.

The op's schema is flat; `ops.py` takes its optional arguments from here, gathers them into an `Options` and hands
it to the backend. A new option is a field here and a field of `Options` in csrc/lmcl.h.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

KEPT_SHARE, KEPT_MIN = 1 / 6, 2**20  # of the entries of the softmax
CACHE_HEADER = 64  # bytes
CACHE_ALIGNMENT = 64  # bytes
MOST_SUBCENTERS = 64  # of a class
SIGMOIDS = ("cross_entropy", "angle")
LARGEST_TILE = 256  # classes by which the last tile of backend `cpu` may pass the end
WORKSPACE_BYTES = 256 << 20
CACHE_BYTES = 128 << 20  # by default, of backend `cpu`


def compute_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """The dtype of logits, sums and results: float64 if either input is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32


@dataclass(frozen=True, eq=False)
class Options:
    """The defaults are plain LMCL over all classes.

    Attributes:
        classes: (S,) int64, S > 0, the rows of the weight that take part, ascending, on its device; the targets
            are positions in it, and dw is (S, D). None: all rows. Of sub-centres these are all rows of each class
            that takes part, and a target is the position of its class's first, over K.
        cache_bytes: memory that forward may fill for backward with cosines that backward would compute again.
            None: CACHE_BYTES on backend `cpu`, kept exactly, which changes no bit of a gradient; 0 elsewhere, and
            on `cpu` where it multiplies bfloat16, which makes a cosine faster than memory brings it back.
            With a gradient_tolerance, memory for the entries of the softmax; 0 is then as much as they take, and
            None that much beside the memory for cosines, which serve where an exact backward is faster.
        exact_cache: whether cosines are kept as they were computed, in float32 (float64 where an input is), on
            backend `cpu`. If not, they are in 16-bit fixed point (float64 where an input is), which is off by at
            most 2^-16: a probability p_ij, and what it adds to a gradient, by s 2^-16 relative to it, 1e-3 at
            s = 64. bfloat16 exponentials would be off by 2e-3. The loss does not change. A negative that is as
            near to its threshold may be on its other side in backward, and of sub-centres that are as near to each
            other's cosines the other one may be the nearest. None: if cache_bytes is None.
        gradient_tolerance: softmax mass that backward may leave out of every sample; forward keeps the rest of the
            entries in the cache. 0: backward is exact, as it always is on `cpu` where AMX multiplies bfloat16,
            which is faster.
        normalize_weight: if not, <x_i, w_j> / |x_i| takes the place of cos_ij, and dw has no projection.
        workspace_bytes: memory that a chunk of classes may take on a GPU for its logit gradients and, where rows
            move, for their gradients, but at least what 256 classes take. The more, the fewer launches. Results
            are the same to rounding. On a CPU, where a tile fits the processor's cache, it means nothing.
        thresholds: (N,) tau_i, in the dtype of the results, or None. A hard negative, j != y_i with
            cos_ij > tau_i, enters the softmax as N(cos_ij) = (q cos_ij + a) cos_ij + b. Without a gradient.
        negatives: (3,) q, a and b, where there are thresholds; or (6,), with r, u and v too: any other negative
            enters as r cos_ij, and backward takes the slopes u cos_ij + v and r, which need not be N's own.
            Without a gradient.
        subcenters: K, in [1, 64]. Class j owns the rows jK .. jK + K - 1 of the weight, or of those chosen, and
            cos_ij is the largest of theirs; of equal ones the first, which alone has a gradient.
        moments: forward also returns the moments of every sample's negatives, (4, N), as `reference.moments`
            defines them, and takes (2, N) targets: a sample may then have two, of which neither is a negative.
        g_moments: (2, N), of backward alone: b_i and c_i of `reference.backward`.
        sigmoid: None for a softmax. Else each class counts on its own, without a forward and its cache: backward
            then has p_ij = 1 / (1 + e^-z_ij) with z_ij = s_i N(cos_ij) - log_sum_i, and leaves top alone.
            "cross_entropy": a negative adds log(1 + e^z_ij), and N is the first of the polynomials. "angle":
            N(cos) = -arccos(cos), and a negative adds p_ij cos_ij, of which p_ij is a constant.
        polynomials: (2, 5), of "cross_entropy" alone: coefficients of 1, c, c^2, c^3 and c^4 in N(c), and in the
            slope that backward takes for it, which need not be N's own. Without a gradient.
        exponents: (C,) int8, of a weight in float8: row j is 2^e_j times what is stored; see
            `cosface_kernels.float8`. Cosines do not depend on them, but <x_i, w_j> does where normalize_weight is
            False. An update changes them.
        updates: backward moves the rows of the weight by an `Update` and returns no dw.
    """

    classes: Tensor | None = None
    cache_bytes: int | None = None
    gradient_tolerance: float = 0.0
    normalize_weight: bool = True
    workspace_bytes: int = WORKSPACE_BYTES
    exact_cache: bool | None = None
    thresholds: Tensor | None = None
    negatives: Tensor | None = None
    subcenters: int = 1
    sigmoid: str | None = None
    polynomials: Tensor | None = None
    exponents: Tensor | None = None
    moments: bool = False
    g_moments: Tensor | None = None
    updates: bool = False

    def flat(self) -> tuple[Any, ...]:
        """The arguments of an op for it, `ARGUMENTS`."""
        return _values(self)

    @property
    def own_slopes(self) -> bool:
        """Whether the slopes of negatives are not those of their shape."""
        return self.negatives is not None and self.negatives.shape == (6,)

    def coefficients(self, dtype: torch.dtype) -> Tensor:
        """(6,) of negatives: r = 1, u = 2 q and v = a where only q, a and b are given."""
        assert self.negatives is not None
        given = self.negatives.to(dtype)
        if self.own_slopes:
            return given
        return torch.cat([given, torch.ones_like(given[:1]), 2 * given[:1], given[1:2]])

    def count(self, w: Tensor) -> int:
        """How many rows take part: the classes, or their sub-centres."""
        return w.shape[0] if self.classes is None else self.classes.numel()

    @property
    def keeps_exactly(self) -> bool:
        return self.cache_bytes is None if self.exact_cache is None else self.exact_cache

    @property
    def keeps_cosines(self) -> bool:
        """Whether a backend may; with a tolerance and a limit it keeps entries alone."""
        entries_alone = self.gradient_tolerance and self.cache_bytes is not None
        return self.cache_bytes != 0 and not entries_alone and not self.sigmoid

    def entry_bytes(self, x: Tensor, w: Tensor) -> int:
        """Of the entries of the softmax, each a cosine and 16 bits, where there is a tolerance.

        A share of KEPT_SHARE of all, and KEPT_MIN more for the first tiles, of which nothing can be left out yet.
        Only what is filled is touched.
        """
        if not self.gradient_tolerance:
            return 0
        samples, classes = x.shape[0], self.count(w)
        entry = compute_dtype(x, w).itemsize + 2
        all_entries = samples * classes
        few = torch.sym_min(2 * all_entries, int(KEPT_SHARE * 2**20) * all_entries // 2**20 + KEPT_MIN)
        if self.cache_bytes:
            few = torch.sym_min(few, self.cache_bytes // entry)
        counts = 4 * (classes // 64 + 1) * (samples // 256 + 1)
        return (16 * samples + counts + entry * few + 4096) // 64 * 64

    def cosine_bytes(self, x: Tensor, w: Tensor, by_default: int = 0) -> int:
        """Of cosines: cache_bytes, or fewer if that is more than all."""
        most = by_default if self.cache_bytes is None else self.cache_bytes
        if not self.keeps_cosines or most < CACHE_HEADER:
            return 0
        dtype = compute_dtype(x, w)
        itemsize = dtype.itemsize if self.keeps_exactly or dtype is torch.float64 else 2
        return torch.sym_min(most, CACHE_HEADER + itemsize * x.shape[0] * (self.count(w) + LARGEST_TILE))

    def refusal(self, supported: Collection[str] = ()) -> str | None:
        """Why a backend that knows only the `supported` options cannot take these, or None.

        It need not know of workspace_bytes, which changes no result.
        """
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            # 0, False and None ask alike for nothing.
            differs = isinstance(value, Tensor) or (value or None) != (default or None)
            if differs and name not in {"workspace_bytes", *supported}:
                return f"option {name!r} is not on this backend yet."
        if self.keeps_cosines and not (self.normalize_weight or self.keeps_exactly):
            return "it keeps cosines alone in 16 bits, so that without normalize_weight an exact_cache is needed."
        return None


PLAIN = Options()
DEFAULTS = {field.name: field.default for field in fields(Options)}
ARGUMENTS = tuple(field for field in fields(Options) if field.name != "updates")  # that is which op it is
_values = attrgetter(*(field.name for field in ARGUMENTS))
RULES = ("sgd", "adamw")


@dataclass(frozen=True)
class Update:
    """How rows of the weight move once their gradient is known, with the numbers of one step.

    Attributes:
        rule: "sgd" or "adamw".
        step: 1 for the first step.
        seed: of the stochastic rounding of a weight or state in bfloat16 or float8.
        gradient_factor: multiplies the gradient; negative to maximize.
        max_row_norm: a row of the gradient, after the factor, that is longer is scaled down to it.
        weight_norm: the length that each row of the weight is given as it is written; 0 leaves it alone.
        momentum, dampening, nesterov: of "sgd", as in torch.optim.SGD.
        beta1, beta2, eps: of "adamw", as in torch.optim.AdamW.
    """

    rule: str
    step: int
    seed: int
    gradient_factor: float
    max_row_norm: float
    lr: float
    weight_decay: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_norm: float = 0.0

    def flat(self) -> tuple[str, int, int, list[float]]:
        """The arguments of an op for it."""
        rule, step, seed, *numbers = vars(self).values()
        return rule, step, seed, [float(number) for number in numbers]

    @classmethod
    def unflat(cls, rule: str, step: int, seed: int, numbers: list[float]) -> "Update":
        names = [field.name for field in fields(cls)][3:]
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}.")
        if len(numbers) != len(names):
            raise ValueError(f"numbers must hold {', '.join(names)}, got {len(numbers)} numbers.")
        values: dict[str, Any] = dict(zip(names, numbers, strict=True))
        return cls(rule, step, seed, **{**values, "nesterov": bool(values["nesterov"])})


def empty_cache(x: Tensor) -> Tensor:
    """What forward returns where there is no cache."""
    return x.new_empty(0, dtype=torch.uint8)
