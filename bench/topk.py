"""`python -m bench topk`: the k nearest classes, against peers and against the forward pass of the loss."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine, step
from bench.implementations import Problem, UnavailableError
from bench.worker import (
    CHECK_CLASSES,
    DTYPES,
    WARM_UP_BATCH,
    WARM_UP_CLASSES,
    Accuracy,
    Case,
    Turn,
    draw_problem,
    largest_error,
    lmcl,
    seconds_of,
    timed,
)
from cosface_recipes.arguments import count

Found = tuple[Tensor, Tensor]  # cosines and classes, (N, k) each
Work = Callable[[], Found | Tensor]  # a search, or the mean loss of a forward pass


@dataclass(frozen=True)
class Implementation:
    """How to build, from a problem and k, what is done again and again."""

    build: Callable[[Problem, int], Work]
    flops: int = 2
    is_loss: bool = False  # with a margin and a scale, which a search has not
    note: str | None = None


def _fused(problem: Problem, k: int) -> Callable[[], Found]:
    from cosface_kernels import nearest_classes

    return lambda: nearest_classes(problem.embeddings, problem.weight, k)


def _forward(problem: Problem, _: int) -> Callable[[], Tensor]:
    from cosface_kernels import cosface_loss

    options = {"scale": problem.scale, "margin": problem.margin}
    return lambda: cosface_loss(problem.embeddings, problem.weight, problem.labels, **options)


def _logits(problem: Problem, k: int) -> Callable[[], Found]:
    def run() -> Found:
        cosines = F.normalize(problem.embeddings) @ F.normalize(problem.weight).T  # (N, C)
        return tuple(cosines.topk(k))

    return run


def _faiss(problem: Problem, k: int) -> Callable[[], Found]:
    try:
        import faiss
    except ImportError as error:
        raise UnavailableError("faiss needs the package faiss-cpu, which is not installed.") from error
    if problem.weight.dtype != torch.float32 or problem.weight.is_cuda:
        raise UnavailableError(f"faiss searches float32 on a CPU, got {problem.weight.dtype}.")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(problem.weight.shape[1])
    index.add(F.normalize(problem.weight).numpy())

    def run() -> Found:
        cosines, classes = index.search(F.normalize(problem.embeddings).numpy(), k)
        return torch.from_numpy(cosines), torch.from_numpy(classes)

    return run


IMPLEMENTATIONS = {
    "fused": Implementation(_fused),
    "forward": Implementation(_forward, is_loss=True, note="the loss without a gradient, for comparison"),
    "logits": Implementation(_logits, note="all cosines, then torch.topk"),
    "faiss": Implementation(_faiss, note="IndexFlatIP; the copy of the normalised weight is not counted"),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "topk",
        help="the k nearest classes",
        description="Times the search for the k nearest classes, each implementation in a process of its own, in "
        "turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    step.add_options(parser, IMPLEMENTATIONS, ",".join(IMPLEMENTATIONS))
    parser.add_argument("--k", type=count, default=10, help="classes that are sought for each sample")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    jobs = step.Jobs(
        IMPLEMENTATIONS,
        partial(Check, k=args.k),
        partial(Measure, k=args.k),
        note=lambda case, _: IMPLEMENTATIONS[case.impl].note,
        ran_with=lambda case: (case.margin, case.scale) if IMPLEMENTATIONS[case.impl].is_loss else (None, None),
    )
    return step.run(args, jobs)


def _build(case: Case, k: int) -> tuple[Problem, Work]:
    torch.set_num_threads(case.threads)
    problem = draw_problem(case)
    return problem, IMPLEMENTATIONS[case.impl].build(problem, min(k, case.classes))


class Check:
    """Compares with float64, for at most CHECK_CLASSES classes: the cosines found, and those of the classes found.

    Of the forward pass, the mean loss.
    """

    def __init__(self, case: Case, k: int) -> None:
        self.case, self.k = replace(case, classes=min(case.classes, CHECK_CLASSES)), k

    def turn(self) -> Accuracy:
        problem, work = _build(self.case, self.k)
        with torch.no_grad():
            found = work()
        x, w = problem.embeddings.double(), problem.weight.double()
        if isinstance(found, Tensor):
            error = largest_error([found], [lmcl(x, w, problem)])
        else:
            cosines = F.normalize(x) @ F.normalize(w).T  # (N, C)
            wanted = cosines.topk(found[0].shape[1]).values
            error = largest_error([found[0], cosines.gather(1, found[1])], [wanted, wanted])
        return Accuracy(error, torch.finfo(DTYPES[self.case.dtype]).eps)  # inputs are rounded once, to its dtype


class Measure:
    """Times searches, a few a turn; see `bench.worker.Measure`."""

    def __init__(self, case: Case, k: int) -> None:
        self.case, self.k = case, k
        self.turns = 0

    def turn(self) -> Turn:
        if not self.turns:
            small = replace(self.case, batch=WARM_UP_BATCH, classes=max(self.k, WARM_UP_CLASSES))
            _build(small, self.k)[1]()
        self.turns += 1
        turn = self._searches()
        machine.release_memory()
        return turn

    @torch.no_grad()
    def _searches(self) -> Turn:
        work = _build(self.case, self.k)[1]
        return timed(lambda: seconds_of(work, self.case.device), self.case.device)
