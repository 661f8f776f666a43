"""What backends on a GPU share: how long a chunk of classes is, how a row of G is scaled, the nearest classes."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import float8
from cosface_kernels.backends import contract
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import PLAIN, WORKSPACE_BYTES, Options
from cosface_kernels.reference import EPS, compute_dtype

CHUNK_STEP = 256  # classes; a multiple of every tile's, and rows of a chunk stay aligned to any load
LAUNCH_FLOPS = 1 << 36  # of a product with a chunk, which longer ones would hide no better: 86 us at 800 TFLOP/s
SMALLEST_UNIT, LARGEST_UNIT = 2.0**-100, 2.0**100  # so that the lift of G over a unit is finite in float32
ENTRY_BYTES = 32  # that a cosine of a chunk takes at most: itself, its order and what topk makes of that
ROW_COPIES = 2  # of a row of w at most, in the dtype of cosines: upcast, and times what it is divided by


def nearest(x: Tensor, w: Tensor, k: int, options: Options) -> tuple[Tensor, Tensor]:
    """As `reference.nearest`."""
    contract.check_nearest(x, w, k, options)
    dtype = compute_dtype(x, w)
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.to(dtype), eps=EPS)  # (N, D)
        best, classes = unit.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        first = 0
        class_bytes = ENTRY_BYTES * len(x) + ROW_COPIES * x.shape[1] * dtype.itemsize
        for rows in w.split(max(1, WORKSPACE_BYTES // class_bytes)):
            rows = rows.to(dtype)
            if options.normalize_weight:
                rows = F.normalize(rows, eps=EPS)
            elif options.exponents is not None:
                rows = rows * float8.units(options.exponents[first : first + len(rows)], dtype)
            cosines = unit @ rows.T
            found, places = largest(cosines, min(k, len(rows)))
            best, classes = torch.cat([best, found], 1), torch.cat([classes, places + first], 1)
            best, order = largest(best, min(k, best.shape[1]))  # those before have lower classes
            classes = classes.gather(1, order)
            first += len(rows)
    return best, classes


def chunk_classes(
    N: int, D: int, C: int, *, class_bytes: int, workspace_bytes: int, wave: int = CHUNK_STEP
) -> int:
    """Classes per chunk, a multiple of CHUNK_STEP.

    As few chunks as the workspace and LAUNCH_FLOPS allow, of even sizes, each of whole waves where it can be.
    """
    affordable = workspace_bytes // class_bytes
    step = wave if wave <= affordable else CHUNK_STEP
    long_enough = cdiv(LAUNCH_FLOPS, 2 * max(N, 1) * D * step)
    chunks = cdiv(C, step * max(min(affordable // step, long_enough), 1))
    return cdiv(C, chunks * step) * step


def chunk_in_environment(name: str, C: int) -> int | None:
    """What the variable sets instead, rounded up to CHUNK_STEP; raises ValueError for no positive number."""
    wanted = os.environ.get(name)
    if wanted is None:
        return None
    if not wanted.isdecimal() or int(wanted) == 0:
        raise ValueError(f"{name} must be a positive number of classes, got {wanted!r}.")
    return cdiv(min(int(wanted), C), CHUNK_STEP) * CHUNK_STEP


def is_full(error: Exception) -> bool:
    """Whether memory was, which passes; Triton and the CUDA runtime have errors of their own for it."""
    return "out of memory" in str(error)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def embeddings(x: Tensor, w: Tensor, options: Options) -> Tensor:
    """Those to multiply: G has the length of rows that count, and float16 no range for it.

    Of rows in float8 by their exponents, of others where the slope of N(cos) grows with cos.
    """
    sloping = options.thresholds is not None or options.polynomials is not None
    of_any_length = not options.normalize_weight and (sloping or w.dtype is FLOAT8)
    return x.float() if of_any_length and x.dtype is torch.float16 else x


def units(scale: Tensor, g_lse: Tensor, g_cos: Tensor, options: Options = PLAIN) -> Tensor:
    """(N,) powers of two that bound |G_ij| of each row, so that G / unit fits float16 whatever the loss's mean.

    One per row and not one for all: then no row of dx depends on the rest of the batch.
    What b adds with moments, b p (1 - s u) with u = top - N(cos) and p <= e^{-s u}, is at most |b|, whatever the
    |w_j|: |1 - v| e^-v <= 1. Slopes are bounded where |cos| <= 1; of a weight that is not normalised, where it may
    be more, `embeddings` leaves no float16 to fit.
    """
    bound = (scale * g_lse).abs()  # (N,)
    if options.polynomials is not None:
        bound = bound * options.polynomials[1].abs().sum()
    elif options.sigmoid:
        bound = g_lse.abs()
    if options.g_moments is not None:
        bound = bound + options.g_moments.abs().sum(0)
    if options.thresholds is not None:
        r, u, v = options.coefficients(bound.dtype)[3:].abs()
        bound = bound * torch.maximum(r, u + v)
    of_targets = g_cos.abs() if g_cos.dim() == 1 else g_cos.abs().amax(0)
    bound = torch.maximum(bound, of_targets)  # (N,)
    bound = bound.where(bound < torch.inf, 0).clamp(SMALLEST_UNIT, LARGEST_UNIT)
    return torch.ldexp(torch.ones_like(bound), torch.frexp(bound).exponent)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As torch.topk along the rows, but of equal values the first ones, which are the same on every run."""
    if values.dtype != torch.float32:
        ordered, places = values.sort(stable=True, dim=1, descending=True)
        return ordered[:, :k], places[:, :k]
    bits = (values + 0.0).view(torch.int32)  # without a negative zero, which would be less than zero
    order = torch.where(values.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & 0x7FFF_FFFF)).long()  # as the values
    keys = (order << 32) | (2**32 - 1 - torch.arange(values.shape[1], device=values.device))  # no two are equal
    places = keys.topk(k, dim=1).indices
    return values.gather(1, places), places
