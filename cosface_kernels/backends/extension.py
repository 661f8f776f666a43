"""The compiled module cosface_kernels._C, or None and why it cannot be imported."""

import importlib
from dataclasses import fields
from typing import Any

from cosface_kernels.options import Update

_C: Any = None
import_error = ""
try:
    _C = importlib.import_module("cosface_kernels._C")
except ImportError as error:
    import_error = f"the compiled module cosface_kernels._C cannot be imported ({error})."


def kernel_update(update: Update) -> Any:
    """The update's numbers, as the compiled functions take them."""
    numbers = _C.Update()
    for field in fields(update):
        setattr(numbers, field.name, getattr(update, field.name))
    return numbers
