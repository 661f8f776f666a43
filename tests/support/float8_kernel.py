"""What the Triton kernels make of float8, by itself."""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import _upcast
from cosface_kernels.backends.triton.kernels.whole_rows import _to_float8


@triton.jit
def decoded(stored, out, TO: tl.constexpr, BLOCK: tl.constexpr):
    """In float32 what TO holds."""
    k = tl.arange(0, BLOCK)
    tl.store(out + k, _upcast(tl.load(stored + k), TO).to(tl.float32))


@triton.jit
def rounded(values, noise, out, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + k, _to_float8(tl.load(values + k), tl.load(noise + k)))
