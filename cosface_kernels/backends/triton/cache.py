"""What forward leaves for backward, in one tensor of bytes: norms, and cosines or the entries of a tolerance."""

from typing import NamedTuple

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import CHUNK_STEP, cdiv
from cosface_kernels.backends.triton.launch import ALIGNED_BYTES, aligned
from cosface_kernels.options import Options

ALIGNED = ALIGNED_BYTES // torch.float32.itemsize
# With a gradient_tolerance a sample keeps one of so many classes, and some more where there are few. To gather its
# two rows, an entry is predicted to take as long as three dense products with 128 classes on an H100.
KEPT_CLASSES, KEPT_LEAST = 256, 256


def cache_size(x: Tensor, w: Tensor, options: Options) -> int:
    """Of the norms, and of the cosines that fit into cache_bytes, or of the entries that a tolerance leaves."""
    if options.sigmoid:
        return 0
    norms = 4 * _norm_slots(x, w, options)
    if options.gradient_tolerance:
        return 16 * x.shape[0] + norms + 8 * x.shape[0] * entry_slots(x, w, options)
    return norms + 2 * x.shape[0] * _kept_classes(x, w, options)


def entry_slots(x: Tensor, w: Tensor, options: Options) -> int:
    """Entries of a sample for which a cache has room, that of the target included."""
    C = options.count(w)
    most = torch.sym_min(C, C // KEPT_CLASSES + KEPT_LEAST)
    if options.cache_bytes:
        most = torch.sym_min(most, options.cache_bytes // (8 * torch.sym_max(x.shape[0], 1)))
    return 1 + most


class Saved(NamedTuple):
    """What forward leaves in the cache for backward."""

    w_norm: Tensor  # (C,) |w_j|, float32; without normalize_weight nothing, or exponents of float8 in int8
    x_norm: Tensor  # (N,) |x_i|, float32
    cosines: Tensor  # (N, K) int16, of the first K classes, in steps of 1 / 32767

    def half_kept(self, classes: int) -> "Saved":
        """With a copy of the cosines of half of so many classes: what reads them is tried, and what does not."""
        half = CHUNK_STEP * cdiv(classes, 2 * CHUNK_STEP)
        return self._replace(cosines=self.cosines[:, :half].contiguous())


def _class_slots(w: Tensor, options: Options) -> int:
    """Places for norms of classes in the cache, so many that those of embeddings behind them are aligned."""
    return _aligned(options.count(w)) if options.normalize_weight else 0


def _norm_slots(x: Tensor, w: Tensor, options: Options) -> int:
    return _class_slots(w, options) + _aligned(x.shape[0])


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGNED) * ALIGNED


def _kept_classes(x: Tensor, w: Tensor, options: Options) -> int:
    """Those whose cosines the cache holds, in whole tiles, so that it may pass the last class."""
    step = CHUNK_STEP
    if options.gradient_tolerance or options.sigmoid:
        return 0
    fitting = (options.cache_bytes or 0) // (2 * step * torch.sym_max(x.shape[0], 1))
    return step * torch.sym_min(fitting, -(-options.count(w) // step))


def saved_in(cache: Tensor, x: Tensor, w: Tensor, options: Options) -> Saved:
    kept, classes = _kept_classes(x, w, options), _class_slots(w, options)
    if options.gradient_tolerance:
        cache = cache[16 * len(x) :]
    slots = 4 * _norm_slots(x, w, options)
    norms = cache[:slots].view(torch.float32)
    w_norm, exponents = norms[:classes], options.exponents
    if exponents is not None and not options.normalize_weight:
        w_norm = aligned(exponents) if options.classes is None else exponents[options.classes]
    cosines = cache[slots : slots + 2 * len(x) * kept].view(torch.int16)
    return Saved(w_norm, norms[classes:], cosines.view(len(x), kept))


def nothing_saved(x: Tensor, w: Tensor, options: Options) -> Saved:
    """Room for the norms where no forward precedes backward."""
    return saved_in(x.new_empty(4 * _norm_slots(x, w, options), dtype=torch.uint8), x, w, options)
