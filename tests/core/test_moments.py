"""What the op sums up of the negatives beside their logsumexp, and two targets of a sample."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import BF16, F16, F32, F64, Problem, relative_error
from torch import Tensor

from cosface_kernels import ops, optim, reference
from cosface_kernels.optim import FusedSGD
from cosface_kernels.options import Options

pytestmark = pytest.mark.option("moments")

POLYNOMIALS = {"zero": (0.0, 0.0, 0.0), "linear": (0.0, 1.2, 0.2), "slopes": (1.0, 0.1, -0.06, 0.2, 0.7, 0.25)}


class Rows(NamedTuple):
    """Differentiable: lse (N,), target_cos as targets, mean (N,) and sum (N,) of the negatives; then counts."""

    lse: Tensor
    target_cos: Tensor
    mean: Tensor
    sum: Tensor
    hard_sum: Tensor
    hard_count: Tensor


def _options(problem: Problem, polynomial: str | None, **more) -> dict:
    options: dict = {"moments": True, **more}
    if polynomial:
        to = {"dtype": problem.dtypes.compute, "device": problem.x.device}
        thresholds = torch.linspace(-0.4, 0.7, len(problem.targets), **to)
        options |= {"thresholds": thresholds, "negatives": torch.tensor(POLYNOMIALS[polynomial], **to)}
    return options


def _two(problem: Problem) -> Tensor:
    """(2, N) different targets, where some samples have only the first, only the second, or none."""
    first, classes = problem.targets, len(problem.w)
    second = (first + 1 + torch.arange(len(first), device=first.device) % max(classes - 1, 1)) % classes
    second = second.where(second != first, -1)
    if len(first) > 4:
        second[1], second[2] = -1, -1
        first = first.clone()
        first[2], first[3] = -1, -1
    return torch.stack([first, second])


def _explicit(x, w, targets, scale, *, normalize_weight=True, thresholds=None, negatives=None, **_) -> Rows:
    """By the words of the definition, in the dtype of the inputs, for autograd."""
    cos = F.normalize(x) @ (F.normalize(w) if normalize_weight else w).T  # (N, C)
    each = torch.atleast_2d(targets)  # (1 or 2, N)
    others = torch.ones_like(cos, dtype=torch.bool)
    for one in each:
        others[one >= 0, one[one >= 0]] = False
    shaped, hard = cos, torch.zeros_like(others)
    if thresholds is not None:
        q, a, b, r, u, v = negatives if len(negatives) == 6 else (*negatives, 1, 2 * negatives[0], negatives[1])
        above = cos > thresholds[:, None]
        hard = above & others
        value = torch.where(above, q * cos.square() + a * cos + b, r * cos).detach()
        shaped = value + torch.where(above, u * cos + v, r).detach() * (cos - cos.detach())
    z = torch.where(others, scale[:, None] * shaped, -torch.inf)
    p = torch.where(others, z.softmax(1).nan_to_num(), 0)
    rows = [torch.where(one >= 0, cos.gather(1, one.clamp_min(0)[:, None])[:, 0], 0) for one in each]
    return Rows(
        z.logsumexp(1),
        torch.stack(rows).view(targets.shape),
        (p * shaped).sum(1),
        torch.where(others, shaped, 0).sum(1),
        (cos * hard).sum(1).detach(),
        hard.sum(1).to(cos.dtype),
    )


def _of_op(name: str):
    def lmcl(x, w, targets, scale, **options) -> Rows:
        _, top, log_sum, target_cos, _, _, (below, *sums) = ops.lmcl(x, w, targets, scale, 0.0, name, **options)
        mean = torch.where(log_sum.isneginf(), 0, top - below)
        return Rows(scale * top + log_sum, target_cos, mean, *sums)

    return lmcl


def _gradients(lmcl, x, w, targets, scale, upstream: list[Tensor | None], options: dict):
    x, w, scale = (t.detach().requires_grad_() for t in (x, w, scale))
    rows = lmcl(x, w, targets, scale, **options)
    used = [(row, g.to(row.dtype)) for row, g in zip(rows, upstream, strict=False) if g is not None]
    total = sum((torch.where(row.isfinite(), row, 0) * g).sum() for row, g in used)
    gradients = torch.autograd.grad(total, (x, w, scale), allow_unused=True, materialize_grads=True)
    return rows, gradients


def _check(
    backend, problem: Problem, targets: Tensor, options: dict, used: str = "lse target_cos mean sum"
) -> None:
    rng = torch.Generator().manual_seed(2)
    upstream = []
    for name in Rows._fields[:4]:
        shape = targets.shape if name == "target_cos" else problem.targets.shape
        g = torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu").to(problem.x.device)
        upstream.append(g if name in used.split() else None)
    inputs = problem.x, problem.w, targets, problem.scale
    got, got_gradients = _gradients(_of_op(backend.name), *inputs, upstream, options)
    seen = backend.seen(problem)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    double = seen.x.double(), seen.w.double(), targets, seen.scale.double()
    want, want_gradients = _gradients(_explicit, *double, upstream, exact)
    largest = max(1.0, float((seen.scale.max() * want.mean.abs().max()).nan_to_num(1))) if len(seen.x) else 1.0
    tolerance = 10 * largest * torch.finfo(problem.dtypes.compute).eps + 4 * backend.rounding(problem.dtypes)
    names = (*Rows._fields, "dx", "dw", "dscale")
    for name, g, r in zip(names, (*got, *got_gradients), (*want, *want_gradients), strict=True):
        g, r = g.double(), r.double()
        assert torch.equal(g.isinf(), r.isinf()), name
        finite = r.isfinite()
        error, size = (g - r)[finite].norm(), r[finite].norm()
        assert error <= tolerance * (size + 1e-2 * largest), f"{name}: error {error:.3g}, norm {size:.3g}"


@pytest.mark.parametrize("polynomial", [None, *POLYNOMIALS])
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("dtypes", [F32, F64], ids=str)
@pytest.mark.parametrize("targets", ["one", "two"])
def test_agrees_with_autograd(backend, regime, polynomial, dtypes, targets):
    problem = backend.problem(33, 301, 24, dtypes, regime=regime, scale=30.0)
    problem.targets[4] = -1
    _check(backend, problem, problem.targets if targets == "one" else _two(problem), _options(problem, polynomial))


@pytest.mark.parametrize("sizes", [(1, 1, 5), (1, 2, 4), (1, 40, 3), (7, 1, 8), (300, 90, 17), (0, 9, 4)], ids=str)
@pytest.mark.parametrize("targets", ["one", "two"])
def test_ragged_sizes(backend, sizes, targets):
    problem = backend.problem(*sizes, scale=10.0)
    options = _options(problem, "linear", normalize_weight=False)
    _check(backend, problem, problem.targets if targets == "one" else _two(problem), options)


def test_half_precision(backend):
    problem = backend.problem(16, 300, 32, BF16, scale=4.0)
    _check(backend, problem, _two(problem), _options(problem, None))


@pytest.mark.parametrize("normalize_weight", [True, False], ids=["hat", "raw"])
def test_slopes_beyond_float16_s_room(backend, normalize_weight):
    problem = backend.problem(16, 300, 32, F16, regime="wrong", scale=4.0)
    options = _options(problem, "linear", normalize_weight=normalize_weight)
    options["negatives"] = torch.tensor([0.0, 41.0, 40.0], device=problem.x.device)
    _check(backend, problem, problem.targets, options)


@pytest.mark.parametrize("used", ["lse", "target_cos", "mean", "sum"])
def test_each_gradient_alone(backend, used):
    problem = backend.problem(9, 60, 16, scale=12.0)
    for targets in (problem.targets, _two(problem)):
        _check(backend, problem, targets, _options(problem, "slopes"), used)


def test_a_large_scale(backend):
    """At s = 64 and one near negative, where the mean is within an ulp of the largest."""
    problem = backend.problem(8, 200, 32, regime="wrong", scale=64.0)
    _check(backend, problem, problem.targets, _options(problem, None))


def test_below_does_not_cancel(backend):
    """One negative holds nearly all mass: what is left to the others, as a difference of cosines, would be 0."""
    e = torch.eye(3, 8, device=backend.device)
    x, w = e[:1] + 0.0, torch.stack([e[2], e[0], e[1]])
    target = torch.zeros(1, dtype=torch.int64, device=backend.device)
    scale = torch.full((1,), 40.0, device=backend.device)
    *_, moments = ops.lmcl(x, w, target, scale, 0.0, backend.name, moments=True)
    below = float(torch.tensor(-40.0, dtype=torch.float64, device="cpu").exp())
    assert float(moments[0]) == pytest.approx(below, rel=1e-4)


def test_rows_that_are_not_asked_for_have_no_gradient(backend):
    """A sample with gradients of 0 has none, even where its embedding is not finite."""
    problem = backend.problem(6, 50, 16, scale=10.0)
    problem.x[2] = torch.nan
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    *_, moments = ops.lmcl(x, w, problem.targets, problem.scale, 0.0, backend.name, moments=True)
    asked = torch.ones(6, device=x.device)
    asked[2] = 0
    moments[0].backward(asked, retain_graph=True)
    moments[1].backward(asked)
    for gradient in (x.grad, w.grad):
        assert gradient.isfinite().all()
    assert x.grad.any(1).tolist() == [True, True, False, True, True, True]


def test_what_is_asked_for_changes_nothing_else(backend):
    problem = backend.problem(9, 120, 16)
    inputs = problem.x, problem.w, problem.targets, problem.scale, 0.35, backend.name
    for plain, asked in zip(ops.lmcl(*inputs)[:5], ops.lmcl(*inputs, moments=True)[:5], strict=True):
        torch.testing.assert_close(asked, plain, rtol=1e-5, atol=1e-6)
    assert ops.lmcl(*inputs)[6].shape == (0, 9)
    assert ops.lmcl(*inputs, moments=True)[6].shape == (4, 9)


def test_the_loss_of_two_targets_is_of_the_first(backend):
    problem = backend.problem(9, 120, 16)
    inputs = problem.x, problem.w, _two(problem), problem.scale, 0.35
    got = ops.lmcl(*inputs, backend.name, moments=True)[0]
    want = reference.forward(*(t.double() if t.is_floating_point() else t for t in inputs[:4]), 0.35)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_classes(backend):
    problem = backend.problem(7, 60, 16, scale=8.0)
    classes = torch.arange(3, 60, 4, device=backend.device)
    targets = _two(problem) % len(classes)
    targets[1] = targets[1].where(targets[1] != targets[0], -1)
    options = _options(problem, None)
    inputs = problem.x, problem.w, targets, problem.scale
    upstream = [
        torch.ones_like(problem.scale),
        torch.ones_like(targets),
        *torch.ones_like(problem.scale).expand(2, -1),
    ]
    got, (dx, dw, _) = _gradients(_of_op(backend.name), *inputs, upstream, options | {"classes": classes})
    want, (want_dx, want_dw, _) = _gradients(_explicit, *inputs[:1], problem.w[classes], *inputs[2:], upstream, {})
    for g, r in zip(got, want, strict=True):
        torch.testing.assert_close(g, r, rtol=1e-4, atol=1e-4)
    assert relative_error(dx, want_dx) < 1e-4
    assert relative_error(dw.to_dense()[classes], want_dw) < 1e-4


@pytest.mark.option("updates")
def test_rows_that_move_inside_backward_move_by_the_same_gradient(backend):
    problem = backend.problem(6, 90, 16, scale=8.0)
    moved, plain = (problem.w.clone().requires_grad_() for _ in range(2))
    optimizer = FusedSGD([moved], lr=0.5)
    targets, options = _two(problem), Options(moments=True)
    for weight in (moved, plain):
        arguments = problem.x, weight, targets, problem.scale, 0.3, backend.name
        outputs = (
            optim.lmcl(weight, *arguments, moments=True)
            if weight is moved
            else ops.lmcl(*arguments, *options.flat())
        )
        loss, _, log_sum, target_cos, _, _, moments = outputs
        (loss.sum() + log_sum.sum() + target_cos.sum() + moments[:2].sum()).backward()
    optimizer.step()
    torch.testing.assert_close(moved, plain - 0.5 * plain.grad)


def test_a_gradient_that_is_not_finite_moves_nothing(backend):
    problem = backend.problem(6, 90, 16, scale=8.0)
    weight = problem.w.clone().requires_grad_()
    _owner = FusedSGD([weight], lr=0.5)
    *_, moments = optim.lmcl(
        weight, problem.x, weight, problem.targets, problem.scale, 0.3, backend.name, moments=True
    )
    with pytest.raises(RuntimeError, match="not finite"):
        (moments[1].sum() * torch.inf).backward()
    assert torch.equal(weight, problem.w)


def test_the_same_on_every_run(backend):
    problem = backend.problem(40, 700, 24)
    inputs = problem.x, problem.w, _two(problem), problem.scale
    upstream = [None, None, problem.scale, problem.scale]
    runs = [_gradients(_of_op(backend.name), *inputs, upstream, _options(problem, "linear")) for _ in range(2)]
    for first, second in zip(*((*rows, *gradients) for rows, gradients in runs), strict=True):
        assert torch.equal(first, second)


def test_opcheck(backend):
    problem = backend.problem(5, 40, 8)
    inputs = (problem.x.requires_grad_(), problem.w.requires_grad_(), _two(problem), problem.scale, 0.3)
    torch.library.opcheck(torch.ops.cosface.lmcl.default, (*inputs, backend.name), _options(problem, "linear"))


def test_bad_shapes_are_refused(backend):
    problem = backend.problem(5, 40, 8)
    inputs = problem.x, problem.w
    two, three = _two(problem), torch.stack([problem.targets] * 3)
    with pytest.raises(ValueError, match=r"targets must have shape \[5\], got \[2, 5\]"):
        ops.lmcl(*inputs, two, problem.scale, 0.3, backend.name)
    with pytest.raises(ValueError, match=r"targets must have shape \[5\], got \[3, 5\]|got \[3, 5\]"):
        ops.lmcl(*inputs, three, problem.scale, 0.3, backend.name, moments=True)
    rows = problem.scale, problem.scale, problem.scale
    cache = ops.lmcl(*inputs, two, problem.scale, 0.3, backend.name, moments=True)[5]
    with pytest.raises(ValueError, match=r"g_cos must have shape \[2, 5\], got \[5\]"):
        ops.lmcl_backward(
            *inputs, two, problem.scale, *rows, rows[0], cache, True, True, backend.name, moments=True
        )
    with pytest.raises(ValueError, match=r"g_moments must have shape \[2, 5\], got \[4, 5\]"):
        ops.lmcl_backward(
            *inputs, problem.targets, problem.scale, *rows, rows[0], cache, True, True, backend.name,
            moments=True, g_moments=torch.zeros(4, 5, device=backend.device),
        )  # fmt: skip


def test_the_reference_s_backward_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (7, 30))
    scale = torch.full((7,), 5.0, dtype=torch.float64)
    targets = torch.stack([torch.arange(7), torch.arange(7) + 9])
    thresholds = torch.linspace(-0.5, 0.5, 7, dtype=torch.float64)
    negatives = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
    upstream = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (7, (2, 7), 7, 7)]
    options = {"moments": True, "thresholds": thresholds, "negatives": negatives}
    _, got = _gradients(_of_op("reference"), x, w, targets, scale, upstream, options)
    _, want = _gradients(_explicit, x, w, targets, scale, upstream, options)
    for g, r in zip(got, want, strict=True):
        assert relative_error(g, r) < 1e-12
