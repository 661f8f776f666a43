"""`python -m bench train-step --state`: a training step with a gradient_tolerance, against the exact one.

Speed follows how peaked the softmax is, so that is what a state sets: a random head, a controlled spread of the
cosines, or a trained head with embeddings.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import machine
from cosface_kernels import margin_softmax_loss
from cosface_kernels.functional import LossStats
from cosface_kernels.init import normal_
from cosface_kernels.optim import FusedSGD
from cosface_recipes.arguments import finite, whole

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16")}  # whose rows it moves
MOMENTUM = 0.9
LEARNING_RATE = 1e-9  # the state stays what it is
CHUNK = 16_384  # rows of dw that are compared at a time


@dataclass(frozen=True)
class State:
    """What a step starts from: embeddings (N, D), weight (C, D), labels (N,), and the head's scale and margin."""

    embeddings: Tensor
    weight: Tensor
    labels: Tensor
    scale: float
    margin: float


@dataclass(frozen=True)
class Row:
    """One state at one tolerance; kept, dropped and exact are over the samples of the batch."""

    state: str
    batch: int
    dim: int
    classes: int
    dtype: str
    scale: float
    margin: float
    tolerance: float
    path: str  # "exact", "sparse", or "both" where that differs between samples
    median_s: float
    min_s: float
    speedup: float  # of the medians, over tolerance 0
    kept: float  # mean share of the negatives
    dropped_max: float
    dropped_mean: float
    exact: float  # share of the samples
    dx_error: float  # |dx - exact dx| / |exact dx|
    dw_error: float
    threads: int
    rounds: int
    cache_bytes: int  # for the entries; 0: as many as the head takes by itself
    device: str
    torch: str
    commit: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "steps with a gradient_tolerance, which take the place of --impl, on the CPU"
    )
    group.add_argument(
        "--state",
        type=_states,
        help="with commas: random; spread:S, cosines with standard deviation S; or a file that "
        "examples/studies/head_state.py wrote, whose sizes, scale and margin then count",
    )
    group.add_argument("--tolerance", type=_tolerances, default="1e-2,1e-3,1e-4", help="with commas; 0 is added")
    group.add_argument("--cache-mib", type=whole, default=0, help="memory for the entries; 0: the head's default")


