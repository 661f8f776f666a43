"""The stages of `margin_softmax_loss`, in the order in which a batch passes them.

    check -> gather -> op -> combine -> each label -> margin -> reduce -> statistics

Combining is a method of `cosface_kernels.distributed.Exchange` and of `Local`. Between gathering and reducing, N
counts the samples of all ranks, and M the labels that these have: N or, where a sample has two, 2 N.
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
from cosface_kernels.derivatives import refuse_forward_mode
from cosface_kernels.distributed import Exchange, Local
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.margins import ClassMargin, Margin, Rows, Smoothing
from cosface_kernels.margins.base import check_use
from cosface_kernels.options import Options
from cosface_kernels.reference import EPS, compute_dtype
from cosface_kernels.sampling import ClassSampler
from cosface_kernels.softmax import Softmax
from cosface_kernels.stats import LossStats, Sparsity
from cosface_kernels.subcenters import check_subcenters, first_of_each_class, rows_of
from cosface_kernels.validation import (
    check_bool,
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
    label_smoothing: float = 0.0
    entropy: bool = False
    subcenters: int = 1
    exponents: Tensor | None = None  # (C_r,) of a weight in float8

    def subtracted(self) -> float:  # a method: torch 2.10 compiles no property of a NamedTuple
        """m of the op, which knows no other margin."""
        return 0.0 if callable(self.margin) else float(self.margin)

    def classes_of(self, rows: int) -> int:
        """How many classes have so many rows."""
        return rows // self.subcenters


class Batch(NamedTuple):
    """The samples of all ranks, which N counts from here on."""

    embeddings: Tensor  # (N, D)
    targets: Tensor  # (N,) or (2, N)
    scale: Tensor  # (N,)
    sample_weight: Tensor | None  # as targets
    share: Tensor | None  # (2, N), what each of two labels counts in an accuracy


class Labels(NamedTuple):
    """The labels of all ranks' samples, one after the other, and of each the softmax over all other classes."""

    rows: Rows
    scale: Tensor  # (M,)
    sample_weight: Tensor | None  # (M,)
    softmax: Softmax
    valid: Tensor  # (M,), not ignored
    share: Tensor  # (M,), what a label counts in an accuracy


class OwnClasses(NamedTuple):
    """This rank's classes, those of them that take part, and the batch as their op takes it."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    targets: Tensor  # as the batch's, among the classes that take part
    scale: Tensor  # (N,)
    chosen: Tensor | None  # the rows of w that take part; all of them if None
    targets_of_all: Tensor  # as the batch's, among all of w's classes
    num_classes: int  # that take part


class Part(NamedTuple):
    """What the op finds among those of this rank's classes that take part."""

    results: tuple[Tensor, ...]  # loss, top, log_sum, target_cos, max_neg and moments, as the op has them
    cache: Tensor
    scale: Tensor  # (N,)
    targets: Tensor  # as the batch's, among these classes
    num_classes: int


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
    check_subcenters(
        settings.subcenters,
        sharded=isinstance(ranks, Exchange),
        gradient_tolerance=settings.gradient_tolerance,
        margin=settings.margin,
    )
    if weight.shape[0] % settings.subcenters:
        raise ValueError(
            f"the weight must have {settings.subcenters} rows of each class, its subcenters, got "
            f"{weight.shape[0]} rows."
        )
    if settings.sampler is not None:
        if not isinstance(settings.sampler, ClassSampler):
            raise TypeError(f"sampler must be a ClassSampler, got {settings.sampler!r}.")
        check_sampler(settings.sampler.num_classes, settings.classes_of(ranks.weight.shape[0]))
    check_labels(labels, embeddings)
    check_reduction(settings.reduction)
    check_name(settings.backend)
    check_scale(scale)
    check_integer("ignore_index", settings.ignore_index)
    check_flag("validate_labels", settings.validate_labels)
    check_bool("normalize_embeddings", settings.normalize_embeddings)
    check_bool("normalize_weight", settings.normalize_weight)
    check_cache(settings.cache_bytes, settings.exact_cache)
    check_integer("workspace_bytes", settings.workspace_bytes, 0)
    if isinstance(settings.margin, ClassMargin):
        check_table(settings.margin.margins, settings.classes_of(ranks.num_classes))
    elif not callable(settings.margin):
        check_margin(settings.margin)
    if isinstance(scale, Tensor) and scale.dim():
        check_per_sample("scale", scale, labels if labels.dim() == 1 else labels[:, 0])
    if isinstance(scale, Tensor) and scale.is_meta and not embeddings.is_meta:
        raise ValueError(f"scale must have a value on {embeddings.device}, as the embeddings do, got {scale!r}.")
    margin = settings.margin
    if weight.dtype is FLOAT8 and isinstance(margin, Margin) and margin.reads_weight:
        raise ValueError(
            f"{type(margin).__name__} computes with the weight: its dtype must be another, got {weight.dtype}."
        )
    check_use(
        margin,
        settings.label_smoothing,
        settings.gradient_tolerance,
        labels.dim(),
        settings.entropy,
        sample_rate=settings.sampler.rate if settings.sampler else 1.0,
    )


