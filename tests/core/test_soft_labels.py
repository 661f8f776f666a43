"""Label smoothing, two labels of a sample and the entropy, against all logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import (
    FusedAdaFaceLoss,
    FusedArcFaceLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedGBCosFaceLoss,
    FusedMagFaceLoss,
    margin_softmax_loss,
)
from cosface_kernels.margins import (
    ArcFaceMargin,
    CurricularFaceMargin,
    GBCosFaceMargin,
    MVSoftmaxMargin,
    NPCFaceMargin,
    X2SoftmaxMargin,
)
from cosface_kernels.optim import FusedSGD

N, C, D, S = 11, 37, 12, 9.0
pytestmark = pytest.mark.option("moments")


def _inputs(backend, dtype=torch.float32, *, spread: float = 1.0):
    rng = torch.Generator().manual_seed(3)
    x, w = (torch.randn(rows, D, generator=rng, dtype=torch.float64, device="cpu") for rows in (N, C))
    labels = torch.randint(C, (N,), generator=rng, device="cpu")
    x = x + spread * w[labels]
    labels[4] = -100
    return (
        x.to(backend.device, dtype).requires_grad_(),
        w.to(backend.device, dtype).requires_grad_(),
        labels.to(backend.device),
    )


def _two(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2) labels, some of which are equal or ignored, and weights that sum up to 1."""
    second = (labels + 5) % C
    second[0], second[1], second[2] = labels[0], -100, labels[2]
    weights = torch.linspace(0.2, 0.9, len(labels), device=labels.device)
    return torch.stack([labels, second], 1), torch.stack([weights, 1 - weights], 1)


def _explicit(x, w, labels, psi, *, smoothing=0.0, scale=S, negatives=None):
    """(N,) losses by F.cross_entropy of all logits, in float64, with psi at the label."""
    cos = F.normalize(x.double()) @ F.normalize(w.double()).T
    valid = labels >= 0
    at = labels.clamp_min(0)[:, None]
    target = cos.gather(1, at)
    shaped = cos if negatives is None else negatives(cos, target)
    logits = scale * shaped.scatter(1, at, psi(target))
    loss = F.cross_entropy(logits, labels.clamp_min(0), reduction="none", label_smoothing=smoothing)
    return torch.where(valid, loss, 0)


def _compare(got: Tensor, want: Tensor, leaves: list[Tensor], tolerance: float = 2e-5) -> None:
    """Values, and gradients with a non-uniform upstream gradient."""
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 2, max(want.numel(), 1), dtype=torch.float64, device=want.device).view(
        want.shape
    )
    got_gradients = torch.autograd.grad((got * upstream.to(got.dtype)).sum(), leaves)
    want_gradients = torch.autograd.grad((want * upstream).sum(), leaves)
    for g, r in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(g.double(), r.double(), rtol=20 * tolerance, atol=tolerance)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_smoothing_is_that_of_cross_entropy(backend, smoothing, reduction):
    x, w, labels = _inputs(backend)
    got = margin_softmax_loss(
        x, w, labels, margin=0.2, scale=S, reduction=reduction, label_smoothing=smoothing, backend=backend.name
    )
    want = _explicit(x, w, labels, lambda c: c - 0.2, smoothing=smoothing)
    if reduction != "none":
        want = want.sum() if reduction == "sum" else want.sum() / (labels >= 0).sum()
    _compare(got, want, [x, w])


@pytest.mark.float64
def test_smoothing_in_float64(backend):
    x, w, labels = _inputs(backend, torch.float64)
    got = margin_softmax_loss(
        x, w, labels, margin=0.2, scale=64.0, reduction="none", label_smoothing=0.1, backend=backend.name
    )
    _compare(got, _explicit(x, w, labels, lambda c: c - 0.2, smoothing=0.1, scale=64.0), [x, w], 1e-12)


def test_smoothing_of_any_margin(backend):
    x, w, labels = _inputs(backend)
    margin = ArcFaceMargin(0.4)
    got = margin_softmax_loss(
        x, w, labels, margin=margin, scale=S, reduction="none", label_smoothing=0.2, backend=backend.name
    )
    _compare(got, _explicit(x, w, labels, margin, smoothing=0.2), [x, w])


