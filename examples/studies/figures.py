"""Figures of margins: what they do to a decision, to a logit, to features and to verification.

    python examples/studies/figures.py NAME

    decision-margins    CosFace's Fig. 2, in cosine and in angle space; a second
    target-logits       what each loss puts in the place of cos(theta); a second
    toy                 CosFace's Fig. 4: 8 identities in 2 dimensions; ten seconds
    margin-sweep        verification by m, from 0 to 0.45; half an hour
    sparse-density      time of a step by the entries it keeps, from rows of the bench
    growth              memory and time of a step over the classes, from rows of the bench

Each writes a PNG to docs/figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.margins import (
    AdaFaceMargin,
    AnnealedSphereFaceMargin,
    ArcFaceMargin,
    CombinedMargin,
    CosFaceMargin,
    CurricularFaceMargin,
    GBCosFaceMargin,
    KappaFaceMargin,
    MagFaceMargin,
    Margin,
    MVSoftmaxMargin,
    Rows,
    SphereFaceMargin,
    X2SoftmaxMargin,
)
from cosface_recipes.arguments import count
from cosface_recipes.outputs import check_output
from cosface_recipes.small_training import Recipe, SoftmaxLoss
from trials import EPOCHS, RESULTS, SCALE, Trial, run_all

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
DENSITY = Path(__file__).parents[2] / "bench" / "results" / "sparse-density.json"
GROWTH = Path(__file__).parents[2] / "bench" / "results" / "xeon-amx-2-threads-train-step.json"

# Okabe and Ito's colours, told apart by colour-blind readers.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}

TOY_IDENTITIES = 8
TOY_NOISE = 0.7  # standard deviation of an identity's samples around their mean, along each axis
TOY_HEADS = {"softmax": None, "LMCL, $m = 0$": 0.0, "LMCL, $m = 0.1$": 0.1, "LMCL, $m = 0.2$": 0.2}
TOY_SCALE = 16.0


def decision_margins() -> Figure:
    """Two classes: where a sample counts as the first, as the second, and as neither, because of the margin."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "Softmax, $|w_1| = 2|w_2|$": lambda cos: cos,
        "NSL": CosFaceMargin(0.0),
        "A-Softmax, $m = 4$": SphereFaceMargin(4.0),
        "CosFace (LMCL), $m = 0.35$": CosFaceMargin(0.35),
        "ArcFace, $m = 0.5$": ArcFaceMargin(0.5),
    }
    axis = torch.linspace(0, math.pi, 721, dtype=torch.float64)
    theta_1, theta_2 = torch.meshgrid(axis, axis, indexing="xy")
    cos_1, cos_2 = theta_1.cos(), theta_2.cos()
    figure, rows = plt.subplots(2, len(losses), figsize=(12.5, 5.4), sharex="row", sharey="row")
    for (name, psi), in_cosine, in_angle in zip(losses.items(), *rows, strict=True):
        norm_1, norm_2 = (2, 1) if name.startswith("Softmax") else (1, 1)
        first = norm_1 * psi(cos_1) - norm_2 * cos_2  # the loss is content where this is positive
        second = norm_2 * psi(cos_2) - norm_1 * cos_1
        for axes, x, y in ((in_cosine, cos_1, cos_2), (in_angle, theta_1.rad2deg(), theta_2.rad2deg())):
            axes.set_facecolor("#E4E4E4")
            for decision, color in ((first, SKY), (second, ORANGE)):
                axes.contourf(x, y, decision, [0, decision.max()], colors=[color], alpha=0.75)
                axes.contour(x, y, decision, [0], colors=[BLACK], linewidths=0.8)
            axes.set_box_aspect(1)
        in_cosine.set(title=name, xlabel=r"$\cos\,\theta_1$", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        in_angle.set(xlabel=r"$\theta_1$ (degrees)", xticks=[0, 90, 180], yticks=[0, 90, 180])
    rows[0, 0].set_ylabel(r"$\cos\,\theta_2$")
    rows[1, 0].set_ylabel(r"$\theta_2$ (degrees)")
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=color) for color in (SKY, ORANGE, "#E4E4E4")]
    figure.legend(patches, ["class 1", "class 2", "margin: neither"], loc="outside lower center", ncols=3)
    return figure


