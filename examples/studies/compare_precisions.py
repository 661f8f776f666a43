"""The same training with the head's weight and momentum in fewer and fewer bits.

    python examples/studies/compare_precisions.py               # goes on where it stopped
    python examples/studies/compare_precisions.py --seeds 5 --processes 2

CosFace on the glyph data, as the demo trains it, with FusedSGD for the head. What differs is the dtype of the
class centres and of their momentum; the network and its optimizer are in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cosface_kernels import FusedCosFaceLoss
from cosface_recipes.small_training import Recipe
from cosface_recipes.tables import markdown
from trials import COLUMNS, MARGIN, RESULTS, SCALE, Trial, make_parser, run_all, summary, two_optimizers

MEASURED = RESULTS / "precisions.json"
FLOAT8 = torch.float8_e4m3fn
PRECISIONS = {  # of weight and momentum
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, momentum in float8": (torch.bfloat16, FLOAT8),
    "float8, momentum in float32": (FLOAT8, torch.float32),
    "float8, momentum in bfloat16": (FLOAT8, torch.bfloat16),
    "float8": (FLOAT8, FLOAT8),
}


@dataclass(frozen=True)
class PrecisionTrial(Trial):
    """Of the weight and momentum that its `loss` names."""

    def run(self) -> dict[str, float]:
        weight, momentum = PRECISIONS[self.loss]
        network, _, _ = self.train(
            partial(self.make_head, dtype=weight),
            partial(two_optimizers, state_dtype=momentum, seed=self.recipe.seed),
        )
        return self.measure(network) if network else {}


def table(rates: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds, in per cent."""
    lines = [["weight", *COLUMNS.values()]]
    for precision, runs in rates.items():
        cells = [summary([run[column] for run in runs]) if all(runs) else "diverged" for column in COLUMNS]
        lines.append([precision, *cells])
    return markdown(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser(__doc__, MEASURED).parse_args(argv)
    try:
        trials = [
            PrecisionTrial(
                precision,
                FusedCosFaceLoss,
                {"margin": MARGIN, "scale": SCALE},
                Recipe(epochs=args.epochs, seed=seed),
                max_identities=args.identities,
            )
            for seed in range(args.seeds)
            for precision in PRECISIONS
        ]
        results = run_all(trials, args.results, args.processes)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    rates: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    for trial, result in zip(trials, results, strict=True):
        rates[trial.loss].append(result)
    print(table(rates))


if __name__ == "__main__":
    main()
