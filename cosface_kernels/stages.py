"""The stages of `margin_softmax_loss`, in the order in which a batch passes them.

    check -> gather -> op -> combine -> margin -> reduce -> statistics

Combining is a method of `cosface_kernels.distributed.Exchange` and of `Local`. Between gathering and reducing, N
counts the samples of all ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import ops, optim
from cosface_kernels.backends import check_name, select
from cosface_kernels.backends.contract import check_classes
from cosface_kernels.distributed import Exchange, Local
from cosface_kernels.margins import ClassMargin, Margin, Rows
from cosface_kernels.options import Options
from cosface_kernels.reference import EPS, compute_dtype, excess, softplus
from cosface_kernels.sampling import ClassSampler
from cosface_kernels.stats import LossStats, Sparsity
from cosface_kernels.validation import (
    check_cache,
    check_flag,
    check_integer,
    check_labels,
    check_margin,
    check_per_sample,
    check_reduction,
    check_rows,
    check_sampler,
    check_scale,
    check_table,
    check_tolerance,
)


class Settings(NamedTuple):
    """The arguments of `margin_softmax_loss` that are no tensors of its batch."""

    margin: float | Callable[..., Tensor]
    reduction: str
    ignore_index: int
    validate_labels: bool | None
    backend: str | None
    gradient_tolerance: float
    normalize_embeddings: bool
    normalize_weight: bool
    sampler: ClassSampler | None
    cache_bytes: int | None
    exact_cache: bool | None
    workspace_bytes: int

    @property
    def subtracted(self) -> float:
        """m of the op, which knows no other margin."""
        return 0.0 if callable(self.margin) else float(self.margin)


class Batch(NamedTuple):
    """The samples of all ranks, which N counts from here on."""

    rows: Rows
    scale: Tensor  # (N,)
    sample_weight: Tensor | None  # (N,)
    valid: Tensor  # (N,), not ignored


class Part(NamedTuple):
    """What the op finds among those of this rank's classes that take part."""

    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, top, log_sum, target_cos and max_neg, (N,) each
    cache: Tensor
    scale: Tensor  # (N,)
    targets: Tensor  # (N,), among these classes
    num_classes: int


class Softmax(NamedTuple):
    """The results of the op over all classes, (N,) each."""

    top: Tensor
    log_sum: Tensor
    target_cos: Tensor
    max_neg: Tensor


def facts(
    settings: Settings,
    weight: Tensor,
    scale: float | Tensor,
    weights: tuple[object, ...],
    return_stats: bool | int,
) -> dict[str, object]:
    """What must be the same on every rank, by its name in a message."""
    known = {
        "reduction": settings.reduction,
        "sample_rate": settings.sampler.rate if settings.sampler else 1,
        "margin": _described(settings.margin),
        "scale": _described(scale),
        "ignore_index": settings.ignore_index,
        "validate_labels": settings.validate_labels,
        "dtype of sample_weight": getattr(weights[0], "dtype", None),
        "presence of class_weight and indices_tuple": [each is not None for each in weights[1:]],
        "recording of class_weight's gradient": getattr(weights[1], "requires_grad", False),
        "normalization of embeddings and weight": (settings.normalize_embeddings, settings.normalize_weight),
        "gradient_tolerance": settings.gradient_tolerance,
        "k of return_stats": None if isinstance(return_stats, bool) else return_stats,
    }
    if getattr(weight, optim.MARK, False):
        known["optimizer"] = optim.progress(weight)
        known["options of the optimizer"] = optim.options_of(weight)
    return known


def _described(value: object) -> object:
    """What of a margin or a scale must be the same on every rank, for its text; a function has only a name."""
    if isinstance(value, Tensor):
        return value.item() if not value.dim() else "one per sample"
    if isinstance(value, Margin):
        settings = {name: setting for name, setting in vars(value).items() if not name.startswith("_")}
        return type(value).__name__, settings, [state.item() for state in value.batch_state()]
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def check(
    settings: Settings,
    ranks: Local | Exchange,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
) -> None:
    """All but the range of the labels; `margin_softmax_loss` says what it raises."""
    if getattr(weight, optim.MARK, False):
        optim.note_use(weight)
    check_rows(embeddings, weight)
    if settings.sampler:
        check_sampler(settings.sampler.num_classes, ranks.weight.shape[0])
    check_labels(labels, embeddings)
    check_reduction(settings.reduction)
    check_name(settings.backend)
    check_scale(scale)
    check_integer("ignore_index", settings.ignore_index)
    check_flag("validate_labels", settings.validate_labels)
    check_cache(settings.cache_bytes, settings.exact_cache)
    check_integer("workspace_bytes", settings.workspace_bytes, 0)
    check_tolerance(settings.gradient_tolerance)
    if isinstance(settings.margin, ClassMargin):
        check_table(settings.margin.margins, ranks.num_classes)
    elif not callable(settings.margin):
        check_margin(settings.margin)
    if isinstance(scale, Tensor) and scale.dim():
        check_per_sample("scale", scale, labels)


