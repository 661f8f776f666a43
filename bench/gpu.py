"""`python -m bench gpu STEP`: the steps of bench/gpu.sh, which proves and measures the kernels on a GPU.

Each figure is appended to a file of JSON lines as soon as it exists, and `python -m bench.tables` makes tables.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import gpu_steps
from bench.implementations import UnavailableError
from bench.probe import DTYPES, Bench

STEPS: dict[str, Callable[[Bench], None]] = {
    "versions": gpu_steps.versions,
    "ceilings": gpu_steps.ceilings,
    "race": gpu_steps.races,
    "kernels": gpu_steps.kernels,
    "specialized": gpu_steps.specialized,
    "library": gpu_steps.library,
    "steps": gpu_steps.steps,
    "update": gpu_steps.update,
    "tolerance": gpu_steps.tolerance,
    "sweep": gpu_steps.sweep,
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("gpu", help="the steps of bench/gpu.sh", description="Steps of bench/gpu.sh.")
    parser.add_argument("what", nargs="+", choices=(*STEPS, "once"), metavar="STEP", help="in order")
    parser.add_argument("--file", type=Path, required=True, help="JSON lines, which are appended to")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--dtype", choices=(*DTYPES, "tf32"), default="bfloat16", help="of race")
    parser.add_argument("--backend", default="triton", help="of once")
    parser.add_argument("--small", action="store_true", help="once: a step for a sanitizer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.toy and not torch.cuda.is_available():
        print("bench gpu needs a CUDA or ROCm GPU, and torch sees none; --toy rehearses without.", file=sys.stderr)
        return 2
    os.environ["COSFACE_TRITON_TUNE"] = "0"
    bench = Bench(args.file, args.toy, args.dtype, args.backend)
    for step in args.what:
        try:
            if step == "once":
                gpu_steps.once(bench, args.small)
                continue
            before = bench.rows, bench.measured
            STEPS[step](bench)
        except UnavailableError as reason:
            bench.add(step, note=str(reason))
            return 1
        bench.wrong |= bench.rows > before[0] and bench.measured == before[1]  # reasons alone, and no figure
    return int(bench.wrong)
