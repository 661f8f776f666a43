"""Class sampling in the manner of Partial FC: the positives of a batch and random negatives."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from cosface_kernels.validation import check_integer, check_sample_rate

TAKE_SPARSE = (torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad)  # of torch.optim
ADVICE = "take FusedSGD or FusedAdamW, which move the drawn rows, or sample_rate=1"


class ClassSampler(nn.Module):
    """Draws the classes that take part in a step's loss: all positives, and negatives without replacement.

    Each set of negatives of the size that is missing is as likely as any other, so each negative class takes part
    with probability q = (S - P) / (C - P), where P counts the distinct positives. A sum over negatives, such
    as sum_j e^{s cos_ij}, over the sampled ones and divided by q is therefore unbiased. The loss itself is not, as
    in Partial FC: over the sampled classes alone it is smaller than the full one, and its gradients push the
    sampled negatives harder. At rate 1 it is the full loss.

    Where the classes are sharded over ranks, each draws from its own, so that C, P and S are those of the rank,
    with a seed that is larger by the number of its first class. A run that resumes on as many ranks goes on as if
    it had not stopped; on another number of ranks, with other draws of the same kind.

    Args:
        num_classes: C; 0 on a rank that owns no class.
        rate: share of the classes that take part, in (0, 1]; S = ceil(rate C), or P where that is more.
        seed: of the draws. The number of draws so far is a buffer, so that a run that resumes from a state_dict
            goes on as if it had not stopped.
        device: of that number; targets may be on another.

    Raises:
        ValueError: an argument is out of its range; the message shows its value.

    Source: An et al., Partial FC, arXiv:2010.05222, Section 3.2.

    >>> classes, positions = ClassSampler(10, 0.4)(torch.tensor([7, 2, -1, 7]))
    >>> len(classes), classes[positions[:2]].tolist(), positions[2].item()
    (4, [7, 2], -1)
    """

    num_classes: int
    rate: float
    seed: int
    draws: Tensor

    def __init__(
        self, num_classes: int, rate: float, seed: int = 0, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 0)
        check_integer("seed", seed)
        check_sample_rate(rate)
        self.num_classes = num_classes
        self.rate = rate
        self.seed = seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))
        _watch_optimizers()

    def reset_parameters(self) -> None:
        """Begins the draws anew."""
        self.draws.zero_()

    def resize_(self, num_classes: int, seed: int) -> None:
        """From now on draws of so many classes; the number of draws goes on."""
        check_integer("num_classes", num_classes, 0)
        self.num_classes, self.seed = num_classes, seed

    def forward(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The classes of the next step.

        Args:
            targets: (N,) or (2, N) int64 class numbers; negative ones are no class.

        Returns:
            classes (S,) int64, ascending, and targets as positions in it; negative ones stay.
        """
        positives = targets[targets >= 0].unique()  # (P,) ascending
        count = max(math.ceil(self.rate * self.num_classes) - len(positives), 0)  # S - P
        generator = torch.Generator(targets.device)
        generator.manual_seed((self.seed * 0x9E3779B1 + int(self.draws)) % 2**32)  # its 32 bits
        self.draws += 1
        ranks = _distinct(count, self.num_classes - len(positives), generator)  # among the classes not positive
        before = positives - torch.arange(len(positives), device=targets.device)  # these before each positive
        negatives = ranks + torch.searchsorted(before, ranks, right=True)  # (S - P,)
        classes = torch.cat([positives, negatives]).sort().values  # (S,)
        return classes, torch.where(targets >= 0, torch.searchsorted(classes, targets), targets)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, rate={self.rate}, seed={self.seed}"


@functools.cache  # once
def _watch_optimizers() -> None:
    """Lets torch's optimizers refuse a sparse gradient before they have moved other parameters, and say why."""
    register_optimizer_step_pre_hook(_check_optimizer)


def _check_optimizer(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Of one of torch.optim, checks the gradients that it steps on: those of its closure, if it has one."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _check_gradients(optimizer)
        return None

    def checked() -> Any:
        loss = closure()
        _check_gradients(optimizer)
        return loss

    return args[:1], {**kwargs, "closure": checked}


def _check_gradients(optimizer: Optimizer) -> None:
    """
    Raises:
        RuntimeError: the optimizer, one of torch.optim, cannot step on a sparse gradient that it has.
    """
    gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    sparse = [[gradient.layout is torch.sparse_coo for gradient in of_group] for of_group in gradients]
    for group, of_group in zip(optimizer.param_groups, sparse, strict=True):
        if not any(of_group):
            continue
        name, why = type(optimizer).__name__, ""
        if isinstance(optimizer, torch.optim.SparseAdam) and not all(map(all, sparse)):
            why = f"{name} takes no dense one beside it"
        elif not isinstance(optimizer, TAKE_SPARSE):
            why = f"{name} takes none"
        elif group.get("weight_decay"):
            why = f"{name} with weight_decay={group['weight_decay']} takes none"
        elif group.get("fused"):
            why = f"{name} with fused=True takes none"
        if why:
            raise RuntimeError(f"The gradient of sampled classes is sparse, and {why}: {ADVICE}.")


def _distinct(count: int, below: int, generator: torch.Generator) -> Tensor:
    """(count,) distinct numbers in [0, below), ascending, each such set as likely as any other.

    Repeated draws give each set of their size with the same probability, and so does a random part of it. Work and
    memory grow with count alone.
    """
    device = generator.device
    if 4 * count > below:
        return torch.randperm(below, generator=generator, device=device)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device=device)
    while len(drawn) < count:
        missing = (count - len(drawn)) * 5 // 4 + 16
        more = torch.randint(below, (missing,), generator=generator, device=device)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator, device=device)[:count]].sort().values