def op_options(settings: Settings, differentiable: bool) -> dict[str, Any]:
    """Fields of `Options`: what is for backward only where there may be one."""
    options: dict[str, Any] = {
        "normalize_weight": settings.normalize_weight,
        "workspace_bytes": int(settings.workspace_bytes),
    }
    if differentiable:
        options["cache_bytes"] = None if settings.cache_bytes is None else int(settings.cache_bytes)
        options["exact_cache"] = settings.exact_cache
        options["gradient_tolerance"] = float(settings.gradient_tolerance)
    else:
        options["cache_bytes"] = 0
    return options


def in_one_call(
    settings: Settings,
    options: dict[str, Any],
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    validate: bool,
) -> Tensor | None:
    """The reduced loss of a plain CosFace from a backend that has a short way there, or None."""
    special = callable(settings.margin) or settings.sampler
    if special or not settings.normalize_embeddings or getattr(weight, optim.MARK, False):
        return None
    if ops.dispatches(embeddings, weight, labels):
        return None
    plain = Options(**options)
    loss = getattr(select(settings.backend, embeddings, weight, plain), "loss", None)
    if loss is None:
        return None
    ops.refuse_forward_mode()
    return loss(
        embeddings,
        weight,
        labels,
        plain,
        scale=float(scale),
        margin=float(settings.margin),  # type: ignore[arg-type]
        reduction=settings.reduction,
        ignore_index=int(settings.ignore_index),
        validate_labels=validate,
    )


def gather(
    settings: Settings,
    ranks: Local | Exchange,
    embeddings: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
) -> Batch:
    """The samples of all ranks from those of this one."""
    s = _row_scale(ranks.replicate(scale), embeddings, weight)  # (N_r,)
    embeddings, targets, s = ranks.gather(embeddings), ranks.gather(targets), ranks.gather(s)
    rows = Rows(embeddings, targets, ranks.whole, ranks.share)
    if not settings.normalize_embeddings:
        # no kernel: s x = (s |x|) x / |x|; clamped as the kernels clamp, so that x = 0 has its gradient
        s = s * rows.norms().clamp_min(EPS)  # (N,)
    sample_weight = None if sample_weight is None else ranks.gather(sample_weight)  # (N,)
    return Batch(rows, s, sample_weight, targets != ops.IGNORED)


def _row_scale(scale: float | Tensor, embeddings: Tensor, weight: Tensor) -> Tensor:
    """The (N,) scale that the op takes, differentiable if the user's scale is."""
    rows, dtype = embeddings.shape[0], compute_dtype(embeddings, weight)
    if isinstance(scale, Tensor):
        return scale.to(embeddings.device, dtype).expand(rows)
    return embeddings.new_full((rows,), scale, dtype=dtype)


def over_own_classes(
    settings: Settings,
    options: dict[str, Any],
    ranks: Local | Exchange,
    weight: Tensor,
    batch: Batch,
    validate: bool,
) -> Part:
    """The op, with a sample of the classes and reshaped negatives where they are asked for."""
    sampler, margin = settings.sampler, settings.margin
    # x (N, D), w (C, D), and of the classes of w: targets (N,), which take part (S,), targets among those (N,)
    x, w, own_targets, s = ranks.enter(
        batch.rows.embeddings, batch.rows.targets, batch.scale, sampled=sampler is not None
    )
    classes, targets = sampler(own_targets) if sampler else (None, own_targets)
    if classes is not None and validate and classes.device.type != "cpu":  # on a CPU the op looks at them
        check_classes(classes, w.shape[0])
    if isinstance(margin, Margin) and margin.reshapes_negatives:
        with torch.no_grad():
            target_cos = ranks.sum(_target_cosines(x, w, own_targets))  # (N,)
            thresholds, negatives = margin.negatives(target_cos, batch.rows)
            options = {**options, "thresholds": thresholds, "negatives": negatives}
    lmcl: Any = ops.lmcl
    if getattr(weight, optim.MARK, False):
        lmcl = partial(optim.lmcl, weight, whole_gradient=isinstance(margin, Margin) and margin.reads_weight)
    *results, cache = lmcl(x, w, targets, s, settings.subtracted, settings.backend, classes=classes, **options)
    return Part(tuple(results), cache, s, targets, (w if classes is None else classes).shape[0])


