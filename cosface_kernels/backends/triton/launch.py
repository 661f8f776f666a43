"""What the launches of the Triton kernels share: the kernels, how the device is filled, compile-time arguments."""

import functools
import importlib
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import CHUNK_STEP
from cosface_kernels.backends.triton import tiles
from cosface_kernels.backends.triton.tiles import Key, Tile
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Options
from cosface_kernels.reference import operand_dtype

TRIAL_FLOPS = 1 << 34  # of a product on which tiles are tried: some waves of any tile, and little memory
PROGRAMS_PER_PROCESSOR = 2
ALIGNED_BYTES = 16  # for which Triton compiles wide loads, and at which a tensor descriptor's rows begin

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_PROCESSORS = 4

triton: Any = None  # imported by unavailable(): a second that a machine without a GPU need not spend
kernels: Any = None


def aligned(values: Tensor) -> Tensor:
    """What kernels read beside rows of classes, contiguous and from a multiple of 16 bytes on, if need be a copy.

    Of what begins elsewhere they load each number on its own, by code that no trial has seen.
    """
    values = values.contiguous()
    return values if _is_aligned(values) else values.clone()


def _is_aligned(values: Tensor) -> bool:
    return values.data_ptr() % ALIGNED_BYTES == 0


def chosen_rows(unused: Tensor, options: Options) -> tuple[Tensor, bool]:
    """The chosen rows as the kernels read them, or what stands in for them where none are read."""
    return (unused, False) if options.classes is None else (aligned(options.classes), True)


def stored(rows: Tensor) -> Tensor:
    """Rows of w or of a state as the kernels read them: float8 as bytes, as not every architecture knows it."""
    return rows.view(torch.int8) if rows.dtype is FLOAT8 else rows


def polynomial(options: Options, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds and coefficients as the kernels read them, or what stands in for them where none are read.

    Of a sigmoid the coefficients are its polynomials'.
    """
    if options.polynomials is not None:
        return unused, aligned(options.polynomials.float())
    if options.thresholds is None or options.negatives is None:
        return unused, unused
    return aligned(options.thresholds.float()), aligned(options.negatives.float())


def pairs(values: Tensor, none: int) -> Tensor:
    """(2, N), of values for each target of a sample, (N,) where all have one."""
    if values.dim() == 1:
        values = torch.stack([values, torch.full_like(values, none)])
    return values


def sample(x: Tensor, w: Tensor, options: Options) -> tuple[Tensor, Options]:
    """The first classes, on which tiles are tried."""
    step = CHUNK_STEP
    classes = step * max(TRIAL_FLOPS // (2 * max(x.numel(), 1) * step), 1)
    if options.classes is None:
        return w[:classes], options
    return w, replace(options, classes=options.classes[:classes])


def operand(x: Tensor, w: Tensor) -> Any:
    """The same for Triton. The interpreter's products of bfloat16 are wrong, so that it multiplies float32."""
    operand = operand_dtype(x.dtype, w.dtype)
    if INTERPRETED and operand == torch.bfloat16:
        return triton.language.float32
    return getattr(triton.language, str(operand).removeprefix("torch."))


def precision(operand: torch.dtype) -> str:
    """How float32 operands are multiplied: three TensorFloat-32 products (nearly float32), or one if torch may.

    AMD's matrix units multiply float32 as it is.
    """
    if operand != torch.float32 or INTERPRETED or torch.version.hip is not None:
        return "ieee"
    # Not `allow_tf32`, which raises once a user has set `fp32_precision`; this one follows either.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def splits(blocks: int, x: Tensor, programs: int = PROGRAMS_PER_PROCESSOR) -> int:
    """How many parts a sum over classes is cut into, so that `blocks` times as many programs fill the GPU."""
    return max(1, programs * processors(x) // blocks)


def processors(x: Tensor) -> int:
    return INTERPRETED_PROCESSORS if INTERPRETED else _device(x.device).multi_processor_count


@functools.cache
def _device(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def variant(w: Tensor, options: Options, operand: torch.dtype) -> frozenset[str]:
    """What the kernels are compiled for beside dtypes and blocks, in the words of `python -m bench kernels`."""
    words = {
        "chosen": options.classes is not None,
        "raw": not options.normalize_weight,
        "reshape": options.thresholds is not None,
        "slopes": options.own_slopes,
        "kept": options.cache_bytes and options.keeps_cosines,
        "some": options.gradient_tolerance,
        "moved": options.updates,
        "moments": options.moments,
        "sigmoid": options.sigmoid,
        "angle": options.sigmoid == "angle",
        "tf32": precision(operand) == "tf32",
        "unaligned": not _is_aligned(w),  # and too large for a copy
    }
    return frozenset(word for word, is_so in words.items() if is_so)


def key(x: Tensor, w: Tensor, options: Options) -> Key:
    bucket = triton.next_power_of_2(len(x))
    # The library and the specialised kernels multiply all rows of x with neighbouring rows of w.
    whole = not INTERPRETED and x.dtype == w.dtype and options.classes is None and not options.gradient_tolerance
    library = whole and x.dtype == torch.bfloat16
    # On demand: where a barrier is wrong a kernel hangs, which no check of results would find.
    described = whole and os.environ.get("COSFACE_TRITON_SPECIALIZED") == "1" and can_describe(x, w)
    operand = operand_dtype(x.dtype, w.dtype)
    return Key(
        architecture(x.device), x.shape[1], x.dtype, w.dtype, operand, bucket, variant(w, options, operand),
        library, described,
    )  # fmt: skip


def can_describe(*matrices: Tensor) -> bool:
    """Rows of contiguous numbers that begin at multiples of 16 bytes and do not overlap."""
    return all(
        m.stride(1) == 1
        and m.stride(0) >= m.shape[1]
        and m.stride(0) * m.itemsize % ALIGNED_BYTES == m.data_ptr() % ALIGNED_BYTES == 0
        for m in matrices
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """As the table of tiles names it."""
    if INTERPRETED:
        return tiles.INTERPRETED
    if torch.version.hip is not None:
        name = str(_device(device).gcnArchName).split(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return tiles.ALIKE.get(name, name)


@functools.cache
def hopper() -> Any:
    """Imported when first launched: a Triton that lacks what it imports has one candidate fewer."""
    return importlib.import_module("cosface_kernels.backends.triton.kernels.hopper")


def described(x: Tensor, w: Tensor, tile: Tile) -> tuple[Any, Any]:
    """Descriptors of the operands, as a specialised kernel loads them."""
    return hopper().describe(x, tile.n, tile.d), hopper().describe(w, tile.c, tile.d)


def specialized_blocks(tile: Tile, x: Tensor) -> dict[str, Any]:
    """Likewise of `blocks`; the kernel adds warps to its first four."""
    return {"D": x.shape[1], "BLOCK_N": tile.n, "BLOCK_C": tile.c, "SLOTS": tile.stages, "num_warps": 4}


def blocks(tile: Tile, x: Tensor, w: Tensor) -> dict[str, Any]:
    """The compile-time arguments of a matrix-product kernel."""
    return {
        "D": x.shape[1],
        "BLOCK_N": tile.n,
        "BLOCK_C": tile.c,
        "BLOCK_D": tile.d,
        "OPERAND": operand(x, w),
        "PRECISION": precision(operand_dtype(x.dtype, w.dtype)),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
