"""The heads as modules: they own the class centres and call the functional form."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import Self, Unpack

from cosface_kernels import optim, resizing, sample_weights, theory
from cosface_kernels.backends import check_name
from cosface_kernels.centres import ClassCentres
from cosface_kernels.distributed import agreement_on_rows, own_classes, several_ranks, warn_of_drift
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.functional import LossStats, cosine_logits, margin_softmax_loss
from cosface_kernels.margins import ClassMargin, Margin, SigmoidMargin, defaults, of_each_class
from cosface_kernels.margins.base import check_use, in_its_dtype, taken
from cosface_kernels.nearest import NearestClasses, nearest_classes
from cosface_kernels.options import WORKSPACE_BYTES
from cosface_kernels.recomputation import state_of_pass
from cosface_kernels.sampling import ClassSampler
from cosface_kernels.subcenters import check_one_centre, check_subcenters, drop_, nearest_of_classes
from cosface_kernels.validation import (
    check_cache,
    check_dtype,
    check_flag,
    check_integer,
    check_interval,
    check_margin,
    check_positive,
    check_reduction,
    check_sample_rate,
    check_scale,
    check_table,
)

INIT_STD = 0.01  # as in insightface's partial_fc; the loss does not depend on it, the effective learning rate does


class HeadOptions(TypedDict, total=False):
    """The keyword arguments of `FusedMarginLoss`, which says what they mean and are by default."""

    reduction: str
    ignore_index: int
    validate_labels: bool | None
    class_weight: Tensor | Sequence[float] | None
    backend: str | None
    gradient_tolerance: float
    label_smoothing: float
    process_group: ProcessGroup | None
    sample_rate: float
    sample_seed: int
    init_std: float
    cache_bytes: int | None
    exact_cache: bool | None
    workspace_bytes: int
    subcenters: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class FusedMarginLoss(ClassCentres):
    """A head with any margin of `cosface_kernels.margins`: class centres, margin and softmax in one fused loss.

    Takes the place of a last linear layer with its cross-entropy. The losses with a name are subclasses.

    Args:
        num_classes: C, the number of identities.
        embedding_size: D, the size of the backbone's output.
        margin: a number m for cos - m; (C,) numbers, one of each class, all of them on every rank; a `Margin`; or
            any function from the (N,) target cosines to as many.
        scale: s > 0, or a 0-d `torch.nn.Parameter` to learn it.
        reduction: "none", "sum" or "mean" (over the samples that are not ignored).
        ignore_index: label of samples that have no loss and no gradient.
        validate_labels: raise for a label out of range, which waits for the device; None: on the CPU alone. If not
            validated, the loss of such a sample is nan.
        class_weight: (C,) factor of the loss of each class's samples, all of them on every rank; in float32,
            whatever the dtype of the head.
        backend: name of a backend, or None for the first that can run; see `python -m cosface_kernels.info`.
        gradient_tolerance: softmax mass that backward may leave out of every sample, 0 for exact gradients; see
            `cosface_kernels.functional.Sparsity`.
        label_smoothing: eps in [0, 1], the mass of a target that is spread evenly over all classes.
        process_group: shards the classes over these ranks; see `cosface_kernels.distributed`.
        sample_rate, sample_seed: share of the classes that take part in a training step, the batch's own among
            them, and the seed of the draws; see `cosface_kernels.sampling`. In evaluation all take part. The
            gradient of the weight is sparse, unless there are several ranks or an optimizer of
            `cosface_kernels.optim` moves the rows.
        init_std: standard deviation of the entries of the first class centres. With normalised class centres the
            loss does not depend on it, but a step of SGD turns rows of half the length four times as far.
        cache_bytes, exact_cache: memory for cosines that backward need not compute again, 128 MiB by default on a
            CPU, and whether they are kept as computed or in 16 bits; see `cosface_kernels.options`.
        workspace_bytes: memory for what a GPU has of a chunk of classes; see `cosface_kernels.options`.
        subcenters: K centres of each class, of which the nearest to a sample counts, so that noisy labels and rare
            looks gather at one that is not dominant; see `drop_subcenters_`. On backends `cpu` and `reference`.
        device, dtype: of the weight; float64, float32, bfloat16 or float16; or float8_e4m3fn, a byte a weight,
            whose rows move inside backward alone: see `cosface_kernels.float8` and docs/optimizers.md.

    Attributes:
        weight: Parameter (num_classes, embedding_size), one class centre per row, not normalised; a DTensor,
            Shard(0), with a process group. With subcenters, (num_classes K, embedding_size), K rows of each class.
        weight_exponent: of a weight in float8, (num_classes,) int8 buffer e: a row is 2^e times what is stored.
        margin: as given; a `Margin` with state keeps it in this module's state_dict.

    Raises:
        TypeError: process_group is something other than a process group.
        ValueError: an argument is out of its range, or this rank is not in process_group; the message shows its
            value.

    Warns, when it is made, of a scale below CosFace's Eq. 6 or a margin m above its Eq. 7; see
    `cosface_kernels.theory`.

    >>> from cosface_kernels.margins import ArcFaceMargin
    >>> head = FusedMarginLoss(num_classes=1000, embedding_size=128, margin=ArcFaceMargin(0.4))
    >>> head(torch.randn(4, 128), torch.tensor([1, 17, 17, 999])).shape
    torch.Size([])
    """

    normalize_embeddings = normalize_weight = True
    label_smoothing, subcenters = 0.0, 1  # of a head that was pickled before it could have others
    scale: float | Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor | Callable[..., Tensor],
        scale: float | Tensor = defaults.SCALE,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        validate_labels: bool | None = None,
        class_weight: Tensor | Sequence[float] | None = None,
        backend: str | None = None,
        gradient_tolerance: float = 0.0,
        label_smoothing: float = 0.0,
        process_group: ProcessGroup | None = None,
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        init_std: float = INIT_STD,
        cache_bytes: int | None = None,
        exact_cache: bool | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        subcenters: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("embedding_size", embedding_size)
        margin = of_each_class(margin)
        if isinstance(margin, ClassMargin):
            check_table(margin.margins, num_classes)
        elif not callable(margin):
            check_margin(margin)
        check_scale(scale, of_head=True)
        check_reduction(reduction)
        check_name(backend)
        check_integer("ignore_index", ignore_index)
        check_flag("validate_labels", validate_labels)
        check_dtype(dtype)
        check_cache(cache_bytes, exact_cache)
        check_integer("workspace_bytes", workspace_bytes, 0)
        check_sample_rate(sample_rate)
        check_integer("sample_seed", sample_seed)
        check_use(margin, label_smoothing, gradient_tolerance, sample_rate=sample_rate)
        check_subcenters(
            subcenters, sharded=process_group is not None, gradient_tolerance=gradient_tolerance, margin=margin
        )
        check_interval("init_std", init_std, "(0, inf)", math.ulp(0.0), math.inf)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.margin = margin
        self.scale = scale
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.validate_labels = validate_labels
        self.backend = backend
        self.gradient_tolerance = gradient_tolerance
        self.label_smoothing = label_smoothing
        self.cache_bytes, self.exact_cache = cache_bytes, exact_cache
        self.workspace_bytes = workspace_bytes
        self.subcenters = int(subcenters)
        self.init_std = init_std
        self.register_buffer("class_weight", sample_weights.of_each_class(class_weight, num_classes))
        self._warn_of_theory()
        if process_group is not None and isinstance(margin, Margin) and margin.reads_weight:
            raise ValueError(
                f"{type(margin).__name__} needs all class centres on one process: process_group must be None, "
                f"got {process_group!r}."
            )
        self._make_weight(num_classes * self.subcenters, embedding_size, process_group, device, dtype)
        own = own_classes(self.weight)
        self.sampler = None
        if sample_rate != 1:
            self.sampler = ClassSampler(
                len(own) // self.subcenters, sample_rate, sample_seed + own.start, device=device
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the class centres anew; the same for the same `torch.manual_seed`, on any number of threads.

        All other state is then as before the first batch, also of a head that was made without memory; but of such
        a head, `class_weight`, the margins of a table and KappaFace's `class_counts` must be set again.
        """
        self._draw_weight(self.init_std)
        if self.sampler is not None:
            self.sampler.reset_parameters()
        if isinstance(self.margin, Margin):
            self.margin.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        class_weight = self.class_weight
        super()._apply(fn, recurse)
        if class_weight is not None:
            self.class_weight = in_its_dtype(class_weight, self.get_buffer("class_weight"))
        return self

    def _warn_of_theory(self) -> None:
        if not callable(self.margin):
            theory.warn_of_margin(self.margin, self.num_classes, self.embedding_size)
        if isinstance(self.margin, SigmoidMargin):
            return  # Eq. 6 is of a softmax
        if self.normalize_embeddings and not isinstance(self.scale, Tensor):
            theory.warn_of_scale(self.scale, self.num_classes)

    @torch.no_grad()
    def resize_classes_(
        self,
        keep: resizing.Keep = None,
        new: int = 0,
        *,
        init: tuple[Tensor, Tensor] | None = None,
        optimizer: Optimizer | None = None,
    ) -> Self:
        """Drops classes, gives them other labels and adds some, in all that is known of each.

        That is the weight, the optimizer's state of it, the margin's of each class, class_weight (1 for a new
        class), the sampler and num_classes. The parameter stays the same object. Its gradient, which had the old
        shape, is dropped, and DistributedDataParallel around the head must be made anew. The ranks that share the
        classes must all make the call, between two steps.

        Args:
            keep: the old labels that stay, (K,) integers whose positions are the new labels; or a mapping from old
                to new labels; None for all as they are.
            new: how many classes come, behind those kept, or where a mapping leaves a label free. A new class
                centre is as long as the kept ones are in the mean; the optimizer's state of it is 0.
            init: None for random directions; or (embeddings, labels), (M, D) and (M,), of this rank's samples by
                their new labels: a new class centre has the direction of the mean of its unit embeddings (weight
                imprinting). Those of kept classes are left out.
            optimizer: that of the weight, also one of torch.optim; None if there is none.

        Returns:
            The head.

        Raises:
            ValueError: a label, `init` or the optimizer does not fit, or the weight is computed from another, as
                by weight_norm; nothing has been changed.
            RuntimeError: backward has moved the weight and the step is not over.

        Source of the means: Qi et al., Low-Shot Learning with Imprinted Weights, arXiv:1712.07136.

        >>> head = FusedMarginLoss(num_classes=1000, embedding_size=128, margin=0.35)
        >>> head.resize_classes_(keep=range(10, 1000), new=20).weight.shape
        torch.Size([1010, 128])
        """
        check_one_centre("resized", self.subcenters)
        learned = self.margin.parameters_of_each_class() if isinstance(self.margin, Margin) else []
        before = own_classes(self.weight)
        change, counts, self.weight_exponent = resizing.resize_(
            self.weight, learned, self.num_classes, self.init_std, keep, new, init, optimizer, self.weight_exponent
        )  # (C_new,) each
        if self.sampler is not None:
            own = own_classes(self.weight)
            self.sampler.resize_(len(own), self.sampler.seed - before.start + own.start)
        if isinstance(self.margin, Margin):
            self.margin.resize_classes_(change, counts)
        if self.class_weight is not None:
            self.class_weight = taken(self.class_weight, change, torch.ones_like(change))
        self.num_classes = len(change)
        self._warn_of_theory()
        return self

    @torch.no_grad()
    def drop_subcenters_(
        self, embeddings: Tensor | None = None, labels: Tensor | None = None, *, optimizer: Optimizer | None = None
    ) -> Self:
        """Leaves each class its dominant centre, so that the head is one without sub-centres, as it is then used.

        The dominant centre is the nearest for most samples of its class; of a class without samples, the longest.
        The paper then trains on, without samples that are more than 75 degrees away from it.

        Args:
            embeddings, labels: (M, D) and (M,) of training samples; the same on every process that holds the head.
            optimizer, and what is raised: as of `resize_classes_`.

        >>> head = FusedMarginLoss(num_classes=1000, embedding_size=128, margin=0.35, subcenters=3)
        >>> head.drop_subcenters_().weight.shape
        torch.Size([1000, 128])
        """
        drop_(self, embeddings, labels, optimizer)
        return self

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool | int = False,
        entropy: bool = False,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """The loss of a batch; see `margin_softmax_loss`.

        Args:
            embeddings: (N, embedding_size), need not be normalised.
            labels: (N,) integers in [0, num_classes), or ignore_index; or (N, 2), two of a sample, as mixup has
                them.
            indices_tuple: what a miner of pytorch-metric-learning gives, pairs or triplets of positions in the
                batch, of this rank's samples. Each is weighted by how often it occurs in them, over the largest of
                these counts.
            ref_emb, ref_labels: None, or the embeddings and labels themselves; others are refused, as by the
                classification losses of pytorch-metric-learning, in whose call they have these places. Without
                ref_emb, ref_labels are not looked at, as there.
            sample_weight: (N,) factor of each sample's loss, times `class_weight` and the miner's; (N, 2) for two
                labels of a sample, which need it; the mean is then over the sum of both.
            return_stats: also return `LossStats`, which costs no further pass over the weight but with a
                `SigmoidMargin`; k for its accuracy among the k nearest classes too, which costs one.
            entropy: with return_stats, its entropy too, which is differentiable.

        Returns:
            The loss, 0-d, or (N,) for reduction "none"; with return_stats, a pair (loss, stats). Where samples
            have weights a_i, the mean is sum(a_i loss_i) / sum(a_i), as of `torch.nn.functional.cross_entropy`.
        """
        if ref_emb is not None and (ref_emb is not embeddings or ref_labels is not labels):
            with agreement_on_rows(self.weight, "the batch"):  # in which the other ranks are
                raise ValueError(
                    "ref_emb and ref_labels must be None or the embeddings and labels themselves, got others: a "
                    "head compares embeddings with its class centres."
                )
        with self._state_of_pass(embeddings, labels):
            return self._loss(
                embeddings,
                labels,
                self.margin,
                sample_weight=sample_weight,
                indices_tuple=indices_tuple,
                return_stats=return_stats,
                entropy=entropy,
            )

    def _state_of_pass(self, embeddings: Tensor, labels: Tensor) -> AbstractContextManager[None]:
        """Under torch.utils.checkpoint a batch changes the state once; see `cosface_kernels.recomputation`."""
        state = [] if self.sampler is None else [self.sampler.draws]
        state += self.margin.batch_state() if isinstance(self.margin, Margin) else []
        if not (state and self.training) or torch.compiler.is_compiling():
            return nullcontext()
        return state_of_pass(self, state, embeddings, labels)

    def _loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        margin: float | Callable[..., Tensor],
        **arguments: Any,
    ) -> Tensor | tuple[Tensor, LossStats]:
        weight: Tensor = self.weight
        if not self.training and (getattr(weight, optim.MARK, False) or weight.dtype is FLOAT8):
            weight = weight.detach()  # no step is meant, and so no row moves
        trains = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if (
            trains
            and not torch.compiler.is_compiling()
            and not isinstance(self.weight, DTensor)
            and several_ranks()
        ):
            warn_of_drift()
        return margin_softmax_loss(
            embeddings,
            weight,
            labels,
            margin=margin,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            validate_labels=self.validate_labels,
            class_weight=self.class_weight,
            backend=self.backend,
            gradient_tolerance=self.gradient_tolerance,
            label_smoothing=self.label_smoothing,
            normalize_embeddings=self.normalize_embeddings,
            normalize_weight=self.normalize_weight,
            sampler=self.sampler if self.training else None,
            cache_bytes=self.cache_bytes,
            exact_cache=self.exact_cache,
            workspace_bytes=self.workspace_bytes,
            subcenters=self.subcenters,
            weight_exponent=self.weight_exponent,
            **arguments,
        )

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, num_classes) logits s cos_ij without a margin; see `cosine_logits`."""
        logits = cosine_logits(
            embeddings,
            self.weight,
            scale=self.scale,
            normalize_embeddings=self.normalize_embeddings,
            normalize_weight=self.normalize_weight,
            weight_exponent=self.weight_exponent,
        )
        return logits if self.subcenters == 1 else logits.unflatten(1, (-1, self.subcenters)).max(2).values

    def topk(self, embeddings: Tensor, k: int) -> NearestClasses:
        """The k nearest classes of each embedding, without all logits; see `nearest_classes`.

        Args:
            embeddings: (N, D), of this rank's samples where the classes are sharded.
            k: in [1, num_classes].

        Returns:
            cosines and classes, (N, k) each; times the scale the cosines are logits without a margin.
        """
        find = partial(
            nearest_classes,
            embeddings,
            self.weight,
            normalize_embeddings=self.normalize_embeddings,
            normalize_weight=self.normalize_weight,
            backend=self.backend,
            weight_exponent=self.weight_exponent,
        )
        return find(k) if self.subcenters == 1 else nearest_of_classes(find, k, self.num_classes, self.subcenters)

    def extra_repr(self) -> str:
        margin = "" if isinstance(self.margin, nn.Module) else f"margin={self.margin}, "
        own = f"subcenters={self.subcenters}, " if self.subcenters > 1 else ""
        own += f"label_smoothing={self.label_smoothing}, " if self.label_smoothing else ""
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, {own}{margin}"
            f"scale={self.scale}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"backend={self.backend!r}, dtype={self.weight.dtype}"
        )


class FusedCosFaceLoss(FusedMarginLoss):
    """CosFace (LMCL) head, psi(cos) = cos - m.

    The first four arguments are in the order of pytorch-metric-learning's `CosFaceLoss`. MFCosface's loss is
    this one too: what is new there is its network.

    Args:
        num_classes, embedding_size, scale: C, D and s, as in `FusedMarginLoss`.
        margin: m, subtracted from the target's cosine; or (C,), one of each class.
        options: the keyword arguments of `FusedMarginLoss`.

    Raises:
        ValueError: an argument is out of its range; the message shows its value.

    Source: Wang et al., CosFace, arXiv:1801.09414. The defaults m = 0.35 and s = 64 are the paper's.

    >>> _ = torch.manual_seed(0)
    >>> head = FusedCosFaceLoss(num_classes=1000, embedding_size=128)
    >>> embeddings = torch.randn(4, 128, requires_grad=True)
    >>> loss = head(embeddings, torch.tensor([1, 17, 17, 999]))
    >>> loss.backward()
    >>> embeddings.grad.shape, head.weight.grad.shape
    (torch.Size([4, 128]), torch.Size([1000, 128]))
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor = defaults.COSFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        **options: Unpack[HeadOptions],
    ) -> None:
        if not isinstance(margin, Tensor):
            check_margin(margin)  # FusedMarginLoss would take a callable
        super().__init__(num_classes, embedding_size, margin, scale, **options)
