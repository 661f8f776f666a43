"""What is timed: the fused loss and its peers, each a function that turns a problem into a step.

A problem is x (N, D), w (C, D), labels y (N,), scale s and margin m; every step computes the same mean loss.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OURS = "cosface_kernels"
CHECKPOINT_CLASSES = 8192  # classes of a chunk: 8 MiB of float32 logits at N = 256


@dataclass
class Problem:
    embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    labels: Tensor  # (N,)
    scale: float
    margin: float


@dataclass
class Step:
    """A forward pass over two leaves; `loss().backward()` leaves the gradients in them."""

    loss: Callable[[], Tensor]
    embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D), or (D, C) if transposed
    transposed: bool = False

    def clear_gradients(self) -> None:
        self.embeddings.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """dx (N, D) and dw (C, D)."""
        dw = self.weight.grad
        return self.embeddings.grad, dw.T if self.transposed else dw


class UnavailableError(RuntimeError):
    """An implementation cannot run here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """How to build a step, and what its time is to be compared with.

    Attributes:
        build: a step from a problem; it must not keep the problem's weight if it makes a copy.
        flops: k for a step of k N C D in matrix products: 6 with the logits kept, 8 with them recomputed.
        package: what has to be installed for it.
        definition: the mean loss of (x, w, problem) in float64, that of LMCL if None.
        note: what its rows say.
        margin: whether it has a margin; one that has none is built, checked and timed with margin 0.
        compiles: whether the first step of each shape compiles.
        scale: s, if not the problem's.
    """

    build: Callable[[Problem], Step]
    flops: int
    package: str
    margin: bool = True
    compiles: bool = False
    definition: Callable[[Tensor, Tensor, Problem], Tensor] | None = None
    note: str | None = None
    scale: float | None = None

    def ran_with(self, margin: float, scale: float) -> tuple[float | None, float]:
        """The problem's margin and scale, or those in their place; None: a margin of its own."""
        if self.definition:
            return None, self.scale or scale
        return margin if self.margin else 0.0, scale

    @property
    def is_peer(self) -> bool:
        """Whether it is another project's, and computes the same loss."""
        return self.margin and self.definition is None and self.package != OURS


