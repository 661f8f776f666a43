"""The losses of the family as their papers write them, over angles and norms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import (
    FusedAdaCosLoss,
    FusedAdaFaceLoss,
    FusedAdaMSoftmaxLoss,
    FusedArcFaceLoss,
    FusedASoftmaxLoss,
    FusedCircleLoss,
    FusedCombinedMarginLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedElasticFaceLoss,
    FusedGBCosFaceLoss,
    FusedKappaFaceLoss,
    FusedLSoftmaxLoss,
    FusedMagFaceLoss,
    FusedMarginLoss,
    FusedMVSoftmaxLoss,
    FusedNormalizedSoftmaxLoss,
    FusedNPCFaceLoss,
    FusedSFaceLoss,
    FusedSoftmaxLoss,
    FusedSphereFace2Loss,
    FusedSphereFaceLoss,
    FusedSubCenterArcFaceLoss,
    FusedUniFaceLoss,
    FusedX2SoftmaxLoss,
)
from cosface_kernels.margins import ClassMargin
from cosface_kernels.margins.drawn import standard_normal
from support import F64, make_problem

NUM_CLASSES, DIM = 37, 12


CLASS_COUNTS = list(range(3, 3 + NUM_CLASSES))


# Each formula takes the (N,) angles and norms of a batch and its labels, and gives psi.


def _arcface(theta: Tensor, norms: Tensor, labels: Tensor, m: float = 0.5) -> Tensor:
    return torch.where(theta + m < math.pi, (theta + m).cos(), theta.cos() - m * math.sin(m))


def _sphereface(theta: Tensor, norms: Tensor, labels: Tensor, m: float = 1.7) -> Tensor:
    k = (m * theta / math.pi).detach().floor()
    return (-1) ** k * torch.cos(m * theta) - 2 * k


def _annealed(theta: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
    annealing = max(5, 1000 / (1 + 0.12 * 1))
    return (_sphereface(theta, norms, labels, 4) + annealing * theta.cos()) / (1 + annealing)


def _adaface(theta: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
    m, h = 0.4, 0.333
    norms = norms.detach().clip(1e-3, 100)
    mean, std = 0.99 * 20 + 0.01 * norms.mean(), 0.99 * 100 + 0.01 * norms.std()
    quality = (h * (norms - mean) / (std + 1e-3)).clip(-1, 1)
    theta = theta.cos().clamp(-0.999, 0.999).acos()
    return (theta - m * quality).clip(1e-3, math.pi - 1e-3).cos() - (m + m * quality)


def _magface_margin(norms: Tensor) -> Tensor:
    return 0.45 + 0.35 * (norms.clamp(10, 110) - 10) / 100


def _magface(theta: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
    return torch.where(theta < math.pi / 2, (theta + _magface_margin(norms)).cos(), theta.cos())


def _magface_regularizer(norms: Tensor) -> Tensor:
    a = norms.clamp(10, 110)
    return 35 * (a / 110**2 + 1 / a)


def _kappaface(theta: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
    return torch.cos(theta + 0.8 * _kappaface_weights(labels.device)[labels])


def _kappaface_sums(device: torch.device) -> Tensor:
    double = {"generator": torch.Generator(device).manual_seed(4), "dtype": torch.float64, "device": device}
    directions = F.normalize(torch.randn(NUM_CLASSES, DIM, **double))
    lengths = 0.1 + 0.8 * torch.rand(NUM_CLASSES, 1, **double)
    return directions * lengths * torch.tensor(CLASS_COUNTS, device=device)[:, None]


def _kappaface_weights(device: torch.device) -> Tensor:
    n = torch.tensor(CLASS_COUNTS, dtype=torch.float64, device=device)
    r = _kappaface_sums(device).norm(dim=1) / n
    kappa = r * (DIM - r**2) / (1 - r**2)
    w_kappa = 1 - torch.sigmoid(0.4 * (kappa - kappa.mean()) / kappa.std())
    return 0.7 * w_kappa + 0.3 * (1 + torch.cos(math.pi * n / (1.05 * n.max()))) / 2


def _kappaface_head(*args, **options) -> FusedKappaFaceLoss:
    head = FusedKappaFaceLoss(*args, class_counts=CLASS_COUNTS, **options)
    head.margin.update(_kappaface_sums(head.weight.device))
    return head


def _mv_softmax(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return _reshaped(x, w, labels, 32, lambda cos, _: cos - 0.35, lambda c, cos: 1.2 * c + 0.2, only_positive=True)


def _mv_arc_softmax(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    psi = lambda cos, theta: (theta + 0.5).cos()  # noqa: E731
    return _reshaped(x, w, labels, 32, psi, lambda c, cos: 1.2 * c + 0.2, only_positive=True)


def _npcface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = F.normalize(x) @ F.normalize(w).T  # (N, C)
    target = cos.gather(1, labels[:, None])  # (N, 1)
    hard = (cos > (target.detach().acos() + 0.5).cos()).scatter(1, labels[:, None], False)
    mean = torch.where(hard, cos, 0).sum(1, keepdim=True) / hard.sum(1, keepdim=True).clamp_min(1)
    psi = torch.where(target > 0, (target.acos() + 0.4 + 0.2 * mean.detach()).cos(), target)
    logits = torch.where(hard, 1.1 * cos + 0.2, cos).scatter(1, labels[:, None], psi)
    return F.cross_entropy(64 * logits, labels, reduction="none")


def _circle_loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = F.normalize(x) @ F.normalize(w).T  # (N, C)
    is_target = F.one_hot(labels, len(w)).bool()
    of_target = (1.25 - cos.detach()).clamp_min(0) * (cos - 0.75)
    of_others = (cos.detach() + 0.25).clamp_min(0) * (cos - 0.25)
    return F.cross_entropy(256 * torch.where(is_target, of_target, of_others), labels, reduction="none")


def _sv_softmax(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """As its paper has it: e^{s (t - 1)(cos_j + 1)} multiplies the hard negatives."""
    t = 1.3
    return _reshaped(x, w, labels, 32, lambda cos, _: cos, lambda c, cos: c + (t - 1) * (c + 1))


def _curricularface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The first batch: t is 0.01 of the mean target cosine."""

    def harder(c: Tensor, cos: Tensor) -> Tensor:
        return c * (0.01 * cos.detach().mean() + c)

    def psi(cos: Tensor, theta: Tensor) -> Tensor:
        return (theta + 0.5).cos()

    return _reshaped(x, w, labels, 64, psi, harder, guard=lambda theta: _arcface(theta, theta, labels))


