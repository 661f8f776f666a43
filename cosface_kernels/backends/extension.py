"""The compiled module cosface_kernels._C, or None and why it cannot be imported."""

import importlib
from typing import Any

_C: Any = None
import_error = ""
try:
    _C = importlib.import_module("cosface_kernels._C")
except ImportError as error:
    import_error = f"the compiled module cosface_kernels._C cannot be imported ({error})."
