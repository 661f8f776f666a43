"""What runs in one implementation's process: the check of its output, and the timed steps."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench import machine
from bench.implementations import IMPLEMENTATIONS, Problem, Step, UnavailableError, build, eager_loss
from cosface_kernels import reference

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
CHECK_CLASSES = 4 * 4003  # 125 MiB of float64 logits at N = 1024; a prime: no tile divides them, sub-centres do
FEW_ULP = 4
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


class Accuracy(NamedTuple):
    """Errors against float64, each relative to the largest magnitude of what it should be."""

    error: float
    plain: float  # of plain PyTorch in the same dtype, on the same problem
    kept: float = 0.0  # what may come from numbers that are kept in fewer bits on purpose

    def allowed(self, dtype: str, scale: float) -> float:
        """Twice plain PyTorch's error, and a few ulp of the result and of logits of up to `scale`.

        Logits have no less than float32's precision, whatever the dtype.
        """
        eps = torch.finfo(getattr(torch, dtype)).eps
        of_logits = scale * min(eps, torch.finfo(torch.float32).eps)
        return 2 * self.plain + FEW_ULP * (eps + of_logits) + self.kept


class Check:
    """Compares loss, dx and dw with the float64 reference, for at most CHECK_CLASSES classes."""

    def __init__(self, case: Case) -> None:
        self.case = replace(case, classes=min(case.classes, CHECK_CLASSES))

    def turn(self) -> Accuracy:
        """The largest error of the three."""
        torch.set_num_threads(self.case.threads)
        problem = make_problem(self.case)
        definition = IMPLEMENTATIONS[self.case.impl].definition
        wanted = _evaluate(problem, definition or lmcl, torch.float64)
        plain = _evaluate(problem, definition or _eager, DTYPES[self.case.dtype])
        step = build(self.case.impl, problem)
        loss = step.loss()
        loss.backward()
        return Accuracy(largest_error((loss, *step.gradients()), wanted), largest_error(plain, wanted))


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
        turn = self._steps(apart=first and compiles)
        machine.release_memory()
        return turn

    def _steps(self, apart: bool) -> Turn:
        """Timed steps, one more apart from them before."""
        step = build(self.case.impl, make_problem(self.case))
        if apart:
            _seconds(step)
            step.clear_gradients()
        return timed(
            lambda: _seconds(step),
            self.case.device,
            lambda: sum(gradient.nbytes for gradient in step.gradients()),
        )


def make_problem(case: Case) -> Problem:
    """As `draw_problem`, without a margin where the implementation has none."""
    problem = draw_problem(case)
    return problem if IMPLEMENTATIONS[case.impl].margin else replace(problem, margin=0.0)


def draw_problem(case: Case) -> Problem:
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
        weight=_draw_rows(case.classes, case.dim, dtype, case.seed, case.threads, case.device),
        labels=torch.randint(case.classes, (case.batch,), generator=rng).to(case.device),
        scale=case.scale,
        margin=case.margin,
    )


def _draw_rows(rows: int, dim: int, dtype: torch.dtype, seed: int, threads: int, device: str) -> Tensor:
    weight = torch.empty(rows, dim, dtype=dtype, device=device)
    if weight.is_cuda:
        rng = torch.Generator(device).manual_seed(seed + 1)
        return weight.normal_(std=dim**-0.5, generator=rng)

    def fill(block: int) -> None:
        rng = torch.Generator().manual_seed(seed + 1 + block)
        weight[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS].normal_(std=dim**-0.5, generator=rng)

    with ThreadPoolExecutor(threads) as pool:  # normal_() itself uses one thread
        list(pool.map(fill, range(-(-rows // BLOCK_ROWS))))
    return weight


def _eager(x: Tensor, w: Tensor, problem: Problem) -> Tensor:
    return eager_loss(x, w, problem.labels, problem.scale, problem.margin)


def lmcl(x: Tensor, w: Tensor, problem: Problem) -> Tensor:
    scale = x.new_full((len(x),), problem.scale)
    return reference.forward(x, w, problem.labels, scale, problem.margin)[0].mean()


def _evaluate(
    problem: Problem, definition: Callable[[Tensor, Tensor, Problem], Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, dx and dw of inputs in this dtype."""
    x = problem.embeddings.detach().to(dtype).requires_grad_()
    w = problem.weight.detach().to(dtype).requires_grad_()
    loss = definition(x, w, problem)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def largest_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of the tensors' errors, each relative to the largest magnitude of what it should be."""
    errors = []
    for g, w in zip(got, wanted, strict=True):
        largest = w.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
        errors.append((g.detach().double() - w).abs().max() / largest)
    return float(torch.stack(errors).max())  # nan, if one is


def timed(run: Callable[[], float], device: str, result_bytes: Callable[[], int] = lambda: 0) -> Turn:
    """Runs, each of which gives its seconds, for SECONDS_PER_TURN, at least two.

    The first, with no memory of an earlier one, is not timed. The bytes of the last one's result are not extra.
    """
    machine.release_memory()
    baseline = machine.reset_peak(device)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < SECONDS_PER_TURN:
        seconds.append(run())
    peak = machine.peak(device)
    extra = None
    if baseline is not None and peak is not None:
        extra = max(0, peak - baseline - result_bytes())
    return Turn(seconds[1:], extra)


def seconds_of(work: Callable[[], object], device: str) -> float:
    machine.synchronize(device)
    start = time.perf_counter()
    work()
    machine.synchronize(device)
    return time.perf_counter() - start


def _seconds(step: Step) -> float:
    """One forward and backward into fresh gradients."""
    step.clear_gradients()
    return seconds_of(lambda: step.loss().backward(), step.embeddings.device.type)
