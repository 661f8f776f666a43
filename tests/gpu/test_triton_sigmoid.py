"""Classes that count each on its own, on backend `triton`, where the suite of the op does not look."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import BF16, F16, F32, relative_error

from bench import launches
from cosface_kernels import ops
from cosface_kernels.backends import triton as backend_triton
from cosface_kernels.backends.chunks import units
from cosface_kernels.backends.triton import launch
from cosface_kernels.options import SIGMOIDS, Options

pytestmark = pytest.mark.triton_only
STRAIGHT = [0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]
CUBIC = [-0.35, 0.75, 0.75, 0.25, 0.0], [0.75, 1.5, 0.75, 0.0, 0.0]  # 2 ((c + 1) / 2)^3 - 0.6


def asked(form, backend, **more):
    """Options of the op, by the name of a sigmoid, or by the polynomials of one."""
    if form == "angle":
        return {"sigmoid": form, **more}
    polynomials = torch.tensor(form, dtype=torch.float32, device=backend.device)
    return {"sigmoid": "cross_entropy", "polynomials": polynomials, **more}


def both(backend, problem, bias, g, g_cos, **options):
    """sums, dx, dw and dscale, and the same by the specification in float64."""
    inputs = problem.x, problem.w, problem.targets, problem.scale, bias, g, g_cos
    got = ops.sigmoid(*inputs, True, True, backend.name, **options)
    double = [t.double() if t.is_floating_point() else t for t in inputs]
    return got, ops.sigmoid(*double, True, True, "reference", **options)


def some(backend, n, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng, device="cpu").to(backend.device)


@pytest.mark.parametrize("form", ["angle", CUBIC], ids=["angle", "cubic"])
@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("chunk", [1, 512, 10**9])
def test_chunk_of_classes_changes_no_result(backend, form, dtypes, chunk, monkeypatch):
    """Chunks of 256, of 512 and of all, of which the last is ragged; some classes, and all."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", str(chunk))
    problem = backend.problem(40, 700, 40, dtypes, scale=8.0)
    problem.targets[3] = -1
    bias = -8 * (torch.ones_like(problem.scale) if form != "angle" else -1.4 * torch.ones_like(problem.scale))
    g, g_cos = some(backend, 40, 1), some(backend, 40, 2)
    g[5] = g_cos[5] = 0
    for classes in (None, torch.arange(0, 700, 2, device=backend.device)):
        if classes is not None:
            problem.targets.clamp_(max=len(classes) - 1)
        got, want = both(backend, problem, bias, g, g_cos, **asked(form, backend, classes=classes))
        allowed = 2e-5 + 2 * backend.rounding(dtypes)
        for mine, exact in zip(got, want, strict=True):
            assert relative_error(mine, exact) < allowed if exact.any() else not mine.any()


@pytest.mark.parametrize("form", ["angle", STRAIGHT, CUBIC], ids=["angle", "straight", "cubic"])
def test_places_past_the_last_class_add_nothing(backend, form):
    """Where p would be 1."""
    problem = backend.problem(6, 70, 8)
    bias = torch.full_like(problem.scale, 1000.0)
    sums, *_ = ops.sigmoid(
        problem.x, problem.w, problem.targets, problem.scale, bias, bias, bias, True, True, backend.name,
        **asked(form, backend),
    )  # fmt: skip
    assert sums[1].tolist() == [69.0] * 6


