"""What every margin is made of: the batch that it sees, its base class, averages over batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosface_kernels.reference import excess, softplus
from cosface_kernels.validation import check_bool, check_interval, check_per_sample, check_tolerance, vector_of


@dataclass(frozen=True)
class Smoothing:
    """Label smoothing: of a sample's target, a mass of epsilon is spread evenly over all classes.

    Attributes:
        total: (N,) sum_{j != y} cos_ij, of reshaped negatives as they enter the softmax; differentiable.
        classes: how many take part, the target among them.
    """

    epsilon: float
    total: Tensor
    classes: int | Tensor


@dataclass(frozen=True)
class Rows:
    """The samples of a batch, for the margins that look at more than their target's cosine.

    A sample with two labels is two of them; of equal ones, the second has no loss.

    Attributes:
        embeddings: (N, D), as given to the loss.
        targets: (N,) int64 classes, negative for a sample that has no loss.
        weight: (C, D) class centres, or None if they are sharded.
        share: what a parameter that every rank has goes through, so that its gradient is the same on all;
            without it ranks whose losses differ, as with reduction="none", would move it apart.
        smoothing: of the labels, or None.
        hardness: (N,) mean cosine of the hard negatives, 0 where there is none, for a margin that
            `reads_hard_negatives`; without a gradient.
    """

    embeddings: Tensor
    targets: Tensor
    weight: Tensor | None = None
    share: Callable[[Tensor], Tensor] = lambda parameter: parameter
    smoothing: Smoothing | None = None
    hardness: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        return self.targets >= 0  # (N,)

    def norms(self) -> Tensor:
        """(N,) |x_i|, differentiable; 0 for a sample that has no loss."""
        dtype = torch.promote_types(self.embeddings.dtype, torch.float32)
        return torch.linalg.vector_norm(self.embeddings.where(self.valid[:, None], 0), dim=1, dtype=dtype)

    def cross_entropy(self, top: Tensor, log_sum: Tensor, psi: Tensor, scale: Tensor) -> Tensor:
        """(N,) softplus(lse - s psi), with smoothed labels if they are; anything for a sample that has no loss."""
        loss = softplus(torch.where(self.valid, excess(scale, top, log_sum, psi), 0))  # (N,)
        if self.smoothing is None:
            return loss
        epsilon, total, classes = self.smoothing.epsilon, self.smoothing.total, self.smoothing.classes
        return loss + epsilon * scale * (psi - (psi + total) / classes)


class Margin(nn.Module):
    """Base of the margins. A subclass defines psi as `forward(cos, rows)`; some replace `loss`.

    One that `reshapes_negatives` also has `negatives(cos, rows)`, which is called first, without a graph. It
    returns (N,) thresholds, above which a negative's cosine c enters the softmax as (q c + a) c + b, and (3,) q, a
    and b, or (6,) with slopes of their own, as `Options.negatives` of cosface_kernels/options.py says. Of the hard
    negatives, those above, one that `reads_hard_negatives` finds the mean in its rows.

    One that `reads_weight` has a gradient of the class centres besides that of their cosines, and so no sampled
    classes. One whose loss is no cross-entropy has no `smooths_labels`.
    """

    reshapes_negatives = reads_hard_negatives = reads_weight = False
    smooths_labels = True

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define negatives(cos, rows).")

    def __init__(self, *, straight_through: bool = False) -> None:
        super().__init__()
        check_bool("straight_through", straight_through)
        self.straight_through = straight_through
        self._initial: dict[str, float] = {}

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        """softplus(lse - s psi(c)), and 0 for a sample that has no loss.

        Args:
            top, log_sum, cos, scale: (N,), finite for samples without a loss; log_sum is -inf, and top 0, where
                there is no other class.

        Returns:
            (N,); what it holds for a sample without a loss is dropped.
        """
        psi = self(cos, rows)  # (N,)
        check_per_sample(f"the result of {type(self).__name__}", psi, cos)
        if self.straight_through:
            psi = cos + (psi - cos).detach()
        return rows.cross_entropy(top, log_sum, psi, scale)

    def reset_parameters(self) -> None:
        """Sets the state to what it was before the first batch."""
        for name, value in self._initial.items():
            self.get_buffer(name).fill_(value)

    def resize_classes_(self, sources: Tensor, counts: Tensor) -> None:
        """Takes the state of each class to its new label; a class that is new has the state of the beginning.

        Args:
            sources: (C_new,) int64 old labels, -1 for a class that is new.
            counts: (C_new,) int64, how many samples there are of a new class.
        """
        for name, initial in self._initial.items():
            state = self.get_buffer(name)
            if state.dim():
                setattr(self, name, taken(state, sources, torch.full_like(sources, initial, dtype=state.dtype)))

    def parameters_of_each_class(self) -> list[nn.Parameter]:
        """(C,) those that `resize_classes_` changes."""
        return []

    def batch_state(self) -> list[Tensor]:
        """What a batch may change; a state of each class is changed between batches."""
        return [state for state in map(self.get_buffer, self._initial) if not state.dim()]

    def check_use(
        self, label_smoothing: float, gradient_tolerance: float, labels_per_sample: int, entropy: bool
    ) -> None:
        """Raises ValueError for what the loss does not have."""
        if label_smoothing and not self.smooths_labels:
            raise ValueError(
                f"{type(self).__name__} is no cross-entropy, whose labels could be smoothed: label_smoothing must "
                f"be 0, got {label_smoothing!r}."
            )
        if labels_per_sample > 1 and self.reshapes_negatives:
            raise ValueError(
                f"{type(self).__name__} reshapes negatives, of which a second label would be one: labels must "
                f"have shape (N,), got shape (N, {labels_per_sample})."
            )
        if gradient_tolerance and self.reads_hard_negatives:
            raise ValueError(
                f"{type(self).__name__} sums up all classes: gradient_tolerance must be 0, got "
                f"{gradient_tolerance!r}."
            )

    def _register_state(self, name: str, initial: float, *shape: int) -> None:
        self._initial[name] = initial
        self.register_buffer(name, torch.full(shape, initial, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Margin":
        super()._apply(lambda state: in_its_dtype(state, fn(state)), recurse)  # type: ignore[no-untyped-call]
        return self


def in_its_dtype(state: Tensor, moved: Tensor) -> Tensor:
    """Moved to a device, but not by way of a dtype that would round it."""
    return moved if moved.dtype == state.dtype else state.to(moved.device)


def kept_for_backward(state: Tensor) -> Tensor:
    """The same 0-d number. What is cheap, a compiled backward computes again, of a buffer that changed meanwhile.

    A running sum is not cheap to torch.compile, which keeps it.
    """
    return state.reshape(1).cumsum(0).reshape(())


def mean_and_std(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over the valid samples, 0-d float64; nan if there are too few."""
    count = valid.sum()
    values = values.double()  # (N,)
    mean = values.where(valid, 0).sum() / count
    return mean, ((values - mean).where(valid, 0).square().sum() / (count - 1).clamp_min(0)).sqrt()