def run(args: argparse.Namespace) -> int:
    unfit = [dtype for dtype in args.dtype if dtype not in DTYPES]
    if args.device != "cpu" or unfit:
        got = f"--dtype {','.join(unfit)}" if unfit else f"--device {args.device}"
        print(f"--state measures on the CPU, a weight in {', '.join(DTYPES)}; got {got}.", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    print(f"{machine.device_name('cpu')}, {args.threads} threads, torch {torch.__version__}")
    rows: list[Row] = []
    for dtype, dim, state, batch, classes in itertools.product(
        args.dtype, args.dim, args.state, args.batch, args.classes
    ):
        rows += (found := measure(state, make_state(state, batch, classes, dim, dtype, args), args))
        for row in found:
            print(
                f"{row.state}  N {row.batch}  C {row.classes:,}  tolerance {row.tolerance:g}: {row.path}, "
                f"{1e3 * row.median_s:.1f} ms, x {row.speedup:.2f}, kept {row.kept:.3%}, exact samples "
                f"{row.exact:.0%}, dropped at most {row.dropped_max:.1e}, error dx {row.dx_error:.1e}, "
                f"dw {row.dw_error:.1e}",
                flush=True,
            )
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def measure(name: str, state: State, args: argparse.Namespace) -> list[Row]:
    x, weight = state.embeddings.requires_grad_(), nn.Parameter(state.weight)

    def loss_at(tolerance: float) -> tuple[Tensor, LossStats]:
        return margin_softmax_loss(  # type: ignore[return-value]
            x, weight, state.labels, margin=state.margin, scale=state.scale, backend="cpu",
            gradient_tolerance=tolerance, cache_bytes=(args.cache_mib << 20) if tolerance else None,
            return_stats=True,
        )  # fmt: skip

    tolerances = [0.0, *args.tolerance]
    errors = gradient_errors(loss_at, x, weight, tolerances)
    optimizer = FusedSGD([weight], lr=LEARNING_RATE, momentum=MOMENTUM)
    seconds: dict[float, list[float]] = {tolerance: [] for tolerance in tolerances}
    stats: dict[float, LossStats] = {}
    for turn in range(args.rounds + 1):  # the first touches all memory and is not timed
        for tolerance in tolerances:
            optimizer.zero_grad()
            start = time.perf_counter()
            loss, stats[tolerance] = loss_at(tolerance)
            loss.backward()
            optimizer.step()
            if turn:
                seconds[tolerance].append(time.perf_counter() - start)
    rows = []
    for tolerance in tolerances:
        median, sparsity = statistics.median(seconds[tolerance]), stats[tolerance].sparsity
        dropped, kept = sparsity or (torch.zeros(1), torch.ones(1))
        exact = float((kept == 1).double().mean())
        rows.append(
            Row(
                state=name,
                batch=len(x),
                dim=x.shape[1],
                classes=len(weight),
                dtype=str(weight.dtype).removeprefix("torch."),
                scale=state.scale,
                margin=state.margin,
                tolerance=tolerance,
                path={0.0: "sparse", 1.0: "exact"}.get(exact, "both"),
                median_s=median,
                min_s=min(seconds[tolerance]),
                speedup=statistics.median(seconds[0.0]) / median,
                kept=float(kept.mean()),
                dropped_max=float(dropped.max()),
                dropped_mean=float(dropped.mean()),
                exact=exact,
                dx_error=errors[tolerance][0],
                dw_error=errors[tolerance][1],
                threads=args.threads,
                rounds=args.rounds,
                cache_bytes=args.cache_mib << 20,
                device=machine.device_name("cpu"),
                torch=torch.__version__,
                commit=machine.commit(),
            )
        )
    return rows


def make_state(name: str, batch: int, classes: int, dim: int, dtype: str, args: argparse.Namespace) -> State:
    kind, _, value = name.partition(":")
    if kind not in ("random", "spread"):
        return load_state(name)
    # the cosine of two random directions of k dimensions has standard deviation 1 / sqrt(k)
    width = dim if kind == "random" else min(dim, max(1, round(float(value) ** -2)))
    torch.manual_seed(args.seed)
    x, w = torch.zeros(batch, dim), torch.zeros(classes, dim, dtype=DTYPES[dtype])
    x[:, :width] = torch.randn(batch, width)
    normal_(w, 1.0)
    w[:, width:] = 0
    return State(x, w, torch.randint(classes, (batch,)), args.scale, args.margin)


def load_state(file: str, mmap: bool = False) -> State:
    try:
        return State(**torch.load(file, mmap=mmap, weights_only=True))
    except Exception as error:  # bytes that torch.save did not write can raise anything
        raise argparse.ArgumentTypeError(f"{file} is no file of examples/studies/head_state.py.") from error


def gradient_errors(
    loss_at: Callable[[float], tuple[Tensor, LossStats]], x: Tensor, weight: Tensor, tolerances: list[float]
) -> dict[float, tuple[float, float]]:
    """Of dx and dw, relative to the exact ones, which are the first."""
    exact: list[Tensor] = []
    errors = {}
    for tolerance in tolerances:
        got = torch.autograd.grad(loss_at(tolerance)[0], [x, weight])
        exact = exact or list(got)
        dx, dw = (_relative(a, b) for a, b in zip(got, exact, strict=True))
        errors[tolerance] = dx, dw
    return errors


def _relative(got: Tensor, want: Tensor) -> float:
    pairs = list(zip(got.split(CHUNK), want.split(CHUNK), strict=True))
    error = sum(float((a.float() - b.float()).norm()) ** 2 for a, b in pairs)
    return math.sqrt(error / sum(float(b.float().norm()) ** 2 for _, b in pairs))


def _states(text: str) -> list[str]:
    for state in text.split(","):
        kind, _, value = state.partition(":")
        try:
            right = state == "random" or (kind == "spread" and 0 < float(value) <= 1) or Path(state).is_file()
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(
                f"{state!r} is not random, spread:S with 0 < S <= 1, or a file that is there."
            )
        if kind not in ("random", "spread"):
            load_state(state, mmap=True)
    return text.split(",")


def _tolerances(text: str) -> list[float]:
    values = []
    for part in text.split(","):
        value = finite(part)
        if not 0 <= value < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not a tolerance in [0, 1).")
        values.append(value)
    return [value for value in values if value]
