"""The losses of the family against explicit PyTorch: logits materialised, formulas as the papers write them."""

import inspect
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import DEFAULT_DEVICE, F64, make_problem, relative_error
from torch import Tensor

import cosface_kernels
from cosface_kernels import (
    FusedAdaCosLoss,
    FusedAdaFaceLoss,
    FusedArcFaceLoss,
    FusedASoftmaxLoss,
    FusedCombinedMarginLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedGBCosFaceLoss,
    FusedKappaFaceLoss,
    FusedLSoftmaxLoss,
    FusedMagFaceLoss,
    FusedMarginLoss,
    FusedMVSoftmaxLoss,
    FusedNormalizedSoftmaxLoss,
    FusedSoftmaxLoss,
    FusedSphereFaceLoss,
    FusedX2SoftmaxLoss,
    margins,
)

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


def _adacos(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cos = F.normalize(x) @ F.normalize(w).T
    with torch.no_grad():
        scale = math.sqrt(2) * math.log(len(w) - 1)
        total = (scale * cos).exp().masked_fill(F.one_hot(labels, len(w)).bool(), 0).sum(1).mean()
        median = cos[torch.arange(len(x), device=x.device), labels].acos().median()
        scale = total.log() / median.clamp_max(math.pi / 4).cos()
    return F.cross_entropy(scale * cos, labels, reduction="none")


def _combined(theta, *_):
    angle = 1.2 * theta + 0.3
    return torch.where(angle <= math.pi, angle.cos(), -angle.cos() - 2) - 0.1


LOSSES = {
    "nsl": (FusedNormalizedSoftmaxLoss, Formula(lambda theta, *_: theta.cos())),
    "cosface": (FusedCosFaceLoss, Formula(lambda theta, *_: theta.cos() - 0.35)),
    "arcface": (FusedArcFaceLoss, Formula(_arcface)),
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
STRAIGHT_THROUGH = ("arcface", "combined", "sphereface", "adaface", "x2_softmax")
STATEFUL = ("a_softmax", "adaface", "kappaface", "gb_cosface", "adacos", "curricularface")
NAMES = list(LOSSES)


def _problem(regime: str, num_samples: int = 9, seed: int = 0, device: str | None = None):
    """Embeddings whose norms lie on both sides of MagFace's and AdaFace's bounds."""
    problem = make_problem(num_samples, NUM_CLASSES, DIM, F64, regime=regime, seed=seed, device=device)
    lengths = torch.logspace(0, 2.2, num_samples, dtype=torch.float64, device=device)
    return F.normalize(problem.x) * lengths[:, None], problem.w, problem.targets


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def _head(name: str, w: Tensor, **options) -> FusedMarginLoss:
    with w.device:  # for the margin's state
        head = LOSSES[name][0](*w.shape, dtype=w.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(w)
    return head


def _check_against_formula(head: FusedMarginLoss, formula, x: Tensor, labels: Tensor) -> None:
    """Loss and gradients, under a non-uniform upstream gradient."""
    upstream = torch.linspace(-1, 2, len(x), dtype=x.dtype, device=x.device)
    ours, theirs, w = *_leaves(x, x), *_leaves(head.weight)
    want, got = formula(theirs, w, labels), head(ours, labels)
    # state is in float32, and one of its ulps moves the logits
    tolerance = 64 * 1e-7 if len(head.state_dict()) > 1 else 1e-9
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-12)
    want_dx, want_dw = torch.autograd.grad(want, (theirs, w), upstream)
    got_dx, got_dw = torch.autograd.grad(got, (ours, head.weight), upstream)
    assert relative_error(got_dx, want_dx) < max(tolerance, 1e-7)
    assert relative_error(got_dw, want_dw) < max(tolerance, 1e-7)


@pytest.mark.float64
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("name", NAMES)
def test_is_the_formula(backend, name, regime):
    x, w, labels = _problem(regime, device=backend.device)
    _check_against_formula(_head(name, w, backend=backend.name, reduction="none"), LOSSES[name][1], x, labels)


@pytest.mark.parametrize("regime", ["random", "wrong"])
@pytest.mark.parametrize("name", STRAIGHT_THROUGH)
def test_straight_through_gradient(name, regime):
    x, w, labels = _problem(regime)
    head = _head(name, w, reduction="none", straight_through=True)

    def formula(x, w, labels):
        theirs = LOSSES[name][1]
        if name == "arcface":  # insightface has no guard
            theirs = Formula(lambda theta, *_: (theta + 0.5).cos())
        if name == "combined":
            theirs = Formula(lambda theta, *_: (1.2 * theta + 0.3).cos() - 0.1)
        return theirs(x, w, labels, straight_through=True)

    _check_against_formula(head, formula, x, labels)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_samples_count_for_nothing(name):
    """Neither in the loss nor in a statistic, whatever they hold."""
    x, w, labels = _problem("random")
    alone, together = _head(name, w), _head(name, w)
    want = alone(*_leaves(x), labels)
    rubbish = torch.full((2, DIM), math.nan, dtype=x.dtype)
    (padded,) = _leaves(torch.cat([rubbish[:1], x, rubbish[1:], 50 * x[:1]]))
    ignored = torch.tensor([-100])
    got = together(padded, torch.cat([ignored, labels, ignored, ignored]))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got.backward()
    want.backward()
    torch.testing.assert_close(together.weight.grad, alone.weight.grad, rtol=1e-9, atol=1e-12)
    assert not padded.grad[[0, -2, -1]].any()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], value, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["all ignored", "no samples", "one sample", "two classes"])