def target_logits() -> Figure:
    """What a loss puts in the place of cos(theta), for the target and for other classes that are too close.

    CurricularFace's target is ArcFace's; MV-Softmax's is CosFace's up to 90 degrees.
    """
    fixed: dict[str, Margin] = {
        "NSL": CosFaceMargin(0.0),
        "CosFace, $m = 0.35$": CosFaceMargin(0.35),
        "GB-CosFace, $m = 0.16$": GBCosFaceMargin(0.16),
        "ArcFace, $m = 0.5$": ArcFaceMargin(0.5),
        "combined, $m = (1, 0.3, 0.2)$": CombinedMargin((1.0, 0.3, 0.2)),
        "SphereFace, $m = 1.7$": SphereFaceMargin(1.7),
        r"A-Softmax, $m = 4$, $\lambda = 5$": AnnealedSphereFaceMargin(4.0, base=0.0),
        "X2-Softmax": X2SoftmaxMargin(),
    }
    adaface, kappaface = AdaFaceMargin(0.4), KappaFaceMargin([1, 1])
    adaface.mean.fill_(20.0)
    adaface.std.fill_(5.0)
    kappaface.weights.copy_(torch.tensor([0.2, 0.8]))
    of_sample = [
        ("AdaFace, norm 3 deviations below the mean", adaface, 5.0, 0, RED, ":"),
        ("AdaFace, norm at the mean", adaface, 20.0, 0, RED, "--"),
        ("AdaFace, norm 3 deviations above the mean", adaface, 35.0, 0, RED, "-"),
        ("MagFace, norm 10", MagFaceMargin(), 10.0, 0, BLUE, ":"),
        ("MagFace, norm 60", MagFaceMargin(), 60.0, 0, BLUE, "--"),
        ("MagFace, norm 110", MagFaceMargin(), 110.0, 0, BLUE, "-"),
        ("KappaFace, class of weight 0.2", kappaface, 1.0, 0, GREEN, ":"),
        ("KappaFace, class of weight 0.8", kappaface, 1.0, 1, GREEN, "-"),
    ]
    curricular = {t: CurricularFaceMargin(0.5) for t in (0.3, 0.7)}
    for t, margin in curricular.items():
        margin.t.fill_(t)
    reshaping = [
        *(
            (f"CurricularFace, $t = {t}$", margin, color)
            for (t, margin), color in zip(curricular.items(), (SKY, BLUE), strict=True)
        ),
        ("MV-Softmax, $t = 0.2$", MVSoftmaxMargin(), RED),
        ("inter-class filter, above 0.4", CombinedMargin(filter_above=0.4), GREEN),
    ]
    theta = torch.linspace(0, math.pi, 1441, dtype=torch.float64)
    figure, panels = plt.subplots(1, 3, figsize=(14, 5.2), sharey=True)
    left, middle, right = panels
    colors = (BLACK, RED, ORANGE, BLUE, PURPLE, GREEN, SKY, "#7F7F7F")
    lines = ("-", "-", "--", "-", "--", "-", "--", "-.")
    for (name, margin), color, line in zip(fixed.items(), colors, lines, strict=True):
        left.plot(theta.rad2deg(), margin.eval()(theta.cos()), line, color=color, label=name)
    for axes in (middle, right):
        axes.plot(theta.rad2deg(), theta.cos(), color=BLACK, label=r"$\cos\,\theta$")
    for name, margin, norm, label, color, line in of_sample:
        rows = Rows(torch.full((len(theta), 1), norm, dtype=torch.float64), torch.full((len(theta),), label))
        middle.plot(theta.rad2deg(), margin.eval()(theta.cos(), rows), line, color=color, label=name)
    target, row = (theta.new_tensor([0.5]), Rows(theta.new_ones(1, 1), torch.zeros(1, dtype=torch.int64)))
    for name, margin, color in reshaping:
        threshold, (q, a, b) = margin.eval().negatives(target, row)
        hard = theta[theta.cos() > threshold]
        cos = hard.cos()
        right.plot(hard.rad2deg(), (q * cos + a) * cos + b, color=color, label=name)
    titles = (
        "margins of the angle alone",
        "margins that follow the norm or the class",
        "other classes, target at 60°",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel=r"angle $\theta$ to the class centre (degrees)", xlim=(0, 180))
        axes.set(ylim=(-3, 1.75), xticks=range(0, 181, 30))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=7.5, columnspacing=1)
    left.set_ylabel("logit, before the scale $s$")
    return figure


