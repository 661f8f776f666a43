"""`python -m bench update`: rows moved by a gradient that exists, in bytes a second beside a copy of as many."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.step import _writable
from cosface_kernels import ops
from cosface_kernels.backends import cpu
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Update
from cosface_recipes.arguments import count
from cosface_recipes.tables import aligned

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CASES = {  # the dtypes of the weight and of its state
    "float32": (FLOAT32, FLOAT32),
    "bfloat16": (BFLOAT16, BFLOAT16),
    "float8, state in bfloat16": (FLOAT8, BFLOAT16),
    "float8": (FLOAT8, FLOAT8),
}
RULES = {
    "sgd": (1, Update("sgd", 1, 0, 1.0, float("inf"), 1e-3, 1e-4, momentum=0.9)),
    "adamw": (2, Update("adamw", 1, 0, 1.0, float("inf"), 1e-3, 1e-4, beta1=0.9, beta2=0.999, eps=1e-8)),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "update",
        help="rows of the weight moved by a gradient that exists",
        description="Times an update of all rows on the CPU, each dtype and a copy of float32 in turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--classes", type=count, default=200_000, help="rows")
    parser.add_argument("--dim", type=count, default=512, help="numbers in a row")
    parser.add_argument("--rounds", type=count, default=7, help="turns of each")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the rows to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    print(f"{machine.device_name('cpu')}, {args.threads} threads, {cpu.describe()}, commit {machine.commit()}")
    source, target = torch.zeros(2, args.classes, args.dim)
    moves: dict[tuple[str, str], tuple[int, Callable[[], object]]] = {
        ("", "copy of float32"): (2 * source.nbytes, lambda: target.copy_(source))
    }
    for rule in RULES:
        for name in CASES:
            moves[rule, name] = _move(rule, name, source)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in moves}
    for _ in range(args.rounds + 1):  # the first touches the memory
        for key, (_, move) in moves.items():
            start = time.perf_counter()
            move()
            seconds[key].append(time.perf_counter() - start)
    rows = [
        {
            "rule": rule, "dtype": name, "classes": args.classes, "dim": args.dim, "threads": args.threads,
            "median_s": statistics.median(seconds[rule, name][1:]), "bytes": count,
            "instruction_set": cpu.describe(), "device": machine.device_name("cpu"), "commit": machine.commit(),
        }
        for (rule, name), (count, _) in moves.items()
    ]  # fmt: skip
    print(table(rows))
    if args.json:
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(partial, args.json)
    return 0


def _move(rule: str, name: str, gradient: Tensor) -> tuple[int, Callable[[], object]]:
    """How many bytes a step reads and writes, and the step."""
    (count, update), (weight, of_state) = RULES[rule], CASES[name]
    w = torch.randn(gradient.shape).to(weight)
    state = [torch.zeros(gradient.shape, dtype=of_state) for _ in range(count)]
    in_float8 = [each for each in (w, *state) if each.dtype is FLOAT8]
    exponents = [torch.zeros(len(w), dtype=torch.int8) for _ in in_float8]
    g = gradient if weight is FLOAT8 else gradient.to(weight)
    moved = 2 * sum(each.nbytes for each in (w, *state, *exponents)) + g.nbytes
    return moved, lambda: ops.apply_update_(w, g, [*state, *exponents], *update.flat(), "cpu")


def table(rows: list[dict[str, Any]]) -> str:
    copied = rows[0]["bytes"] / rows[0]["median_s"]
    lines = [("rule", "weight and state", "median", "GB/s", "of a copy", "ns a number")]
    for row in rows:
        rate, numbers = row["bytes"] / row["median_s"], row["classes"] * row["dim"]
        lines.append(
            (
                row["rule"],
                row["dtype"],
                f"{1e3 * row['median_s']:.1f} ms",
                f"{rate / 1e9:.1f}",
                f"{rate / copied:.2f}",
                f"{1e9 * row['median_s'] / numbers:.2f}",
            )
        )
    return aligned(lines, left=(0, 1))