@pytest.mark.parametrize("form", ["angle", CUBIC], ids=["angle", "cubic"])
def test_several_runs_give_the_same_bits(backend, form):
    problem = backend.problem(40, 700, 24)
    ones = torch.ones_like(problem.scale)
    inputs = problem.x, problem.w, problem.targets, problem.scale, -ones, ones, ones
    first, second = (ops.sigmoid(*inputs, True, True, backend.name, **asked(form, backend)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_logarithm_keeps_what_1_would_absorb(backend):
    """One class, at each cosine and bias."""
    z = torch.linspace(-80, 80, 3001, device=backend.device)
    x = F.pad(torch.ones(len(z), 1, device=backend.device), (0, 7))  # cos = 1
    none, one = torch.full_like(z, -1, dtype=torch.int64), torch.ones_like(z)
    sums, *_ = ops.sigmoid(
        x, x[:1].clone(), none, one, z - 1, one, one, False, False, backend.name, **asked(STRAIGHT, backend)
    )
    exact = (z - 1).double() + 1
    # e^-|z| is as exact as |z| in float32
    torch.testing.assert_close(sums[0].double(), F.softplus(exact, threshold=700), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1].double(), exact.sigmoid(), rtol=1e-5, atol=0)


def test_the_angle_at_every_cosine(backend):
    angles = torch.linspace(0, math.pi, 2001, device=backend.device, dtype=torch.float64)
    x = F.pad(torch.stack([angles.cos(), angles.sin()], 1).float(), (0, 6))
    w = torch.eye(1, 8, device=backend.device)
    none, one = torch.full((2001,), -1, device=backend.device), torch.ones(2001, device=backend.device)
    sums, *_ = ops.sigmoid(
        x, w, none, 4 * one, 6 * one, one, one, False, False, backend.name, **asked("angle", backend)
    )
    cos = F.normalize(x.double())[:, 0]
    p = (6 - 4 * cos.acos()).sigmoid()
    # A cosine near 1 is off by an ulp, 2^-24, its angle by the root of twice as much.
    torch.testing.assert_close(sums[1].double(), p, rtol=4 * 2**-11, atol=0)
    middle = cos.abs() < 0.99
    torch.testing.assert_close(sums[1].double()[middle], p[middle], rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[0].double()[middle], (p * cos)[middle], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [-20, 0, 4])
@pytest.mark.parametrize("form", ["angle", STRAIGHT, CUBIC], ids=["angle", "straight", "cubic"])
def test_float16_g_neither_underflows_nor_overflows(backend, exponent, form):
    problem = backend.problem(12, 300, 32, F16, scale=32.0)
    problem.x.mul_(2.0 ** min(0, exponent // 2)), problem.w.mul_(2.0 ** min(0, exponent // 2))
    g = 2.0**exponent * some(backend, 12)
    bias = torch.full_like(problem.scale, 48.0 if form == "angle" else 0.0)
    got, want = both(backend, problem, bias, g, 0 * g, **asked(form, backend))
    for mine, exact in zip(got[1:3], want[1:3], strict=True):
        assert relative_error(mine, exact) < backend.rounding(F16) + 2**-11


def test_a_weight_that_is_not_normalised_in_float16(backend):
    """Long rows, whose slope is 1 all the same."""
    problem = backend.problem(6, 70, 16, F16, scale=1.0)
    problem.w.mul_(200)
    g = some(backend, 6)
    got, want = both(backend, problem, -g, g, g, **asked(STRAIGHT, backend, normalize_weight=False))
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) < 2e-2


@pytest.mark.parametrize("form", ["angle", STRAIGHT, CUBIC, ([0.0] * 5, [0.0, -3.0, 0.0, 2.0, 0.5])], ids=str)
def test_unit_of_a_row_bounds_its_gradients(backend, form):
    g, scale = some(backend, 20), torch.full((20,), 30.0, device=backend.device)
    unit = units(scale, g, 0 * g, Options(**asked(form, backend)))
    c = torch.linspace(-1, 1, 1001, device=backend.device)
    slope = torch.zeros_like(c) if form == "angle" else sum(k * c**i for i, k in enumerate(form[1]))
    bound = g.abs() if form == "angle" else (scale * g).abs() * slope.abs().max()
    assert bool((bound <= unit * (1 + 1e-6)).all())
    assert bool((unit <= 8 * bound).all())


@pytest.mark.parametrize("form", ["angle", CUBIC], ids=["angle", "cubic"])
def test_no_forward_and_no_cache(backend, form):
    problem = backend.problem(4, 70, 8)
    options = asked(form, backend, cache_bytes=10**6)
    assert backend_triton.cache_size(problem.x, problem.w, Options(**options)) == 0
    flags = {}

    def record(name, launch, arguments):
        flags[name] = launch.keywords.get("SIGMOID"), launch.keywords.get("ANGLE")
        launch()

    ones = torch.ones_like(problem.scale)
    inputs = problem.x, problem.w, problem.targets, problem.scale, ones, ones, ones
    with launches.through(record):
        ops.sigmoid(*inputs, True, True, backend.name, **options)
    assert "class_statistics" not in flags
    assert flags["logit_gradients"] == (True, form == "angle")
    assert flags["finish_embedding_gradients"][0]


def test_it_takes_a_sigmoid_alone(backend):
    problem = backend.problem(4, 70, 8)
    ones = torch.ones_like(problem.scale)
    with pytest.raises(ValueError, match="sigmoid must be one of cross_entropy, angle, got None"):
        ops.sigmoid(
            problem.x, problem.w, problem.targets, problem.scale, ones, ones, ones, True, True, backend.name
        )


def test_tiles_are_chosen_apart(backend):
    problem = backend.problem(4, 70, 8)
    keys = [launch.key(problem.x, problem.w, Options(sigmoid=name)) for name in (None, *SIGMOIDS)]
    raw = launch.key(problem.x, problem.w, Options(normalize_weight=False))
    assert len({*keys, raw}) == 4
    assert [key.plain for key in keys] == [True, False, False]