def toy(steps: int = 600) -> tuple[Figure, dict[str, Tensor]]:
    """2-D features of samples not trained on, of 8 identities: with softmax, and with a margin that grows.

    An identity is a Gaussian around a random point of R^16. All heads see the same samples, and a network of the
    same initial weights.

    Returns:
        The figure, and each head's `gaps_between` identities.
    """
    random = torch.Generator().manual_seed(0)
    prototypes = torch.randn(TOY_IDENTITIES, 16, generator=random)
    batches = [toy_samples(prototypes, 32, random) for _ in range(steps)]
    unseen, labels = toy_samples(prototypes, 150, random)
    colors = [(BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE)[label] for label in labels.tolist()]
    figure, rows = plt.subplots(2, len(TOY_HEADS), figsize=(11, 5.8))
    gaps = {}
    for (name, margin), plane, circle in zip(TOY_HEADS.items(), *rows, strict=True):
        features = toy_network(margin, batches)(unseen).detach()  # (n, 2)
        gaps[name] = gaps_between(features, labels)
        plane.scatter(*features.T, s=3, c=colors, linewidths=0)
        bound = 1.05 * features.abs().max().item()
        plane.set(title=name, xlim=(-bound, bound), ylim=(-bound, bound), xlabel="$x_1$")
        circle.scatter(*F.normalize(features).T, s=6, c=colors, linewidths=0)
        circle.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        circle.set_xlabel(r"$x_1 / \|x\|$")
        circle.text(0, 0, gap_text(gaps[name]), ha="center", va="center")
        for axes in (plane, circle):
            axes.set_box_aspect(1)
    rows[0, 0].set_ylabel("$x_2$")
    rows[1, 0].set_ylabel(r"$x_2 / \|x\|$")
    return figure, gaps


