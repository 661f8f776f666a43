"""`python -m bench step`: forward and backward to dx and dw, no optimizer, against the peers."""

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import machine, report
from bench.implementations import IMPLEMENTATIONS, UnavailableError
from bench.process import FailedError, Worker
from bench.worker import DTYPES, Case, Check, Measure, Turn
from cosface_recipes.arguments import count, counts, finite, positive

DEFAULT_IMPLEMENTATIONS = "fused,eager,compile,checkpoint,pml,torch-lce"
DTYPE_ALIASES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}
DTYPE_ALIASES |= {"fp8": "float8_e4m3fn"}
PRODUCTS_IN = {"float8_e4m3fn": "bfloat16"}  # in which its rows are multiplied


@dataclass
class Outcome:
    """What is known so far of one implementation on one problem."""

    case: Case
    error: float | None = None
    turns: list[Turn] = field(default_factory=list)
    note: str | None = None  # why it cannot be measured
    failed: bool = False  # it could run here and did not do its work

    def stop(self, reason: Exception) -> None:
        self.note, self.failed, self.turns = str(reason), isinstance(reason, FailedError), []


@dataclass(frozen=True)
class Jobs:
    """What a command measures: its implementations, the job that checks one, the job that times it, and a note.

    `ran_with` gives the margin and the scale of a case, None where it has none of a number.
    """

    implementations: Mapping[str, Any]
    check: Callable[[Case], Any]
    measure: Callable[[Case], Any]
    note: Callable[[Case, list[Any]], str | None]
    ran_with: Callable[[Case], tuple[float | None, float | None]] = lambda case: (case.margin, case.scale)