def test_smoothing_of_reshaped_negatives(backend):
    """Smoothed labels see the negatives as they enter the softmax."""
    x, w, labels = _inputs(backend)
    margin = MVSoftmaxMargin(0.3, t=0.2)
    got = margin_softmax_loss(
        x, w, labels, margin=margin, scale=S, reduction="none", label_smoothing=0.2, backend=backend.name
    )

    def negatives(cos, target):
        return torch.where(cos > target.detach() - 0.3, 1.2 * cos + 0.2, cos)

    _compare(got, _explicit(x, w, labels, margin, smoothing=0.2, negatives=negatives), [x, w], 1e-4)


def test_smoothing_with_a_learned_scale(backend):
    x, w, labels = _inputs(backend)
    scale = torch.tensor(S, device=backend.device, requires_grad=True)
    got = margin_softmax_loss(
        x, w, labels, margin=0.2, scale=scale, reduction="none", label_smoothing=0.2, backend=backend.name
    )
    _compare(got, _explicit(x, w, labels, lambda c: c - 0.2, smoothing=0.2, scale=scale), [x, w, scale])


def test_smoothing_of_sampled_classes(backend):
    """C is how many take part."""
    head = backend.head(C, D, scale=S, sample_rate=0.5, label_smoothing=0.3, reduction="none")
    x, _, labels = _inputs(backend)
    loss = head(x, labels)
    head.sampler.reset_parameters()
    classes, positions = head.sampler(torch.where(labels < 0, -1, labels))
    want = _explicit(x, head.weight[classes], positions, lambda c: c - 0.35, smoothing=0.3)
    got_dw = torch.autograd.grad(loss.sum(), head.weight, retain_graph=True)[0].to_dense()
    want_dw = torch.autograd.grad(want.sum(), head.weight, retain_graph=True)[0]
    torch.testing.assert_close(got_dw, want_dw, rtol=1e-3, atol=1e-4)
    _compare(loss, want, [x])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("margin", [0.2, ArcFaceMargin(0.4)], ids=["cosface", "arcface"])
def test_two_labels_are_two_losses(backend, reduction, smoothing, margin):
    x, w, labels = _inputs(backend)
    labels, weights = _two(labels)
    got = margin_softmax_loss(
        x, w, labels, margin=margin, scale=S, reduction=reduction, label_smoothing=smoothing,
        sample_weight=weights, backend=backend.name,
    )  # fmt: skip
    psi = margin if callable(margin) else lambda c: c - margin
    each = torch.stack([_explicit(x, w, column, psi, smoothing=smoothing) for column in labels.T], 1)  # (N, 2)
    want = (each * weights.double()).sum(1)
    if reduction != "none":
        want = want.sum()
    if reduction == "mean":
        want = want / torch.where(labels >= 0, weights, 0).double().sum()
    _compare(got, want, [x, w])


def test_two_labels_of_a_confident_sample(backend):
    """In float32, where taking one label's share from 1 would leave nothing of the others."""
    e = torch.eye(4, D, device=backend.device)
    x, w = e[:1].clone().requires_grad_(), e.clone().requires_grad_()
    labels, weights = torch.tensor([[0, 1]], device=x.device), torch.tensor([[0.7, 0.3]], device=x.device)
    got = margin_softmax_loss(
        x, w, labels, margin=0.0, scale=64.0, reduction="none", sample_weight=weights, backend=backend.name
    )
    each = [_explicit(x, w, column, lambda c: c, scale=64.0) for column in labels.T]
    _compare(got, 0.7 * each[0] + 0.3 * each[1], [x, w])


def test_classes_weigh_each_label(backend):
    head = backend.head(C, D, scale=S, class_weight=[1.0 + k for k in range(C)], reduction="sum")
    x, _, labels = _inputs(backend)
    labels, weights = _two(labels)
    each = torch.stack([_explicit(x, head.weight, column, lambda c: c - 0.35) for column in labels.T], 1)
    want = (each * weights.double() * (1 + labels.clamp_min(0))).sum()
    torch.testing.assert_close(head(x, labels, sample_weight=weights).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FusedAdaFaceLoss, FusedMagFaceLoss, FusedArcFaceLoss])
def test_two_equal_labels_are_one(backend, kind):
    x, _, labels = _inputs(backend)
    x = (x.detach() * 8).requires_grad_()
    with torch.device(backend.device):  # of the margin's state
        head = backend.head(C, D, kind=kind, reduction="none").eval()
    halves = torch.full((N, 2), 0.5, device=x.device)
    twice = head(x, torch.stack([labels, labels], 1), sample_weight=halves)
    torch.testing.assert_close(twice, head(x, labels), rtol=1e-5, atol=1e-5)


