"""The compiled module cosface_kernels._C, or None and why it cannot be imported."""

import ctypes
import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from cosface_kernels.options import Update

_C: Any = None
import_error = ""


def give_torch_to(kernels: Any) -> None:
    """What a module of kernels needs of torch, by address: its view of tensors and its threads.

    Both are C interfaces that torch has kept since 2.10: DLPack's, and that of torch/csrc/stable/c/shim.h.
    """
    windows = Path(torch.__file__).parent / "lib" / "torch_cpu.dll"
    module = torch._C.__file__  # with the libraries that it is linked with, but on Windows
    library = ctypes.CDLL(str(windows) if sys.platform == "win32" else module)
    functions = (library.torch_parallel_for, library.torch_get_num_threads)
    addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    kernels.use_torch(torch.Tensor.__dlpack_c_exchange_api__, *addresses)


try:
    _C = importlib.import_module("cosface_kernels._C")
    give_torch_to(_C)
except ModuleNotFoundError as error:
    import_error = (
        f"the compiled module cosface_kernels._C cannot be imported ({error}): it has not been built where Python "
        f"imports the package, in {Path(__file__).parents[1]}. Leave that clone, if `pip install .` was run in "
        "it, or run `pip install -e .` there."
    )
except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as error:
    import_error = (
        f"the compiled module cosface_kernels._C cannot be used with PyTorch {torch.__version__} ({error}): "
        "build it again, with PyTorch 2.10 or later: pip install ."
    )
    _C = None


def kernel_update(update: Update) -> Any:
    """The update's numbers, as the compiled functions take them."""
    numbers = _C.Update()
    for field in fields(update):
        setattr(numbers, field.name, getattr(update, field.name))
    return numbers