def toy_samples(prototypes: Tensor, each: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(len(prototypes)).repeat(each)  # (n,)
    noise = torch.randn(len(labels), prototypes.shape[1], generator=random)
    return prototypes[labels] + TOY_NOISE * noise, labels


def toy_network(margin: float | None, batches: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """Trained with LMCL, or with softmax where there is no margin."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    head = (
        SoftmaxLoss(2, TOY_IDENTITIES)
        if margin is None
        else FusedCosFaceLoss(TOY_IDENTITIES, 2, margin, TOY_SCALE)
    )
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for samples, labels in batches:
        head(network(samples), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network


def gap_text(gaps: Tensor) -> str:
    return f"mean gap {gaps.mean():.1f}°\nsmallest {gaps.min():.1f}°"


def gaps_between(features: Tensor, labels: Tensor) -> Tensor:
    """(C,) degrees between each of C identities of 2-D features and the next one around the circle.

    An identity reaches from the 5th to the 95th percentile of its angles around their mean direction; where two
    overlap, their gap is negative.
    """
    angle = torch.atan2(*features.double().T.flip(0))  # (n,)
    spans = []
    for label in labels.unique():
        own = angle[labels == label]
        mean = torch.atan2(own.sin().mean(), own.cos().mean())
        away = (own - mean + math.pi).remainder(2 * math.pi) - math.pi
        spans.append(mean + away.quantile(away.new_tensor([0.05, 0.95])))
    low, high = torch.stack(sorted(spans, key=lambda span: span.mean())).T  # (C,) each
    return (torch.cat([low[1:], low[:1] + 2 * math.pi]) - high).rad2deg()


def margin_sweep(seeds: int = 3, processes: int = 2, results: Path = RESULTS / "losses.json") -> Figure:
    """Verification on the glyph data by m: one training for each m and seed, kept in `results`."""
    margins = [round(0.05 * i, 2) for i in range(10)]
    trials = [
        Trial("LMCL (CosFace)", FusedCosFaceLoss, {"margin": m, "scale": SCALE}, Recipe(epochs=EPOCHS, seed=seed))
        for seed in range(seeds)
        for m in margins
    ]
    rates = run_all(trials, results, processes)
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4))
    names = {
        "accuracy": "10-fold accuracy (%)",
        "rank-1": "rank-1 (%)",
        "TAR@FAR=1e-4": "TAR at a FAR of 1e-4 (%)",
    }
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        by_margin = torch.tensor([[100 * run.get(name, math.nan) for run in rates]]).view(seeds, len(margins))
        for values in by_margin:
            axes.plot(margins, values, "o", color=SKY, markersize=3.5)
        axes.plot(margins, by_margin.mean(0), color=BLUE)
        axes.set(xlabel="margin $m$", ylabel=label, xticks=margins[::2])
        axes.grid(alpha=0.25)
    handles = [*panels[0].lines[:1], panels[0].lines[-1]]
    figure.legend(handles, ["one training", f"mean of {seeds}"], loc="outside lower center", ncols=2)
    return figure


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """The rows in a file of the bench's --json in which these columns were measured; ValueError if none was."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    found = [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and all(row.get(column) is not None for column in columns)
    ]
    if not found:
        raise ValueError(f"{path} has no row of `python -m bench` with {', '.join(columns)}.")
    return found


def sparse_density(results: Path = DENSITY) -> Figure:
    """Time of a training step by the share of the softmax's entries that backward visits.

    Of rows of `python -m bench train-step --state` at one size: those that took the sparse path, the line a + b x
    share through them (least squares, relative), and the exact step; dense wins beyond where the two meet.
    """
    rows = read_rows(results, "classes", "batch", "dim", "path", "tolerance", "kept", "median_s")
    classes = max(row["classes"] for row in rows)
    rows = [row for row in rows if row["classes"] == classes]
    sparse = [row for row in rows if row["path"] == "sparse"]
    dense = [row["median_s"] for row in rows if row["tolerance"] == 0]
    if not (sparse and dense):
        raise ValueError(f"{results} needs rows of the sparse path and of tolerance 0 for {classes:,} classes.")
    exact = torch.tensor(dense).median()
    kept, seconds = torch.tensor([(row["kept"], row["median_s"]) for row in sparse], dtype=torch.float64).T
    powers = torch.stack([torch.ones_like(kept), kept], 1) / seconds[:, None]
    (a,), (b,) = torch.linalg.lstsq(powers, torch.ones_like(kept)[:, None]).solution.tolist()
    even = (float(exact) - a) / b
    figure, axes = plt.subplots(figsize=(6, 3.8))
    share = torch.logspace(math.log10(float(kept.min()) / 2), math.log10(max(1.5 * even, 1.0)), 200)
    axes.plot(100 * share, a + b * share, color="#7F7F7F", linewidth=1)
    for tolerance, color in zip(
        sorted({row["tolerance"] for row in sparse}, reverse=True),
        (ORANGE, BLUE, GREEN, RED, PURPLE),
        strict=False,
    ):
        points = [(100 * row["kept"], row["median_s"]) for row in sparse if row["tolerance"] == tolerance]
        axes.plot(*zip(*points, strict=True), "o", color=color, label=f"tolerance {tolerance:g}")
    axes.axhline(float(exact), color=BLACK, linewidth=1, linestyle="--", label="exact")
    axes.axvline(100 * even, color=BLACK, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"dense wins\nbeyond {100 * even:.0f} %", (100 * even, 0), (-4, 4), ha="right", textcoords="offset points"
    )
    axes.set(xscale="log", xlim=(float(100 * share[0]), 100), ylim=(0, 1.3 * float(exact)))
    axes.set(xlabel="entries kept (%)", ylabel="time of a training step (s)")
    axes.set_title(f"{classes:,} classes, {rows[0]['batch']} samples, D = {rows[0]['dim']}")
    axes.legend(loc="center left")
    axes.grid(alpha=0.25)
    return figure


def growth(results: Path = GROWTH) -> Figure:
    """Memory and time of a training step over the classes, of FusedSGD and of its peers.

    Of rows of `python -m bench train-step` in float32 at one batch and size of an embedding.
    """
    rows = read_rows(results, "impl", "classes", "dtype", "peak_extra_mib", "median_s")
    styles = {
        "fused+FusedSGD": ("this package, FusedSGD", BLUE, "o-"),
        "fused+SGD": ("this package, torch.optim.SGD", SKY, "o-"),
        "compile+SGD": ("PyTorch under torch.compile", GREEN, "s-"),
        "eager+SGD": ("PyTorch", ORANGE, "^-"),
        "pml+SGD": ("pytorch-metric-learning", RED, "x-"),
    }
    rows = [row for row in rows if row["dtype"] == "float32" and row["impl"] in styles]
    if not rows:
        raise ValueError(f"{results} has no row in float32 of {', '.join(styles)}.")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, (key, label) in zip(
        panels,
        {"peak_extra_mib": "memory beyond weight\nand momentum (MiB)", "median_s": "time of a step (s)"}.items(),
        strict=True,
    ):
        for impl, (name, color, style) in styles.items():
            points = sorted((row["classes"], row[key]) for row in rows if row["impl"] == impl)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel="classes", ylabel=label)
        axes.grid(alpha=0.25)
    panels[0].set_ylim(bottom=1)
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=3)
    return figure


def draw(name: str, seeds: int, rows: Path | None) -> Figure:
    if name == "toy":
        figure, gaps = toy()
        for head, each in gaps.items():
            print(f"{head}: {gap_text(each)}".replace("\n", ", "))
        return figure
    if name == "margin-sweep":
        return margin_sweep(seeds)
    if name == "sparse-density":
        return sparse_density(rows or DENSITY)
    if name == "growth":
        return growth(rows or GROWTH)
    return {"decision-margins": decision_margins, "target-logits": target_logits}[name]()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name", choices=["decision-margins", "target-logits", "toy", "margin-sweep", "sparse-density", "growth"]
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default: docs/figures")
    parser.add_argument("--seeds", type=count, default=3, help="of margin-sweep (default: 3)")
    parser.add_argument("--rows", type=Path, metavar="JSON", help="of sparse-density and growth")
    args = parser.parse_args(argv)
    path = args.output / f"{args.name}.png"
    try:
        check_output(path)
        with matplotlib.rc_context(STYLE):
            figure = draw(args.name, args.seeds, args.rows)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
            plt.close(figure)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(path)


if __name__ == "__main__":
    main()