def test_two_labels_with_the_scale_of_the_norms(backend):
    x, w, labels = _inputs(backend)
    labels, weights = _two(labels)
    got = margin_softmax_loss(
        x, w, labels, margin=0.1, scale=1.0, normalize_embeddings=False, reduction="none", sample_weight=weights,
        backend=backend.name,
    )  # fmt: skip
    norms = x.double().norm(dim=1)[:, None]
    each = [_explicit(x, w, column, lambda c: c - 0.1, scale=norms) for column in labels.T]
    _compare(got, weights[:, 0].double() * each[0] + weights[:, 1].double() * each[1], [x, w], 1e-4)


@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_entropy(backend, two, spread):
    x, w, labels = _inputs(backend, spread=spread)
    options = {}
    if two:
        labels, options["sample_weight"] = _two(labels)
    _, stats = margin_softmax_loss(
        x, w, labels, margin=0.2, scale=S, return_stats=True, entropy=True, backend=backend.name, **options
    )
    log_p = (S * F.normalize(x.double()) @ F.normalize(w.double()).T).log_softmax(1)
    _compare(stats.entropy, -(log_p.exp() * log_p).sum(1), [x, w])
    assert not any(each.requires_grad for each in stats[:4])


def test_entropy_of_a_confident_sample(backend):
    """1e-20 is not 0."""
    e = torch.eye(3, D, device=backend.device)
    label = torch.zeros(1, dtype=torch.int64, device=e.device)
    _, stats = margin_softmax_loss(
        e[:1], e, label, margin=0.0, scale=40.0, return_stats=True, entropy=True, backend=backend.name
    )
    q = 2 * torch.tensor(-40.0, dtype=torch.float64, device="cpu").exp()
    assert float(stats.entropy) == pytest.approx(float(40 * q + q), rel=1e-4)