def op_options(settings: Settings, labels: Tensor, differentiable: bool) -> dict[str, Any]:
    """Fields of `Options`: what is for backward only where there may be one.

    Raises:
        ValueError: a tolerance meets what sums up all classes.
    """
    reads = isinstance(settings.margin, Margin) and settings.margin.reads_hard_negatives
    moments = bool(settings.label_smoothing or settings.entropy or labels.dim() == 2 or reads)
    options: dict[str, Any] = {
        "normalize_weight": settings.normalize_weight,
        "workspace_bytes": int(settings.workspace_bytes),
        "moments": moments,
        "subcenters": int(settings.subcenters),
        "exponents": settings.exponents,
    }
    if differentiable:
        options["cache_bytes"] = None if settings.cache_bytes is None else int(settings.cache_bytes)
        options["exact_cache"] = settings.exact_cache
        options["gradient_tolerance"] = float(settings.gradient_tolerance)
        if moments and settings.gradient_tolerance:
            raise ValueError(
                "label_smoothing, two labels of a sample and entropy sum up all classes: gradient_tolerance must "
                f"be 0, got {settings.gradient_tolerance!r}."
            )
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
    special = callable(settings.margin) or settings.sampler or options["moments"] or settings.subcenters > 1
    if special or not settings.normalize_embeddings or getattr(weight, optim.MARK, False):
        return None
    if ops.dispatches(embeddings, weight, labels):
        return None
    plain = Options(**options)
    loss = getattr(select(settings.backend, embeddings, weight, plain), "loss", None)
    if loss is None:
        return None
    refuse_forward_mode()
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
    share: Tensor | None,
) -> Batch:
    """The samples of all ranks from those of this one; of two equal targets, the first has both weights.

    share: of two labels of a sample, where it is not the sample_weight.
    """
    s = _row_scale(ranks.replicate(scale), embeddings, weight)  # (N_r,)
    embeddings, targets, s = ranks.gather(embeddings), ranks.gather(targets), ranks.gather(s)
    sample_weight, share = (None if each is None else ranks.gather(each) for each in (sample_weight, share))
    if targets.dim() == 2:
        assert sample_weight is not None
        first, second = targets.T  # (N,) each
        same = first == second
        targets = torch.stack([first, second.masked_fill(same, ops.IGNORED)])  # (2, N)
        # a sample whose loss is nan has no gradient
        targets = targets.masked_fill((targets == ops.INVALID).any(0), ops.INVALID)
        sample_weight, share = (
            torch.stack([torch.where(same, of_first + of_second, of_first), of_second])  # (2, N)
            for of_first, of_second in (sample_weight.T, (sample_weight if share is None else share).T)
        )
    any_target = targets if targets.dim() == 1 else targets.amax(0)  # (N,)
    if isinstance(scale, Tensor) and scale.dim():  # a nan in an ignored sample must not reach a gradient
        s = torch.where((any_target >= 0) | s.isfinite(), s, 1)
    if not settings.normalize_embeddings:
        # no kernel: s x = (s |x|) x / |x|; clamped as the kernels clamp, so that x = 0 has its gradient
        if settings.entropy:  # which ignored samples have too
            any_target = torch.where(embeddings.isfinite().all(1), 0, any_target)
        s = s * Rows(embeddings, any_target).norms().clamp_min(EPS)  # (N,)
    return Batch(embeddings, targets, s, sample_weight, share)


def _row_scale(scale: float | Tensor, embeddings: Tensor, weight: Tensor) -> Tensor:
    """The (N,) scale that the op takes, differentiable if the user's scale is."""
    rows, dtype = embeddings.shape[0], compute_dtype(embeddings, weight)
    if isinstance(scale, Tensor):
        return scale.to(embeddings.device, dtype).expand(rows)
    return embeddings.new_full((rows,), scale, dtype=dtype)


def own_classes(settings: Settings, ranks: Local | Exchange, batch: Batch, validate: bool) -> OwnClasses:
    """With a sample of them where it is asked for."""
    sampler = settings.sampler
    # x (N, D), w (C, D), and of the classes of w: targets (N,), which take part (S,), targets among those (N,)
    x, w, own_targets, s = ranks.enter(batch.embeddings, batch.targets, batch.scale, sampled=sampler is not None)
    classes, targets = sampler(own_targets) if sampler else (None, own_targets)
    if classes is not None and validate and classes.device.type != "cpu":  # on a CPU the op looks at them
        check_classes(classes, settings.classes_of(w.shape[0]))
    num_classes = settings.classes_of(w.shape[0]) if classes is None else classes.shape[0]
    if classes is not None and settings.subcenters > 1:
        classes = rows_of(classes, settings.subcenters)
    return OwnClasses(x, w, targets, s, classes, own_targets, num_classes)


