"""The compiled module cosface_kernels._C, or None and why it cannot be imported."""

import importlib
import re
from dataclasses import fields
from typing import Any

import torch

from cosface_kernels.options import Update

_C: Any = None
import_error = ""
REBUILD = "build it again with the PyTorch that runs: pip install --no-build-isolation ."


def _release(version: str) -> list[str]:
    """Major and minor: another of these has other symbols, or the same ones for other things."""
    return re.findall(r"\d+", version)[:2]


try:
    _C = importlib.import_module("cosface_kernels._C")
    built_for = getattr(_C, "torch_version", "(unknown)")
    if _release(built_for) != _release(torch.__version__):
        import_error = (
            f"the compiled module cosface_kernels._C is for PyTorch {built_for}, and PyTorch "
            f"{torch.__version__} runs: {REBUILD}"
        )
        _C = None
except ModuleNotFoundError as error:
    import_error = f"the compiled module cosface_kernels._C cannot be imported ({error}): it has not been built."
except ImportError as error:  # a symbol that PyTorch lacks
    import_error = f"the compiled module cosface_kernels._C cannot be imported ({error}): {REBUILD}"


def kernel_update(update: Update) -> Any:
    """The update's numbers, as the compiled functions take them."""
    numbers = _C.Update()
    for field in fields(update):
        setattr(numbers, field.name, getattr(update, field.name))
    return numbers