def test_entropy_of_one_class_and_of_an_ignored_sample(backend):
    x = torch.randn(2, D, device=backend.device)
    labels = torch.tensor([0, -100], device=x.device)
    for classes in (1, 2):
        w = torch.ones(classes, D, device=x.device)
        _, stats = margin_softmax_loss(
            x, w, labels, margin=0.0, return_stats=True, entropy=True, backend=backend.name
        )
        want = torch.full((2,), float(classes), device=x.device).log()
        torch.testing.assert_close(stats.entropy, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted_by", ["sample_weight", "class_weight", "indices_tuple"])
def test_statistics_of_two_labels(backend, weighted_by):
    """Of what weights the loss, sample_weight alone weights an accuracy: by it the two of a sample share one."""
    x, w, labels = _inputs(backend, spread=0.5)
    labels, weights = _two(labels)
    pairs = torch.tensor([[0, 0, 3], [1, 2, 0]], device=x.device)
    others = {"class_weight": torch.arange(1.0, C + 1, device=x.device), "indices_tuple": tuple(pairs)}
    others = {name: value for name, value in others.items() if name == weighted_by}
    _, stats = margin_softmax_loss(
        x, w, labels, margin=0.2, scale=S, sample_weight=weights, return_stats=3, backend=backend.name, **others
    )
    cos = F.normalize(x.detach()) @ F.normalize(w.detach()).T
    valid = labels >= 0
    valid[:, 1] &= labels[:, 0] != labels[:, 1]
    share = torch.where(valid, weights, 0)
    share[:, 0] += torch.where(labels[:, 0] == labels[:, 1], weights[:, 1], 0) * (labels[:, 0] >= 0)
    own = cos.gather(1, labels.clamp_min(0))
    rank = (cos[:, None] > own[..., None]).sum(2)
    for got, k in ((stats.accuracy, 1), (stats.top_k_accuracy, 3)):
        assert float(got) == pytest.approx(float((share * (rank < k)).sum() / share.sum()), rel=1e-5)
    torch.testing.assert_close(stats.target_cos, torch.where(valid, own, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.option("updates")
def test_rows_that_move_inside_backward_move_by_the_same_gradient(backend):
    x, _, labels = _inputs(backend)
    labels, weights = _two(labels)
    heads = [backend.head(C, D, scale=S, label_smoothing=0.1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    optimizers = FusedSGD(heads[0].parameters(), lr=0.1), torch.optim.SGD(heads[1].parameters(), lr=0.1)
    for head, optimizer in zip(heads, optimizers, strict=True):
        loss, stats = head(x, labels, sample_weight=weights, return_stats=True, entropy=True)
        (loss + 0.1 * stats.entropy.mean()).backward()
        optimizer.step()
    torch.testing.assert_close(heads[0].weight, heads[1].weight)


def test_what_does_not_go_together_is_refused(backend):
    x, w, labels = _inputs(backend)
    two = torch.stack([labels, labels], 1)
    weights = torch.ones(N, 2, device=x.device)
    cases = [
        ({"labels": two}, r"labels of shape \(11, 2\) must have a sample_weight of that shape"),
        ({"labels": two, "sample_weight": weights[:, 0]}, r"sample_weight must hold .* shape \(11, 2\)"),
        ({"sample_weight": weights}, r"sample_weight must hold .* shape \(11,\), got shape \(11, 2\)"),
        ({"labels": torch.stack([labels] * 3, 1)}, r"labels must have shape \(N,\), or \(N, 2\).* \(11, 3\)"),
        (
            {"labels": two, "sample_weight": weights, "margin": CurricularFaceMargin()},
            r"CurricularFaceMargin reshapes negatives, .* got shape \(N, 2\)",
        ),
        (
            {"label_smoothing": 0.1, "margin": GBCosFaceMargin()},
            "GBCosFaceMargin is no cross-entropy.* got 0.1",
        ),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"entropy": True}, "return_stats must be True or k, got False"),
        ({"entropy": 1, "return_stats": True}, "entropy must be True or False, got 1"),
        ({"entropy": labels, "return_stats": True}, "entropy must be True or False, got tensor"),
        ({"label_smoothing": 0.1, "gradient_tolerance": 0.01}, "gradient_tolerance must be 0, got 0.01"),
    ]
    for changes, message in cases:
        arguments = {"labels": labels, "margin": 0.2, **changes}
        with pytest.raises(ValueError, match=message):
            margin_softmax_loss(x, w, arguments.pop("labels"), backend=backend.name, **arguments)


def test_a_tolerance_is_of_backward_alone():
    """Where there will be none, it meets nothing."""
    x, w, labels = torch.randn(4, D), torch.randn(C, D), torch.arange(4)
    head = FusedCosFaceLoss(C, D, gradient_tolerance=0.1, label_smoothing=0.1)
    with torch.no_grad():
        assert head(x, labels, return_stats=True, entropy=True)[1].entropy.shape == (4,)
    assert margin_softmax_loss(x, w, labels, margin=0.2, gradient_tolerance=0.1, label_smoothing=0.1).isfinite()
    with pytest.raises(ValueError, match=r"gradient_tolerance must be 0, got 0\.1"):
        head(x, labels)


def test_a_head_refuses_to_smooth_what_has_no_labels_to_smooth():
    with pytest.raises(ValueError, match=r"GBCosFaceMargin is no cross-entropy.* got 0\.1"):
        FusedGBCosFaceLoss(C, D, label_smoothing=0.1)


def test_a_label_out_of_range(backend):
    x, w, labels = _inputs(backend)
    two = torch.stack([labels, labels], 1)
    two[3, 1] = C
    weights = torch.ones(N, 2, device=x.device)
    with pytest.raises(ValueError, match=rf"labels must be in \[0, {C}\).* got {C} at row 3"):
        margin_softmax_loss(x, w, two, margin=0.2, sample_weight=weights, backend=backend.name)
    loss = margin_softmax_loss(
        x, w, two, margin=0.2, sample_weight=weights, validate_labels=False, reduction="none", backend=backend.name
    )
    assert loss.isnan().nonzero().flatten().tolist() == [3]

    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert (gradient == 0).all(1).nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(
    "margin", [0.2, ArcFaceMargin(0.4), NPCFaceMargin()], ids=["cosface", "arcface", "npcface"]
)
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_a_broken_sample_that_is_ignored_reaches_no_gradient(backend, two, margin, value):
    if two and isinstance(margin, NPCFaceMargin):
        return  # which takes one label
    x, w, labels = _inputs(backend)
    options = {}
    if two:
        labels, options["sample_weight"] = _two(labels)
        labels[4] = -100
    scale, others = torch.tensor(S, device=x.device, requires_grad=True), torch.arange(N, device=x.device) != 4
    got = []
    for broken in (0.0, value):
        x.data[4] = broken
        loss, stats = margin_softmax_loss(
            x, w, labels, margin=margin, scale=scale, label_smoothing=0.1, return_stats=True, entropy=True,
            backend=backend.name, **options,
        )  # fmt: skip
        got.append(torch.autograd.grad(loss + stats.entropy[others].sum(), [x, w, scale]))
    assert stats.entropy[4].isnan()
    for clean, other in zip(*got, strict=True):
        torch.testing.assert_close(other, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margin", [0.2, ArcFaceMargin(0.4)], ids=["cosface", "arcface"])
def test_a_broken_scale_of_an_ignored_sample_reaches_no_gradient(backend, margin):
    x, w, labels = _inputs(backend)
    scale = torch.full((N,), S, device=x.device)
    scale[4] = torch.nan
    scale.requires_grad_()
    loss = margin_softmax_loss(x, w, labels, margin=margin, scale=scale, backend=backend.name)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, w, scale]))


def test_entropy_of_an_ignored_sample_with_the_scale_of_its_norm(backend):
    """Samples without a label may be those whose entropy is wanted."""
    x, w, labels = _inputs(backend)
    _, stats = margin_softmax_loss(
        x, w, torch.full_like(labels, -100), margin=0.0, scale=1.0, normalize_embeddings=False, return_stats=True,
        entropy=True, backend=backend.name,
    )  # fmt: skip
    log_p = (x.double() @ F.normalize(w.double()).T).log_softmax(1)
    _compare(stats.entropy, -(log_p.exp() * log_p).sum(1), [x, w])


def test_two_classes_that_are_both_labels_and_both_far(backend):
    """In float32, where s cos of either would be a rounding above what is left of their difference."""
    w = F.normalize(torch.tensor([[-0.3, 1.0], [-0.34, 1.0]], device=backend.device))
    x, labels = torch.tensor([[1.0, 0.0]], device=w.device), torch.tensor([[0, 1]], device=w.device)
    weights = torch.tensor([[1.0, 0.0]], device=w.device)
    loss, stats = margin_softmax_loss(
        x, w, labels, margin=0.0, scale=800.0, sample_weight=weights, return_stats=True, entropy=True,
        backend=backend.name,
    )  # fmt: skip
    log_p = (800 * x.double() @ w.double().T).log_softmax(1)
    torch.testing.assert_close(loss.double(), -log_p[0, 0], rtol=5e-5, atol=0.0)
    torch.testing.assert_close(stats.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=5e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_16_bits_have_an_exact_sum(backend, dtype):
    x, w, labels = _inputs(backend)
    labels, weights = _two(labels)
    weights = (1e4 * weights).to(dtype)  # whose sum float16 does not hold
    got = [
        margin_softmax_loss(
            x, w, labels, margin=0.2, scale=S, sample_weight=a, return_stats=3, backend=backend.name
        )
        for a in (weights, weights.float())
    ]
    for loss, stats in got:
        torch.testing.assert_close(loss, got[1][0])
        torch.testing.assert_close(stats.accuracy, got[1][1].accuracy)
        torch.testing.assert_close(stats.top_k_accuracy, got[1][1].top_k_accuracy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NPCFaceMargin(a=torch.inf), r"^a must be in \(-inf, inf\), got inf"),
        (
            lambda: NPCFaceMargin(target_margins=(0.4, torch.nan)),
            r"each of target_margins must be in \(-pi, pi\) radians, got nan",
        ),
        (lambda: X2SoftmaxMargin(h=torch.nan), r"^h must be in \(-inf, inf\), got nan"),
        (lambda: X2SoftmaxMargin(k=torch.nan), r"^k must be in \(-inf, inf\), got nan"),
    ],
)
def test_a_message_names_the_number_that_is_not_finite(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_head_shows_what_it_smooths():
    head = FusedCosFaceLoss(C, D, label_smoothing=0.1)
    assert head.label_smoothing == 0.1
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got -0.1"):
        FusedCurricularFaceLoss(C, D, label_smoothing=-0.1)


def test_compiled_and_eager_agree():
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    labels, weights = _two(torch.arange(N))

    def step(x, w):
        loss, stats = margin_softmax_loss(
            x, w, labels, margin=0.2, scale=S, sample_weight=weights, label_smoothing=0.1, return_stats=True,
            entropy=True,
        )  # fmt: skip
        return loss + stats.entropy.sum()

    runs = [(each(x, w), x, w) for each in (step, torch.compile(step, fullgraph=True))]
    gradients = [torch.autograd.grad(loss, (x, w)) for loss, x, w in runs]
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[1][0], runs[0][0])
