"""`python -m bench kernels`: compiles every Triton kernel ahead of time, without a GPU, and reads the result."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.hazards import Pipeline, pipeline
from bench.step import _writable
from cosface_kernels.backends.triton.tiles import (
    ALIKE,
    COLUMNS,
    GEMM_KERNELS,
    MOVED_WHOLE,
    RAGGED,
    ROWS,
    SPARSE_KERNELS,
    SPLITS,
    Key,
    Tile,
    plainest,
    row_block,
    specialized,
    table,
)
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.reference import operand_dtype
from cosface_recipes.arguments import count, counts

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that a program can have.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_87": 163 << 10,
    "gfx942": 64 << 10,
    "gfx90a": 64 << 10,
    "gfx950": 160 << 10,
}
SHARED_LIMIT |= dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99 << 10)
SHARED_LIMIT |= dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), 227 << 10)
# (embeddings, weight, allow_tf32): each operand dtype, and each path that converts one side.
DTYPES = (
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float16, torch.float16, False),
    (torch.bfloat16, torch.float32, False),
    (torch.float32, torch.float32, False),
    (torch.float32, torch.float32, True),
    (torch.float32, torch.bfloat16, False),
    (torch.bfloat16, FLOAT8, False),
    (torch.float16, FLOAT8, False),
    (torch.float32, FLOAT8, False),
)
OTHER_DTYPES = ((torch.float16, torch.float16), (torch.float32, torch.bfloat16))
PLAIN_DTYPES = (*OTHER_DTYPES, (torch.float16, FLOAT8), (torch.float32, FLOAT8))
DIMS = (512, 1, 64, 515, 768)  # others: one number, a short row, rows that no vector load divides, a long one
MATRIX_INSTRUCTIONS = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"
# Bytes a thread: compilers differ by them, and a device takes the fastest block.
MOST_SPILLED = 16
NARROW = r"\b(ld|st)\.global[.\w]*\.[bu]16 "  # a load or a store of one 16-bit number
FEATURES = ("cp.async", "wgmma", "tcgen05", "mma.sync", "ldmatrix", "ex2.approx", "sqrt.rn.f32")
POINTERS = {"targets": torch.int64, "chosen": torch.int64, "finite": torch.bool, "cosines": torch.int16}
POINTERS |= {"dx": "x", "g": "operand", "x_hat": "operand", "places": torch.int64, "starts": torch.int64}
POINTERS |= dict.fromkeys(("active_rows", "exact_rows", "classes", "split_classes", "keys"), torch.int32)
POINTERS |= dict.fromkeys(("counts", "ends"), torch.int32)
# In the embeddings' dtype, so that both dtypes of an optimizer's state meet both of a weight.
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
POINTERS |= dict.fromkeys(STATES, "x")
POINTERS |= dict.fromkeys((f"{name}_exponents" for name in ("w", *STATES)), torch.int8)
INTEGERS = ("N", "C", "splits", "tiles", "tiles_per_split", "row_blocks", "first_tile", "dot_blocks")
INTEGERS += ("seed", "step", "steps", "stride", "capacity", "slots", "count")
SOME = 1001  # no multiple of 16: nothing may depend on what Triton would make of one
NUMBERS = (
    "margin",
    "gradient_factor",
    "max_row_norm",
    "weight_norm",
    "lr",
    "weight_decay",
    "momentum",
    "fresh",
    "of_gradient",
)
NUMBERS += ("of_momentum", "step_size", "kept", "fresh1", "beta2", "fresh2", "root_correction", "eps")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", FLOAT8: "fp8"}


@dataclass(frozen=True)
class Case:
    kernel: str
    arch: str
    tile: Tile
    x: torch.dtype
    w: torch.dtype
    tf32: bool
    dim: int
    variant: str = "plain"  # or words of VARIANTS

    def has(self, word: str) -> bool:
        return word in self.variant.split()

    @property
    def operand(self) -> torch.dtype:
        return operand_dtype(self.x, self.w)

    @property
    def precision(self) -> str:
        if self.operand != torch.float32 or self.arch.startswith("gfx"):
            return "ieee"
        return "tf32" if self.tf32 else "tf32x3"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "kernels",
        help="ahead-of-time report of the Triton kernels",
        description="Compiles every Triton kernel for each architecture, dtype and tile; fails where the compiler "
        f"does, on more than {MOST_SPILLED} bytes spilled a thread, on too much shared memory, and where a matrix "
        "product does not use the matrix units.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, separated by commas")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--dim",
        type=counts,
        default=",".join(map(str, DIMS)),
        help="sizes of an embedding, separated by commas; of all but the first, what they change",
    )
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the rows to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: interpreter and compiler cannot share a process.", file=sys.stderr)
        return 2
    architectures = args.arch.split(",")
    if unknown := set(architectures) - set(SHARED_LIMIT):
        known = ", ".join(SHARED_LIMIT)
        print(f"--arch takes architectures among {known}, got {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 2
    dim, *others = args.dim
    cases = itertools.chain(all_cases(architectures, dim), *(plain_cases(architectures, dim) for dim in others))
    cases = [case for case in cases if args.kernel in case.kernel]
    rows, wrong = [], []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row, complaints in pool.map(examine, cases):
            rows += [row] if "registers" in row else []
            line = "  ".join((_line(row), *complaints))
            wrong += [line] if complaints else []
            print(line, flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} compiled, {len(wrong)} not fit to run.", *wrong, sep="\n")
    return 1 if wrong else 0


def all_cases(architectures: list[str], dim: int) -> Iterator[Case]:
    for arch, (x, w, tf32) in itertools.product(architectures, DTYPES):
        # AMD multiplies float32 as it is. But on sm_90, the dtypes whose tiles the others take stand for them.
        if (tf32 and arch.startswith("gfx")) or (arch != "sm_90" and (x, w) in OTHER_DTYPES):
            continue
        for kernel in (*GEMM_KERNELS, *SPARSE_KERNELS):
            for variant in _variants(kernel, arch):
                words = set(variant.split())
                if tf32 and "chosen" in words:  # three products in its place need more registers
                    continue
                # As both bfloat16 or both float32, in the same tiles.
                if variant != "plain" and (x, w) in PLAIN_DTYPES:
                    continue
                # Bytes are decoded before all that options change: two architectures stand for the others.
                if variant != "plain" and w is FLOAT8 and arch not in ("sm_80", "sm_90"):
                    continue
                options = {"variant": frozenset(words), "described": x == w}
                key = Key(ALIKE.get(arch, arch), dim, x, w, operand_dtype(x, w), bucket=0, **options)
                tiles = (plainest(kernel, key),) if kernel == "sample_entries" else table(kernel, key)
                if variant == "plain" and x == w and not tf32:  # the others are held against the plainest
                    tiles = dict.fromkeys((*tiles, RAGGED[kernel][-1], *specialized(kernel, key)))
                for tile in tiles:
                    yield Case(kernel, arch, tile, x, w, tf32, dim, variant)
        if not tf32:
            for kernel, tile in other_tiles(dim).items():
                for variant in _variants(kernel, arch):
                    in_float8 = w is FLOAT8 or "states" in variant
                    if not kernel.endswith("_rows") or in_float8 == ("whole" in kernel):
                        yield Case(kernel, arch, tile, x, w, False, dim, variant)


def plain_cases(architectures: list[str], dim: int) -> Iterator[Case]:
    """Without options, of two dtypes; of all on sm_90 where rows are odd, and each dtype has loads of its own."""
    for case in all_cases(architectures, dim):
        every = dim % 16 and case.arch == "sm_90" and "entr" not in case.kernel
        same = case.x == case.w != torch.float16
        if case.variant == "plain" and not case.tf32 and (same or every):
            yield case


# Kernels that options change: "reshape", of negatives; "raw", a weight that is not normalised; "chosen" classes;
# "kept" cosines; "moved" rows, whose gradient is float32; "some" rows that have one; "moments" of the negatives,
# and "slopes" that are not those of their shape; "sigmoid", where each class counts on its own, and its "angle";
# "states" in float8. "unaligned" is a weight that does not begin at a multiple of 16 bytes.
# What is raw computes less, so that nothing crosses it.
# Easier than what is crossed, in the same tiles: for sm_90 alone.
EASIER = {"reshape", "reshape slopes", "raw", "kept", "some", "moments"}
RESHAPED = ("reshape", "reshape slopes")
MOMENTS = ("moments", "chosen reshape moments", "kept moments")
SIGMOID = ("sigmoid", "sigmoid angle")
VARIANTS = {
    "row_norms": ("plain", "chosen"),
    "class_statistics": ("plain", *RESHAPED, "raw", "chosen", "chosen reshape", "kept", *MOMENTS),
    "merge_statistics": ("plain", "reshape", "raw", "chosen reshape", "moments"),
    "normalize_embeddings": ("plain", "raw", "chosen", "moments"),
    "logit_gradients": ("plain", *RESHAPED, "raw", "chosen", "chosen reshape", "kept", "some", *MOMENTS, *SIGMOID),
    "embedding_gradients": ("plain", "chosen", "some"),
    "weight_gradients": ("plain", "raw", "chosen moved", "some"),
    "project_weight_gradients": ("plain", "moved"),
    "finish_embedding_gradients": ("plain", "reshape", "moments", "sigmoid"),
    "sgd_rows": ("plain", "chosen moved"),
    "adamw_rows": ("plain", "chosen moved"),
    "sgd_whole_rows": ("plain", "states"),
    "adamw_whole_rows": ("plain", "states"),
    "keep_entries": ("plain", "raw", "chosen"),
    "sample_entries": ("plain", "raw", "chosen"),
    "entry_embedding_gradients": ("plain", "raw", "chosen"),
    "entry_weight_gradients": ("plain", "raw", "chosen moved"),
}


def _variants(kernel: str, arch: str) -> Iterator[str]:
    variants = VARIANTS.get(kernel, ("plain",))
    if arch == "sm_90":
        yield from variants
        if kernel in (*GEMM_KERNELS, *SPARSE_KERNELS):  # in the blocks of odd rows
            yield "unaligned"
    elif "entr" in kernel:  # of a gradient_tolerance
        yield "plain"
    else:
        yield from (variant for variant in variants if variant not in EASIER)


def other_tiles(dim: int) -> dict[str, Tile]:
    """Of kernels without a matrix product."""
    samples, rows = Tile(ROWS, 0, COLUMNS, 4, 3), Tile(0, *row_block(dim), 4, 3)
    read_twice = Tile(0, *row_block(dim, MOVED_WHOLE), 4, 3)
    return {
        "row_norms": rows,
        "merge_statistics": samples,
        "normalize_embeddings": samples,
        "finish_embedding_gradients": samples,
        "project_weight_gradients": rows,
        "sgd_rows": rows,
        "adamw_rows": rows,
        "sgd_whole_rows": read_twice,
        "adamw_whole_rows": read_twice,
        "pack_entries": rows,
        "entry_gradients": rows,
        "entry_embedding_gradients": rows,
        "entry_weight_gradients": rows,
    }


def examine(case: Case) -> tuple[dict, list[str]]:
    """One row of the report, as much of it as there is, and what is wrong with it."""
    row = {
        "kernel": case.kernel,
        "arch": case.arch,
        "variant": case.variant,
        "dim": case.dim,
        "config": asdict(case.tile),
        "dtype": f"{SHORT[case.x]} x {SHORT[case.w]}" + (f" {case.precision}" if case.precision != "ieee" else ""),
    }
    try:
        compiled = compile_specialized(case) if case.tile.specialized else compile_case(case)
    except Exception as reason:  # of whatever type: Triton's passes have many, and the other kernels are asked for
        return row, [f"cannot be compiled ({type(reason).__name__}: {reason})."]
    row |= _read_amd(compiled) if case.arch.startswith("gfx") else _read_nvidia(compiled)
    complaints = []
    if row["spill_bytes"] > MOST_SPILLED:
        complaints.append(f"spills {row['spill_bytes']} bytes a thread.")
    if row["shared_bytes"] > SHARED_LIMIT[case.arch]:
        limit = SHARED_LIMIT[case.arch]
        complaints.append(f"needs {row['shared_bytes']} bytes of shared memory, {case.arch} has {limit}.")
    reads_cosines = case.kernel == "logit_gradients" and case.has("kept")
    multiplies = case.kernel in (*GEMM_KERNELS, *SPARSE_KERNELS) and not reads_cosines
    if multiplies and not row["tensor_core_ops"]:
        complaints.append("does not use the matrix units.")
    if case.kernel in GEMM_KERNELS and case.dim % 16 == 0 and row.get("narrow") and not case.has("unaligned"):
        complaints.append(f"moves 16-bit numbers one at a time, in {row['narrow']} places.")
    # Which order of events is safe in a specialised kernel, its tests ask: one product is pending in its loop.
    found = Pipeline(case.tile.stages, 1, []) if case.tile.specialized else pipeline(compiled.asm["ttgir"])
    row |= {"slots": found.slots, "pending": found.pending}
    return row, complaints + found.hazards


def compile_case(case: Case):
    """The kernel, specialised and compiled as a launch would do it, for a GPU that need not be there."""
    import triton

    import cosface_kernels.backends.triton.kernels as kernels
    import cosface_kernels.backends.triton.kernels.sparse as sparse_kernels
    from cosface_kernels.backends.triton.sparse import BLOCK, BLOCK_K, STEPS

    triton.runtime.driver.set_active(StandIn(case.arch))
    function = getattr(kernels if hasattr(kernels, case.kernel) else sparse_kernels, case.kernel)
    w = torch.int8 if case.w is FLOAT8 else case.w
    dtypes = {
        "x": case.x,
        "w": w,
        "matrix": w,
        "operand": case.operand,
        "dw": torch.float32 if case.has("moved") or case.w is FLOAT8 else w,
    }
    if case.has("raw") and case.w is FLOAT8:
        dtypes |= {"w_norm": torch.int8}  # exponents
    if case.has("states"):
        dtypes |= dict.fromkeys(STATES, torch.int8)
    if case.has("unaligned"):
        dtypes["w"] = _unaligned(w)
    if case.kernel.startswith("entry_"):
        dtypes |= {"g": torch.float32, "cosines": torch.float32}
    numbers = dict.fromkeys(INTEGERS, SOME) | dict.fromkeys(NUMBERS, 1.0)
    numbers |= {"first_class": 0, "chunk": 256, "kept": 256, "largest_cut": -12.0}
    options = {
        "D": case.dim,
        "BLOCK_N": case.tile.n,
        "BLOCK_C": case.tile.c,
        "BLOCK_D": case.tile.d,
        "OPERAND": getattr(triton.language, str(case.operand).removeprefix("torch.")),
        "PRECISION": case.precision,
        "NEED_DX": True,
        "NORMALIZE": not case.has("raw"),
        "RESHAPE": case.has("reshape"),
        "SLOPES": case.has("slopes"),
        "MOMENTS": case.has("moments"),
        "SIGMOID": case.has("sigmoid"),
        "ANGLE": case.has("angle"),
        "CHOSEN": case.has("chosen"),
        "KEEP": case.has("kept"),
        "KEPT": case.has("kept"),
        "CLIP": True,
        "NORM": True,
        "MOMENTUM": True,
        "AMSGRAD": True,
        "MAY_STAY": True,
        "BLOCK_SPLITS": SPLITS,
        "SOME": case.has("some"),
        "BLOCK": BLOCK,
        "BLOCK_K": BLOCK_K,
        "STEPS": STEPS,
    }
    arguments = []  # all that precede the options
    for name in function.arg_names:
        if name not in options:
            pointer = POINTERS.get(name, torch.float32)  # a dtype stands for its tensor
            arguments.append(numbers.get(name, dtypes.get(name, dtypes.get(pointer, pointer))))
    options = {name: value for name, value in options.items() if name in function.arg_names}
    return function.warmup(
        *arguments, grid=(1,), **options, num_warps=case.tile.warps, num_stages=case.tile.stages
    )


def _unaligned(dtype: torch.dtype) -> Any:
    """What Triton has in a dtype's place: a tensor, here one that does not begin at a multiple of 16 bytes."""
    from triton.runtime.jit import MockTensor

    tensor = MockTensor(dtype)
    tensor.data_ptr = lambda: dtype.itemsize
    return tensor