def eager_loss(x: Tensor, w: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    logits = scale * F.linear(F.normalize(x), F.normalize(w))  # (N, C)
    logits[torch.arange(len(labels), device=x.device), labels] -= scale * margin
    return F.cross_entropy(logits, labels)


def checkpoint_loss(x: Tensor, w: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Chunks of classes recomputed in backward; with p_y the target's probability without a margin,
    lse' = lse + log1p(p_y (e^{-s m} - 1)) and loss = lse' - (z_y - s m).
    """
    x_hat = F.normalize(x)  # (N, D)
    chunks, start = [], 0
    for w_chunk in w.split(CHECKPOINT_CLASSES):  # not w[a:b], whose backward fills a (C, D) buffer per chunk
        args = (x_hat, w_chunk, labels - start, scale)
        chunks.append(checkpoint(_chunk_statistics, *args, use_reentrant=False, preserve_rng_state=False))
        start += len(w_chunk)
    lse = torch.stack([lse for lse, _ in chunks]).logsumexp(0)  # (N,)
    z_y = torch.stack([z_y for _, z_y in chunks]).sum(0)  # (N,)
    shift = torch.expm1(torch.as_tensor(-scale * margin, dtype=lse.dtype, device=lse.device))
    return (lse + torch.log1p((z_y - lse).exp() * shift) - (z_y - scale * margin)).mean()


def _chunk_statistics(x_hat: Tensor, w: Tensor, local: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """logsumexp over a chunk of classes, and the target's logit if it lies in it, else 0; (N,) each."""
    z = scale * F.linear(x_hat, F.normalize(w))  # (N, T)
    inside = (local >= 0) & (local < len(w))  # (N,)
    z_y = z.gather(1, local.where(inside, 0)[:, None])[:, 0]  # (N,)
    return z.logsumexp(1), z_y.where(inside, 0)


def _leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.embeddings.requires_grad_(), problem.weight.requires_grad_()


def _build_fused(problem: Problem, backend: str | None = None) -> Step:
    from cosface_kernels import cosface_loss

    x, w = _leaves(problem)
    labels, options = problem.labels, {"scale": problem.scale, "margin": problem.margin}
    backend = _backend(x, w, backend)
    return Step(lambda: cosface_loss(x, w, labels, backend=backend, **options), x, w)


def _backend(x: Tensor, w: Tensor, name: str | None = None, **options: Any) -> str:
    from cosface_kernels.backends import select
    from cosface_kernels.options import Options

    # A backend by name, so that a missing one is reported and not replaced by the reference.
    backend = name or os.environ.get("COSFACE_BACKEND", "cpu" if x.device.type == "cpu" else "triton")
    try:
        select(backend, x, w, Options(**options))
    except RuntimeError as error:
        raise UnavailableError(f"fused needs its {error}") from error
    return backend


def _of_family(name: str, flops: int = 8, **options: Any) -> Implementation:
    """A loss of the family with its own margin and the problem's scale, unless the options have one."""

    subcenters = options.get("subcenters", 1)  # the problem's classes are their rows

    def margin(problem: Problem) -> Any:
        from cosface_kernels import margins

        classes = len(problem.weight)
        if name == "KappaFaceMargin":
            return margins.KappaFaceMargin(torch.arange(1, 1 + classes))
        if name == "ClassMargin":
            return margins.ClassMargin(torch.linspace(0.1, 0.5, classes, device=problem.weight.device))
        if name == "SphereFace2Margin":
            return margins.SphereFace2Margin(num_classes=classes, scale=problem.scale).to(problem.weight.device)
        if name == "UniFaceMargin":
            return margins.UniFaceMargin(bias=math.log(10 * classes)).to(problem.weight.device)
        if name == "AdaMSoftmaxMargin":
            return margins.AdaMSoftmaxMargin(classes).to(problem.weight.device)
        return getattr(margins, name)(**({"filter_above": 0.1} if name == "CombinedMargin" else {}))

    def build(problem: Problem) -> Step:
        from cosface_kernels import margin_softmax_loss

        x, w = _leaves(problem)
        backend, labels = _backend(x, w, subcenters=subcenters), problem.labels // subcenters
        arguments = {"margin": margin(problem), "scale": problem.scale, "backend": backend, **options}
        return Step(lambda: margin_softmax_loss(x, w, labels, **arguments), x, w)

    def definition(x: Tensor, w: Tensor, problem: Problem) -> Tensor:
        from cosface_kernels import margin_softmax_loss

        arguments = {"margin": margin(problem), "scale": problem.scale, "backend": "reference", **options}
        return margin_softmax_loss(x, w, problem.labels // subcenters, **arguments)

    return Implementation(
        build, flops, OURS, definition=definition, note="its own margin", scale=options.get("scale")
    )


def _build_eager(problem: Problem) -> Step:
    x, w = _leaves(problem)
    rest = (problem.labels, problem.scale, problem.margin)
    return Step(lambda: eager_loss(x, w, *rest), x, w)


def _build_compile(problem: Problem) -> Step:
    x, w = _leaves(problem)
    rest = (problem.labels, problem.scale, problem.margin)
    compiled = torch.compile(eager_loss, dynamic=False, fullgraph=True)
    return Step(lambda: compiled(x, w, *rest), x, w)


def _build_checkpoint(problem: Problem) -> Step:
    x, w = _leaves(problem)
    rest = (problem.labels, problem.scale, problem.margin)
    return Step(lambda: checkpoint_loss(x, w, *rest), x, w)


def _build_pml(problem: Problem) -> Step:
    from pytorch_metric_learning.losses import CosFaceLoss

    def assign(parameter: torch.nn.Parameter) -> None:
        parameter.data = problem.weight.T.contiguous()  # (D, C)

    (num_classes, dim), x, labels = problem.weight.shape, problem.embeddings.requires_grad_(), problem.labels
    loss = CosFaceLoss(num_classes, dim, margin=problem.margin, scale=problem.scale, weight_init_func=assign)
    loss.weight_init_func = None  # it keeps problem.weight alive
    return Step(lambda: loss(x, labels), x, loss.W, transposed=True)


def _build_torch_lce(problem: Problem) -> Step:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(f"torch-lce needs torch >= 2.13, this is torch {torch.__version__}.")
    x, w = _leaves(problem)
    labels, scale, options = problem.labels, problem.scale, torch.nn.LinearCrossEntropyOptions()
    return Step(
        lambda: F.linear_cross_entropy(scale * F.normalize(x), F.normalize(w), labels, options=options), x, w
    )


def _build_cce(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    x, w = _leaves(problem)
    labels, s, m = problem.labels, problem.scale, problem.margin
    impl = "cce" if x.device.type == "cuda" else "torch_compile"

    def loss() -> Tensor:
        plain = linear_cross_entropy(s * F.normalize(x), F.normalize(w), labels, impl=impl, reduction="none")
        p_y = (-plain).exp()  # (N,), the target's probability without a margin
        return (plain + s * m + torch.log1p(p_y * math.expm1(-s * m))).mean()

    return Step(loss, x, w)


def _build_liger(problem: Problem) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    x, w = _leaves(problem)
    labels, scale, cross_entropy = problem.labels, problem.scale, LigerFusedLinearCrossEntropyLoss()
    return Step(lambda: cross_entropy(F.normalize(w), scale * F.normalize(x), labels), x, w)


IMPLEMENTATIONS = {
    "fused": Implementation(_build_fused, 8, OURS),
    "fused-cuda": Implementation(functools.partial(_build_fused, backend="cuda"), 8, OURS),
    "eager": Implementation(_build_eager, 6, "torch"),
    "compile": Implementation(_build_compile, 6, "torch", compiles=True),
    "checkpoint": Implementation(_build_checkpoint, 8, "torch"),
    "pml": Implementation(_build_pml, 6, "pytorch-metric-learning"),
    "torch-lce": Implementation(_build_torch_lce, 6, "torch >= 2.13", margin=False, note="margin 0"),
    "cce": Implementation(_build_cce, 6, "cut-cross-entropy and triton", compiles=True),
    # Its gradients are made in forward for the mean, so that no margin can be added after.
    "liger": Implementation(_build_liger, 6, "liger-kernel and triton", margin=False, note="margin 0"),
    "uncached": _of_family("CosFaceMargin", cache_bytes=0),
    "label-smoothing": _of_family("CosFaceMargin", label_smoothing=0.1),
    "arcface": _of_family("ArcFaceMargin"),
    "subcenter-arcface": _of_family("ArcFaceMargin", subcenters=4),  # of which the usual sizes are multiples
    "sphereface": _of_family("SphereFaceMargin"),
    "a-softmax": _of_family("AnnealedSphereFaceMargin", scale=1.0, normalize_embeddings=False),
    "l-softmax": _of_family("LSoftmaxMargin", scale=1.0, normalize_embeddings=False, normalize_weight=False),
    "adaface": _of_family("AdaFaceMargin"),
    "magface": _of_family("MagFaceMargin"),
    "kappaface": _of_family("KappaFaceMargin"),
    "x2-softmax": _of_family("X2SoftmaxMargin"),
    "gb-cosface": _of_family("GBCosFaceMargin"),
    "elasticface": _of_family("ElasticFaceMargin"),
    "class-margin": _of_family("ClassMargin"),
    "adam-softmax": _of_family("AdaMSoftmaxMargin"),
    "curricularface": _of_family("CurricularFaceMargin"),
    "circle-loss": _of_family("CircleLossMargin"),
    "npcface": _of_family("NPCFaceMargin"),
    "mv-softmax": _of_family("MVSoftmaxMargin"),
    "sphereface2": _of_family("SphereFace2Margin", 6),
    "uniface": _of_family("UniFaceMargin", 6),
    "sface": _of_family("SFaceMargin", 6),
    "combined-filter": _of_family("CombinedMargin"),
}


def build(name: str, problem: Problem) -> Step:
    """The named implementation's step.

    Raises:
        UnavailableError: its package is not installed, or is too old.
    """
    implementation = IMPLEMENTATIONS[name]
    try:
        return implementation.build(problem)
    except ImportError as error:
        raise UnavailableError(
            f"{name} needs {implementation.package}, and importing it failed: {error}."
        ) from error
