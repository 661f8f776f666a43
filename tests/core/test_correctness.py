"""Loss, statistics and gradients of every backend against the specification in float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import (
    BF16,
    F16,
    F32,
    F64,
    LOGIT_ULPS,
    MIXED_DTYPES,
    SAME_DTYPES,
    Dtypes,
    brute_force_losses,
    check_backend,
    evaluate,
    evaluate_oracle,
    natural_rows,
    plain_forward,
    random_upstream,
    relative_error,
)

NUM_CLASSES = (1, 2, 3, 511, 512, 513, 10007)
NUM_SAMPLES = (0, 1, 7, 256)
DIMS = (1, 3, 64, 512, 515)
GRID_DTYPES = (F32, BF16, F64, F16, Dtypes(torch.float32, torch.bfloat16))


def _pairwise_sizes() -> list:
    """35 cases in which every pair of values of two of (C, D, N, dtype) occurs together."""
    cases = []
    for a, num_classes in enumerate(NUM_CLASSES):
        for b, dim in enumerate(DIMS):
            num_samples, dtypes = NUM_SAMPLES[(a + b) % 4], GRID_DTYPES[(a + 3 * b) % 5]
            heavy = num_samples * num_classes * dim > 10**6
            cases.append(
                pytest.param(
                    num_samples,
                    num_classes,
                    dim,
                    dtypes,
                    id=f"N{num_samples}-C{num_classes}-D{dim}-{dtypes}",
                    marks=[pytest.mark.heavy] if heavy else [],
                )
            )
    return cases


@pytest.mark.parametrize(("num_samples", "num_classes", "dim", "dtypes"), _pairwise_sizes())
def test_sizes(backend, num_samples, num_classes, dim, dtypes):
    check_backend(backend, backend.problem(num_samples, num_classes, dim, dtypes))


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
def test_regimes(backend, dtypes, regime):
    check_backend(backend, backend.problem(32, 700, 64, dtypes, regime=regime))


@pytest.mark.parametrize("margin", [0.0, 0.35, 0.9])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 128.0])
def test_scale_and_margin(backend, dtypes, scale, margin):
    check_backend(backend, backend.problem(9, 300, 32, dtypes, scale=scale, margin=margin))


@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["random", "wrong"])
def test_mixed_dtypes(backend, dtypes, regime):
    check_backend(backend, backend.problem(17, 600, 48, dtypes, regime=regime))


@pytest.mark.parametrize("dtypes", [BF16, F16, *MIXED_DTYPES[:5]], ids=str)
def test_gradients_of_low_precision_are_rounded_once(backend, dtypes):
    """They are those of float32 inputs of the same values, to the nearest number of their dtype, not cut off."""
    problem = backend.problem(20, 600, 40, dtypes)
    upstream = random_upstream(problem, "loss")
    got = evaluate(backend.lmcl, problem, upstream)
    seen = backend.seen(problem)
    want = evaluate(backend.lmcl, replace(seen, x=seen.x.float(), w=seen.w.float()), upstream)
    for name in ("loss", "lse", "target_cos", "max_neg", "dscale"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
    for name in ("dx", "dw"):
        exact = getattr(want, name)
        if backend.operand(dtypes) == dtypes.compute and not backend.interpreted:
            changed = getattr(got, name) != exact.to(getattr(got, name).dtype)
            assert float(changed.double().mean()) < 0.02, name  # ties move with the last bit
        else:
            rounding = max(backend.rounding(dtypes), torch.finfo(getattr(got, name).dtype).eps)
            assert relative_error(getattr(got, name), exact) < 2 * rounding, name


def test_one_scale_per_sample(backend, dtypes):
    problem = backend.problem(11, 200, 32, dtypes)
    scale = torch.logspace(0, 7, 11, base=2, dtype=problem.scale.dtype, device=backend.device)
    check_backend(backend, replace(problem, scale=scale))


@pytest.mark.parametrize("targets", ["all_the_same", "pairs", "some_missing", "all_missing"])
def test_targets(backend, dtypes, targets):
    problem = backend.problem(14, 90, 32, dtypes)
    row = torch.arange(14, device=backend.device)
    problem.targets[:] = {
        "all_the_same": torch.full_like(row, 41),
        "pairs": row // 2 * 13,
        "some_missing": problem.targets.where(row % 3 != 0, -1),
        "all_missing": torch.full_like(row, -1),
    }[targets]
    check_backend(backend, problem, random_upstream(problem, "loss", "lse", "target_cos"))


@pytest.mark.parametrize(
    "num_samples", [255, 257, pytest.param(600, marks=pytest.mark.heavy)], ids=lambda n: f"N{n}"
)
def test_many_samples(backend, dtypes, num_samples):
    """More rows than fit in one block: gradients of the classes add up over blocks."""
    check_backend(backend, backend.problem(num_samples, 130, 24, dtypes))


@pytest.mark.parametrize("target", [0, 511, 512, 1023, 1024, 1029], ids=lambda t: f"target{t}")
def test_target_at_a_tile_edge(backend, target):
    problem = backend.problem(5, 1030, 16, F32)
    problem.targets[2] = target
    check_backend(backend, problem)


@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
def test_confident_losses_are_not_zero(backend, dtypes):
    """Losses near 1e-12 to 1e-4 relative, gradients too, where F.cross_entropy gives 0 in float32."""
    problem = backend.problem(12, 513, 512, dtypes, regime="confident")
    upstream = random_upstream(problem, "loss")
    got, want = evaluate(backend.lmcl, problem, upstream), evaluate_oracle(problem, upstream)
    exact = torch.tensor(brute_force_losses(problem), dtype=torch.float64, device=backend.device)
    assert float(exact.min()) > 1e-15
    assert float(exact.median()) < 1e-11
    torch.testing.assert_close(got.loss.double(), exact, rtol=1e-4, atol=0)
    plain = plain_forward(problem.x, problem.w, problem.targets, problem.scale, problem.margin)[0]
    assert int((plain == 0).sum()) >= 6, "the case is too easy to tell anything"
    rounding = backend.rounding(dtypes)
    if dtypes is not F16:  # gradients of 1e-10 are below the smallest float16
        assert relative_error(got.dx, want.dx) < 1e-4 + rounding
        assert relative_error(got.dw, want.dw) < 1e-4 + rounding
    assert relative_error(got.dscale, want.dscale) < 1e-4


@pytest.mark.parametrize(
    "option",
    [
        {},
        pytest.param({"moments": True}, marks=pytest.mark.option("moments")),
        pytest.param({"gradient_tolerance": 1e-2}, marks=pytest.mark.option("gradient_tolerance")),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
def test_a_negative_scale_has_its_loss_or_none(backend, dtypes, option):
    """No number that looks like a loss: under torch.compile and on a GPU nobody looks at the scale."""
    problem = backend.problem(6, 300, 16, dtypes)
    problem.scale[1::2] = torch.tensor([-0.5, -5.0, -64.0], device=backend.device)
    upstream = random_upstream(problem, "loss")
    got, want = evaluate(partial(backend.lmcl, **option), problem, upstream), evaluate_oracle(problem, upstream)
    is_right = (got.loss.double() / want.loss - 1).abs() < 1e-2
    assert bool((is_right | ~got.loss.isfinite()).all())
    assert bool(is_right[::2].all())
    assert torch.equal(got.dx[1::2].isfinite().all(1), got.loss[1::2].isfinite())


@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
def test_each_confident_row_by_itself(backend, dtypes):
    """A norm over all rows is ruled by the largest: here every row of dx is held to its own size."""
    problem = backend.problem(12, 513, 512, dtypes, regime="confident")
    problem.x[::3] *= -1  # losses from 1e-13 to 1e+2 in one batch
    upstream = random_upstream(problem, "loss")
    got, want = evaluate(backend.lmcl, problem, upstream), evaluate_oracle(problem, upstream)
    errors = (got.dx.double() - want.dx).norm(dim=1) / want.dx.norm(dim=1)
    assert float(errors.max()) < 1e-4 + backend.rounding(dtypes)


@pytest.mark.parametrize("where", ["x", "w", "x_and_w", "target_centre", "all"])
@pytest.mark.parametrize(
    ("size", "dtypes"),
    [("zero", d) for d in SAME_DTYPES] + [("below_eps", d) for d in (F32, F64, BF16)],  # float16 ends at 6e-8
    ids=lambda v: str(v),
)
def test_vanishing_rows(backend, dtypes, where, size):
    """Norms are clamped at 1e-12 as in F.normalize: cosines shrink to 0, and there is no projection term."""
    problem = backend.problem(10, 70, 16, dtypes)
    factor = 0.0 if size == "zero" else 1e-14
    if where in ("x", "x_and_w"):
        problem.x[[0, 4]] *= factor
    if where in ("w", "x_and_w"):
        problem.w[[3, 50, 69]] *= factor
    if where == "target_centre":
        problem.w[problem.targets[:3]] *= factor
    if where == "all":
        problem.x.mul_(factor), problem.w.mul_(factor)
    upstream = random_upstream(problem, "loss")
    got, want = evaluate(backend.lmcl, problem, upstream), evaluate_oracle(problem, upstream)
    plain, terms = evaluate(plain_forward, problem, upstream), natural_rows(problem, upstream)
    rounds = backend.operand(dtypes) != dtypes.compute  # operands of the gradients' products
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4 if dtypes != F64 else 1e-10, atol=0)
    for name in ("dx", "dw"):  # vanishing rows have gradients 1e12 times larger than the others: row by row
        g, e, p = (getattr(r, name) for r in (got, want, plain))
        assert not g.isnan().any()
        finite = e.to(g.dtype).isfinite()
        surely = (e.abs() < 3e4) | (e.abs() > 2e5) if rounds else torch.ones_like(finite)
        assert torch.equal(g.isfinite()[surely], finite[surely])  # 1e12 is past the largest float16
        finite &= g.isfinite()
        allowed = 2 * (p.double() - e).where(finite, 0).norm(dim=1) + torch.finfo(g.dtype).eps * e.norm(dim=1)
        allowed += LOGIT_ULPS * 64 * torch.finfo(dtypes.compute).eps * e.norm(dim=1)
        if rounds:
            allowed += backend.rounding(dtypes) * getattr(terms, name)
            allowed += torch.finfo(g.dtype).smallest_normal * torch.finfo(g.dtype).eps * math.sqrt(g.shape[1])
        held = (g.double() - e).where(finite, 0).norm(dim=1) <= allowed
        if rounds and dtypes is F16 and name == "dw":  # a float16 G loses p < 2^-36, which 1e12 shows
            held |= (problem.w == 0).all(dim=1)
        assert bool(held.all()), name


def test_unnormalised_sizes(backend):
    """Only directions count: embeddings and centres from 1e-6 to 1e6 long."""
    problem = backend.problem(9, 200, 24, F32)
    problem.x.mul_(torch.logspace(-6, 6, 9, device=backend.device)[:, None])
    problem.w.mul_(torch.logspace(-6, 6, 200, device=backend.device)[:, None])
    upstream = random_upstream(problem, "loss")
    got, want = evaluate(backend.lmcl, problem, upstream), evaluate_oracle(problem, upstream)
    assert relative_error(got.loss, want.loss) < 1e-5
    for g, e in ((got.dx, want.dx), (got.dw, want.dw)):
        assert float(((g.double() - e).norm(dim=1) / e.norm(dim=1).clamp(min=1e-30)).max()) < 1e-4


def test_orthogonal_classes_by_hand(backend):
    """x = (1, 0) of class 0, w = identity, s = 2, m = 1/2: softplus(-1) = 0.31326, sigma = 1 / (1 + e)."""
    weight = torch.eye(2, device=backend.device, requires_grad=True)
    x = torch.tensor([[1.0, 0.0]], device=backend.device, requires_grad=True)
    loss = backend.loss(x, weight, torch.tensor([0], device=backend.device), scale=2.0, margin=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.3132616875, rel=1e-6)
    sigma = 0.2689414213699951
    for leaf, want in ((x, [[0.0, 2 * sigma]]), (weight, [[0.0, 0.0], [2 * sigma, 0.0]])):
        want = torch.tensor(want, device=backend.device)
        torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-7)


def test_two_close_classes_by_hand(backend):
    """Cosines .71 and .70, s = 64: softplus(-0.64) without a margin, softplus(21.76) with m = .35."""
    w = torch.tensor([[0.71, math.sqrt(1 - 0.71**2)], [0.70, math.sqrt(1 - 0.70**2)]], device=backend.device)
    x, labels = torch.tensor([[5.0, 0.0]], device=backend.device), torch.tensor([0], device=backend.device)
    assert backend.loss(x, w, labels, scale=64.0, margin=0.0).item() == pytest.approx(0.42349651, rel=1e-5)
    assert backend.loss(x, w, labels, scale=64.0, margin=0.35).item() == pytest.approx(21.76, rel=1e-6)


@pytest.mark.strided_weight
def test_all_classes_alike(backend):
    """Every p_ij is 1 / (C - 1): the loss is log(1 + (C - 1) e^(s m))."""
    direction = torch.linspace(-1, 1, 40, device=backend.device)
    w = direction.expand(1000, 40)
    loss = backend.loss(direction[None] * 3, w, torch.tensor([999], device=backend.device), scale=16.0, margin=0.5)
    assert loss.item() == pytest.approx(math.log1p(999 * math.exp(8.0)), rel=1e-6)


@pytest.mark.float64
def test_margin_of_zero_is_cross_entropy(backend):
    problem = backend.problem(8, 60, 16, F64, scale=10.0)
    loss = backend.loss(problem.x, problem.w, problem.targets, scale=10.0, margin=0.0)
    z = 10 * F.normalize(problem.x) @ F.normalize(problem.w).T
    torch.testing.assert_close(loss, F.cross_entropy(z, problem.targets), rtol=1e-12, atol=0)
