"""Rows in float8: what is stored times a power of two, which each row has for itself.

A row w_j is 2^e_j q_j, with q_j in float8_e4m3fn and e_j in int8. Its cosines are those of q_j, so that only what
moves rows, or takes them to another dtype, looks at e_j, the length of a row being information for the optimizer
alone. A row is stored with its largest |q_jk| in (224, 448], the end of the format's range: of a normal row, whose
largest of 512 entries is three times their standard deviation, all but a few in 10,000 are normal numbers, which
rounding to the nearest changes by at most 1/16, and smaller ones by at most 2^-10. Nothing but the row decides on
e_j, once it has moved; the rows of a new head have one exponent for all, with a standard deviation in (32, 64].
"""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST_EXPONENT, LARGEST_EXPONENT = -118, 118  # rows then are within the range of float32
SMALLEST = 2.0**-9
INITIAL_STD = 64.0  # of q at most: no number of `cosface_kernels.init` is 7 standard deviations away
ROWS_AT_ONCE = 1 << 16
OF_STATE = "_exponent"  # what the name of a state in float8 is followed by in that of its exponents


def exponents_for(largest: Tensor, before: Tensor) -> Tensor:
    """(C,) int8 from the largest magnitude of each row; what it was before for a row that is 0 or not finite."""
    fraction, exponent = torch.frexp(largest)  # in [1/2, 1); LARGEST = 7/8 2^9
    exponent = (exponent - 9 + (fraction > LARGEST / 512).int()).clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
    return torch.where((largest > 0) & largest.isfinite(), exponent, before.int()).to(torch.int8)


def units(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, 1) 2^e."""
    return torch.ldexp(torch.ones_like(exponents, dtype=dtype), exponents)[:, None]


def values(rows: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, D) 2^e q, exact where the dtype holds it."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32  # 2^e alone may be beyond 16 bits
    return (rows.to(wide) * units(exponents, wide)).to(dtype)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """q (C, D), to the nearest, and e (C,) of rows in another dtype; nan for what is infinite."""
    q, exponents = torch.empty_like(rows, dtype=FLOAT8), rows.new_zeros(len(rows), dtype=torch.int8)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        here = slice(first, first + ROWS_AT_ONCE)
        block = rows[here].to(torch.float64 if rows.dtype is torch.float64 else torch.float32)
        exponents[here] = exponents_for(block.abs().amax(1), exponents[here])
        q[here] = torch.where(block.isfinite(), block / units(exponents[here], block.dtype), torch.nan).to(FLOAT8)
    return q, exponents


def lengths(rows: Tensor, exponents: Tensor | None = None) -> Tensor:
    """(C,) float64, of rows (C, D) in any dtype."""
    if rows.dtype is not FLOAT8:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    blocks = [torch.linalg.vector_norm(block.double(), dim=1) for block in rows.split(ROWS_AT_ONCE)]
    stored = torch.cat(blocks) if blocks else rows.new_empty(0, dtype=torch.float64)
    return stored if exponents is None else torch.ldexp(stored, exponents)


def initial_exponent(std: float) -> int:
    """Of rows of N(0, std^2): std 2^-e in (INITIAL_STD / 2, INITIAL_STD]."""
    fraction, exponent = torch.frexp(torch.tensor(std, dtype=torch.float64, device="cpu"))
    wanted = int(exponent) - 6 - (1 if float(fraction) == 0.5 else 0)
    return max(LEAST_EXPONENT, min(wanted, LARGEST_EXPONENT))


def rounded(rows: Tensor, generator: torch.Generator) -> Tensor:
    """(C, D) of |q| <= LARGEST in float8, up or down at random so that the expected value is kept."""
    step = torch.where(rows.abs() < 8 * SMALLEST, SMALLEST, torch.exp2(torch.frexp(rows).exponent - 4.0))
    noise = torch.rand(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
    q = (rows / step + noise).floor() * step
    return torch.where(rows.isfinite(), q, torch.nan).to(FLOAT8)  # there is no infinity
