"""`python -m cosface_kernels.info`: versions, what runs here, and why the rest does not."""

import os
import platform

import torch

import cosface_kernels
from cosface_kernels.backends import BACKENDS


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


if __name__ == "__main__":
    print(describe())
