"""What the op takes beyond LMCL: reshaped negatives, and a weight that is not normalised."""

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
    Problem,
    Upstream,
    evaluate,
    make_problem,
    random_upstream,
    relative_error,
)
from torch import Tensor

from cosface_kernels import optim, reference
from cosface_kernels.optim import FusedSGD
from cosface_kernels.options import Options

POLYNOMIALS = {
    "zero": (0.0, 0.0, 0.0),  # inter-class filter
    "linear": (0.0, 1.2, 0.2),  # MV-Softmax
    "quadratic": (1.0, 0.3, 0.0),  # CurricularFace
    "all": (0.7, -0.4, 0.1),
    "slopes": (1.0, 0.1, -0.06, 0.2, 0.7, 0.25),  # not N's own, as in CircleLoss
}


def _options(problem: Problem, polynomial: str | None, normalize_weight: bool) -> dict:
    """Thresholds that differ between rows: some reshape nothing, some everything."""
    options = {"normalize_weight": normalize_weight}
    if polynomial:
        n, compute = len(problem.targets), problem.dtypes.compute
        to = {"dtype": compute, "device": problem.x.device}
        thresholds = torch.linspace(-0.3, 0.6, n, **to) if n > 1 else torch.zeros(n, **to)
        if n > 4:
            thresholds[1], thresholds[2] = -torch.inf, torch.inf
        options |= {"thresholds": thresholds, "negatives": torch.tensor(POLYNOMIALS[polynomial], **to)}
    return options


def _explicit(x, w, targets, scale, margin, *, normalize_weight=True, thresholds=None, negatives=None):
    """The op as a loop over samples would have it, for autograd; in the dtype of the inputs."""
    product = F.normalize(x) @ (F.normalize(w) if normalize_weight else w).T  # (N, C)
    others = torch.ones_like(product, dtype=torch.bool)
    others[targets >= 0, targets[targets >= 0]] = False
    shaped = product
    if thresholds is not None:
        q, a, b, r, u, v = negatives if len(negatives) == 6 else (*negatives, 1, 2 * negatives[0], negatives[1])
        hard = product > thresholds[:, None]
        value = torch.where(hard, q * product.square() + a * product + b, r * product).detach()
        slope = torch.where(hard, u * product + v, r).detach()
        shaped = value + slope * (product - product.detach())
    lse = torch.where(others, scale[:, None] * shaped, -torch.inf).logsumexp(1)
    target_cos = torch.where(others, 0, product).sum(1)
    loss = F.softplus(lse - scale * (target_cos - margin), threshold=1e9) * (targets >= 0)
    return loss, lse, target_cos, torch.where(others, product, -torch.inf).amax(1)


def _doubled(problem: Problem, options: dict) -> tuple[Problem, dict]:
    doubled = replace(problem, x=problem.x.double(), w=problem.w.double(), scale=problem.scale.double())
    return doubled, {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}


def _check(backend, problem: Problem, options: dict) -> None:
    """Every output and gradient; relative to the whole tensor, a few times what float32 itself gets."""
    names = ("loss", "lse", "target_cos")
    got = evaluate(partial(backend.lmcl, **options), problem, random_upstream(problem, *names))
    seen, exact = _doubled(backend.seen(problem), options)
    upstream = Upstream(*(g.double() for g in random_upstream(problem, *names)))
    want = evaluate(partial(_explicit, **exact), seen, upstream)
    # an ulp of a logit moves e^z by as much
    largest = float((problem.scale.max() * want.max_neg.abs().max()).clamp_min(1)) if len(problem.targets) else 1
    tolerance = 8 * largest * torch.finfo(problem.dtypes.compute).eps + 4 * backend.rounding(problem.dtypes)
    for name in got._fields:
        g, r = getattr(got, name).double(), getattr(want, name)
        assert torch.equal(g.isinf(), r.isinf()), name
        finite = r.isfinite()
        error, size = (g - r)[finite].norm(), r[finite].norm()
        assert error <= tolerance * (size + 1e-3 * largest), f"{name}: error {error:.3g}, norm {size:.3g}"


@pytest.mark.parametrize("normalize_weight", [True, False], ids=["hat", "raw"])
@pytest.mark.parametrize("polynomial", [None, *POLYNOMIALS])
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("dtypes", [F32, F64], ids=str)
def test_agrees_with_autograd(backend, regime, polynomial, normalize_weight, dtypes):
    problem = backend.problem(33, 601, 24, dtypes, regime=regime, scale=30.0 if normalize_weight else 2.0)
    problem.targets[3] = -1
    _check(backend, problem, _options(problem, polynomial, normalize_weight))