STEP = Jobs(
    IMPLEMENTATIONS,
    Check,
    Measure,
    note=lambda case, _: IMPLEMENTATIONS[case.impl].note,
    ran_with=lambda case: IMPLEMENTATIONS[case.impl].ran_with(case.margin, case.scale),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "step",
        help="forward and backward of the head",
        description="Times forward and backward of each implementation in a process of its own, in turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, IMPLEMENTATIONS, DEFAULT_IMPLEMENTATIONS).set_defaults(run=run)


def add_options(
    parser: argparse.ArgumentParser, implementations: Iterable[str], default: str, dtypes: Iterable[str] = DTYPES
) -> argparse.ArgumentParser:
    """The options of every command that times implementations on problems."""
    parser.add_argument("--batch", type=counts, default="256", help="numbers of samples, separated by commas")
    parser.add_argument("--dim", type=counts, default="512", help="sizes of an embedding, with commas")
    parser.add_argument("--classes", type=counts, default="100000", help="numbers of classes, with commas")
    parser.add_argument(
        "--impl",
        type=functools.partial(_implementations, known=implementations),
        default=default,
        help=f"which to run, with commas, of {', '.join(implementations)}",
    )
    parser.add_argument(
        "--dtype",
        type=functools.partial(_dtypes, known=dtypes),
        default="float32",
        help=f"some of {', '.join(dtypes)}, with commas",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda is a ROCm GPU too")
    parser.add_argument("--rounds", type=count, default=5, help="turns of each implementation")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--margin", type=finite, default=0.35, help="m")
    parser.add_argument("--scale", type=positive, default=64.0, help="s")
    parser.add_argument("--seed", type=int, default=0, help="of embeddings, weight and labels")
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the rows to this file")
    return parser


def run(
    args: argparse.Namespace, jobs: Jobs = STEP, summary: Callable[[list[report.Row]], list[str]] | None = None
) -> int:
    """Measures, prints and writes; 1 if an implementation failed, 0 if some were merely not available."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA or ROCm GPU, and torch sees none.", file=sys.stderr)
        return 2
    where = f"{machine.device_name(args.device)}, {args.threads} threads"
    print(f"{where}, torch {torch.__version__}, commit {machine.commit()}")
    rows, failed = [], False
    common = (args.margin, args.scale, args.seed, args.threads, args.device)
    for dtype, dim, batch, classes in itertools.product(args.dtype, args.dim, args.batch, args.classes):
        matmul_dtype = PRODUCTS_IN.get(dtype, dtype) if args.device == "cuda" else "float32"
        cases = [Case(impl, batch, dim, classes, dtype, *common) for impl in args.impl]
        outcomes, matmul = measure(cases, args.rounds, matmul_dtype, jobs)
        rows += (found := [_row(outcome, matmul, args.rounds, jobs) for outcome in outcomes])
        failed |= any(outcome.failed for outcome in outcomes)
        print(f"\nbatch {batch}, dim {dim}, classes {classes:,}, {dtype}, {args.rounds} rounds")
        print(f"{matmul_dtype} matmul, GFLOP/s: " + _describe_matmul(matmul))
        print(report.table(found), flush=True)
        if args.json:
            report.write_json(args.json, rows)
    if summary:
        print("", *summary(rows), sep="\n")
    return int(failed)


def measure(
    cases: list[Case], rounds: int, matmul_dtype: str = "float32", jobs: Jobs = STEP
) -> tuple[list[Outcome], list[dict[str, float]]]:
    """Checks each case, then gives each its turns, with a turn of the plain matrix product before each.

    A rate that cannot be measured costs no other figure.
    """
    outcomes = [Outcome(case) for case in cases]
    for outcome in outcomes:
        _check(outcome, jobs)
    matmul: list[dict[str, float]] = []
    with ExitStack() as stack:
        first = cases[0]
        sizes = (first.batch, first.dim, first.threads, first.device, matmul_dtype)
        multiply = stack.enter_context(closing(Worker(machine.Matmul, *sizes)))
        workers: dict[str, Worker] = {}

        def multiplied() -> None:
            try:
                matmul.append(multiply.turn())
            except (UnavailableError, FailedError) as reason:
                print(f"The matrix products were not measured: {reason}", file=sys.stderr, flush=True)

        for number, outcome in _turns(outcomes, rounds):
            impl = outcome.case.impl
            multiplied()
            if impl not in workers:
                workers[impl] = stack.enter_context(closing(Worker(jobs.measure, outcome.case)))
            try:
                turn = workers[impl].turn()
            except (UnavailableError, FailedError) as reason:
                outcome.stop(reason)
                _progress(outcome.case, str(reason))
                continue
            outcome.turns.append(turn)
            _progress(outcome.case, f"round {number} of {rounds}: {report.duration(min(turn.seconds))}")
        if not matmul:
            multiplied()
    return outcomes, matmul


def _turns(outcomes: list[Outcome], rounds: int) -> Iterator[tuple[int, Outcome]]:
    """Round after round, each implementation that has not been stopped, in order."""
    for number in range(1, rounds + 1):
        for outcome in outcomes:
            if outcome.note is None:
                yield number, outcome


def _check(outcome: Outcome, jobs: Jobs = STEP) -> None:
    case = outcome.case
    try:
        with closing(Worker(jobs.check, case)) as worker:
            accuracy = worker.turn()
        outcome.error, allowed = accuracy.error, accuracy.allowed(case.dtype, case.scale)
        if not outcome.error <= allowed:  # nan is wrong too
            raise FailedError(
                f"Its output is wrong and was not timed: error {outcome.error:.1e}, allowed {allowed:.1e}, "
                f"plain PyTorch's {accuracy.plain:.1e}."
            )
    except (UnavailableError, FailedError) as reason:
        outcome.stop(reason)
        _progress(case, str(reason))
    else:
        _progress(case, f"output right to {outcome.error:.1e}")


def _row(outcome: Outcome, matmul: list[dict[str, float]], rounds: int, jobs: Jobs = STEP) -> report.Row:
    case, implementation = outcome.case, jobs.implementations[outcome.case.impl]
    shape, gflops = machine.best_shape(matmul) if matmul else (None, None)
    seconds = [second for turn in outcome.turns for second in turn.seconds]
    median = statistics.median(seconds) if seconds else None
    extra = [turn.peak_extra_bytes for turn in outcome.turns if turn.peak_extra_bytes is not None]
    flops = implementation.flops * case.batch * case.classes * case.dim
    margin, scale = jobs.ran_with(case)
    return report.Row(
        impl=case.impl,
        batch=case.batch,
        dim=case.dim,
        classes=case.classes,
        dtype=case.dtype,
        median_s=median,
        min_s=min(seconds, default=None),
        peak_extra_mib=max(extra) / 2**20 if extra else None,
        matmul_gflops=gflops,
        fraction_of_matmul=flops / median / 1e9 / gflops if median and gflops else None,
        max_rel_err=outcome.error if outcome.error is not None and math.isfinite(outcome.error) else None,
        threads=case.threads,
        torch=torch.__version__,
        commit=machine.commit(),
        flops_per_ncd=implementation.flops,
        matmul_shape=shape,
        steps=len(seconds),
        rounds=rounds,
        margin=margin,
        scale=scale,
        seed=case.seed,
        device=machine.device_name(case.device),
        note=outcome.note or jobs.note(case, outcome.turns),
    )


def _describe_matmul(matmul: list[dict[str, float]]) -> str:
    if not matmul:
        return report.MISSING
    best, _ = machine.best_shape(matmul)
    rates = machine.median_rates(matmul)
    parts = [f"{shape} {rate:.0f}" + (" (taken)" if shape == best else "") for shape, rate in rates.items()]
    return "; ".join(parts)


def _progress(case: Case, text: str) -> None:
    size = f"batch {case.batch}, classes {case.classes:,}"
    print(f"{size}, {case.impl}: {text}", file=sys.stderr, flush=True)


def _implementations(text: str, known: Iterable[str] = IMPLEMENTATIONS) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not an implementation; there are {', '.join(known)}.")
    return names


def _dtype(text: str, known: Iterable[str] = DTYPES) -> str:
    name = DTYPE_ALIASES.get(text, text)
    if name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not a dtype; there are {', '.join(known)}.")
    return name


def _dtypes(text: str, known: Iterable[str]) -> list[str]:
    return [_dtype(part, known) for part in text.split(",")]


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: its folder does not exist, or it is one.")
    return path
