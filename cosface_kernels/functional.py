"""The functional form: validation, margin, reduction. The work is done by torch.ops.cosface.lmcl."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from cosface_kernels import ops, optim
from cosface_kernels.backends import check_name, select
from cosface_kernels.backends.contract import check_classes
from cosface_kernels.distributed import Exchange, dense_gradient, several_ranks
from cosface_kernels.margins import Margin, Rows
from cosface_kernels.options import WORKSPACE_BYTES, Options
from cosface_kernels.reference import EPS, compute_dtype, excess, softplus
from cosface_kernels.sampling import ClassSampler
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
    check_tolerance,
)

LOGITS_CHUNK = 8192  # classes that cosine_logits upcasts at a time: 16 MiB of float32 at embedding_size 512


class Sparsity(NamedTuple):
    """What a backward with a gradient_tolerance leaves out, known before it runs.

    Let p_ij = e^{s_i cos_ij} / sum_{k != y_i} e^{s_i cos_ik}, and dropped_i the sum of p_ij over the negatives
    left out. With g_i = d loss / d lse_i, |x_i| dx_i lacks s_i g_i sum_{j dropped} p_ij w_j / |w_j|, and
    |w_j| dw_j lacks s_i g_i p_ij x_i / |x_i| of every i that dropped it, projected, which makes nothing longer. So

        |delta dx_i| <= s_i |g_i| dropped_i / |x_i|    sum_j |w_j| |delta dw_j| <= sum_i s_i |g_i| dropped_i

    and nothing is left out of the target's part of either. |x_i| and |w_j| are clamped at 1e-12. Where classes are
    sharded, all of this is of the samples and the classes of all ranks.

    Where the margin reshapes negatives, N(cos_ij) takes the place of cos_ij in p_ij. What is left out then has the
    factor N'(cos_ij), and both bounds the largest |N'| of it: at most 2 + |t| of CurricularFace, 1 + t of
    MV-Softmax, and 1 with an inter-class filter.

    Attributes:
        dropped: (N,) float64, at most the tolerance; 0 for an exact sample.
        kept: (N,) float64, the share of the negatives that is not left out; 1 for an exact sample, one with so
            many that dense products are faster, or more than there is room for, on every rank.
    """

    dropped: Tensor
    kept: Tensor

    @property
    def exact(self) -> Tensor:
        """(N,) bool: the samples that take the exact path."""
        return self.kept == 1


class LossStats(NamedTuple):
    """What the loss knows of its batch without another pass over the weights. Detached from the graph.

    Attributes:
        lse: (N,) log sum_{j != y} e^{s cos_ij}, over the negative classes alone.
        target_cos: (N,) cosine between each embedding and its class centre; 0 for an ignored sample.
        max_negative_cos: (N,) cosine of the nearest other class centre; -inf if there is none.
        accuracy: 0-d, the share of the valid samples whose own class centre is the nearest, without the margin.
        sparsity: with a gradient_tolerance, and where there will be a gradient.
    """

    lse: Tensor
    target_cos: Tensor
    max_negative_cos: Tensor
    accuracy: Tensor
    sparsity: Sparsity | None = None


def cosface_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    validate_labels: bool | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
    gradient_tolerance: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """CosFace's Large Margin Cosine Loss (LMCL), fused with its normalisation and class matrix product.

        loss_i = -log( e^{s(cos_iy - m)} / ( e^{s(cos_iy - m)} + sum_{j != y} e^{s cos_ij} ) )

    Args:
        embeddings: (N, D) float64, float32, bfloat16 or float16; need not be normalised.
        weight: (C, D) class centres, one row each, of any of these dtypes; need not be normalised.
        labels: (N,) integers in [0, C), or ignore_index.
        margin: m, subtracted from the target's cosine.
        scale: s > 0: a number, a 0-d tensor (learned if it requires a gradient), or one value per sample (N,).
        reduction: "none", "sum" or "mean". The mean is over the samples that are not ignored, weighted by
            sample_weight as `torch.nn.functional.cross_entropy` weights its mean: sum(a_i loss_i) / sum(a_i).
        ignore_index: label of samples that have no loss and no gradient.
        validate_labels: raise for a label out of range, which waits for the device. None: on the CPU alone. If not
            validated, the loss of such a sample is nan, and it has no gradient.
        sample_weight: (N,) factor a_i of each sample's loss.
        backend: name of a backend, or None for the first that takes these tensors.
        gradient_tolerance: eps in [0, 1). 0: exact gradients. Else backward may leave out of every sample
            negatives that hold at most eps of the softmax over its negatives, and takes time in proportion to what
            remains; the loss stays exact. See `Sparsity`.
        return_stats: also return `LossStats`.

    Returns:
        The loss, (N,) or 0-d, float32 (float64 if an input is); with return_stats, a pair (loss, stats). As in
        PyTorch, a mean over no valid sample is nan and a sum over none is 0.

    Raises:
        ValueError: a shape, label or option does not fit; the message shows the value. Nothing has been computed.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, arXiv:1801.09414, Eq. 4.

    >>> weight = torch.eye(3, 4)
    >>> cosface_loss(weight[:2], weight, torch.tensor([0, 2]), margin=0.5, scale=2.0, reduction="none")
    tensor([0.5514, 3.1698])
    """
    check_margin(margin)  # before margin_softmax_loss, which would take a callable
    return margin_softmax_loss(
        embeddings,
        weight,
        labels,
        margin=margin,
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        validate_labels=validate_labels,
        sample_weight=sample_weight,
        backend=backend,
        gradient_tolerance=gradient_tolerance,
        return_stats=return_stats,
    )


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float | Callable[..., Tensor],
    scale: float | Tensor = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    validate_labels: bool | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
    gradient_tolerance: float = 0.0,
    return_stats: bool = False,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    sampler: ClassSampler | None = None,
    cache_bytes: int | None = None,
    exact_cache: bool | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor | tuple[Tensor, LossStats]:
    """Softmax over cosines with any margin psi on the target: CosFace, ArcFace and whoever comes next.

        loss_i = -log( e^{s psi(cos_iy)} / ( e^{s psi(cos_iy)} + sum_{j != y} e^{s cos_ij} ) )

    The margin touches one logit per sample, so it costs no kernel: autograd differentiates psi on an (N,) vector.

    Args:
        margin: psi, from the (N,) target cosines to as many margined ones; or a number m for cos - m; or one of
            `cosface_kernels.margins`, which may also look at the embeddings' norms, replace the loss or reshape
            the negatives. Samples that are ignored pass through psi with cosine 0 and their result is dropped.
        normalize_embeddings: if not, the scale of each sample is s |x_i|, as in A-Softmax.
        normalize_weight: if not, <x_i, w_j> / |x_i| takes the place of cos_ij, the target's as well.
        sampler: draws the classes that take part, of a sharded weight from those of this rank; the gradient of the
            weight is then sparse, except where there are several ranks.
        cache_bytes, exact_cache: memory for cosines that backward need not compute again, 32 MiB by default on a
            CPU, and whether they are kept as computed or in 16 bits; see `cosface_kernels.options`.
        workspace_bytes: memory for what a GPU has of a chunk of classes; see `cosface_kernels.options`.

    The other arguments, the result and the errors are those of `cosface_loss`.

    >>> weight = torch.eye(3, 4)
    >>> arcface = lambda cos: torch.cos(torch.acos(cos.clamp(-1, 1)) + 0.5)
    >>> margin_softmax_loss(weight[:2] + 0.1, weight, torch.tensor([0, 2]), margin=arcface, scale=2.0)
    tensor(1.6890)
    """
    ops.refuse_transforms()
    ranks = Exchange(weight) if isinstance(weight, DTensor) else None
    moves = getattr(weight, optim.MARK, False)
    facts: dict[str, Any] = {}
    if ranks:
        facts = {
            "reduction": reduction,
            "sample_rate": sampler.rate if sampler else 1,
            "margin": _described(margin),
            "scale": _described(scale),
            "ignore_index": ignore_index,
            "validate_labels": validate_labels,
            "dtype of sample_weight": getattr(sample_weight, "dtype", None),
            "normalization of embeddings and weight": (normalize_embeddings, normalize_weight),
            "gradient_tolerance": gradient_tolerance,
        }
        if moves:
            facts["optimizer"] = optim.progress(weight)
            facts["options of the optimizer"] = optim.options_of(weight)
    with ranks.agreement(embeddings, sample_weight, **facts) if ranks else nullcontext():
        if moves:
            optim.note_use(weight)
        check_rows(embeddings, weight)
        if sampler:
            check_sampler(sampler.num_classes, len(ranks.classes) if ranks else weight.shape[0])
        check_labels(labels, embeddings)
        check_reduction(reduction)
        check_name(backend)
        check_scale(scale)
        check_integer("ignore_index", ignore_index)
        check_flag("validate_labels", validate_labels)
        check_cache(cache_bytes, exact_cache)
        check_integer("workspace_bytes", workspace_bytes, 0)
        check_tolerance(gradient_tolerance)
        if not callable(margin):
            check_margin(margin)
        if isinstance(scale, Tensor) and scale.dim():
            check_per_sample("scale", scale, labels)
        if sample_weight is not None:
            check_per_sample("sample_weight", sample_weight, labels)
        if validate_labels is None:
            validate_labels = labels.device.type == "cpu"
        differentiable = torch.is_grad_enabled() and (embeddings.requires_grad or weight.requires_grad)
        options: dict[str, Any] = {"normalize_weight": normalize_weight, "workspace_bytes": int(workspace_bytes)}
        if differentiable:
            options |= {
                "cache_bytes": None if cache_bytes is None else int(cache_bytes),
                "exact_cache": exact_cache,
                "gradient_tolerance": float(gradient_tolerance),
            }
        else:
            options["cache_bytes"] = 0
        m = 0.0 if callable(margin) else float(margin)
        special = callable(margin) or isinstance(scale, Tensor) or sample_weight is not None
        special = special or bool(ranks or moves or sampler or return_stats)
        if normalize_embeddings and not special and not ops.dispatches(embeddings, weight, labels):
            plain = Options(**options)
            in_one_call = getattr(select(backend, embeddings, weight, plain), "loss", None)
            if in_one_call:
                ops.refuse_forward_mode()
                rule = {"scale": float(scale), "margin": m, "reduction": reduction}
                rule |= {"ignore_index": int(ignore_index), "validate_labels": validate_labels}
                return in_one_call(embeddings, weight, labels, plain, **rule)
        targets = ops.targets(labels, weight.shape[0], int(ignore_index), validate_labels)  # (N,)
    s = _row_scale(ranks.replicate(scale) if ranks else scale, embeddings, weight)  # (N,)
    if ranks:  # from here on N counts the samples of all ranks
        embeddings, targets, s = ranks.gather(embeddings), ranks.gather(targets), ranks.gather(s)
        sample_weight = None if sample_weight is None else ranks.gather(sample_weight)
    valid = targets != ops.IGNORED  # (N,)
    if not normalize_embeddings:
        # no kernel: s x = (s |x|) x / |x|; clamped as the kernels clamp, so that x = 0 has its gradient
        s = s * Rows(embeddings, targets).norms().clamp_min(EPS)  # (N,)

    # x (N, D), w (C, D), and of the classes of w: targets (N,), which take part (S,), targets among those (N,)
    x, w, own_targets, own_s = ranks.enter(embeddings, targets, s) if ranks else (embeddings, weight, targets, s)
    classes, positions = sampler(own_targets) if sampler else (None, own_targets)
    if classes is not None and validate_labels and classes.device.type != "cpu":  # on a CPU the op looks at them
        check_classes(classes, w.shape[0])
    if sampler and not ranks and several_ranks():
        w = dense_gradient(w)
    options["classes"] = classes
    rows = Rows(embeddings, targets, weight if ranks is None else None)
    if isinstance(margin, Margin) and margin.reshapes_negatives:
        with torch.no_grad():
            target_cos = _target_cosines(x, w, own_targets)  # (N,)
            target_cos = ranks.sum(target_cos) if ranks else target_cos
            options["thresholds"], options["negatives"] = margin.negatives(target_cos, rows)
    lmcl: Any = ops.lmcl
    if moves:
        lmcl = partial(optim.lmcl, weight, whole_gradient=isinstance(margin, Margin) and margin.reads_weight)
    loss, *rows_of_x, cache = lmcl(x, w, positions, own_s, m, backend, **options)  # each (N,)
    top, log_sum, target_cos, max_neg = ranks.combine(own_s, *rows_of_x) if ranks else rows_of_x  # each (N,)
    if isinstance(margin, Margin):
        # masked before and after: a nan in an ignored sample must not reach a gradient
        loss = margin.loss(torch.where(valid, top, 0), torch.where(valid, log_sum, 0), target_cos, s, rows)  # (N,)
        loss = torch.where(valid, loss, 0)  # (N,)
    elif ranks or callable(margin):
        psi = margin(target_cos) if callable(margin) else target_cos - m  # (N,)
        check_per_sample("the margin's result", psi, targets)
        loss = torch.where(valid, softplus(torch.where(valid, excess(s, top, log_sum, psi), 0)), 0)  # (N,)
    if not validate_labels:
        loss = loss.masked_fill(targets == ops.INVALID, torch.nan)  # (N,)

    reduced = _reduce(loss, valid, sample_weight, reduction)
    if ranks and reduction == "none":
        reduced = ranks.keep_own(reduced)
    sparsity = None
    if options.get("gradient_tolerance") and (ranks or return_stats):
        sparsity = Sparsity(*ops.kept_entries(cache, len(targets)))
    if ranks and sparsity:  # whoever asks for statistics: every rank takes part
        own_top, own_log_sum = rows_of_x[:2]  # (N,) each
        negatives = len(w if classes is None else classes) - (positions >= 0).double()  # (N,)
        lse_from_top = (own_log_sum + own_s * (own_top - top)).detach()  # (N,)
        sparsity = Sparsity(*map(ranks.keep_own, ranks.combine_kept(*sparsity, negatives, lse_from_top)))
    if not return_stats:
        return reduced
    accuracy = ((target_cos > max_neg) & valid).sum() / valid.sum()
    rows_of_stats = ((s * top + log_sum).detach(), target_cos.detach(), max_neg)  # (N,) each
    lse, target_cos, max_neg = map(ranks.keep_own, rows_of_stats) if ranks else rows_of_stats
    return reduced, LossStats(lse, target_cos, max_neg, accuracy, sparsity)


def cosine_logits(
    embeddings: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
) -> Tensor:
    """s cos_ij without a margin, for inference over known classes; differentiable.

    A sharded weight is gathered whole on each of its ranks, which must all make the call.

    Args:
        embeddings: (N, D); weight: (C, D); scale: a number or a 0-d tensor.
        normalize_embeddings, normalize_weight: if not, s |x_i| cos_ij, s |w_j| cos_ij, or s <x_i, w_j>.

    Returns:
        (N, C) float32 (float64 if an input is). A weight of lower precision is upcast a chunk at a time.

    Raises:
        ValueError: a shape does not fit, or the scale is not one number; the message shows it.
    """
    check_rows(embeddings, weight)
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError(f"scale must be a number or a 0-d tensor, got shape {tuple(scale.shape)}.")
    if getattr(weight, optim.MARK, False):
        optim.note_use(weight)
    dtype = compute_dtype(embeddings, weight)
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.to(dtype)  # (N, D)
        x = scale * (F.normalize(x) if normalize_embeddings else x)
        chunks = (w.to(dtype) for w in torch.split(weight, LOGITS_CHUNK))
        return torch.cat([x @ (F.normalize(w) if normalize_weight else w).T for w in chunks], dim=1)  # (N, C)


def _described(value: object) -> object:
    """What of a margin or a scale must be the same on every rank, for its text; a function has only a name."""
    if isinstance(value, Tensor):
        return value.item() if not value.dim() else "one per sample"
    if isinstance(value, Margin):
        settings = {name: setting for name, setting in vars(value).items() if not name.startswith("_")}
        return type(value).__name__, settings, [state.item() for state in value.batch_state()]
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def _target_cosines(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """(N,) cosines with the targets, 0 where there is none, ahead of the pass over all classes."""
    dtype, has_target = compute_dtype(x, w), targets >= 0  # (N,)
    if not len(w):  # a rank that owns no class
        return x.new_zeros(len(x), dtype=dtype)
    x_hat, w_hat = (F.normalize(rows.to(dtype)) for rows in (x, w[targets.clamp_min(0)]))  # (N, D)
    return torch.where(has_target, (x_hat * w_hat).sum(1), 0)


def _reduce(loss: Tensor, valid: Tensor, sample_weight: Tensor | None, reduction: str) -> Tensor:
    count = valid
    if sample_weight is not None:
        count = torch.where(valid, sample_weight, 0)
        loss = torch.where(valid, loss * sample_weight, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count.sum()


def _row_scale(scale: float | Tensor, embeddings: Tensor, weight: Tensor) -> Tensor:
    """The (N,) scale that the op takes, differentiable if the user's scale is."""
    rows, dtype = embeddings.shape[0], compute_dtype(embeddings, weight)
    if isinstance(scale, Tensor):
        return scale.to(embeddings.device, dtype).expand(rows)
    return embeddings.new_full((rows,), scale, dtype=dtype)