def test_small_batches_leave_no_nan_behind(name, case):
    x, w, labels = _problem("random")
    head = _head(name, w, reduction="sum") if case != "two classes" else None
    if case == "all ignored":
        labels = torch.full_like(labels, -100)
    elif case == "no samples":
        x, labels = x[:0], labels[:0]
    elif case == "one sample":
        x, labels = x[4:5], labels[4:5]
    elif name == "kappaface":
        head = FusedKappaFaceLoss(2, DIM, class_counts=[3, 4], dtype=w.dtype, reduction="sum")
    else:
        scale = {"scale": 5.0} if name == "adacos" else {}
        head = LOSSES[name][0](2, DIM, dtype=w.dtype, reduction="sum", **scale)
    (x,) = _leaves(x)
    loss = head(x, labels % head.num_classes if case == "two classes" else labels)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()
    head(*_leaves(_problem("random")[0]), _problem("random")[2] % head.num_classes).backward()
    finite = [bool(t.isfinite().all()) for t in head.state_dict().values()]
    assert all(finite)
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_and_exact_centres(name):
    """x = 0, w_j = 0, cos = 1 and cos = -1 exactly: finite losses and gradients."""
    x, w, labels = _problem("random")
    w[3], w[4] = 0, torch.eye(DIM, dtype=w.dtype)[0]
    x[0], x[1], x[2] = 0, 20 * w[4], -20 * w[4]
    labels[:3], labels[3] = 4, 3
    for dtype in (torch.float64, torch.float32):
        head = _head(name, w.to(dtype), reduction="none")
        (leaf,) = _leaves(x.to(dtype))
        loss = head(leaf, labels)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert leaf.grad.isfinite().all()
        assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name):
    """Gradients of confident samples, where the angle is hardest to know from its cosine."""
    x, w, labels = _problem("confident")
    results = []
    for dtype in (torch.float64, torch.float32):
        head = _head(name, w.to(dtype), reduction="none")
        (leaf,) = _leaves(x.to(dtype))
        loss = head(leaf, labels)
        results.append((loss, *torch.autograd.grad(loss.sum(), (leaf, head.weight))))
    for want, got in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_state_travels_in_the_state_dict(name):
    x, w, labels = _problem("random")
    head = _head(name, w)
    before = {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}
    assert bool(before) == (name in STATEFUL)
    head(x, labels)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    twin = _head(name, torch.zeros_like(w))
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    x, _, labels = _problem("random", seed=1)
    for _ in range(3):
        assert torch.equal(twin(x, labels), head(x, labels))
    changed = [key for key in before if not torch.equal(before[key].nan_to_num(), head.state_dict()[key])]
    assert bool(changed) == (name in STATEFUL and name != "kappaface")


