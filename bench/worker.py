"""What runs in one implementation's process: the check of its output, and the timed steps."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import machine
from bench.implementations import IMPLEMENTATIONS, Problem, Step, UnavailableError, build
from cosface_kernels import reference

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
CHECK_CLASSES = 16001  # 125 MiB of float64 logits at N = 1024; odd, so that no tile divides it
WARM_UP_BATCH, WARM_UP_CLASSES = 8, 1000
SECONDS_PER_TURN = 0.5
BLOCK_ROWS = 16384  # rows of the weight drawn from one seed, whatever the number of threads


@dataclass(frozen=True)
class Case:
    """One implementation on one problem."""

    impl: str
    batch: int
    dim: int
    classes: int
    dtype: str
    margin: float
    scale: float
    seed: int
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Turn:
    seconds: list[float]  # of every timed step
    peak_extra_bytes: int | None  # beyond inputs and gradients


class Check:
    """Compares loss, dx and dw with the float64 reference, for at most CHECK_CLASSES classes."""

    def __init__(self, case: Case) -> None:
        self.case = replace(case, classes=min(case.classes, CHECK_CLASSES))

    def turn(self) -> float:
        """The largest error of the three, each relative to the largest magnitude of what it should be."""
        torch.set_num_threads(self.case.threads)
        problem = make_problem(self.case)
        wanted = _reference(problem, IMPLEMENTATIONS[self.case.impl].definition or _lmcl)
        step = build(self.case.impl, problem)
        loss = step.loss()
        loss.backward()
        got = (loss.detach(), *step.gradients())
        return max(_relative_error(g, w) for g, w in zip(got, wanted, strict=True))


class Measure:
    """Times steps, a few a turn; between turns nothing but the process is left in memory.

    The first turn begins with a small problem, whose pages of code and library buffers are not counted as the
    step's memory, or with a step of the full size for implementations that compile, whose compiler is not.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.turns = 0

    def turn(self) -> Turn:
        torch.set_num_threads(self.case.threads)
        first, compiles = self.turns == 0, IMPLEMENTATIONS[self.case.impl].compiles
        self.turns += 1
        if first and not compiles:
            small = replace(
                self.case,
                batch=min(self.case.batch, WARM_UP_BATCH),
                classes=min(self.case.classes, WARM_UP_CLASSES),
            )
            _seconds(build(small.impl, make_problem(small)))
        step = build(self.case.impl, make_problem(self.case))
        if first and compiles:
            _seconds(step)
            step.clear_gradients()
        turn = _timed(step)
        del step
        machine.release_memory()
        return turn


def make_problem(case: Case) -> Problem:
    """Random embeddings, class centres and labels; the same for a seed, whatever the number of threads.

    Raises:
        UnavailableError: weight and gradient do not fit into the memory that is available.
    """
    dtype = DTYPES[case.dtype]
    needed, available = 2 * case.classes * case.dim * dtype.itemsize, machine.available_bytes(case.device)
    if available is not None and needed > available:
        raise UnavailableError(
            f"Weight and gradient take {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available."
        )
    rng = torch.Generator().manual_seed(case.seed)
    return Problem(
        embeddings=torch.randn(case.batch, case.dim, generator=rng).to(case.device, dtype),
        weight=_draw_rows(case.classes, case.dim, dtype, case.seed, case.threads).to(case.device),
        labels=torch.randint(case.classes, (case.batch,), generator=rng).to(case.device),
        scale=case.scale,
        margin=case.margin if IMPLEMENTATIONS[case.impl].margin else 0.0,
    )


def _draw_rows(rows: int, dim: int, dtype: torch.dtype, seed: int, threads: int) -> Tensor:
    weight = torch.empty(rows, dim, dtype=dtype)

    def fill(block: int) -> None:
        rng = torch.Generator().manual_seed(seed + 1 + block)
        weight[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS].normal_(std=dim**-0.5, generator=rng)

    with ThreadPoolExecutor(threads) as pool:  # normal_() itself uses one thread
        list(pool.map(fill, range(-(-rows // BLOCK_ROWS))))
    return weight


def _lmcl(x: Tensor, w: Tensor, problem: Problem) -> Tensor:
    scale = x.new_full((len(x),), problem.scale)
    return reference.forward(x, w, problem.labels, scale, problem.margin)[0].mean()


def _reference(
    problem: Problem, definition: Callable[[Tensor, Tensor, Problem], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, dx and dw in float64."""
    x = problem.embeddings.detach().double().requires_grad_()
    w = problem.weight.detach().double().requires_grad_()
    loss = definition(x, w, problem)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    largest = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float((got.double() - wanted).abs().max() / largest)


def _timed(step: Step) -> Turn:
    """Steps for SECONDS_PER_TURN, at least two; the first, with no memory of an earlier one, is not timed."""
    device = step.embeddings.device.type
    machine.release_memory()
    baseline = machine.reset_peak(device)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < SECONDS_PER_TURN:
        seconds.append(_seconds(step))
    peak = machine.peak(device)
    extra = None
    if baseline is not None and peak is not None:
        gradients = sum(gradient.nbytes for gradient in step.gradients())
        extra = max(0, peak - baseline - gradients)
    return Turn(seconds[1:], extra)


def _seconds(step: Step) -> float:
    """One forward and backward into fresh gradients."""
    step.clear_gradients()
    machine.synchronize(step.embeddings.device.type)
    start = time.perf_counter()
    step.loss().backward()
    machine.synchronize(step.embeddings.device.type)
    return time.perf_counter() - start