def over_own_classes(
    settings: Settings,
    options: dict[str, Any],
    ranks: Local | Exchange,
    weight: Tensor,
    batch: Batch,
    own: OwnClasses,
) -> Part:
    """The op, with reshaped negatives where they are asked for."""
    margin = settings.margin
    if isinstance(margin, Margin) and margin.reshapes_negatives:
        with torch.no_grad():
            target_cos = ranks.sum(target_cosines(settings, own))  # (N,)
            thresholds, negatives = margin.negatives(target_cos, Rows(batch.embeddings, batch.targets))
            options = {**options, "thresholds": thresholds, "negatives": negatives}
    lmcl: Any = ops.lmcl
    if getattr(weight, optim.MARK, False):
        lmcl = partial(optim.lmcl, weight, whole_gradient=isinstance(margin, Margin) and margin.reads_weight)
    *results, cache, moments = lmcl(
        own.x,
        own.w,
        own.targets,
        own.scale,
        settings.subtracted(),
        settings.backend,
        classes=own.chosen,
        **options,
    )
    return Part((*results, moments), cache, own.scale, own.targets, own.num_classes)


def target_cosines(settings: Settings, own: OwnClasses) -> Tensor:
    """(N,) cosines with the targets, 0 where there is none, ahead of the pass over all classes."""
    x, w, targets = own.x, own.w, own.targets_of_all
    dtype, has_target = compute_dtype(x, w), targets >= 0  # (N,)
    if not len(w):  # a rank that owns no class
        return x.new_zeros(len(x), dtype=dtype)
    chosen = targets.clamp_min(0)
    rows = w.unflatten(0, (-1, settings.subcenters))[chosen].to(dtype)  # (N, K, D)
    if settings.normalize_weight:
        rows = F.normalize(rows, dim=2)
    elif settings.exponents is not None:
        rows = torch.ldexp(rows, settings.exponents.unflatten(0, (-1, settings.subcenters))[chosen][..., None])
    return torch.where(has_target, (F.normalize(x.to(dtype))[:, None] * rows).sum(2).amax(1), 0)


def each_label(settings: Settings, ranks: Local | Exchange, part: Part, softmax: Softmax, batch: Batch) -> Labels:
    """Of two labels of a sample each has the other among its negatives, as if they were two samples."""
    embeddings, targets, scale, sample_weight, _ = batch
    if softmax.below is not None:
        softmax = softmax.only(torch.atleast_2d(targets).amax(0) >= 0)
    valid = share = targets != ops.IGNORED
    if targets.dim() == 2:
        assert sample_weight is not None
        assert batch.share is not None
        cosines = softmax.target_cos
        both = [
            softmax.including(cosines[1 - k], scale, targets[1 - k] >= 0)._replace(target_cos=cosines[k])
            for k in (0, 1)
        ]
        softmax = Softmax(*(torch.cat(each) for each in zip(*both, strict=True)))  # (M,) each
        embeddings, scale = torch.cat([embeddings] * 2), torch.cat([scale] * 2)
        valid, share = valid.flatten(), torch.where(valid, batch.share, 0).flatten().detach()
        targets, sample_weight = targets.flatten(), sample_weight.flatten()
    smoothing = None
    if settings.label_smoothing:
        assert softmax.total is not None
        classes: int | Tensor = settings.classes_of(ranks.num_classes)
        if settings.sampler:
            classes = ranks.count(part.num_classes)
        smoothing = Smoothing(float(settings.label_smoothing), softmax.total, classes)
    hardness = None
    if softmax.hard_sum is not None and softmax.hard_count is not None:
        hardness = (softmax.hard_sum / softmax.hard_count.clamp_min(1)).detach()  # (M,)
    rows = Rows(embeddings, targets, ranks.whole, ranks.share, smoothing, hardness)
    return Labels(rows, scale, sample_weight, softmax, valid, share)


