"""Backend `cuda_host`, for tests alone: backend `cuda` whose driver and kernels run on the host's SIMT shim."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels.backends.cuda.driver import Device
from cosface_kernels.backends.extension import give_torch_to
from cosface_kernels.options import Options

FOLDER = Path(__file__).parents[2] / "build" / ("asan/tests" if os.environ.get("COSFACE_SANITIZE") else "tests")


def _load(name: str, path: str | Path | None = None):
    """A module of its own, though another may have that name."""
    spec = importlib.util.spec_from_file_location(name, path) if path else importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kernels():
    path = next(FOLDER.glob(f"cosface_cuda_host.{sys.implementation.cache_tag}*"), None)
    if path is None:
        raise ImportError(f"There is no cosface_cuda_host in {FOLDER}: `make build` makes it.")
    return _load("cosface_cuda_host", path)


KERNELS = _kernels()
give_torch_to(KERNELS)
# So small a workspace that even a test's problem is several chunks, and a row of one several blocks.
DEVICE = Device(KERNELS, stream=0, processors=4, largest_workspace=1 << 15)
_cuda = _load("cosface_kernels.backends.cuda")
_cuda.device_of = lambda tensor: DEVICE
cache_size, forward = _cuda.cache_size, _cuda.forward
backward, sigmoid = _cuda.backward, _cuda.sigmoid
backward_update_, apply_update_, nearest = _cuda.backward_update_, _cuda.apply_update_, _cuda.nearest
take_launches = KERNELS.take_launches  # how often each kernel was launched since the last call


def unavailable() -> str | None:
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    if x.device.type != "cpu":
        return f"it takes tensors on the CPU, got them on {x.device}."
    return options.refusal(_cuda.OPTIONS)


def describe() -> str:
    return "the CUDA kernels, one thread after the other"


class Calls(TorchDispatchMode):
    """Matrix products and fresh memory of the driver, and the kernels' launches."""

    def __enter__(self):
        take_launches()
        self.products, self.sizes = 0, []
        return super().__enter__()

    def __exit__(self, *error):
        self.launches = take_launches()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if func.overloadpacket is torch.ops.aten.empty:
            self.sizes.append((result.dtype, result.numel()))
        return result
