"""`python -m bench sizes`: the step at a grid of sizes, and its ratio to the fastest peer at each of them."""

import argparse
import math
from collections.abc import Sequence
from itertools import groupby

from bench import step
from bench.implementations import IMPLEMENTATIONS
from bench.report import MISSING, Row, duration

GRID = {
    "batch": [32, 128, 512, 2048],
    "dim": [128, 512],
    "classes": [1000, 10_575, 85_742, 360_232],  # the identities of CASIA-WebFace, MS1M and Glint360K, and fewer
    "dtype": ["float32", "bfloat16"],
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sizes",
        help="forward and backward at a grid of sizes",
        description="The command `step` at a grid of sizes, and the ratio of the fastest peer to the fused step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    step.add_options(parser, IMPLEMENTATIONS, "fused,eager,compile,pml")
    parser.set_defaults(**GRID, run=lambda args: step.run(args, summary=summary))


def summary(rows: Sequence[Row]) -> list[str]:
    """A line a problem, with the geometric mean of the ratios to peers: others that compute the same loss."""
    lines = [f"{'dtype':9} {'dim':>4} {'batch':>5} {'classes':>8} {'fused':>9} {'fastest peer':>22} {'ratio':>6}"]
    ratios = []
    for (dtype, dim, batch, classes), found in groupby(rows, lambda r: (r.dtype, r.dim, r.batch, r.classes)):
        times = {row.impl: row.median_s for row in found if row.median_s}
        fused = times.pop("fused", None)
        peers = {impl: seconds for impl, seconds in times.items() if IMPLEMENTATIONS[impl].is_peer}
        peer = min(peers, key=peers.__getitem__, default=None)
        ratio = peers[peer] / fused if peer and fused else None
        ratios += [ratio] if ratio else []
        named = f"{peer} {duration(peers[peer])}" if peer else MISSING
        lines.append(
            f"{dtype:9} {dim:4} {batch:5} {classes:8,} {duration(fused):>9} {named:>22} "
            + (f"{ratio:6.2f}" if ratio else f"{MISSING:>6}")
        )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"{len(ratios)} problems: {mean:.2f} in the geometric mean, at least {min(ratios):.2f}")
    return lines