@pytest.mark.parametrize("sizes", [(1, 1, 5), (1, 40, 3), (7, 1, 8), (300, 90, 17), (0, 9, 4)], ids=str)
@pytest.mark.parametrize("normalize_weight", [True, False], ids=["hat", "raw"])
def test_ragged_sizes(backend, sizes, normalize_weight):
    problem = backend.problem(*sizes, scale=10.0)
    _check(backend, problem, _options(problem, "all", normalize_weight))


@pytest.mark.parametrize("normalize_weight", [True, False], ids=["hat", "raw"])
def test_half_precision(backend, normalize_weight):
    problem = backend.problem(16, 300, 32, BF16, scale=4.0)
    _check(backend, problem, _options(problem, "linear", normalize_weight))


@pytest.mark.parametrize("length", [None, 1.0, 30.0])
@pytest.mark.parametrize(
    "negatives", [(0.0, 41.0, 40.0), (1.0, 0.3, 0.0), (0, 1, 0, -50, 0, 1), (1, 0, 0, 1, 9, -40)]
)
def test_slopes_beyond_float16_s_room(backend, length, negatives):
    """At the cosines of embeddings at a wrong class's centre; of rows of any length where they count."""
    problem = backend.problem(16, 300, 32, F16, regime="wrong", scale=4.0 / (length or 1))
    options = _options(problem, "linear", length is None)
    options["negatives"] = torch.tensor(negatives, dtype=torch.float32, device=problem.x.device)
    if length is not None:
        problem.w.copy_(length * F.normalize(problem.w))
    _check(backend, problem, options)


def test_zero_rows(backend):
    problem = backend.problem(6, 50, 16, scale=10.0)
    problem.x[1], problem.w[4], problem.w[problem.targets[2]] = 0, 0, 0
    for normalize_weight in (True, False):
        _check(backend, problem, _options(problem, "quadratic", normalize_weight))


def test_no_threshold_reached_is_plain(backend):
    """Bitwise, so that a mask that is never set costs no accuracy."""
    problem = backend.problem(9, 300, 16)
    options = _options(problem, "all", True)
    options["thresholds"] = torch.full_like(options["thresholds"], torch.inf)
    upstream = random_upstream(problem, "loss")
    got, plain = (evaluate(partial(backend.lmcl, **o), problem, upstream) for o in (options, {}))
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=1e-5, atol=1e-7)


def test_reference_backward_is_its_forward_s_gradient():
    problem = make_problem(9, 40, 8, F64, scale=5.0)
    for normalize_weight in (True, False):
        options = Options(**_options(problem, "all", normalize_weight))
        x, w, scale = (t.requires_grad_() for t in (problem.x, problem.w, problem.scale))
        _, top, log_sum, target_cos, _ = reference.forward(x, w, problem.targets, scale, 0.0, options)
        lse = scale * top + log_sum
        g_lse, g_cos = torch.randn(2, 9, dtype=torch.float64)
        want = torch.autograd.grad((lse, target_cos), (x, w, scale), (g_lse, g_cos))
        got = reference.backward(x, w, problem.targets, scale, top, log_sum, g_lse, g_cos, options=options)
        for g, r in zip(got, want, strict=True):
            assert relative_error(g, r) < 1e-12


def test_opcheck(backend):
    problem = backend.problem(5, 40, 8)
    options = _options(problem, "all", False)
    inputs = (problem.x.requires_grad_(), problem.w.requires_grad_(), problem.targets, problem.scale, 0.3)
    torch.library.opcheck(torch.ops.cosface.lmcl.default, (*inputs, backend.name), options)


@pytest.mark.parametrize("normalize_weight", [True, False], ids=["hat", "raw"])
@pytest.mark.option("updates")
def test_rows_that_move_inside_backward_move_by_the_same_gradient(backend, normalize_weight):
    problem = backend.problem(6, 90, 16, scale=8.0)
    options = _options(problem, "all", normalize_weight)
    moved, plain = (problem.w.clone().requires_grad_() for _ in range(2))
    optimizer = FusedSGD([moved], lr=0.5)
    for w, lmcl in ((moved, partial(optim.lmcl, moved)), (plain, torch.ops.cosface.lmcl)):
        lmcl(problem.x, w, problem.targets, problem.scale, 0.3, backend.name, **options)[0].sum().backward()
    optimizer.step()
    torch.testing.assert_close(moved, plain - 0.5 * plain.grad)
