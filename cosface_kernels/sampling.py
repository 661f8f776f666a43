"""Class sampling in the manner of Partial FC: the positives of a batch and random negatives."""

import math
import numbers

import torch
from torch import Tensor, nn


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
        if not isinstance(rate, numbers.Real) or not 0 < rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {rate!r}.")
        self.num_classes = num_classes
        self.rate = rate
        self.seed = seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        """Begins the draws anew."""
        self.draws.zero_()

    def forward(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The classes of the next step.

        Args:
            targets: (N,) int64 class numbers; negative ones are no class.

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
