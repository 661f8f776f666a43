"""`python -m cosface_kernels.info`: versions, what runs here, and why the rest does not: what a bug report needs.

With --device: what the Triton kernels' blocks are worth on this GPU, and which of them compute something wrong.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

import cosface_kernels
from cosface_kernels.backends import BACKENDS, extension, triton
from cosface_kernels.backends.triton import choice, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKAGES = ("triton", "numpy", "safetensors", "pytorch-metric-learning", "accelerate", "pytorch-lightning")
SETTINGS = ("COSFACE_", "TRITON_", "TORCH", "CUDA_", "OMP_", "MKL_", "KMP_", "NCCL_")  # how their names begin


def describe() -> str:
    """The report as text, one fact a line."""
    lines = [
        f"cosface_kernels {cosface_kernels.__version__} in {Path(cosface_kernels.__file__).parent}",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        f"{_processor()}, {os.cpu_count()} cores",
        *_devices(),
        "packages: " + (", ".join(_versions()) or "none of those that are optional"),
        f"compiled module: {_module()}",
    ]
    for name, backend in BACKENDS.items():
        try:
            reason = backend.unavailable()
        except RuntimeError as error:  # COSFACE_CPU_ISA names no set of this processor
            reason = str(error)
        lines.append(
            f"backend {name}: " + (f"unavailable: {reason}" if reason else f"available: {backend.describe()}")
        )
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    return "\n".join(lines)


def _processor() -> str:
    try:
        names = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return names[1] if names else platform.processor() or platform.machine()


def _devices() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        each = torch.cuda.get_device_properties(index)
        built = torch.version.cuda or torch.version.hip
        yield (
            f"GPU {index}: {each.name}, compute capability {each.major}.{each.minor}, "
            f"{each.total_memory / 2**30:.1f} GiB, torch built for {built}"
        )


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{package} {importlib.metadata.version(package)}"


def _module() -> str:
    return (
        extension.import_error if extension._C is None else f"by {extension._C.compiler}, {extension._C.__file__}"
    )


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
