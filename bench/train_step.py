"""`python -m bench train-step`: forward, backward and update of the weight, against peers under torch's SGD.

Each step sees new noisy views of the same N classes, so that the loss falls if the weight learns. With `--state`,
steps with a gradient_tolerance are timed instead (tolerance.py).
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import machine, step, tolerance
from bench.implementations import Problem, UnavailableError, build
from bench.worker import (
    CHECK_CLASSES,
    DTYPES,
    WARM_UP_BATCH,
    WARM_UP_CLASSES,
    Accuracy,
    Case,
    Turn,
    largest_error,
)
from cosface_kernels import float8, reference
from cosface_kernels.backends import select
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.init import normal_
from cosface_kernels.options import Options

WEIGHT_DTYPES = {**DTYPES, "float8_e4m3fn": FLOAT8}  # embeddings are then in bfloat16
DEFAULT_IMPLEMENTATIONS = "fused+FusedSGD,fused+FusedSGD+cache,fused+SGD,compile+SGD,eager+SGD,pml+SGD"
LEARNING_RATE, MOMENTUM = 1.0, 0.9
NOISE = 0.5  # of a view, relative to its class's latent vector
TIMED_STEPS = 3  # a turn, after one that touches all memory first
CACHE_SHARE = 4  # the cache takes this part of the weight's bytes
CACHE_ROUNDING = 2.0**-16  # of its cosines, in fixed point
SGD_SAMPLE = 20_000  # rows on which the variants of torch.optim.SGD are compared
CHECKED_STEPS = 2


@dataclass(frozen=True)
class Implementation:
    """A loss of bench.implementations, and what moves the weight.

    Attributes:
        loss: its name there.
        fused: whether an optimizer of cosface_kernels moves the rows inside backward.
        cache: whether cosines are kept from forward to backward.
        flops: k for a step of k N C D in matrix products; with a cache, where nothing is kept.
        momentum: whether there is some.
        state_dtype: of it; None: the optimizer's default.
    """

    loss: str
    fused: bool
    cache: bool
    flops: int
    momentum: bool = True
    state_dtype: torch.dtype | None = None

    def state_bytes(self, weight: torch.dtype) -> int:
        """Of an entry."""
        dtype = self.state_dtype or (torch.bfloat16 if weight is FLOAT8 else weight)
        return dtype.itemsize if self.momentum else 0


IMPLEMENTATIONS = {
    "fused+FusedSGD": Implementation("fused", True, False, 8),
    "fused+FusedSGD+cache": Implementation("fused", True, True, 8),
    "fused+FusedSGD+fp8": Implementation("fused", True, False, 8, state_dtype=FLOAT8),
    "fused+FusedSGD+plain": Implementation("fused", True, False, 8, momentum=False),
    "fused+SGD": Implementation("fused", False, False, 8),
    "compile+SGD": Implementation("compile", False, False, 6),
    "eager+SGD": Implementation("eager", False, False, 6),
    "pml+SGD": Implementation("pml", False, False, 6),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train-step",
        help="forward, backward and update of the head's weight",
        description="Times whole training steps of the head under SGD with momentum, each implementation in a "
        "process of its own, in turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    step.add_options(parser, IMPLEMENTATIONS, DEFAULT_IMPLEMENTATIONS, WEIGHT_DTYPES).set_defaults(run=run)
    tolerance.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """As `bench step`; a row's note has the loss, the memory at the peak, and what PyTorch would need."""
    if args.state:
        return tolerance.run(args)
    return step.run(args, step.Jobs(IMPLEMENTATIONS, Check, Measure, _note))


def _note(case: Case, turns: list["TrainTurn"]) -> str:
    """The needs of PyTorch are computed: weight, gradient, momentum and one float32 matrix of logits."""
    itemsize = WEIGHT_DTYPES[case.dtype].itemsize
    needs = 3 * case.classes * case.dim * itemsize + 4 * case.batch * case.classes
    notes = [f"PyTorch needs at least {needs / 2**30:.1f} GiB (computed)"]
    if turns:
        first, last = turns[0].losses
        notes.insert(0, f"loss {first:.2f} -> {last:.2f}")
    resident = [turn.resident_bytes for turn in turns if turn.resident_bytes is not None]
    if resident:
        notes.insert(1, f"resident {max(resident) / 2**30:.2f} GiB")
    return "; ".join(notes)


