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

from cosface_kernels.backends.chunks import is_full
from cosface_kernels.backends.triton.tiles import Key, Tile, candidates, plainest
from cosface_kernels.validation import is_capturing

WARM_UP_MS, TIMED_MS = 5, 25
# Of a row's length. Other blocks round otherwise, and the exponential of a logit of 64 makes 1e-5 of a float32's
# rounding; a part of a product that is lost or counted twice makes more than all of this.
MOST_ROUNDING = 0.05
SMALLEST_ROW = 2.0**-20  # relative to the largest
ROWS_AT_ONCE = 1024  # that are compared, in float32 and several times over

log = logging.getLogger(__name__)


class NothingSeenError(Exception):
    """A trial's results are 0 or not finite, as those of any block would be."""


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
    torch.use_deterministic_algorithms, because another tile rounds differently, so that neither times nor earlier
    batches may choose it. Where nothing can be tried, in a CUDA graph capture, without memory for it or without a
    number to compare, the first that is known to be right.
    """
    tiles = candidates(kernel, key)
    if len(tiles) == 1 or os.environ.get("COSFACE_TRITON_TUNE") == "0":
        return tiles[0]
    timed = not torch.are_deterministic_algorithms_enabled()
    if timed and (found := _found(kernel, key)):
        return found
    if is_capturing():
        return _known(kernel, key)
    try:
        right = (tile for tile in tiles if _is_right(kernel, key, tile, prepare))
        if not timed:
            return next(right, plainest(kernel, key))
        _chosen[kernel, key] = fastest = _fastest(kernel, key, list(right), prepare)
    except RuntimeError as error:
        if not is_full(error):
            raise
        log.warning("Memory is too full to try the blocks of %s; the next batch tries them again.", kernel)
        return _known(kernel, key)
    except NothingSeenError:
        return _known(kernel, key)
    return fastest


def _found(kernel: str, key: Key) -> Tile | None:
    """What was chosen before, for these batches or for larger ones."""
    again = _latest.get((kernel, family := _family(key))) == key.bucket
    _latest[kernel, family] = key.bucket
    return _chosen.get((kernel, key)) or (None if again else _of_larger(kernel, key))


def _known(kernel: str, key: Key) -> Tile:
    """The first that was found to be right, or the plainest."""
    tiles = (tile for tile in candidates(kernel, key) if _complaints.get((kernel, _family(key), tile), "") is None)
    return next(tiles, plainest(kernel, key))


def _fastest(kernel: str, key: Key, right: list[Tile], prepare: Prepare) -> Tile:
    if len(right) < 2:
        return right[0] if right else plainest(kernel, key)
    times = {tile: _milliseconds_of(prepare(tile).launch) for tile in right}
    _milliseconds[kernel, key] = times
    return min(right, key=times.__getitem__)


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
    try:
        first = results(tile)
        # The second run is held no longer: a third one's memory beside both may be more than the step's.
        is_same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, results(tile), strict=True))
    except Exception as reason:  # of whatever kind; what is no fault of this block, the plainest one raises next
        if is_full(reason):
            raise
        return f"it cannot be compiled or launched ({type(reason).__name__}: {reason})."
    if not is_same:
        return "two runs on the same numbers gave different bits."
    wanted = results(plain)
    mine, its = (", ".join(str(list(each.shape)) for each in some) for some in (first, wanted))
    if mine != its:
        return f"its results have shapes {mine}, those of the plainest block {its}."
    for got, want in zip(first, wanted, strict=True):
        if not (error := _worst_row(got, want)) <= MOST_ROUNDING:  # nor is nan
            return f"a row of its results is off by {error:.2g} of its length."
    if not any((want.isfinite() & (want != 0)).any() for want in wanted):
        raise NothingSeenError
    return None


def _bits(tensor: Tensor) -> Tensor:
    """In which nan equals nan."""
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def _worst_row(got: Tensor, want: Tensor) -> float:
    """The largest error of a row, relative to it; of a vector's number, to the largest one. Not of nan and inf."""
    some_rows = zip(*(each.reshape(len(each), -1).split(ROWS_AT_ONCE) for each in (got, want)), strict=True)
    error, size = (torch.cat(each) for each in zip(*(_lengths(*rows) for rows in some_rows), strict=True))
    size = size.clamp_min(SMALLEST_ROW * size.amax()) if want.dim() > 1 else size.amax().expand_as(size)
    return float((error / size.clamp_min(torch.finfo(torch.float32).tiny)).amax())


def _lengths(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows' errors and of the rows themselves, (rows,) each."""
    got, want = got.float(), want.float()
    same = (got == want) | (got.isnan() & want.isnan())
    return (got - want).masked_fill(same, 0).norm(dim=1), want.nan_to_num(0, 0, 0).norm(dim=1)


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