def update_average(average: Tensor, value: Tensor, rate: float) -> None:
    """average += rate (value - average), in place; a value that is not finite changes nothing."""
    average.copy_(torch.where(value.isfinite(), average.lerp(value.to(average.dtype), rate), average))


def check_use(
    margin: float | Callable[..., Tensor],
    label_smoothing: float,
    gradient_tolerance: float,
    labels_per_sample: int = 1,
    entropy: bool = False,
    *,
    sample_rate: float = 1.0,
) -> None:
    """Raises ValueError for a number out of its range, or what the margin's loss does not have."""
    check_tolerance(gradient_tolerance)
    check_interval("label_smoothing", label_smoothing, "[0, 1]", 0, math.nextafter(1, 2))
    if isinstance(margin, Margin):
        if sample_rate != 1 and margin.reads_weight:
            raise ValueError(
                f"{type(margin).__name__} reads the class centres, and so has a gradient of all classes, also of "
                f"those that are not drawn: sample_rate must be 1, got {sample_rate!r}."
            )
        margin.check_use(label_smoothing, gradient_tolerance, labels_per_sample, entropy)


def check_rate(rate: float) -> None:
    check_interval("rate", rate, "[0, 1]", 0, math.nextafter(1, 2))


def taken(state: Tensor, sources: Tensor, new: Tensor) -> Tensor:
    """(C_new,) state of each class: the old one's, or that of `new`."""
    sources, new = sources.to(state.device), new.to(state.device, state.dtype)
    return torch.where(sources < 0, new, state[sources.clamp_min(0)])


def check_counts(class_counts: Tensor | Sequence[int]) -> Tensor:
    """(C,) float64.

    Raises:
        ValueError: they are no vector of numbers of at least 1.
    """
    counts = vector_of("class_counts", class_counts)
    if counts.dim() != 1 or counts.numel() == 0 or counts.is_meta or not bool((counts >= 1).all()):
        raise ValueError(f"class_counts must be a vector of positive counts, got {class_counts!r}.")
    return counts.double()
