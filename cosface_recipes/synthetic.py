"""Any number of synthetic identities, and the network that learns them.

An identity is a latent vector z, hashed from its number; a sample is tanh(A (z + noise)), so that a network has to
undo the view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LATENT, VIEW = 48, 256
MARGIN, SCALE = 0.1, 32.0  # of the head
NOISE = 0.3  # of a sample, relative to the latent vector
TEST_SEED = 1 << 40  # of samples that no step of training has seen
MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1))  # shifts and factors of SplitMix64


def latents(labels: Tensor) -> Tensor:
    """(N, LATENT) standard normal numbers, which depend on the label alone (SplitMix64, then the quantiles)."""
    h = (labels[:, None] * LATENT + torch.arange(LATENT) + 1) * -0x61C8864680B583EB  # (N, LATENT), wraps around
    for shift, factor in MIX:
        h = (h ^ (h >> shift & ((1 << 64 - shift) - 1))) * factor
    uniform = (h >> 40 & 0xFFFFFF).double() / (1 << 24) + 2.0**-25  # (0, 1)
    return torch.special.ndtri(uniform).float()


def views(labels: Tensor, seed: int) -> Tensor:
    """(N, VIEW) samples of these identities; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    z = latents(labels)
    z = z + NOISE * torch.randn(z.shape, generator=generator)
    projection = torch.randn(LATENT, VIEW, generator=torch.Generator().manual_seed(0)) / LATENT**0.5
    return torch.tanh(2 * z @ projection)


def make_network(dim: int) -> nn.Module:
    """(N, VIEW) samples to (N, dim) embeddings."""
    return nn.Sequential(nn.Linear(VIEW, 512), nn.ReLU(), nn.Linear(512, dim))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What million.py saved: its settings and steps, and the states of what learns.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is of something else.
    """
    try:
        saved: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
        if saved.keys() >= {"settings", "steps", "network", "head"}:
            return saved
    except OSError:
        raise
    except Exception as error:  # bytes that torch.save did not write can raise anything
        raise ValueError(f"{path} is no checkpoint of million.py.") from error
    raise ValueError(f"{path} is no checkpoint of million.py.")