def _reshaped(x, w, labels, s, lowered, harder, *, only_positive=False, guard=None) -> Tensor:
    """Cross-entropy with negatives above lowered(cos_y, theta_y) replaced by harder(negatives, cos_y)."""
    cos = F.normalize(x) @ F.normalize(w).T  # (N, C)
    rows = torch.arange(len(x), device=x.device)
    target = cos[rows, labels]
    theta = target.acos()
    psi = lowered(target, theta)
    logits = torch.where(cos > psi.detach()[:, None], harder(cos, target), cos)
    if only_positive:
        psi = torch.where(target > 0, psi, target)
    logits[rows, labels] = guard(theta) if guard else psi
    return F.cross_entropy(s * logits, labels, reduction="none")


def _filtered(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Partial FC's inter-class filter: what is above 0.2 becomes 0."""
    cos = F.normalize(x) @ F.normalize(w).T
    is_target = F.one_hot(labels, len(w)).bool()
    angle = cos[is_target].acos() + 0.5
    logits = torch.where((cos > 0.2) & ~is_target, 0, cos)
    logits[is_target] = torch.where(angle <= math.pi, angle.cos(), -angle.cos() - 2)
    return F.cross_entropy(16 * logits, labels, reduction="none")


def _softmax(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T, labels, reduction="none")


def _l_softmax(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = F.normalize(x) @ F.normalize(w).T
    rows = torch.arange(len(x), device=x.device)
    logits = cos.clone()
    logits[rows, labels] = _sphereface(cos[rows, labels].acos(), None, labels, 4)
    return F.cross_entropy(x.norm(dim=1)[:, None] * w.norm(dim=1) * logits, labels, reduction="none")


class Formula:
    """A loss by its formula: psi of the target, the scale, and what is added to the cross-entropy."""

    def __init__(self, psi, scale: float = 64.0, *, by_norm: bool = False, extra=None) -> None:
        self.psi, self.scale, self.by_norm, self.extra = psi, scale, by_norm, extra

    def __call__(self, x: Tensor, w: Tensor, labels: Tensor, straight_through: bool = False) -> Tensor:
        cos = F.normalize(x) @ F.normalize(w).T  # (N, C)
        norms, rows = x.norm(dim=1), torch.arange(len(x), device=x.device)
        target = cos[rows, labels]
        psi = self.psi(target.acos(), norms, labels)
        if straight_through:
            psi = psi.detach() + target - target.detach()
        logits = cos.clone()
        logits[rows, labels] = psi
        scale = self.scale * norms[:, None] if self.by_norm else self.scale
        loss = F.cross_entropy(scale * logits, labels, reduction="none")
        return loss if self.extra is None else loss + self.extra(norms)


def _gbcosface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """As two-class cross-entropies; the boundary of a first batch is the batch's."""
    s, m, alpha = 32, 0.16, 0.15
    cos = F.normalize(x) @ F.normalize(w).T  # (N, C)
    is_target = F.one_hot(labels, len(w)).bool()
    positive, others = cos[is_target], cos[~is_target].view(len(x), -1)
    negative = torch.logsumexp(s * others, 1) / s
    v = ((positive + negative) / 2).detach()
    v = v + alpha * (v.mean().clamp(0.5, 0.7) - v)
    first = torch.zeros_like(labels)
    to_target = F.cross_entropy(2 * s * torch.stack([positive - m, v], 1), first, reduction="none")
    to_others = F.cross_entropy(2 * s * torch.stack([v - m, negative], 1), first, reduction="none")
    return (to_target + to_others) / 2


def _sub_center_arcface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = (F.normalize(x) @ F.normalize(w).T).view(len(x), NUM_CLASSES, 3).max(2).values
    rows = torch.arange(len(x), device=x.device)
    logits = cos.clone()
    logits[rows, labels] = _arcface(cos[rows, labels].acos(), None, labels)
    return F.cross_entropy(64 * logits, labels, reduction="none")


def _adacos(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = F.normalize(x) @ F.normalize(w).T
    with torch.no_grad():
        scale = math.sqrt(2) * math.log(len(w) - 1)
        total = (scale * cos).exp().masked_fill(F.one_hot(labels, len(w)).bool(), 0).sum(1).mean()
        median = cos[torch.arange(len(x), device=x.device), labels].acos().median()
        scale = total.log() / median.clamp_max(math.pi / 4).cos()
    return F.cross_entropy(scale * cos, labels, reduction="none")


def _sphereface2(kind: str, margin: float):
    def formula(x: Tensor, w: Tensor, labels: Tensor, straight_through: bool = False) -> Tensor:
        """As its code has it, with the bias at which it starts."""
        s, lam, t, lw = 40.0, 0.7, 3.0, 50.0
        cos = F.normalize(x) @ F.normalize(w).T
        one_hot = F.one_hot(labels, len(w)).double()
        g = lambda c: 2 * ((c + 1) / 2) ** t - 1  # noqa: E731
        theta = cos.acos()
        if kind == "C":
            shaped = g(cos) - margin * (2 * one_hot - 1)
        elif kind == "A":
            shaped = g((theta + margin * one_hot).clamp_max(math.pi).cos())
        else:
            shaped = g(torch.where(one_hot > 0, margin * theta, theta).clamp_max(math.pi).cos())
        if straight_through:
            shaped = shaped.detach() + cos - cos.detach()
        at_right_angles = {"C": math.pi / 2, "A": math.pi / 2 + margin, "M": margin * math.pi / 2}[kind]
        a_y = s * (g(math.cos(at_right_angles)) - (margin if kind == "C" else 0))
        a_i = s * (g(0) + (margin if kind == "C" else 0))
        z = lam / ((1 - lam) * (len(w) - 1))
        root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(a_y - a_i))
        b = math.log(2 * z) - a_i - math.log(1 - z + root)
        weight = lw / s * (lam * one_hot + (1 - lam) * (1 - one_hot))
        return F.binary_cross_entropy_with_logits(s * shaped + b, one_hot, weight=weight, reduction="none").sum(1)

    return formula


def _uniface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Without the clamp of its code, which no logit here reaches from above."""
    s, m, b = 64, 0.4, math.log(10 * len(w))
    cos = F.normalize(x) @ F.normalize(w).T
    one_hot = F.one_hot(labels, len(w)).bool()
    p = F.softplus(b - s * (cos - m), threshold=200)
    n = F.softplus(s * cos - b, threshold=200)
    return torch.where(one_hot, p, 0.5 * n).sum(1)


def _sface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = F.normalize(x) @ F.normalize(w).T
    one_hot = F.one_hot(labels, len(w)).bool()
    theta = cos.detach().clamp(-1, 1).acos()
    pull, push = torch.sigmoid(80 * (theta - 0.80)), torch.sigmoid(-80 * (theta - 1.23))
    return torch.where(one_hot, -64 * pull * cos, 64 * push * cos).sum(1)


def _combined(theta, *_):
    angle = 1.2 * theta + 0.3
    return torch.where(angle <= math.pi, angle.cos(), -angle.cos() - 2) - 0.1


def _drawn(count: int, m: float, std: float, device: torch.device) -> Tensor:
    """The margins of a first batch."""
    return m + std * standard_normal(0, torch.zeros((), device=device), torch.arange(count, device=device))


def _elastic_arc_plus(theta: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
    """By the paper's rule, one sample after the other: the smallest cosine has the largest margin."""
    margins = _drawn(len(theta), 0.5, 0.0175, theta.device).sort().values
    m = torch.stack([margins[(theta < each).sum()] for each in theta])
    return (theta + m).cos()


def _table(num_classes: int, device: torch.device) -> Tensor:
    return torch.linspace(-0.1, 0.7, num_classes, dtype=torch.float32, device=device)


LOSSES = {
    "elastic_cos": (
        FusedElasticFaceLoss,
        Formula(lambda theta, *_: theta.cos() - _drawn(len(theta), 0.35, 0.05, theta.device)),
    ),
    "elastic_arc_plus": (
        lambda *args, **options: FusedElasticFaceLoss(*args, 0.5, std=0.0175, arc=True, plus=True, **options),
        Formula(_elastic_arc_plus),
    ),
    "class_margin": (
        lambda c, d, **options: FusedCosFaceLoss(c, d, _table(c, options.get("device")), **options),
        Formula(lambda theta, _, labels: theta.cos() - _table(NUM_CLASSES, theta.device)[labels]),
    ),
    "class_margin_arc": (
        lambda c, d, **options: FusedMarginLoss(
            c, d, ClassMargin(_table(c, options.get("device")), arc=True), **options
        ),
        Formula(lambda theta, _, labels: (theta + _table(NUM_CLASSES, theta.device)[labels]).cos()),
    ),
    "adam_softmax": (
        FusedAdaMSoftmaxLoss,
        Formula(lambda theta, *_: theta.cos() - 0.35, 32.0, extra=lambda norms: 70 * (1 - 0.35) + 0 * norms),
    ),
    "nsl": (FusedNormalizedSoftmaxLoss, Formula(lambda theta, *_: theta.cos())),
    "cosface": (FusedCosFaceLoss, Formula(lambda theta, *_: theta.cos() - 0.35)),
    "arcface": (FusedArcFaceLoss, Formula(_arcface)),
    "sub_center_arcface": (FusedSubCenterArcFaceLoss, _sub_center_arcface),
    "combined": (
        lambda *args, **options: FusedCombinedMarginLoss(*args, (1.2, 0.3, 0.1), **options),
        Formula(_combined),
    ),
    "sphereface": (FusedSphereFaceLoss, Formula(_sphereface, 30.0)),
    "a_softmax": (FusedASoftmaxLoss, Formula(_annealed, 1.0, by_norm=True)),
    "adaface": (FusedAdaFaceLoss, Formula(_adaface)),
    "magface": (FusedMagFaceLoss, Formula(_magface, extra=_magface_regularizer)),
    "kappaface": (_kappaface_head, Formula(_kappaface)),
    "x2_softmax": (FusedX2SoftmaxLoss, Formula(lambda theta, *_: -0.9 * theta**2 + 0.65)),
    "gb_cosface": (FusedGBCosFaceLoss, _gbcosface),
    "adacos": (FusedAdaCosLoss, _adacos),
    "softmax": (FusedSoftmaxLoss, _softmax),
    "l_softmax": (FusedLSoftmaxLoss, _l_softmax),
    "curricularface": (FusedCurricularFaceLoss, _curricularface),
    "mv_softmax": (FusedMVSoftmaxLoss, _mv_softmax),
    "npcface": (FusedNPCFaceLoss, _npcface),
    "circle_loss": (FusedCircleLoss, _circle_loss),
    "sphereface2": (FusedSphereFace2Loss, _sphereface2("C", 0.4)),
    "sphereface2_a": (
        lambda *args, **options: FusedSphereFace2Loss(*args, 0.3, kind="A", **options),
        _sphereface2("A", 0.3),
    ),
    "sphereface2_m": (
        lambda *args, **options: FusedSphereFace2Loss(*args, 1.5, kind="M", **options),
        _sphereface2("M", 1.5),
    ),
    "uniface": (lambda *args, **options: FusedUniFaceLoss(*args, balance=0.5, **options), _uniface),
    "sface": (FusedSFaceLoss, _sface),
    "mv_arc_softmax": (
        lambda *args, **options: FusedMVSoftmaxLoss(*args, 0.5, arc=True, **options),
        _mv_arc_softmax,
    ),
    "sv_softmax": (lambda *args, **options: FusedMVSoftmaxLoss(*args, 0.0, t=0.3, **options), _sv_softmax),
    "filter": (
        lambda *args, **options: FusedCombinedMarginLoss(*args, scale=16, filter_above=0.2, **options),
        _filtered,
    ),
}


SIGMOIDS = ("sphereface2", "sphereface2_a", "sphereface2_m", "uniface", "sface")
# of the op, which not every backend takes
OPTIONS = {"sub_center_arcface": ("subcenters",), **{name: ("sigmoid",) for name in SIGMOIDS}}
NAMES = [pytest.param(name, marks=pytest.mark.option(*OPTIONS.get(name, ()))) for name in LOSSES]


def formula_problem(regime: str, num_samples: int = 9, seed: int = 0, device: str | None = None):
    """Embeddings whose norms lie on both sides of MagFace's and AdaFace's bounds."""
    problem = make_problem(num_samples, NUM_CLASSES, DIM, F64, regime=regime, seed=seed, device=device)
    lengths = torch.logspace(0, 2.2, num_samples, dtype=torch.float64, device=device)
    return F.normalize(problem.x) * lengths[:, None], problem.w, problem.targets


def as_leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def make_head(name: str, w: Tensor, **options) -> FusedMarginLoss:
    with w.device:  # for the margin's state
        head = LOSSES[name][0](*w.shape, dtype=w.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(torch.stack([w.roll(k, 1) for k in range(head.subcenters)], 1).flatten(0, 1))
    return head
