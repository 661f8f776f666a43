"""The functional form: reductions, ignored samples, sample weights, learned scales, margins, statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import F32, F64, evaluate_oracle, plain_forward, random_upstream, relative_error

import cosface_kernels
from cosface_kernels import cosface_loss, margin_softmax_loss


@pytest.fixture
def problem(backend):
    return backend.problem(10, 60, 16, F64, scale=20.0)


def _leaves(problem, *names):
    return [getattr(problem, name).detach().clone().requires_grad_() for name in names]


def _losses(problem, scale=20.0, margin=0.35):
    scales = torch.full_like(problem.x[:, 0], scale)
    return plain_forward(problem.x, problem.w, problem.targets, scales, margin)[0]


@pytest.mark.float64
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(backend, problem, reduction):
    x, w = _leaves(problem, "x", "w")
    got = backend.loss(x, w, problem.targets, scale=20.0, reduction=reduction)
    x2, w2 = _leaves(problem, "x", "w")
    losses = plain_forward(x2, w2, problem.targets, problem.scale, problem.margin)[0]
    want = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 10}[reduction]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    got.sum().backward(), want.sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.float64
def test_mean_is_the_default(backend, problem):
    assert torch.equal(
        backend.loss(problem.x, problem.w, problem.targets),
        backend.loss(problem.x, problem.w, problem.targets, margin=0.35, scale=64.0, reduction="mean"),
    )


# 2 is a class: as in F.cross_entropy, samples of an ignored class are ignored
@pytest.mark.float64
@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 60, 10**9])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignored_samples_are_as_good_as_absent(backend, problem, dtypes, ignore_index, reduction):
    labels = problem.targets.where(problem.targets != 2, 3)
    ignored = torch.tensor([0, 3, 4, 9], device=backend.device)
    kept = torch.tensor([1, 2, 5, 6, 7, 8], device=backend.device)
    some = labels.index_fill(0, ignored, ignore_index)
    options = {"scale": 20.0, "reduction": reduction, "ignore_index": ignore_index}
    x, w = problem.x.to(dtypes.x).requires_grad_(), problem.w.to(dtypes.w).requires_grad_()
    loss = backend.loss(x, w, some, **options)
    loss.sum().backward()
    x2, w2 = x.detach()[kept].requires_grad_(), w.detach().clone().requires_grad_()
    want = backend.loss(x2, w2, labels[kept], **options)
    want.sum().backward()
    tolerance = {"rtol": 10 * torch.finfo(dtypes.compute).eps, "atol": 0}
    if reduction == "none":
        assert not loss[ignored].any()
        loss = loss[kept]
    torch.testing.assert_close(loss, want, **tolerance)
    assert not x.grad[ignored].any()
    assert relative_error(x.grad[kept], x2.grad) < 2 * torch.finfo(dtypes.x).eps
    assert relative_error(w.grad, w2.grad) < 2 * torch.finfo(dtypes.w).eps


@pytest.mark.parametrize("num_samples", [0, 5])
def test_no_valid_sample(backend, dtypes, num_samples):
    """As F.cross_entropy: the mean over nothing is nan, the sum is 0, and no gradient flows from the sum."""
    problem = backend.problem(num_samples, 7, 4, dtypes)
    labels = torch.full((num_samples,), -100, device=backend.device)
    x, w = _leaves(problem, "x", "w")
    assert math.isnan(backend.loss(x, w, labels).item())
    losses = backend.loss(x, w, labels, reduction="none").detach()
    assert torch.equal(losses, torch.zeros(num_samples, dtype=dtypes.compute, device=backend.device))
    total = backend.loss(x, w, labels, reduction="sum")
    assert total.item() == 0
    total.backward()
    for leaf in (x, w):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.float64
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_sample_weight(backend, problem, reduction):
    factors = torch.rand(10, dtype=torch.float64, device=backend.device)
    factors[4] = 0
    labels = problem.targets.clone()
    labels[[2, 7]] = -100
    x, w = _leaves(problem, "x", "w")
    got = backend.loss(x, w, labels, scale=20.0, reduction=reduction, sample_weight=factors)
    x2, w2 = _leaves(problem, "x", "w")
    valid = (labels >= 0).double()
    weighted = plain_forward(x2, w2, problem.targets, problem.scale, problem.margin)[0] * factors * valid
    want = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / (factors * valid).sum()}[reduction]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    got.sum().backward(), want.sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.float64
def test_sample_weight_of_an_ignored_sample_is_not_read(backend, problem):
    factors = torch.ones(10, dtype=torch.float64, device=backend.device)
    labels = problem.targets.clone()
    labels[5] = -100
    want = backend.loss(problem.x, problem.w, labels, sample_weight=factors)
    factors[5] = math.nan
    assert torch.equal(backend.loss(problem.x, problem.w, labels, sample_weight=factors), want)


def test_scale_that_learns(backend, dtypes):
    problem = backend.problem(10, 60, 16, dtypes, scale=20.0)
    scale = torch.nn.Parameter(torch.tensor(20.0, device=backend.device))
    backend.loss(problem.x, problem.w, problem.targets, scale=scale, reduction="sum").backward()
    want = evaluate_oracle(problem, random_upstream(problem, "loss")._replace(loss=torch.ones_like(problem.scale)))
    assert scale.grad.shape == ()
    assert scale.grad.item() == pytest.approx(want.dscale.sum().item(), rel=1e-5)


@pytest.mark.float64
def test_scale_per_sample_and_its_gradient(backend, problem):
    """s = |x|, as in A-Softmax: the gradient of the scale joins that of x."""
    margin = 0.1

    def explicit(x, w):
        s = x.norm(dim=1)
        return plain_forward(x, w, problem.targets, s, margin)[0].mean()

    x, w = _leaves(problem, "x", "w")
    got = backend.loss(x, w, problem.targets, scale=x.norm(dim=1), margin=margin)
    x2, w2 = _leaves(problem, "x", "w")
    want = explicit(x2, w2)
    got.backward(), want.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-9, atol=1e-12)


def test_scale_of_another_dtype(backend):
    problem = backend.problem(4, 30, 8, F32)
    want = backend.loss(problem.x, problem.w, problem.targets, scale=32.0)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        scale = torch.tensor(32.0, dtype=dtype, device=backend.device, requires_grad=True)
        loss = backend.loss(problem.x, problem.w, problem.targets, scale=scale)
        assert torch.equal(loss, want)
        loss.backward()
        assert scale.grad.dtype == dtype


def _arcface(cos):
    return torch.cos(torch.acos(cos.clamp(-1 + 1e-7, 1 - 1e-7)) + 0.5)


@pytest.mark.float64
@pytest.mark.parametrize(
    "margin",
    [_arcface, lambda c: c, lambda c: c - 0.35, lambda c: 0.9 * c**3 - 0.1],
    ids=["arc", "none", "cos", "cubic"],
)
def test_any_margin_on_the_target(backend, problem, margin):
    labels = problem.targets.clone()
    labels[3] = -100

    def explicit(x, w):
        cos = F.normalize(x) @ F.normalize(w).T
        one_hot = F.one_hot(labels.clamp(min=0), 60).bool()
        psi = margin(cos.gather(1, labels.clamp(min=0)[:, None]))
        return F.cross_entropy(20 * torch.where(one_hot, psi, cos), labels)

    x, w = _leaves(problem, "x", "w")
    got = margin_softmax_loss(x, w, labels, margin=margin, scale=20.0, backend=backend.name)
    x2, w2 = _leaves(problem, "x", "w")
    want = explicit(x2, w2)
    got.backward(), want.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-9, atol=1e-12)


def test_margin_of_cosface_through_the_general_form(backend, dtypes):
    problem = backend.problem(10, 90, 16, dtypes)
    x, w = _leaves(problem, "x", "w")
    want = backend.loss(x, w, problem.targets, margin=0.3, scale=16.0)
    want_dx, want_dw = torch.autograd.grad(want, (x, w))
    got = margin_softmax_loss(x, w, problem.targets, margin=lambda c: c - 0.3, scale=16.0, backend=backend.name)
    got_dx, got_dw = torch.autograd.grad(got, (x, w))
    torch.testing.assert_close(got, want)
    assert relative_error(got_dx, want_dx) < 2 * torch.finfo(dtypes.x).eps + 1e-6
    assert relative_error(got_dw, want_dw) < 2 * torch.finfo(dtypes.w).eps + 1e-6


@pytest.mark.float64
def test_margin_sees_only_target_cosines_and_may_learn(backend, problem):
    seen = []
    m = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64, device=backend.device))

    def margin(cos):
        seen.append(cos.detach())
        return cos - m

    loss = margin_softmax_loss(
        problem.x, problem.w, problem.targets, margin=margin, scale=20.0, backend=backend.name
    )
    loss.backward()
    assert [tuple(c.shape) for c in seen] == [(10,)]
    cos = (F.normalize(problem.x) * F.normalize(problem.w)[problem.targets]).sum(1)
    torch.testing.assert_close(seen[0], cos, rtol=1e-12, atol=1e-14)
    step = 1e-5
    slope = (_losses(problem, margin=0.2 + step).mean() - _losses(problem, margin=0.2 - step).mean()) / (2 * step)
    assert m.grad.item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.float64
def test_statistics(backend, problem):
    labels = problem.targets.clone()
    nearest = (F.normalize(problem.x) @ F.normalize(problem.w).T).argmax(1)
    labels[:3] = nearest[:3]
    labels[8] = -100
    x = problem.x.requires_grad_()
    loss, stats = backend.loss(x, problem.w, labels, scale=20.0, return_stats=True)
    assert isinstance(stats, cosface_kernels.LossStats)
    assert torch.equal(loss, backend.loss(x, problem.w, labels, scale=20.0))
    cos = F.normalize(problem.x.detach()) @ F.normalize(problem.w).T  # (N, C)
    own = F.one_hot(labels.clamp(min=0), 60).bool() & (labels >= 0)[:, None]
    valid = labels >= 0
    lse = torch.logsumexp((20 * cos).masked_fill(own, -math.inf), 1)
    torch.testing.assert_close(stats.lse[valid], lse[valid], rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.target_cos[valid], cos[own], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        stats.max_negative_cos[valid], cos.masked_fill(own, -math.inf).amax(1)[valid], rtol=1e-12, atol=1e-14
    )
    right = (nearest == labels)[valid]
    assert 3 <= int(right.sum()) < 9
    assert stats.accuracy.shape == ()
    assert stats.accuracy.item() == pytest.approx(right.double().mean().item(), rel=1e-6)
    assert not any(t.requires_grad for t in stats[:4])


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum"}], ids=str)
def test_loss_dtype(backend, dtypes, options):
    problem = backend.problem(3, 5, 4, dtypes)
    assert backend.loss(problem.x, problem.w, problem.targets, **options).dtype == dtypes.compute


def test_first_backend_is_used_by_default(backend):
    problem = backend.problem(3, 5, 4, F32)
    torch.testing.assert_close(
        cosface_loss(problem.x, problem.w, problem.targets),
        backend.loss(problem.x, problem.w, problem.targets),
    )
