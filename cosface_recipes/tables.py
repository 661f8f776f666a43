"""Rows of text in columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """For a terminal: these columns to the left, the others to the right.

    >>> print(aligned([["", "rank-1"], ["CosFace", "9 %"]]))
             rank-1
    CosFace     9 %
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The first line is that of the titles.

    >>> print(markdown([["loss", "rank-1"], ["CosFace", "92.9"]]))
    | loss | rank-1 |
    | --- | --- |
    | CosFace | 92.9 |
    """
    titles, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows))


def percent(rate: float) -> str:
    return "n/a" if math.isnan(rate) else f"{100 * rate:.2f} %"
