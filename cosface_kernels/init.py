"""Initial class centres: a counter-based generator, so that the values do not depend on the number of threads."""

import torch
from torch import Tensor

from cosface_kernels.backends import cpu


@torch.no_grad()
def normal_(tensor: Tensor, std: float) -> Tensor:
    """Fills a tensor with N(0, std^2), seeded by one draw from torch's default generator.

    On the CPU all threads share the work (Philox and Box-Muller in C++); elsewhere this is `Tensor.normal_`.
    """
    if tensor.device.type != "cpu" or cpu.unavailable():
        return tensor.normal_(std=std)
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    cpu.normal_(tensor, seed, std)
    return tensor