@pytest.mark.parametrize("name", NAMES)
def test_state_is_on_the_device_of_the_head(name):
    make = LOSSES[name][0] if name != "kappaface" else partial(FusedKappaFaceLoss, class_counts=CLASS_COUNTS)
    assert all(value.is_meta for value in make(NUM_CLASSES, DIM, device="meta").state_dict().values())


@pytest.mark.parametrize("name", STATEFUL)
def test_state_changes_in_training_alone(name):
    x, w, labels = _problem("random")
    head = _head(name, w)
    head(x, labels)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    head.eval()
    assert torch.equal(head(2 * x, labels.roll(1)), head(2 * x, labels.roll(1)))
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", STATEFUL)
def test_state_keeps_its_precision_and_can_start_anew(name):
    x, w, labels = _problem("random")
    head = _head(name, w)
    first = {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}
    head(x, labels)
    state = {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}
    head.to(torch.float64)
    for key, value in state.items():
        assert torch.equal(head.state_dict()[key], value)
    head.to(torch.bfloat16)
    for key, value in state.items():
        torch.testing.assert_close(head.state_dict()[key], value, rtol=1e-2, atol=0)  # rounded once, and no more
    head.reset_parameters()
    if name == "kappaface":
        assert torch.equal(head.margin.weights, torch.full_like(head.margin.weights, 0.5))
    else:
        for key, value in first.items():
            torch.testing.assert_close(head.state_dict()[key], value, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    x, w, labels = _problem("random")
    head, twin = (_head(name, w) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, labels), head(x, labels), rtol=1e-12, atol=0)
    for key, value in head.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    head = _head(name, torch.ones(NUM_CLASSES, DIM))
    parameters = inspect.signature(type(head)).parameters
    assert list(parameters)[:4] == ["num_classes", "embedding_size", "margin", "scale"]
    assert type(head).__name__ in cosface_kernels.__all__
    assert "Source:" in type(head).__doc__


@pytest.mark.float64
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
def test_arcface_swaps_with_pytorch_metric_learning(backend, regime):
    x, w, labels = _problem(regime, device=backend.device)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    with DEFAULT_DEVICE:
        theirs = pml.ArcFaceLoss(NUM_CLASSES, DIM, margin=math.degrees(0.5), scale=64).to(x)
    ours = backend.head(NUM_CLASSES, DIM, 0.5, 64.0, kind=FusedArcFaceLoss)
    _check_against_pml(ours, theirs, x, w, labels)


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_sphereface_swaps_with_pytorch_metric_learning(regime, m):
    x, w, labels = _problem(regime)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = pml.SphereFaceLoss(NUM_CLASSES, DIM, margin=m, scale=0.7).double()
    ours = FusedASoftmaxLoss(NUM_CLASSES, DIM, m, 0.7, base=0.0, lambda_min=0.0)
    _check_against_pml(ours, theirs, x, w, labels)


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("m", [2, 4])
def test_l_softmax_swaps_with_pytorch_metric_learning(regime, m):
    x, w, labels = _problem(regime)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = pml.LargeMarginSoftmaxLoss(NUM_CLASSES, DIM, margin=m, scale=0.3).double()
    _check_against_pml(FusedLSoftmaxLoss(NUM_CLASSES, DIM, m, 0.3), theirs, x, w, labels)


@pytest.mark.parametrize("make", [FusedSoftmaxLoss, FusedASoftmaxLoss, FusedCosFaceLoss])
def test_logits_are_those_of_the_loss(make):
    x, _, labels = _problem("random")
    head = make(NUM_CLASSES, DIM, dtype=x.dtype)
    del head.margin
    head.margin = 0.0
    torch.testing.assert_close(head(x, labels), F.cross_entropy(head.get_logits(x), labels))


