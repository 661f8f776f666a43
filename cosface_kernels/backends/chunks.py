"""The nearest classes in plain PyTorch, a chunk of classes at a time, for backends on a GPU."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import float8
from cosface_kernels.backends import contract
from cosface_kernels.options import WORKSPACE_BYTES, Options
from cosface_kernels.reference import EPS, compute_dtype

ENTRY_BYTES = 32  # that a cosine of a chunk takes at most: itself, its order and what topk makes of that


def nearest(x: Tensor, w: Tensor, k: int, options: Options) -> tuple[Tensor, Tensor]:
    """As `reference.nearest`."""
    contract.check_nearest(x, w, k, options)
    dtype = compute_dtype(x, w)
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.to(dtype), eps=EPS)  # (N, D)
        best, classes = unit.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        first = 0
        for rows in w.split(max(1, WORKSPACE_BYTES // (ENTRY_BYTES * max(len(x), 1)))):
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


def classes_in_environment(name: str) -> int | None:
    """None where the variable is not set; raises ValueError for what is no positive number."""
    wanted = os.environ.get(name)
    if wanted is None:
        return None
    if not wanted.isdecimal() or int(wanted) == 0:
        raise ValueError(f"{name} must be a positive number of classes, got {wanted!r}.")
    return int(wanted)


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
