"""`python -m cosface_kernels.info`: versions, what runs here, and why the rest does not.

With --device: what the Triton kernels' blocks are worth on this GPU, and which of them compute something wrong.
"""

import argparse
import os
import platform
from collections.abc import Iterator

import torch

import cosface_kernels
from cosface_kernels.backends import BACKENDS, triton
from cosface_kernels.backends.triton import choice, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe() -> str:
    """The report as text, one fact a line."""
    lines = [
        f"cosface_kernels {cosface_kernels.__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}",
    ]
    for name, backend in BACKENDS.items():
        try:
            reason = backend.unavailable()
        except RuntimeError as error:  # COSFACE_CPU_ISA names no set of this processor
            reason = str(error)
        lines.append(
            f"backend {name}: " + (f"unavailable: {reason}" if reason else f"available: {backend.describe()}")
        )
    if forced := os.environ.get("COSFACE_BACKEND"):
        lines.append(f"COSFACE_BACKEND forces {forced}")
    return "\n".join(lines)


def examine_device(batch: int = 1024, dim: int = 512, classes: int = 1 << 16) -> Iterator[str]:
    """Takes a step in each dtype, for which backend `triton` tries its blocks; a line for each block."""
    if reason := triton.unavailable():
        yield f"No kernel was tried: {reason}"
        return
    device = "cpu" if launch.INTERPRETED else "cuda"
    for dtype in DTYPES:
        x, w = (torch.randn(rows, dim, device=device).to(dtype).requires_grad_() for rows in (batch, classes))
        labels = torch.randint(classes, (batch,), device=device)
        loss = cosface_kernels.cosface_loss(x, w, labels, backend="triton")
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    lines = list(choice.report())
    yield from lines or ["Each kernel has one block here, and nothing to choose from."]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cosface_kernels.info", description="What runs here.")
    parser.add_argument("--device", action="store_true", help="try each block of the Triton kernels on this GPU")
    arguments = parser.parse_args()
    print(describe())
    if arguments.device:
        print(*examine_device(), sep="\n")
