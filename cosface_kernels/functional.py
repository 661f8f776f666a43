"""The functional form. The work is done by torch.ops.cosface.lmcl; what comes before and after, by `stages`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import facts, float8, ops, optim, sample_weights, sigmoid, stages
from cosface_kernels.derivatives import refuse_transforms
from cosface_kernels.distributed import Exchange, Local, own_rows, placement, whole
from cosface_kernels.margins import SigmoidMargin, defaults, of_each_class
from cosface_kernels.options import WORKSPACE_BYTES
from cosface_kernels.reference import compute_dtype
from cosface_kernels.sampling import ClassSampler
from cosface_kernels.softmax import Softmax
from cosface_kernels.stats import LossStats as LossStats
from cosface_kernels.stats import Sparsity as Sparsity
from cosface_kernels.validation import (
    check_bool,
    check_exponents,
    check_margin,
    check_rows,
    check_scale,
    check_stats,
)

LOGITS_CHUNK = 8192  # classes that cosine_logits upcasts at a time: 16 MiB of float32 at embedding_size 512


def cosface_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float = defaults.COSFACE_MARGIN,
    scale: float | Tensor = defaults.SCALE,
    reduction: str = "mean",
    ignore_index: int = -100,
    validate_labels: bool | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
    gradient_tolerance: float = 0.0,
    label_smoothing: float = 0.0,
    return_stats: bool | int = False,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """CosFace's Large Margin Cosine Loss (LMCL), fused with its normalisation and class matrix product.

        loss_i = -log( e^{s(cos_iy - m)} / ( e^{s(cos_iy - m)} + sum_{j != y} e^{s cos_ij} ) )

    Args:
        embeddings: (N, D) float64, float32, bfloat16 or float16; need not be normalised.
        weight: (C, D) class centres, one row each, of any of these dtypes; need not be normalised.
        labels: (N,) integers in [0, C), or ignore_index; or (N, 2), two of a sample, as mixup has them, with a
            sample_weight of that shape. Each of them has the margin while the other is one of its negatives.
        margin: m, subtracted from the target's cosine.
        scale: s > 0: a number, a 0-d tensor (learned if it requires a gradient), or one value per sample (N,).
        reduction: "none", "sum" or "mean". The mean is over the samples that are not ignored, weighted by
            sample_weight as `torch.nn.functional.cross_entropy` weights its mean: sum(a_i loss_i) / sum(a_i).
        ignore_index: label of samples that have no loss and no gradient.
        validate_labels: raise for a label out of range, which waits for the device. None: on the CPU alone. If not
            validated, the loss of such a sample is nan, and it has no gradient.
        sample_weight: (N,) factor a_i of each sample's loss; or (N, 2), of the loss of each label: their sum is
            the sample's loss, and the mean divides by the sum of both.
        backend: name of a backend, or None for the first that takes these tensors.
        gradient_tolerance: eps in [0, 1). 0: exact gradients. Else backward may leave out of every sample
            negatives that hold at most eps of the softmax over its negatives, and takes time in proportion to what
            remains; the loss stays exact. See `Sparsity`.
        label_smoothing: eps in [0, 1]: the target has mass 1 - eps + eps / C, and each other class eps / C, as in
            `torch.nn.functional.cross_entropy` of the logits with their margin; of sampled classes C is how many
            take part.
        return_stats: also return `LossStats`; k in [1, C] for its top_k_accuracy too, for a further pass over the
            weight.
        entropy: with return_stats, also `LossStats.entropy`, which is differentiable.

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
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        entropy=entropy,
    )


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor | Callable[..., Tensor],
    scale: float | Tensor = defaults.SCALE,
    reduction: str = "mean",
    ignore_index: int = -100,
    validate_labels: bool | None = None,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    indices_tuple: Sequence[Tensor] | None = None,
    backend: str | None = None,
    gradient_tolerance: float = 0.0,
    label_smoothing: float = 0.0,
    return_stats: bool | int = False,
    entropy: bool = False,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    sampler: ClassSampler | None = None,
    cache_bytes: int | None = None,
    exact_cache: bool | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    subcenters: int = 1,
    weight_exponent: Tensor | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Softmax over cosines with any margin psi on the target: CosFace, ArcFace and whoever comes next.

        loss_i = -log( e^{s psi(cos_iy)} / ( e^{s psi(cos_iy)} + sum_{j != y} e^{s cos_ij} ) )

    The margin touches one logit per sample, so it costs no kernel: autograd differentiates psi on an (N,) vector.

    Args:
        margin: psi, from the (N,) target cosines to as many margined ones; or a number m for cos - m; or (C,)
            numbers, one of each class, differentiable, all of them on every rank; or one of
            `cosface_kernels.margins`, which may also look at the embeddings' norms, replace the loss, reshape the
            negatives, or be a `SigmoidMargin`, for which each class counts on its own. Samples that are ignored
            pass through psi with cosine 0 and their result is dropped. Of samples with two labels psi sees (2 N,),
            all the first labels before all the second.
        class_weight: (C,) factor of the loss of each class's samples, all of them on every rank.
        indices_tuple: pairs or triplets of positions in the batch, as a miner of pytorch-metric-learning gives
            them, (M,) each. Each sample is weighted by how often it occurs, over the largest of these counts.
        normalize_embeddings: if not, the scale of each sample is s |x_i|, as in A-Softmax.
        normalize_weight: if not, <x_i, w_j> / |x_i| takes the place of cos_ij, the target's as well. It is an
            angle's up to 1 alone: beyond, of rows that are longer, margins of an angle take theta for 0 or pi, and
            cos(theta + m) for c cos(m).
        sampler: draws the classes that take part, of a sharded weight from those of this rank; the gradient of the
            weight is then sparse, except where there are several ranks.
        cache_bytes, exact_cache: memory for cosines that backward need not compute again, 128 MiB by default on a
            CPU, and whether they are kept as computed or in 16 bits; see `cosface_kernels.options`.
        workspace_bytes: memory for what a GPU has of a chunk of classes; see `cosface_kernels.options`.
        subcenters: K. The weight is then (C K, D), class j owns its rows jK .. jK + K - 1, and cos_ij is that of
            the nearest of them, which alone has a gradient. On backends `cpu` and `reference`, and on one rank.
        weight_exponent: (C,) int8, of a weight in float8 whose rows an optimizer moves, which changes it too, or
            that is not normalised: row j is 2^e_j times what is stored; sharded like the weight. See
            `cosface_kernels.float8`.

    The other arguments, the result and the errors are those of `cosface_loss`.

    >>> weight = torch.eye(3, 4)
    >>> arcface = lambda cos: torch.cos(torch.acos(cos.clamp(-1, 1)) + 0.5)
    >>> margin_softmax_loss(weight[:2] + 0.1, weight, torch.tensor([0, 2]), margin=arcface, scale=2.0)
    tensor(1.6890)
    """
    refuse_transforms()
    ranks = placement(weight)
    weights = sample_weight, class_weight, indices_tuple
    options: dict[str, Any] = {}

    def stated() -> dict[str, object]:
        return facts.of_batch(settings, options, ranks, embeddings, weight, labels, scale, weights, return_stats)

    of_each = scale if isinstance(scale, Tensor) and scale.dim() else None
    with ranks.agreement(stated, embeddings, sample_weight, of_each):
        settings = stages.Settings(
            of_each_class(margin), reduction, ignore_index, validate_labels, backend, gradient_tolerance,
            normalize_embeddings, normalize_weight, sampler, cache_bytes, exact_cache, workspace_bytes,
            label_smoothing, entropy, subcenters,
            own_rows(weight_exponent) if isinstance(weight_exponent, Tensor) else None,
        )  # fmt: skip
        stages.check(settings, ranks, embeddings, weight, labels, scale)
        check_stats(return_stats, entropy, settings.classes_of(ranks.num_classes))
        check_exponents(weight, weight_exponent, needed=not normalize_weight)
        optim.check_gradient(weight, weight_exponent)
        if class_weight is not None:
            sample_weights.check_class_weight(class_weight, settings.classes_of(ranks.num_classes))
        sample_weight, share = sample_weights.combined(labels, compute_dtype(embeddings, weight), *weights)
        validate = labels.device.type == "cpu" if validate_labels is None else validate_labels
        differentiable = torch.is_grad_enabled() and (embeddings.requires_grad or weight.requires_grad)
        options = stages.op_options(settings, labels, differentiable)
        if not (return_stats or sample_weight is not None or isinstance(scale, Tensor)):
            loss = stages.in_one_call(settings, options, embeddings, weight, labels, scale, validate)
            if loss is not None:
                return loss
        targets = ops.targets(labels, settings.classes_of(weight.shape[0]), int(ignore_index), validate)  # (N,)
    batch = stages.gather(settings, ranks, embeddings, weight, targets, scale, sample_weight, share)
    own = stages.own_classes(settings, ranks, batch, validate)
    if isinstance(settings.margin, SigmoidMargin):
        reduced = sigmoid.loss(settings, options, ranks, weight, batch, own, validate)
        if not return_stats:
            return reduced
        with torch.no_grad():
            part = stages.over_own_classes(settings, {**options, "cache_bytes": 0}, ranks, weight, batch, own)
            _, softmax = ranks.combine(part.scale, *part.results)
            each_label = stages.each_label(settings, ranks, part, softmax, batch)
            return reduced, _stats(settings, ranks, softmax, batch, each_label, None, return_stats)
    part = stages.over_own_classes(settings, options, ranks, weight, batch, own)
    loss, softmax = ranks.combine(part.scale, *part.results)  # (N,), or None, over all classes
    each_label = stages.each_label(settings, ranks, part, softmax, batch)
    loss = stages.with_margin(settings, ranks, loss, each_label)  # (M,)
    if not validate:
        loss = loss.masked_fill(each_label.rows.targets == ops.INVALID, torch.nan)  # (M,)
    reduced = stages.reduce(ranks, loss, batch, each_label.valid, each_label.sample_weight, reduction)
    sparsity = None
    if options.get("gradient_tolerance") and ranks.takes_part(bool(return_stats)):
        sparsity = stages.sparsity(ranks, part)
    if not return_stats:
        return reduced
    stats = _stats(settings, ranks, softmax, batch, each_label, sparsity, return_stats)
    if entropy:
        stats = stats._replace(entropy=stages.entropy(ranks, softmax, batch))
    return reduced, stats


def _stats(
    settings: stages.Settings,
    ranks: Local | Exchange,
    softmax: Softmax,
    batch: stages.Batch,
    labels: stages.Labels,
    sparsity: Sparsity | None,
    return_stats: bool | int,
) -> LossStats:
    stats = stages.statistics(ranks, softmax, batch, labels, sparsity)
    if isinstance(return_stats, bool):
        return stats
    return stats._replace(top_k_accuracy=stages.top_k_accuracy(settings, ranks, batch, labels, int(return_stats)))


def cosine_logits(
    embeddings: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    weight_exponent: Tensor | None = None,
) -> Tensor:
    """s cos_ij without a margin, for inference over known classes; differentiable.

    A sharded weight is gathered whole on each of its ranks, which must all make the call.

    Args:
        embeddings: (N, D); weight: (C, D); scale: a number or a 0-d tensor.
        normalize_embeddings, normalize_weight: if not, s |x_i| cos_ij, s |w_j| cos_ij, or s <x_i, w_j>.
        weight_exponent: (C,) of a weight in float8, which without normalize_weight is needed.

    Returns:
        (N, C) float32 (float64 if an input is). A weight of lower precision is upcast a chunk at a time, of which
        autograd keeps every one, and `torch.no_grad` none.

    Raises:
        ValueError: a shape does not fit, or the scale is not one positive number; the message shows it.
    """
    with placement(weight).agreement(dict, embeddings):
        check_rows(embeddings, weight)
        check_exponents(weight, weight_exponent, needed=not normalize_weight)
        if isinstance(scale, Tensor) and scale.dim():
            raise ValueError(f"scale must be a number or a 0-d tensor, got shape {tuple(scale.shape)}.")
        check_scale(scale)
        check_bool("normalize_embeddings", normalize_embeddings)
        check_bool("normalize_weight", normalize_weight)
        if getattr(weight, optim.MARK, False):
            optim.note_use(weight)
    dtype = compute_dtype(embeddings, weight)
    weight = whole(weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.to(dtype)  # (N, D)
        x = scale * (F.normalize(x) if normalize_embeddings else x)
        chunks = (w.to(dtype) for w in torch.split(weight, LOGITS_CHUNK))
        logits = torch.cat([x @ (F.normalize(w) if normalize_weight else w).T for w in chunks], dim=1)  # (N, C)
    if normalize_weight or weight_exponent is None:
        return logits
    return logits * float8.units(whole(weight_exponent), dtype).T
