"""Train the same network with each loss of CosFace's table and with its successors, and verify unseen identities.

    python examples/studies/compare_losses.py
    python examples/studies/compare_losses.py --losses "LMCL (CosFace)" ArcFace --seeds 5

Every loss gets the same network, initial weights, batches, augmentation and schedule. It first trains with each of
four settings on a part of the training data; then, with the one that had the highest TAR at a FAR of 1e-3 on the
identities and fonts held out, on all of it, once for each seed. A JSON file keeps what has been measured, and a
second call goes on where the first stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cosface_kernels import (
    FusedAdaFaceLoss,
    FusedArcFaceLoss,
    FusedASoftmaxLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedGBCosFaceLoss,
    FusedLSoftmaxLoss,
    FusedSphereFaceLoss,
)
from cosface_recipes.small_training import Recipe, SoftmaxLoss
from cosface_recipes.tables import markdown
from trials import COLUMNS, FARS, RESULTS, SCALE, MakeHead, Trial, make_parser, run_all, summary, tar_name

MEASURED = RESULTS / "losses.json"


class Sum(nn.Module):
    """softmax + weight * other."""

    def __init__(self, softmax: nn.Module, other: nn.Module, weight: float):
        super().__init__()
        self.softmax, self.other, self.weight = softmax, other, weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.softmax(embeddings, labels) + self.weight * self.other(embeddings, labels)


class CenterLoss(nn.Module):
    """|x_i - c_y|^2 / 2, averaged over the batch; each class's centre c follows its samples.

        c_j += rate sum_{y_i = j} (x_i - c_j) / (1 + n_j),  n_j the class's samples in the batch

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016, Eq. 2-4.
    """

    centers: Tensor

    def __init__(self, num_classes: int, embedding_size: int, rate: float = 0.5):
        super().__init__()
        self.rate = rate
        self.register_buffer("centers", torch.zeros(num_classes, embedding_size))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        away = embeddings - self.centers[labels]  # (N, D)
        if self.training:
            classes, row, counts = labels.unique(return_inverse=True, return_counts=True)
            total = torch.zeros_like(self.centers[classes]).index_add_(0, row, away.detach())
            self.centers[classes] += self.rate * total / (1 + counts[:, None])
        return away.square().sum(1).mean() / 2


class SemiHardTripletLoss(nn.Module):
    """max(0, |a - p| - |a - n| + margin) over the triplets with a negative n beyond p, within the margin.

    Source: Schroff et al., FaceNet, arXiv:1503.03832.
    """

    def __init__(self, margin: float):
        from pytorch_metric_learning import losses, miners

        super().__init__()
        self.miner = miners.TripletMarginMiner(margin, type_of_triplets="semihard")
        self.loss = losses.TripletMarginLoss(margin)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


def softmax(num_classes: int, embedding_size: int) -> nn.Module:
    return SoftmaxLoss(embedding_size, num_classes)


def softmax_and_contrastive(num_classes: int, embedding_size: int, *, weight: float, margin: float) -> nn.Module:
    from pytorch_metric_learning.losses import ContrastiveLoss

    return Sum(softmax(num_classes, embedding_size), ContrastiveLoss(neg_margin=margin), weight)


def softmax_and_center(num_classes: int, embedding_size: int, *, weight: float) -> nn.Module:
    return Sum(softmax(num_classes, embedding_size), CenterLoss(num_classes, embedding_size), weight)


def triplet(num_classes: int, embedding_size: int, *, margin: float) -> nn.Module:
    return SemiHardTripletLoss(margin)


def grid(name: str, *values: float, **fixed: float) -> list[dict[str, float]]:
    return [{name: value, **fixed} for value in values]


BUDGET = 4  # settings of each loss
LOSSES: dict[str, tuple[MakeHead, list[dict[str, float]]]] = {
    "Softmax": (softmax, grid("learning_rate", 0.1, 0.2, 0.3, 0.6)),
    "Softmax + Contrastive": (
        softmax_and_contrastive,
        [*grid("margin", 0.7, 1.0, weight=0.3), *grid("margin", 0.7, 1.0, weight=3.0)],
    ),
    "Triplet": (
        triplet,
        [*grid("margin", 0.2, 0.4, learning_rate=0.1), *grid("margin", 0.2, 0.4, learning_rate=0.3)],
    ),
    "L-Softmax": (FusedLSoftmaxLoss, grid("margin", 1.2, 1.5, 2.0, 3.0)),
    "Softmax + Center": (softmax_and_center, grid("weight", 0.003, 0.01, 0.03, 0.1)),
    "A-Softmax": (
        FusedASoftmaxLoss,
        [
            *grid("margin", 2.0, 4.0, base=100.0, lambda_min=5.0),
            *grid("margin", 2.0, 4.0, base=100.0, lambda_min=1.0),
        ],
    ),
    "A-Softmax-NormFea": (FusedSphereFaceLoss, grid("margin", 1.2, 1.35, 1.5, 1.7, scale=SCALE)),
    "LMCL (CosFace)": (FusedCosFaceLoss, grid("margin", 0.15, 0.25, 0.35, 0.45, scale=SCALE)),
    "ArcFace": (FusedArcFaceLoss, grid("margin", 0.2, 0.3, 0.4, 0.5, scale=SCALE)),
    "AdaFace": (FusedAdaFaceLoss, grid("margin", 0.2, 0.3, 0.4, 0.5, scale=SCALE)),
    "CurricularFace": (FusedCurricularFaceLoss, grid("margin", 0.2, 0.3, 0.4, 0.5, scale=SCALE)),
    "GB-CosFace": (FusedGBCosFaceLoss, grid("margin", 0.08, 0.12, 0.16, 0.2, scale=SCALE)),
}


def choose(
    losses: Sequence[str], recipe: Recipe, path: Path, processes: int, max_identities: int = 0
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, float]]]]:
    """For each loss, the setting that was best on the data held out, and its rates there."""
    trials = [
        Trial(loss, LOSSES[loss][0], setting, recipe, held_out=True, max_identities=max_identities)
        for loss in losses
        for setting in LOSSES[loss][1]
    ]
    settings: dict[str, dict[str, float]] = {}
    best: dict[str, list[dict[str, float]]] = {}
    criterion = tar_name(FARS[0])
    for trial, rates in zip(trials, run_all(trials, path, processes), strict=True):
        so_far = best.get(trial.loss, [{}])[0].get(criterion, -math.inf)
        if trial.loss not in best or rates.get(criterion, -math.inf) > so_far:
            settings[trial.loss], best[trial.loss] = trial.setting, [rates]
    return settings, best


def table(rates: dict[str, list[dict[str, float]]], settings: dict[str, dict[str, float]]) -> str:
    """Markdown: mean and standard deviation over the seeds, in per cent."""
    lines = [["loss", "setting", *COLUMNS.values()]]
    for loss, runs in rates.items():
        setting = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings[loss].items())
        cells = (summary([run[column] for run in runs]) if all(runs) else "diverged" for column in COLUMNS)
        lines.append([loss, setting, *cells])
    return markdown(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, MEASURED)
    names = list(LOSSES)
    parser.add_argument("--losses", help="default: all", nargs="+", choices=names, default=names, metavar="LOSS")
    args = parser.parse_args(argv)
    try:
        recipe = Recipe(epochs=args.epochs)
        settings, rates = choose(args.losses, recipe, args.results, args.processes, args.identities)
        print(f"The best of {BUDGET} settings, on the data held out:\n\n{table(rates, settings)}\n", flush=True)
        trials = [
            Trial(
                loss, LOSSES[loss][0], settings[loss], replace(recipe, seed=seed), max_identities=args.identities
            )
            for seed in range(args.seeds)
            for loss in args.losses
        ]
        results = run_all(trials, args.results, args.processes)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    rates = {loss: [] for loss in args.losses}
    for trial, result in zip(trials, results, strict=True):
        rates[trial.loss].append(result)
    print(f"With it, trained on all of the training data, on the test data:\n\n{table(rates, settings)}")


if __name__ == "__main__":
    main()