def compile_specialized(case: Case):
    """Likewise a kernel whose operands are described: tensors without memory stand in for them."""
    import triton

    import cosface_kernels.backends.triton.kernels.hopper as kernels

    triton.runtime.driver.set_active(StandIn(case.arch))
    function, tile, chunk = getattr(kernels, case.kernel), case.tile, 1024
    options = {"D": case.dim, "BLOCK_N": tile.n, "BLOCK_C": tile.c, "SLOTS": tile.stages, "num_warps": 4}
    described = {"x": (case.dim, tile.n, tile.d), "w": (case.dim, tile.c, tile.d)}
    described["g"] = chunk, tile.n, tile.c // kernels.PARTS.value
    numbers = dict.fromkeys(INTEGERS, SOME) | {"first_class": 0, "chunk": chunk}
    arguments = []
    for name in function.arg_names:
        if name in described:
            columns, *block = described[name]
            matrix = torch.empty(SOME, columns, dtype=case.operand, device="meta")
            arguments.append(kernels.describe(matrix, *block))
        elif name not in options:
            arguments.append(numbers.get(name, POINTERS.get(name, torch.float32)))
    return function.warmup(*arguments, grid=(1,), **options)


@dataclass(frozen=True)
class StandIn:
    """What a launch asks Triton's driver before it compiles."""

    arch: str

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        amd = self.arch.startswith("gfx")
        return GPUTarget("hip", self.arch, 64) if amd else GPUTarget("cuda", int(self.arch[3:]), 32)

    def get_current_device(self) -> int:
        return list(SHARED_LIMIT).index(self.arch)  # a kernel keeps one compiler for each device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _read_nvidia(compiled) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def resource(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage)[1])

    return {
        "registers": resource("REG"),
        "spill_bytes": resource("STACK") + resource("LOCAL"),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_ops": len(re.findall(MATRIX_INSTRUCTIONS, compiled.asm["ptx"])),
        "narrow": len(re.findall(NARROW, compiled.asm["ptx"])),
        "ptx_features": [feature for feature in FEATURES if feature in compiled.asm["ptx"]],
    }


def _read_amd(compiled) -> dict:
    listing = compiled.asm["amdgcn"]

    def resource(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", listing)[1])

    return {
        "registers": resource("vgpr_count"),
        "spill_bytes": 4 * resource("vgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_ops": len(re.findall(MATRIX_INSTRUCTIONS, listing)),
        "ptx_features": [],
    }


def _line(row: dict) -> str:
    tile = row["config"]
    line = (
        f"{row['arch']:7} {row['kernel']:27} {row['variant']:22} {row['dtype']:19} "
        f"D {row['dim']:3}  {tile['n']:3} x {tile['c']:3} x {tile['d']:3} "
        f"warps {tile['warps']} stages {tile['stages']}"
    )
    if "registers" not in row:
        return line
    return (
        f"{line}  registers {row['registers']:3}  "
        f"spills {row['spill_bytes']:4}  shared {row['shared_bytes']:6}  matrix {row['tensor_core_ops']:4}  "
        f"slots {row['slots']} pending {row['pending']}"
    )
