"""Initial class centres: a counter-based generator, so that the values do not depend on the number of threads."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cosface_kernels import collectives
from cosface_kernels.backends import cpu
from cosface_kernels.distributed import Exchange, own_rows
from cosface_kernels.float8 import FLOAT8, ROWS_AT_ONCE


@torch.no_grad()
def normal_(tensor: Tensor, std: float) -> Tensor:
    """Fills a tensor with N(0, std^2), seeded by one draw from torch's default generator.

    On the CPU all threads share the work (Philox and Box-Muller in C++); elsewhere this is `Tensor.normal_`. The
    ranks that share a weight take the seed of the first of them, and together have the values that one would have.
    """
    if tensor.device.type != "cpu" or cpu.unavailable():
        if tensor.dtype is not FLOAT8:
            return tensor.normal_(std=std)
        for rows in own_rows(tensor).split(ROWS_AT_ONCE):
            rows.copy_(torch.empty_like(rows, dtype=torch.float32).normal_(std=std))
        return tensor
    seed = torch.randint(2**63 - 1, (), device="cpu")
    if isinstance(tensor, DTensor):
        ranks = Exchange(tensor)
        first, *_ = collectives.agree(ranks.group, tensor.device, {}, int(seed), about="the seed of new rows")
        cpu.normal_(ranks.weight, first, std, ranks.classes.start * tensor.shape[1])
    else:
        cpu.normal_(tensor, int(seed), std)
    return tensor