@dataclass(frozen=True)
class TrainTurn(Turn):
    losses: tuple[float, float]  # of the first step and the last
    resident_bytes: int | None  # at the peak


class Training:
    """Steps of one implementation; `weight` is (C, D) whatever its own layout."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        implementation, dtype = IMPLEMENTATIONS[case.impl], WEIGHT_DTYPES[case.dtype]
        if dtype is FLOAT8 and not implementation.fused:
            raise UnavailableError("A weight in float8 has no gradient for torch.optim.SGD.")
        weight_bytes = case.classes * case.dim * dtype.itemsize
        self.cache_bytes = weight_bytes // CACHE_SHARE if implementation.cache else None  # the head's default
        needed = case.classes * case.dim * implementation.state_bytes(dtype) + (self.cache_bytes or 0)
        needed += (1 if implementation.fused else 2) * weight_bytes
        available = machine.available_bytes(case.device)
        if available is not None and needed > available:
            raise UnavailableError(
                f"Weight, momentum{'' if implementation.fused else ', gradient'} and cache take "
                f"{needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available."
            )
        weight = torch.empty(case.classes, case.dim, dtype=dtype, device=case.device)
        std, self.exponents = case.dim**-0.5, None
        if dtype is FLOAT8:
            exponent = float8.initial_exponent(std)
            self.exponents = torch.full((case.classes,), exponent, dtype=torch.int8, device=case.device)
            std /= 2.0**exponent
        normal_(weight, std)
        self.latent = torch.randn(case.batch, case.dim, device=case.device)
        of_x = torch.bfloat16 if dtype is FLOAT8 else dtype
        self.x = torch.empty(case.batch, case.dim, dtype=of_x, device=case.device)
        self.labels = torch.randint(case.classes, (case.batch,), device=case.device)
        problem = Problem(self.x, weight, self.labels, case.scale, case.margin)
        del weight
        if implementation.fused:
            self.loss, self.optimizer, self.parameter = _fused(
                problem, implementation, self.cache_bytes, self.exponents
            )
            self.transposed = False
            if self.cache_bytes is not None:  # a small batch does not fill it
                of_cache = Options(cache_bytes=self.cache_bytes, exponents=self.exponents)
                backend = select(_backend(self.x), self.x, self.parameter, of_cache)
                self.cache_bytes = min(self.cache_bytes, backend.cache_size(self.x, self.parameter, of_cache))
        else:
            built = build(implementation.loss, problem)
            self.loss, self.parameter, self.transposed = built.loss, built.weight, built.transposed
            self.optimizer = _fastest_sgd(self.parameter)
        del problem
        machine.release_memory()
        self.baseline = machine.reset_peak(case.device)

    @property
    def weight(self) -> Tensor:
        weight = self.parameter.detach().T if self.transposed else self.parameter.detach()
        return weight if self.exponents is None else float8.values(weight, self.exponents, torch.float32)

    def state_bytes(self) -> int:
        state = self.optimizer.state[self.parameter]
        return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))

    def step(self) -> float:
        with torch.no_grad():
            self.x.copy_(self.latent + NOISE * torch.randn_like(self.latent))
        self.x.grad = None
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def _fused(
    problem: Problem, implementation: Implementation, cache_bytes: int | None, exponents: Tensor | None
) -> tuple[Callable[[], Tensor], torch.optim.Optimizer, torch.nn.Parameter]:
    from cosface_kernels.functional import margin_softmax_loss
    from cosface_kernels.optim import FusedSGD

    weight, x = torch.nn.Parameter(problem.weight), problem.embeddings.requires_grad_()
    options = {
        "scale": problem.scale,
        "margin": problem.margin,
        "backend": _backend(x),
        "cache_bytes": cache_bytes,
    }
    options["weight_exponent"] = exponents
    momentum = MOMENTUM if implementation.momentum else 0.0
    optimizer = FusedSGD([weight], lr=LEARNING_RATE, momentum=momentum, state_dtype=implementation.state_dtype)
    return lambda: margin_softmax_loss(x, weight, problem.labels, **options), optimizer, weight


def _backend(x: Tensor) -> str:
    return os.environ.get("COSFACE_BACKEND", "cpu" if x.device.type == "cpu" else "triton")


def _fastest_sgd(weight: Tensor) -> torch.optim.Optimizer:
    """torch.optim.SGD with foreach or fused, whichever is faster here on a part of the weight.

    A variant that moves nothing does not count: on the CPU, fused leaves a bfloat16 weight as it is (torch 2.13).
    """
    seconds = {}
    for variant in ("foreach", "fused"):
        sample = weight.detach()[:SGD_SAMPLE].clone().requires_grad_()
        sample.grad, before = torch.ones_like(sample), sample.detach().clone()
        optimizer = torch.optim.SGD([sample], lr=LEARNING_RATE, momentum=MOMENTUM, **{variant: True})
        optimizer.step()
        start = time.perf_counter()
        optimizer.step()
        if not torch.equal(sample, before):
            seconds[variant] = time.perf_counter() - start
    best = min(seconds, key=seconds.__getitem__)
    return torch.optim.SGD([weight], lr=LEARNING_RATE, momentum=MOMENTUM, **{best: True})


class Check:
    """Compares the movement of the weight with float64 and torch.optim.SGD, for at most CHECK_CLASSES classes."""

    def __init__(self, case: Case) -> None:
        self.case = replace(case, classes=min(case.classes, CHECK_CLASSES))

    def turn(self) -> Accuracy:
        torch.set_num_threads(self.case.threads)
        case = self.case
        implementation = IMPLEMENTATIONS[case.impl]
        fixed_point = implementation.cache and case.dtype != "float64"
        kept = case.scale * CACHE_ROUNDING if fixed_point else 0.0
        if implementation.state_dtype is FLOAT8:
            kept += torch.finfo(FLOAT8).eps
        plain = replace(case, impl="eager+SGD", dtype="bfloat16" if case.dtype == "float8_e4m3fn" else case.dtype)
        return Accuracy(_error_of_movement(case), _error_of_movement(plain), kept)


def _error_of_movement(case: Case) -> float:
    training = Training(case)
    start = training.weight.double().clone()
    exact = start.clone().requires_grad_()
    momentum = MOMENTUM if IMPLEMENTATIONS[case.impl].momentum else 0.0
    optimizer = torch.optim.SGD([exact], lr=LEARNING_RATE, momentum=momentum)
    for _ in range(CHECKED_STEPS):
        training.step()
        x = training.x.detach().double()
        scale = x.new_full((len(x),), case.scale)
        optimizer.zero_grad()
        reference.forward(x, exact, training.labels, scale, case.margin)[0].mean().backward()
        optimizer.step()
    moved, wanted = training.weight.double() - start, exact.detach() - start
    return largest_error((moved,), (wanted,))


class Measure:
    """Times steps, a few a turn, each turn from a new weight."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.turns = 0

    def turn(self) -> TrainTurn:
        torch.set_num_threads(self.case.threads)
        if self.turns == 0:
            small = {
                "batch": min(self.case.batch, WARM_UP_BATCH),
                "classes": min(self.case.classes, WARM_UP_CLASSES),
            }
            Training(replace(self.case, **small)).step()
        self.turns += 1
        training = Training(self.case)
        losses, seconds = [training.step()], []
        for _ in range(TIMED_STEPS):
            machine.synchronize(self.case.device)
            start = time.perf_counter()
            losses.append(training.step())
            machine.synchronize(self.case.device)
            seconds.append(time.perf_counter() - start)
        peak, extra = machine.peak(self.case.device), None
        if peak is not None and training.baseline is not None:
            extra = max(0, peak - training.baseline - training.state_bytes() - (training.cache_bytes or 0))
        del training
        machine.release_memory()
        return TrainTurn(seconds, extra, (losses[0], losses[-1]), peak)
