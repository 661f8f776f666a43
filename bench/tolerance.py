"""`python -m bench tolerance`: a training step of the head with a gradient_tolerance, against the exact one.

Speed follows how peaked the softmax is, so that is what `--state` sets: a random head, a controlled spread of the
cosines, or a trained head with embeddings.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import machine, step
from cosface_kernels import margin_softmax_loss
from cosface_kernels.functional import LossStats
from cosface_kernels.init import normal_
from cosface_kernels.optim import FusedSGD

MARGIN, MOMENTUM = 0.35, 0.9
LEARNING_RATE = 1e-9  # the state stays what it is
CHUNK = 16_384  # rows of dw that are compared at a time
SETUPS = ("embeddings", "weight", "labels")


@dataclass(frozen=True)
class Row:
    """One state at one tolerance; kept, dropped and exact are over the samples of the batch."""

    state: str
    batch: int
    dim: int
    classes: int
    scale: float
    tolerance: float
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
    device: str
    torch: str
    commit: str | None


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tolerance",
        help="training steps with a gradient_tolerance",
        description="Times forward, backward and FusedSGD with momentum at each tolerance, in turn, on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--state",
        type=_states,
        default="random,spread:0.08,spread:0.12,spread:0.17",
        help="with commas: random; spread:S, cosines with standard deviation S; trained:PATH, a file of "
        "torch.save with embeddings (N, D), weight (C, D) and labels (N,)",
    )
    parser.add_argument("--tolerance", type=_tolerances, default="1e-2,1e-3,1e-4", help="with commas; 0 is added")
    parser.add_argument("--batch", type=step._count, default=256, help="number of samples")
    parser.add_argument("--dim", type=step._count, default=512, help="size of an embedding")
    parser.add_argument("--classes", type=step._count, default=100_000, help="number of classes")
    parser.add_argument("--scale", type=step._positive, default=64.0, help="s")
    parser.add_argument("--rounds", type=step._count, default=5, help="steps at each tolerance")
    parser.add_argument("--threads", type=step._count, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of embeddings, weight and labels")
    parser.add_argument("--json", type=step._writable, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--figure", type=step._writable, metavar="FILE", help="draw speed against the share kept")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    print(f"{machine.device_name('cpu')}, {args.threads} threads, torch {torch.__version__}")
    rows: list[Row] = []
    for state in args.state:
        rows += (found := measure(state, args))
        for row in found:
            print(
                f"{row.state}  C {row.classes:,}  tolerance {row.tolerance:g}: {1e3 * row.median_s:.1f} ms, "
                f"x {row.speedup:.2f}, kept {row.kept:.3%}, exact samples {row.exact:.0%}, dropped at most "
                f"{row.dropped_max:.1e}, error dx {row.dx_error:.1e}, dw {row.dw_error:.1e}",
                flush=True,
            )
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.figure:
        draw(rows, args.figure)
    return 0


def measure(state: str, args: argparse.Namespace) -> list[Row]:
    x, w, y = make_state(state, args)
    weight = nn.Parameter(w)

    def loss_at(tolerance: float) -> tuple[Tensor, LossStats]:
        return margin_softmax_loss(  # type: ignore[return-value]
            x, weight, y, margin=MARGIN, scale=args.scale, backend="cpu", gradient_tolerance=tolerance,
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
        rows.append(
            Row(
                state=state,
                batch=len(x),
                dim=x.shape[1],
                classes=len(w),
                scale=args.scale,
                tolerance=tolerance,
                median_s=median,
                min_s=min(seconds[tolerance]),
                speedup=statistics.median(seconds[0.0]) / median,
                kept=float(kept.mean()),
                dropped_max=float(dropped.max()),
                dropped_mean=float(dropped.mean()),
                exact=float((kept == 1).double().mean()),
                dx_error=errors[tolerance][0],
                dw_error=errors[tolerance][1],
                threads=args.threads,
                rounds=args.rounds,
                device=machine.device_name("cpu"),
                torch=torch.__version__,
                commit=machine.commit(),
            )
        )
    return rows


def make_state(state: str, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D), weight (C, D) and labels (N,)."""
    kind, _, value = state.partition(":")
    if kind == "trained":
        saved = torch.load(value, weights_only=True)
        x, w, y = (saved[name] for name in SETUPS)
        return x.float().requires_grad_(), w, y
    # the cosine of two random directions of k dimensions has standard deviation 1 / sqrt(k)
    width = args.dim if kind == "random" else min(args.dim, max(1, round(float(value) ** -2)))
    torch.manual_seed(args.seed)
    x, w = torch.zeros(args.batch, args.dim), torch.zeros(args.classes, args.dim)
    x[:, :width] = torch.randn(args.batch, width)
    normal_(w, 1.0)
    w[:, width:] = 0
    return x.requires_grad_(), w, torch.randint(args.classes, (args.batch,))


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


def draw(rows: list[Row], path: Path) -> None:
    """Speed-up against the share kept, on the states in which some sample is not exact."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for tolerance in sorted({row.tolerance for row in rows} - {0.0}, reverse=True):
        found = sorted((row.kept, row.speedup) for row in rows if row.tolerance == tolerance)
        axes.plot(
            [100 * kept for kept, _ in found], [speedup for _, speedup in found], "o-", label=f"{tolerance:g}"
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="entries kept, %", ylabel="steps of the exact head in the same time")
    axes.legend(title="tolerance", frameon=False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _states(text: str) -> list[str]:
    for state in text.split(","):
        kind, _, value = state.partition(":")
        try:
            right = value != "" if kind == "trained" else kind == "spread" and 0 < float(value) <= 1
        except ValueError:
            right = False
        if not right and state != "random":
            raise argparse.ArgumentTypeError(
                f"{state!r} is not random, spread:S with 0 < S <= 1, or trained:PATH."
            )
    return text.split(",")


def _tolerances(text: str) -> list[float]:
    values = []
    for part in text.split(","):
        value = step._finite(part)
        if not 0 <= value < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not a tolerance in [0, 1).")
        values.append(value)
    return [value for value in values if value]
