"""Backend `cuda_host`, for tests alone: the CUDA driver and kernels, unchanged, on the host's SIMT shim."""

import importlib.util
from pathlib import Path

from torch import Tensor

from cosface_kernels.options import Options, empty_cache

FOLDER = Path(__file__).parents[1] / "build" / "tests"


def _load():
    path = next(FOLDER.glob("cosface_cuda_host.*"), None)
    if path is None:
        raise ImportError(f"There is no cosface_cuda_host in {FOLDER}: `make build` makes it.")
    spec = importlib.util.spec_from_file_location("cosface_cuda_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_host = _load()


def unavailable() -> str | None:
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    if x.device.type != "cpu":
        return f"it takes tensors on the CPU, got them on {x.device}."
    return options.refusal({"normalize_weight", "thresholds", "negatives"})


def describe() -> str:
    return "the CUDA kernels, one thread after the other"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    return *_host.cuda_forward(x, w, targets, scale, margin, *_extras(options)), empty_cache(x)


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, ...]:
    return _host.cuda_backward(*tensors[:-1], need_dx, need_dw, *_extras(options))


def _extras(options: Options) -> tuple[bool, Tensor | None, Tensor | None]:
    return options.normalize_weight, options.thresholds, options.negatives
