"""The op whose classes count each on its own: what its negatives add, and its gradients, in one pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import BF16, F16, F32, F64, Problem
from torch import Tensor

from cosface_kernels import ops, reference
from cosface_kernels.options import Options, Update

pytestmark = pytest.mark.option("sigmoid")

FORMS = ("plain", "cubic", "slopes", "angle")


def _options(form: str, problem: Problem, **more) -> dict:
    """Of UniFace, of SphereFace2 with its exact slope and with that of the cosine, and of SFace."""
    if form == "angle":
        return {"sigmoid": "angle", **more}
    value = [0.0, 1.0, 0.0, 0.0, 0.0]
    if form != "plain":
        value = [math.comb(3, k) / 4 for k in range(4)] + [0.0]
        value[0] += 0.4 - 1
    slope = [(k + 1) * value[k + 1] for k in range(4)] + [0.0]
    if form == "slopes":
        slope = [1.0, 0.0, 0.0, 0.0, 0.0]
    polynomials = torch.tensor([value, slope], dtype=torch.float64, device=problem.x.device)
    return {"sigmoid": "cross_entropy", "polynomials": polynomials, **more}


def _bias(form: str, problem: Problem) -> Tensor:
    """At which some p_ij are near 0 and some are not, of each sample another."""
    middle = 1.3 if form == "angle" else -0.2
    return problem.scale * torch.linspace(middle - 0.1, middle + 0.1, len(problem.x), device=problem.x.device)


def _explicit(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    bias: Tensor,
    g: Tensor,
    g_cos: Tensor,
    form: str,
    options,
) -> tuple[Tensor, ...]:
    """Sums, dx, dw and dscale by the words of the definition and autograd."""
    x, w, scale = (t.detach().requires_grad_() for t in (x, w, scale))
    rows = w if options.get("classes") is None else w[options["classes"]]
    rows = rows if options.get("normalize_weight") is False else F.normalize(rows)
    cos = F.normalize(x) @ rows.T  # (N, C)
    others = torch.ones_like(cos, dtype=torch.bool)
    others[targets >= 0, targets[targets >= 0]] = False
    if form == "angle":
        p = torch.sigmoid(bias[:, None] - scale[:, None] * cos.clamp(-1, 1).acos()).detach()
        added = p * cos
    else:
        c = cos if form != "slopes" else cos.detach()
        shaped = c if form == "plain" else 2 * ((c + 1) / 2) ** 3 - 1 + 0.4
        if form == "slopes":
            shaped = shaped + cos - cos.detach()
        z = scale[:, None] * shaped + bias[:, None]
        p, added = torch.sigmoid(z), -F.logsigmoid(-z)
    sums = torch.stack([torch.where(others, added, 0).sum(1), torch.where(others, p, 0).sum(1)])  # (2, N)
    target_cos = torch.where(targets >= 0, cos.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0)
    total = (sums[0] * g + target_cos * g_cos).sum()
    gradients = torch.autograd.grad(total, (x, w, scale), allow_unused=True, materialize_grads=True)
    return (sums.detach().where((g != 0) | (g_cos != 0), 0), *gradients)


def _check(backend, problem: Problem, form: str, **more) -> None:
    options = _options(form, problem, **more)
    dtype, n = problem.dtypes.compute, len(problem.x)
    rng = torch.Generator().manual_seed(2)
    g, g_cos = (torch.randn(n, generator=rng, device="cpu").to(problem.x.device, dtype) for _ in range(2))
    if n > 3:
        g[2] = g_cos[2] = 0
    bias = _bias(form, problem)
    per_row = problem.targets, problem.scale, bias, g, g_cos
    got = ops.sigmoid(problem.x, problem.w, *per_row, True, True, backend.name, **options)
    seen = backend.seen(problem)
    double = [t.double() if t.is_floating_point() else t for t in (seen.x, seen.w, *per_row)]
    want = _explicit(*double, form, options)
    # an ulp of a logit moves p by as much, relatively
    eps = torch.finfo(dtype).eps
    tolerance = 8 * eps * max(1.0, float(problem.scale.max()) if n else 1.0)
    for name, a, b in zip(("sums", "dx", "dw", "dscale"), got, want, strict=True):
        allowed = tolerance + (4 * backend.rounding(problem.dtypes) if name in ("dx", "dw") else 0)
        assert a.shape == b.shape, name
        assert a.dtype == (problem.x.dtype if name == "dx" else problem.w.dtype if name == "dw" else dtype), name
        error, size = float((a.double() - b).norm()), float(b.norm())
        assert error <= allowed * (size + 0.1 * math.sqrt(max(n, 1))), f"{name}: error {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("dtypes", [F32, F64], ids=str)
def test_agrees_with_autograd(backend, regime, form, dtypes):
    problem = backend.problem(33, 301, 24, dtypes, regime=regime, scale=30.0)
    problem.targets[4] = -1
    _check(backend, problem, form)


@pytest.mark.parametrize("sizes", [(1, 1, 5), (1, 2, 4), (1, 40, 3), (7, 1, 8), (300, 90, 17), (0, 9, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_ragged_sizes(backend, sizes, form):
    problem = backend.problem(*sizes, scale=10.0)
    if form != "angle":  # of a length other than 1 there is none
        _check(backend, problem, form, normalize_weight=False)
    _check(backend, problem, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", [BF16], ids=str)
def test_half_precision(backend, form, dtypes):
    _check(backend, backend.problem(16, 300, 32, dtypes, scale=4.0), form)


@pytest.mark.parametrize("form", ["cubic", "slopes"])
def test_slopes_beyond_float16_s_room(backend, form):
    """Those of rows whose length counts, and is 30."""
    problem = backend.problem(16, 300, 32, F16, regime="wrong", scale=4.0)
    problem.w.copy_(30 * F.normalize(problem.w))
    _check(backend, problem, form, normalize_weight=False)


@pytest.mark.option("classes")
@pytest.mark.parametrize("form", FORMS)
def test_chosen_classes(backend, form):
    problem = backend.problem(20, 300, 16, scale=10.0)
    classes = torch.arange(1, 300, 7, device=problem.x.device)
    problem.targets.remainder_(len(classes))
    problem.targets[3] = -1
    options = _options(form, problem, classes=classes)
    ones = torch.ones_like(problem.scale)
    got = ops.sigmoid(
        problem.x,
        problem.w,
        problem.targets,
        problem.scale,
        -ones,
        ones,
        ones,
        True,
        True,
        backend.name,
        **options,
    )
    want = ops.sigmoid(
        problem.x, problem.w[classes], problem.targets, problem.scale, -ones, ones, ones, True, True, backend.name,
        **{**options, "classes": None},
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["cubic", "angle"])
def test_what_is_not_needed_is_empty(backend, form):
    problem = backend.problem(9, 120, 16, scale=10.0)
    ones = torch.ones_like(problem.scale)
    inputs = problem.x, problem.w, problem.targets, problem.scale, -ones, ones, ones
    options = _options(form, problem)
    both = ops.sigmoid(*inputs, True, True, backend.name, **options)
    for need_dx, need_dw in ((True, False), (False, True), (False, False)):
        sums, dx, dw, dscale = ops.sigmoid(*inputs, need_dx, need_dw, backend.name, **options)
        torch.testing.assert_close(sums, both[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dscale, both[3], rtol=1e-5, atol=1e-6)
        assert dx.shape == (both[1].shape if need_dx else (0,))
        assert dw.shape == (both[2].shape if need_dw else (0,))


@pytest.mark.parametrize("form", ["cubic", "angle"])
def test_a_row_without_gradient_takes_no_part(backend, form):
    """Whatever its embedding holds."""
    problem = backend.problem(6, 50, 16, scale=10.0)
    problem.x[2] = torch.nan
    g = torch.ones_like(problem.scale)
    g[2] = 0
    sums, dx, dw, dscale = ops.sigmoid(
        problem.x, problem.w, problem.targets, problem.scale, -g, g, g, True, True, backend.name,
        **_options(form, problem),
    )  # fmt: skip
    for result in (sums, dx, dw, dscale):
        assert result.isfinite().all()
    assert not sums[:, 2].any()
    assert dx.any(1).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("form", ["plain", "angle"])
def test_a_nan_enters_the_sums(backend, form):
    problem = backend.problem(6, 50, 16, scale=10.0)
    problem.x[2] = torch.nan
    g = torch.ones_like(problem.scale)
    sums, *_ = ops.sigmoid(
        problem.x, problem.w, problem.targets, problem.scale, -g, g, g, False, False, backend.name,
        **_options(form, problem),
    )  # fmt: skip
    assert sums[0].isnan().tolist() == [False, False, True, False, False, False]


def test_neither_end_of_the_sigmoid_cancels(backend):
    """log(1 + e^z) is e^z far below 0, where 1 + e^z would be 1, and z far above."""
    e = torch.eye(3, 8, device=backend.device)
    x, w = e[:1] + 0.0, torch.stack([e[0], e[1]])
    target = torch.zeros(1, dtype=torch.int64, device=backend.device)
    one = torch.ones(1, device=backend.device)
    problem = Problem(x, w, target, one, 0.0)
    for bias, want in ((-40.0, math.exp(-40.0)), (40.0, 40.0), (90.0, 90.0)):
        sums, *_ = ops.sigmoid(
            x, w, target, 50 * one, bias * one, one, one, False, False, backend.name, **_options("plain", problem)
        )
        assert float(sums[0]) == pytest.approx(want, rel=1e-5)
        assert float(sums[1]) == pytest.approx(1 / (1 + math.exp(-bias)), rel=1e-5)


@pytest.mark.option("updates")
@pytest.mark.parametrize("form", ["cubic", "angle"])
def test_rows_move_by_the_gradient(backend, form):
    problem = backend.problem(20, 300, 16, scale=10.0)
    one = torch.ones_like(problem.scale)
    options = _options(form, problem)
    inputs = problem.targets, problem.scale
    _, dx, dw, dscale = ops.sigmoid(
        problem.x, problem.w, *inputs, -one, one, one, True, True, backend.name, **options
    )
    moved, update = problem.w.clone(), Update("sgd", 1, 0, 1.0, math.inf, lr=0.5, weight_decay=0.0)
    cache = torch.empty(0, dtype=torch.uint8, device=problem.x.device)
    got = torch.ops.cosface.lmcl_backward_update_(
        problem.x, moved, *inputs, 0 * one, one, one, one, cache, [], None, *update.flat(), True, backend.name,
        **options,
    )  # fmt: skip
    for a, b in zip((moved, *got), (problem.w - 0.5 * dw, dx, dscale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmoid": "tanh"}, "sigmoid must be None or one of"),
        ({"sigmoid": "cross_entropy"}, "polynomials must be given"),
        ({"sigmoid": "angle", "polynomials": (2, 5)}, "polynomials must be given"),
        ({"sigmoid": "cross_entropy", "polynomials": (2, 4)}, "polynomials must have shape"),
        ({"sigmoid": "angle", "moments": True}, "a softmax"),
    ],
)
def test_what_does_not_fit(backend, options, message):
    problem = backend.problem(4, 9, 8)
    if "polynomials" in options:
        options = {**options, "polynomials": torch.zeros(options["polynomials"], device=problem.x.device)}
    one = torch.ones_like(problem.scale)
    with pytest.raises(ValueError, match=message):
        ops.sigmoid(
            problem.x,
            problem.w,
            problem.targets,
            problem.scale,
            one,
            one,
            one,
            True,
            True,
            backend.name,
            **options,
        )


def test_the_softmax_refuses_it(backend):
    problem = backend.problem(4, 9, 8)
    with pytest.raises(ValueError, match="lmcl is a softmax"):
        ops.lmcl(problem.x, problem.w, problem.targets, problem.scale, 0.0, backend.name, sigmoid="angle")


def test_the_reference_is_the_definition():
    problem = Problem(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, -1]), torch.full((3,), 7.0), 0.0)
    options = Options(**_options("cubic", problem))
    added, mass = reference.sigmoid_sums(
        problem.x, problem.w, problem.targets, problem.scale, -problem.scale, options
    )
    for i in range(3):
        rows = []
        for j in range(5):
            cos = float(F.cosine_similarity(problem.x[i], problem.w[j], dim=0))
            if j != problem.targets[i]:
                rows.append(7 * (2 * ((cos + 1) / 2) ** 3 - 0.6) - 7)
        assert float(added[i]) == pytest.approx(sum(math.log1p(math.exp(z)) for z in rows), rel=1e-4)
        assert float(mass[i]) == pytest.approx(sum(1 / (1 + math.exp(-z)) for z in rows), rel=1e-4)
