"""Which of its blocks a kernel gets on this device: the fastest of those that compute there what they should.

A compiler can be wrong for one block size and right for the next (Triton has overwritten shared memory that an
asynchronous product still read). So each candidate runs on a sample of the first problem and is held against the
plainest block, in which nothing is asynchronous, and against itself. What fails is left out, with a warning in the
log; `python -m cosface_kernels.info --device` shows it.
"""

import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cosface_kernels.backends.triton.tiles import Key, Tile, candidates, plainest
from cosface_kernels.validation import is_capturing

WARM_UP_MS, TIMED_MS = 5, 25
# Of a row's length. Other blocks round otherwise, and the exponential of a logit of 64 makes 1e-5 of a float32's
# rounding; a part of a product that is lost or counted twice makes more than all of this.
MOST_ROUNDING = 0.05
SMALLEST_ROW = 2.0**-20  # relative to the largest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A kernel ready to be launched on a sample; what it has written, in shapes that no block size changes."""

    launch: Callable[[], object]
    results: Callable[[], Sequence[Tensor]]


Prepare = Callable[[Tile], Trial]  # with memory of its own

_chosen: dict[tuple[str, Key], Tile] = {}
_latest: dict[tuple[str, Key], int] = {}  # bucket, by key without one
_complaints: dict[tuple[str, Key, Tile], str | None] = {}  # by key without a bucket; None: it is right
_milliseconds: dict[tuple[str, Key], dict[Tile, float]] = {}


def choose(kernel: str, key: Key, prepare: Prepare) -> Tile:
    """The candidate for this key, remembered once it is found.

    The default with COSFACE_TRITON_TUNE=0, unchecked; the first that is right under
    torch.use_deterministic_algorithms, because another tile rounds differently, and the next process may choose
    another; inside a CUDA graph capture, where nothing can be tried, the plainest.
    """
    tiles = candidates(kernel, key)
    if len(tiles) == 1 or os.environ.get("COSFACE_TRITON_TUNE") == "0":
        return tiles[0]
    again = _latest.get((kernel, family := _family(key))) == key.bucket
    _latest[kernel, family] = key.bucket
    if found := _chosen.get((kernel, key)) or (not again and _of_larger(kernel, key)):
        return found
    if is_capturing():
        return plainest(kernel, key)
    right = [tile for tile in tiles if _is_right(kernel, key, tile, prepare)] or [plainest(kernel, key)]
    if len(right) > 1 and not torch.are_deterministic_algorithms_enabled():
        times = {tile: _milliseconds_of(prepare(tile).launch) for tile in right}
        _milliseconds[kernel, key] = times
        right = sorted(right, key=times.__getitem__)
    _chosen[kernel, key] = right[0]
    return right[0]


def _of_larger(kernel: str, key: Key) -> Tile | None:
    """The tile of the next larger batches, for a smaller one that comes alone: the last batch of an epoch, say."""
    larger = [
        (other.bucket, tile)
        for (name, other), tile in _chosen.items()
        if name == kernel and other.bucket > key.bucket and _family(other) == _family(key)
    ]
    return min(larger, key=lambda pair: pair[0])[1] if larger else None


def _family(key: Key) -> Key:
    """The key of batches of any size."""
    return dataclasses.replace(key, bucket=0)


def _is_right(kernel: str, key: Key, tile: Tile, prepare: Prepare) -> bool:
    plain, place = plainest(kernel, key), (kernel, _family(key), tile)
    if tile == plain:
        return True
    if place not in _complaints:
        _complaints[place] = complaint = _complaint(functools.partial(_results, prepare), tile, plain)
        if complaint:
            log.warning("%s with %s is not used on this device: %s", kernel, tile, complaint)
    return _complaints[place] is None


def _results(prepare: Prepare, tile: Tile) -> Sequence[Tensor]:
    trial = prepare(tile)
    trial.launch()
    return trial.results()


def _complaint(results: Callable[[Tile], Sequence[Tensor]], tile: Tile, plain: Tile) -> str | None:
    triton = importlib.import_module("triton")
    try:
        first, second = results(tile), results(tile)
    except (RuntimeError, TypeError, ImportError, AttributeError, triton.errors.TritonError) as reason:
        if "out of memory" in str(reason):  # it passes, and what is raised is not remembered
            raise
        return f"it cannot be compiled or launched ({type(reason).__name__}: {reason})."
    if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True)):
        return "two runs on the same numbers gave different bits."
    for got, want in zip(first, results(plain), strict=True):
        if not (error := _worst_row(got, want)) <= MOST_ROUNDING:  # nor is nan
            return f"a row of its results is off by {error:.2g} of its length."
    return None


def _bits(tensor: Tensor) -> Tensor:
    """In which nan equals nan."""
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def _worst_row(got: Tensor, want: Tensor) -> float:
    """The largest error of a row, relative to it; of a vector's number, to the largest one. Not of nan and inf."""
    got, want = got.float(), want.float()
    same = (got == want) | (got.isnan() & want.isnan())
    error, size = (got - want).masked_fill(same, 0), want.nan_to_num(0, 0, 0)
    if want.dim() == 1:
        error, size = error.abs(), size.abs().amax().expand_as(want)
    else:
        error, size = error.norm(dim=1), size.norm(dim=1)
        size = size.clamp_min(SMALLEST_ROW * size.amax())
    return float((error / size.clamp_min(torch.finfo(torch.float32).tiny)).amax())


def _milliseconds_of(launch: Callable[[], object]) -> float:
    """Of the device alone, median of many launches, with nothing left in its caches."""
    testing = importlib.import_module("triton.testing")
    return testing.do_bench(launch, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median")


def report() -> Iterator[str]:
    """A line for each candidate that was tried in this process."""
    for (kernel, key), tile in _chosen.items():
        times = _milliseconds.get((kernel, key), {})
        for other in candidates(kernel, key):
            complaint = _complaints.get((kernel, _family(key), other))
            verdict = complaint or (f"{times[other]:.3f} ms" if other in times else "not timed")
            chosen = " (chosen)" if other == tile else ""
            operand = str(key.operand).removeprefix("torch.")
            yield f"{kernel}, {operand}, N <= {key.bucket}, D = {key.dim}, {other}: {verdict}{chosen}"
