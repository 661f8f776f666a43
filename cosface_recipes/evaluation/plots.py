"""Curves as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cosface_recipes.evaluation.verification import Curve


def suffixes() -> list[str]:
    """Of the files that can be drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    return [f".{name}" for name in FigureCanvasBase.get_supported_filetypes()]


@contextmanager
def figure(path: Path, title: str, **settings):
    """Axes that are saved to `path` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    yield axes
    axes.set(title=title, xscale="log", ylim=(0, 1.02), **settings)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_roc(curves: Mapping[str, Curve], path: Path) -> None:
    """True against false acceptance rate.

    Args:
        curves: by name.
    """
    genuine, impostors = next(iter(curves.values())).pairs
    title = f"{genuine:,} genuine and {impostors:,} impostor pairs"
    with figure(path, title, xlabel="false acceptance rate", ylabel="true acceptance rate") as axes:
        for name, curve in curves.items():
            axes.plot(*curve.roc(), label=name)


def plot_cmc(curves: Mapping[str, Sequence[float]], path: Path, title: str = "") -> None:
    """Cumulative match characteristic: the share of probes identified at each rank or a better one.

    Args:
        curves: by name, the rates at rank 1, 2, ...
    """
    with figure(path, title, xlabel="rank", ylabel="identification rate") as axes:
        for name, rates in curves.items():
            axes.plot(range(1, len(rates) + 1), rates, label=name)