def _target_cosines(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """(N,) cosines with the targets, 0 where there is none, ahead of the pass over all classes."""
    dtype, has_target = compute_dtype(x, w), targets >= 0  # (N,)
    if not len(w):  # a rank that owns no class
        return x.new_zeros(len(x), dtype=dtype)
    x_hat, w_hat = (F.normalize(rows.to(dtype)) for rows in (x, w[targets.clamp_min(0)]))  # (N, D)
    return torch.where(has_target, (x_hat * w_hat).sum(1), 0)


def with_margin(settings: Settings, loss: Tensor | None, softmax: Softmax, batch: Batch) -> Tensor:
    """(N,) losses; `loss`, the op's own over all classes, has the margin if that is a number."""
    margin, (rows, s, _, valid) = settings.margin, batch
    top, log_sum, target_cos, _ = softmax
    if isinstance(margin, Margin):
        # masked before and after: a nan in an ignored sample must not reach a gradient
        loss = margin.loss(torch.where(valid, top, 0), torch.where(valid, log_sum, 0), target_cos, s, rows)  # (N,)
        return torch.where(valid, loss, 0)
    if loss is not None and not callable(margin):
        return loss
    psi = margin(target_cos) if callable(margin) else target_cos - settings.subtracted  # (N,)
    check_per_sample("the margin's result", psi, rows.targets)
    return torch.where(valid, softplus(torch.where(valid, excess(s, top, log_sum, psi), 0)), 0)


def reduce(ranks: Local | Exchange, loss: Tensor, batch: Batch, reduction: str) -> Tensor:
    """0-d, or the losses of this rank's samples."""
    count = batch.valid
    if batch.sample_weight is not None:
        count = torch.where(batch.valid, batch.sample_weight, 0)
        loss = torch.where(batch.valid, loss * batch.sample_weight, 0)
    if reduction == "none":
        return ranks.keep_own(loss)
    return loss.sum() if reduction == "sum" else loss.sum() / count.sum()


def sparsity(ranks: Local | Exchange, part: Part) -> Sparsity:
    dropped, kept = ops.kept_entries(part.cache, len(part.targets))  # (N,) each
    dropped, kept = ranks.combine_kept(dropped, kept, part.targets, part.num_classes)
    return Sparsity(ranks.keep_own(dropped), ranks.keep_own(kept))


def statistics(ranks: Local | Exchange, softmax: Softmax, batch: Batch, sparsity: Sparsity | None) -> LossStats:
    top, log_sum, target_cos, max_neg = softmax
    accuracy = ((target_cos > max_neg) & batch.valid).sum() / batch.valid.sum()
    rows_of_stats = ((batch.scale * top + log_sum).detach(), target_cos.detach(), max_neg)  # (N,) each
    lse, target_cos, max_neg = map(ranks.keep_own, rows_of_stats)  # (N_r,) each
    return LossStats(lse, target_cos, max_neg, accuracy, sparsity)


@torch.no_grad()
def top_k_accuracy(settings: Settings, ranks: Local | Exchange, batch: Batch, k: int) -> Tensor:
    """0-d, the share of the valid samples to which fewer than k other classes are at least as near as their own.

    Those are among the k + 1 nearest, wherever ties put the sample's own.
    """
    most = min(k + 1, ranks.num_classes)
    cosines, classes = ops.nearest(
        batch.rows.embeddings,
        ranks.weight,
        min(most, len(ranks.classes)),
        settings.normalize_weight,
        settings.backend,
    )
    cosines, classes = ranks.keep_nearest(cosines, classes, most)  # (N_r, most) each
    own = classes == ranks.keep_own(batch.rows.targets)[:, None]
    own_cos = cosines.where(own, torch.inf).amin(1)  # (N_r,)
    others = ((cosines >= own_cos[:, None]) & ~own).sum(1)  # (N_r,)
    return ranks.sum(((own_cos < torch.inf) & (others < k)).sum()) / batch.valid.sum()
