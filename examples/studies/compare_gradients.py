"""The same training with the exact gradient, with a certified sparse one, and with sampled classes.

    python examples/studies/compare_gradients.py               # goes on where it stopped
    python examples/studies/compare_gradients.py --seeds 5 --scale 12 --learning-rate 0.3

CosFace on the glyph data, as compare_losses.py trains it, with FusedSGD for the head. What differs is the
gradient: exact; without entries that hold at most 1e-2 or 1e-3 of a sample's softmax (gradient_tolerance); or of
the loss over the batch's classes and a tenth or three tenths of the others (sample_rate). The table has rates
after equal steps, the share of the entries in the gradient, and the time of the head and of a step: at equal time,
a variant would do more steps by the ratio of the latter. Trainings side by side would slow each other down.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from cosface_kernels import FusedCosFaceLoss
from cosface_recipes.arguments import positive
from cosface_recipes.small_training import Recipe
from cosface_recipes.tables import markdown
from trials import COLUMNS, MARGIN, RESULTS, Trial, make_parser, run_all, summary, two_optimizers

MEASURED = RESULTS / "gradients.json"
GRADIENTS: dict[str, dict[str, float]] = {
    "exact": {},
    "gradient_tolerance 1e-2": {"gradient_tolerance": 1e-2},
    "gradient_tolerance 1e-3": {"gradient_tolerance": 1e-3},
    "sample_rate 0.3": {"sample_rate": 0.3},
    "sample_rate 0.1": {"sample_rate": 0.1},
}
SCALE, LEARNING_RATE = 64.0, 0.1  # at the demo's s = 12, so many entries matter that no tolerance drops any
EXTRA = {"kept": "entries, %", "head": "head, ms", "step": "step, ms"}


class Watched(nn.Module):
    """A head that notes, at each step, the time and the share of the softmax's entries in the gradient."""

    def __init__(self, *args: float, sample_rate: float = 1.0, **options: float):
        super().__init__()
        self.head = FusedCosFaceLoss(*args, sample_rate=sample_rate, **options)
        self.sample_rate = sample_rate
        self.kept: list[float] = []
        self.times: list[float] = []

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        loss, stats = self.head(embeddings, labels, return_stats=True)
        self.kept.append(float(stats.sparsity.kept.mean()) if stats.sparsity else self.sample_rate)
        return loss


@dataclass(frozen=True)
class GradientTrial(Trial):
    """Its rates have, besides those of `measure`, the EXTRA columns: mean, mean and median over the training."""

    def run(self) -> dict[str, float]:
        heads: list[Watched] = []

        def make_head(*args: int, **setting: float) -> Watched:
            heads.append(self.make_head(*args, sample_seed=self.recipe.seed, **setting))
            return heads[-1]

        network, head_seconds, steps = self.train(make_head, two_optimizers)
        if network is None:
            return {}
        step = statistics.median(b - a for a, b in pairwise(heads[0].times))
        extra = {"kept": statistics.mean(heads[0].kept), "head": head_seconds / steps, "step": step}
        return self.measure(network) | extra


def table(rates: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds; rates in per cent."""
    names = [*COLUMNS.values(), *EXTRA.values()]
    lines = [["gradient", *names]]
    for gradient, runs in rates.items():
        cells = [summary([run[column] for run in runs]) if all(runs) else "diverged" for column in COLUMNS]
        means = [statistics.mean(run.get(column, 0.0) for run in runs) for column in EXTRA]
        lines.append(
            [gradient, *cells, f"{100 * means[0]:.1f}", *(f"{1000 * seconds:.1f}" for seconds in means[1:])]
        )
    return markdown(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, MEASURED, processes=1)
    parser.add_argument("--scale", help="s (default: %(default)s)", type=positive, default=SCALE)
    parser.add_argument(
        "--learning-rate", help="its peak (default: %(default)s)", type=positive, default=LEARNING_RATE
    )
    args = parser.parse_args(argv)
    try:
        trials = [
            GradientTrial(
                gradient,
                Watched,
                {"margin": MARGIN, "scale": args.scale, **setting},
                Recipe(epochs=args.epochs, seed=seed, learning_rate=args.learning_rate),
                max_identities=args.identities,
            )
            for seed in range(args.seeds)
            for gradient, setting in GRADIENTS.items()
        ]
        results = run_all(trials, args.results, args.processes)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    rates: dict[str, list[dict[str, float]]] = {gradient: [] for gradient in GRADIENTS}
    for trial, result in zip(trials, results, strict=True):
        rates[trial.loss].append(result)
    print(table(rates))


if __name__ == "__main__":
    main()