def test_curricularface_averages_target_cosines():
    _, w, _ = _problem("random")
    head, t = _head("curricularface", w), 0.0
    for seed in range(3):
        x, _, labels = _problem("confident", seed=seed)
        head(x, labels)
        t = 0.99 * t + 0.01 * (F.normalize(x) * F.normalize(w)[labels]).sum(1).mean().item()
        assert head.margin.t.item() == pytest.approx(t)


def _check_against_pml(ours, theirs, x, w, labels):
    ours.to(x.dtype)
    with torch.no_grad():
        ours.weight.copy_(w)
        theirs.W.copy_(w.T)
    a, b = _leaves(x, x)
    with DEFAULT_DEVICE:
        want = theirs(a, labels)
    got = ours(b, labels)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    want_dx, want_dw = torch.autograd.grad(want, (a, theirs.W))
    got_dx, got_dw = torch.autograd.grad(got, (b, ours.weight))
    assert relative_error(got_dx, want_dx) < 1e-6  # their cosine is clamped with an epsilon
    assert relative_error(got_dw, want_dw.T) < 1e-6


def test_the_paper_s_example():
    """Cosines 0.71 and 0.70: the softmax of NSL is content, and m = 0.35 is not."""
    x = torch.tensor([[0.71, 0.70, math.sqrt(1 - 0.71**2 - 0.70**2)]], dtype=torch.float64)
    w, label = torch.eye(3, dtype=torch.float64)[:2], torch.tensor([0])
    for margin, logit in ((0.0, 0.01), (0.35, -0.34)):
        head = FusedCosFaceLoss(2, 3, margin, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(w)
        want = math.log1p(math.exp(-64 * logit))
        assert head(x, label).item() == pytest.approx(want, rel=1e-9)


def test_adaface_averages_over_batches():
    x, w, labels = _problem("random")
    head = _head("adaface", w, rate=0.25)
    mean, std = 20.0, 100.0
    for factor in (1.0, 0.3, 2.0):
        head(factor * x, labels)
        norms = (factor * x).norm(dim=1).clip(1e-3, 100)
        mean, std = 0.75 * mean + 0.25 * norms.mean().item(), 0.75 * std + 0.25 * norms.std().item()
        assert head.margin.mean.item() == pytest.approx(mean)
        assert head.margin.std.item() == pytest.approx(std)


def test_gb_cosface_boundary_is_averaged_after_its_use():
    x, w, labels = _problem("confident")
    head = _head("gb_cosface", w)
    boundary = None
    for seed in range(3):
        x, _, labels = _problem("confident", seed=seed)
        cos = F.normalize(x) @ F.normalize(w).T
        is_target = F.one_hot(labels, NUM_CLASSES).bool()
        negative = (32 * cos.masked_fill(is_target, -math.inf)).logsumexp(1) / 32
        middle = ((cos[is_target] + negative) / 2).mean().item()
        boundary = min(max(middle if boundary is None else boundary, 0.5), 0.7)
        boundary = 0.99 * boundary + 0.01 * middle
        head(x, labels)
        assert head.margin.boundary.item() == pytest.approx(boundary)


def test_annealing_counts_batches():
    x, w, labels = _problem("random")
    head = _head("a_softmax", w)
    for step in range(1, 4):
        head(x, labels)
        assert head.margin.annealing.item() == pytest.approx(1000 / (1 + 0.12 * step))
    head.margin.step.fill_(1e9)
    assert head.margin.annealing.item() == 5


def test_any_function_is_a_margin(backend):
    x, _, labels = _problem("random", device=backend.device)
    head, same = (
        backend.head(NUM_CLASSES, DIM, margin, kind=FusedMarginLoss) for margin in (lambda cos: cos**3 - 0.2, 0.2)
    )
    same.load_state_dict(head.state_dict())
    x = x.float()
    _, stats = head(x, labels, return_stats=True)
    _, again = same(x, labels, return_stats=True)
    assert torch.equal(stats.target_cos, again.target_cos)
    want = F.softplus(stats.lse - 64 * (stats.target_cos**3 - 0.2)).mean()
    torch.testing.assert_close(head(x, labels), want)


def test_repr_shows_the_margin():
    assert "ArcFaceMargin(margin=0.4" in repr(FusedArcFaceLoss(50, 16, 0.4))
    assert "AdaFaceMargin(margin=0.4, h=0.333" in repr(FusedAdaFaceLoss(50, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedArcFaceLoss(9, 4, 28.6), r"margin must be in \[0, pi\) radians, got 28.6"),
        (lambda: FusedArcFaceLoss(9, 4, -0.1), r"margin must be in \[0, pi\) radians, got -0.1"),
        (lambda: FusedSphereFaceLoss(9, 4, 0.9), r"margin must be in \[1, inf\), got 0.9"),
        (lambda: FusedSphereFaceLoss(9, 4, math.nan), r"margin must be in \[1, inf\), got nan"),
        (lambda: FusedASoftmaxLoss(9, 4, gamma=-1), r"gamma must be in \[0, inf\), got -1"),
        (lambda: FusedCombinedMarginLoss(9, 4, 0.5), r"margins must be three numbers .*, got 0.5"),
        (lambda: FusedCombinedMarginLoss(9, 4, (0.5, 0, 0)), r"m1 must be in \[1, inf\), got 0.5"),
        (lambda: FusedAdaFaceLoss(9, 4, "0.4"), r"margin must be in \[0, pi\), got '0.4'"),
        (lambda: FusedAdaFaceLoss(9, 4, rate=2), r"rate must be in \[0, 1\], got 2"),
        (lambda: FusedMagFaceLoss(9, 4, 0.4), r"margins must be 2 numbers, got 0.4"),
        (lambda: FusedX2SoftmaxLoss(9, 4, 0.4), r"margin must be 3 numbers, got 0.4"),
        (lambda: FusedGBCosFaceLoss(9, 4, bounds=(0.7, None)), r"bounds must be 2 numbers, got \(0.7, None\)"),
        (lambda: FusedKappaFaceLoss(9, 4, class_counts="abc"), r"class_counts must be a vector .*, got 'abc'"),
        (lambda: FusedMagFaceLoss(9, 4, (0.8, 0.4)), r"largest margin must be in \[smallest, pi\), got 0.4"),
        (lambda: FusedMagFaceLoss(9, 4, norms=(0, 9)), r"smallest norm must be in \(0, inf\), got 0"),
        (lambda: FusedKappaFaceLoss(9, 4), r"KappaFace needs class_counts, .* 9 classes, got None"),
        (lambda: FusedKappaFaceLoss(9, 4, class_counts=[1, 2]), r"class_counts must hold 9 counts, got 2"),
        (lambda: FusedKappaFaceLoss(2, 4, class_counts=[1, 0]), r"positive counts, got \[1, 0\]"),
        (lambda: FusedX2SoftmaxLoss(9, 4, (0.9, 0, 1)), r"a must be in \(-inf, 0\), got 0.9"),
        (lambda: FusedGBCosFaceLoss(9, 4, alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: FusedGBCosFaceLoss(9, 4, bounds=(0.7, 0.5)), r"low <= high, got \(0.7, 0.5\)"),
        (lambda: FusedSoftmaxLoss(9, 4, 0.1), r"margin must be 0, .*, got 0.1"),
        (lambda: FusedLSoftmaxLoss(9, 4, 0), r"margin must be in \[1, inf\), got 0"),
        (lambda: FusedCurricularFaceLoss(9, 4, 4.0), r"margin must be in \[0, pi\) radians, got 4.0"),
        (lambda: FusedMVSoftmaxLoss(9, 4, t=-0.1), r"t must be in \[0, inf\), got -0.1"),
        (lambda: FusedMVSoftmaxLoss(9, 4, 3.5, arc=True), r"margin must be in \[0, pi\) radians, got 3.5"),
        (lambda: FusedCombinedMarginLoss(9, 4, filter_above=40), r"filter_above must be in \[0, 1\], got 40"),
        (lambda: margins.AdaCosMargin(0.0, 1.0, bounds=(2, 1)), r"largest scale must be in .*, got 1"),
        (lambda: FusedAdaCosLoss(2, 4), r"num_classes - 2, .*, must be a positive integer, got 0"),
        (lambda: FusedCosFaceLoss(9, 4, margins.CosFaceMargin()), "margin must be a finite number, got CosFace"),
    ],
)
def test_out_of_domain_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_adaface_refuses_normalised_embeddings():
    x, w, labels = _problem("random")
    head = _head("adaface", w)
    with pytest.raises(ValueError, match=r"before they are normalised, got norms in \[1, 1\]"):
        head(F.normalize(x), labels)
    head(x, labels)


def test_kappaface_refuses_sums_of_other_classes():
    head = FusedKappaFaceLoss(3, 4, class_counts=[5, 6, 7])
    with pytest.raises(ValueError, match=r"class_sums must have shape \(3, D\), got shape \(4, 3\)"):
        head.margin.update(torch.ones(4, 3))


def test_adaface_takes_one_sample_whose_norm_is_one():
    """By chance; and its statistics need two."""
    x, w, labels = _problem("random")
    assert _head("adaface", w)(F.normalize(x[:1]) * 1.005, labels[:1]).isfinite()


def test_kappaface_of_classes_that_are_single_points():
    """Every r is 1 and every kappa infinite: no class is more concentrated than another."""
    margin = margins.KappaFaceMargin([3, 3, 3], gamma=1.0)
    margin.update(3 * torch.eye(3))
    assert margin.weights.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("num_classes", [3, 4, 60])
@pytest.mark.parametrize("opposite", [False, True])
def test_the_scale_of_adacos_stays_within_bounds(num_classes, opposite):
    """In two dimensions a few classes drive it up without end, and negatives that are all opposite below 0."""
    head = FusedAdaCosLoss(num_classes, 2)
    labels = torch.arange(num_classes)
    fixed = math.sqrt(2) * math.log(num_classes - 1)
    for _ in range(50):
        x = head.weight.detach()
        if opposite:
            x = torch.tensor([[1.0, 0.0]]).expand(num_classes, 2)
            head.weight.data.copy_(-x)
        assert head(x, labels).isfinite()
        assert fixed / 4 * 0.999 <= head.scale <= 4 * fixed * 1.001


@pytest.mark.parametrize("margin", [(1.0, 0.5, 0.0), (1.3, 0.4, 0.1), (3.0, 1.0, 0.0)], ids=str)
def test_the_combined_margin_falls_up_to_pi(margin):
    """Without its guard it rises again beyond m1 theta + m2 = pi, as in insightface."""
    cos = torch.linspace(1, -1, 2001, dtype=torch.float64)
    psi = margins.CombinedMargin(margin)(cos)
    assert bool((psi.diff() < 0).all())
    for bare in (
        margins.CombinedMargin(margin, guard=False),
        margins.CombinedMargin(margin, straight_through=True),
    ):
        assert bool((bare(cos).diff() > 0).any())
        falling = margin[0] * cos.acos() + margin[1] <= math.pi
        torch.testing.assert_close(bare(cos)[falling], psi[falling])


def test_no_filter_above_0():
    """insightface's 0, its default, means off."""
    x, w, labels = _problem("random")
    heads = [FusedCombinedMarginLoss(*w.shape, filter_above=above, dtype=w.dtype) for above in (None, 0, 0.0)]
    for head in heads:
        head.weight.data.copy_(w)
    assert len({head(x, labels).item() for head in heads}) == 1


def test_the_normalised_softmax_takes_no_third_position():
    """It is a temperature in pytorch-metric-learning and would be a margin here."""
    with pytest.raises(TypeError, match="positional"):
        FusedNormalizedSoftmaxLoss(9, 4, 0.05)