def with_margin(settings: Settings, ranks: Local | Exchange, loss: Tensor | None, labels: Labels) -> Tensor:
    """(M,) losses; `loss`, the op's own over all classes, has the margin if that is a number."""
    margin, rows, s, valid = settings.margin, labels.rows, labels.scale, labels.valid
    top, log_sum, target_cos, *_ = labels.softmax
    if isinstance(margin, Margin):
        # masked before and after: a nan in an ignored sample must not reach a gradient
        loss = margin.loss(torch.where(valid, top, 0), torch.where(valid, log_sum, 0), target_cos, s, rows)  # (M,)
        check_per_sample(f"the loss of {type(margin).__name__}", loss, valid)
    elif loss is not None and loss.shape == valid.shape and not callable(margin) and rows.smoothing is None:
        return loss
    else:
        psi = ranks.apply(margin, target_cos) if callable(margin) else target_cos - settings.subtracted()  # (M,)
        check_per_sample("the margin's result", psi, rows.targets)
        loss = rows.cross_entropy(top, log_sum, psi, s)  # (M,)
    return torch.where(valid, loss, 0)


def reduce(
    ranks: Local | Exchange,
    loss: Tensor,
    batch: Batch,
    valid: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """0-d, or the losses of this rank's samples, from (M,) losses, which of them count, and their weights."""
    count = valid
    if sample_weight is not None:
        count = torch.where(valid, sample_weight, 0)
        loss = torch.where(valid, loss * sample_weight, 0)
    if reduction == "none":
        return ranks.keep_own(loss if batch.targets.dim() == 1 else loss.view(batch.targets.shape).sum(0))
    return loss.sum() if reduction == "sum" else loss.sum() / count.sum()


def sparsity(ranks: Local | Exchange, part: Part) -> Sparsity:
    dropped, kept = ops.kept_entries(part.cache, len(part.targets))  # (N,) each
    dropped, kept = ranks.combine_kept(dropped, kept, part.targets, part.num_classes)
    return Sparsity(ranks.keep_own(dropped), ranks.keep_own(kept))


def statistics(
    ranks: Local | Exchange, softmax: Softmax, batch: Batch, labels: Labels, sparsity: Sparsity | None
) -> LossStats:
    """softmax: over all classes that are no label of the sample."""
    nearest = labels.softmax.target_cos > labels.softmax.max_neg  # (M,)
    accuracy = (labels.share * nearest).sum() / labels.share.sum()
    target_cos = _by_sample(softmax.target_cos, batch)  # (N,) or (N, 2)
    rows_of_stats = (batch.scale * softmax.top + softmax.log_sum, target_cos, softmax.max_neg)
    lse, target_cos, max_neg = (ranks.keep_own(rows.detach()) for rows in rows_of_stats)  # (N_r, ...) each
    return LossStats(lse, target_cos, max_neg, accuracy, sparsity)


def entropy(ranks: Local | Exchange, softmax: Softmax, batch: Batch) -> Tensor:
    """(N_r,) of the softmax over all classes, without a margin; a constant nan for a broken, ignored sample."""
    assert softmax.below is not None
    ignored = torch.atleast_2d(batch.targets).amax(0) < 0  # (N,)
    broken = ignored & (softmax.log_sum + softmax.below).isnan()  # (N,)
    softmax = softmax.only(~broken)
    for cos, targets in zip(torch.atleast_2d(softmax.target_cos), torch.atleast_2d(batch.targets), strict=True):
        softmax = softmax.including(cos, batch.scale, targets >= 0)
    return ranks.keep_own(softmax.entropy(batch.scale).masked_fill(broken, torch.nan))


@torch.no_grad()
def top_k_accuracy(settings: Settings, ranks: Local | Exchange, batch: Batch, labels: Labels, k: int) -> Tensor:
    """0-d, the share of the valid labels to which fewer than k other classes are at least as near as their own.

    Those are among the k + 1 nearest, wherever ties put the label's own.
    """
    most = min(k + 1, settings.classes_of(ranks.num_classes))
    rows = min(most * settings.subcenters, len(ranks.classes))
    cosines, classes = ops.nearest(
        batch.embeddings, ranks.weight, rows, settings.normalize_weight, settings.backend, settings.exponents
    )
    if settings.subcenters > 1:
        cosines, classes = first_of_each_class(cosines, classes, settings.subcenters, most)
    cosines, classes = ranks.keep_nearest(cosines, classes, most)  # (N_r, most) each
    cosines, classes = cosines[:, None], classes[:, None]
    by_sample = (_by_sample(rows.view(batch.targets.shape), batch) for rows in (labels.rows.targets, labels.share))
    targets, share = (ranks.keep_own(rows).view(len(cosines), batch.targets.dim()) for rows in by_sample)
    own = classes == targets[..., None]  # (N_r, labels of a sample, most)
    own_cos = cosines.where(own, torch.inf).amin(2)  # (N_r, labels of a sample)
    others = ((cosines >= own_cos[..., None]) & ~own).sum(2)
    return ranks.sum((share * ((own_cos < torch.inf) & (others < k))).sum()) / labels.share.sum()


def _by_sample(rows: Tensor, batch: Batch) -> Tensor:
    """(N,) or (N, 2) of what the batch has as its targets."""
    return rows if batch.targets.dim() == 1 else rows.T
