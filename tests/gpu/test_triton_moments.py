"""Moments of the negatives on backend `triton`, where the suite of the op does not look."""

from functools import partial

import pytest
import torch
from support import F16, F32, relative_error

from bench import launches
from cosface_kernels import ops, reference
from cosface_kernels.backends import triton as backend_triton
from cosface_kernels.backends.triton import launch
from cosface_kernels.options import Options

pytestmark = pytest.mark.triton_only


def double(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def both_passes(backend, problem, g_moments, **options):
    """lmcl's results, and dx, dw and dscale of g_moments and of lse, not of the targets."""
    inputs = problem.x, problem.w, problem.targets, problem.scale
    results = ops.lmcl(*inputs, 0.3, backend.name, moments=True, **options)
    _, top, log_sum, target_cos, _, cache, _ = results
    upstream = top, log_sum, torch.ones_like(top), torch.zeros_like(target_cos), cache
    gradients = ops.lmcl_backward(
        *inputs, *upstream, True, True, backend.name, moments=True, g_moments=g_moments, **options
    )
    return results, gradients


def explicit(problem, results, g_moments, **options):
    """The same by the specification, in float64, from the results of a forward."""
    inputs = double(problem.x, problem.w, problem.targets, problem.scale)
    top, log_sum = double(*results[1:3])
    upstream = top, log_sum, torch.ones_like(top), torch.zeros_like(results[3].double())
    given = Options(moments=True, g_moments=g_moments.double(), **options)
    return reference.moments(*inputs, top, log_sum, given), reference.backward(*inputs, *upstream, options=given)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_many_splits_of_several_tiles(backend, order, monkeypatch):
    """More splits than are merged at a time, of two tiles each; the first sample's cosines are in order."""
    monkeypatch.setattr(launch, "INTERPRETED_PROCESSORS", 40)
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "2048")
    problem = backend.problem(2, 66 * 2 * 64 + 5, 3, scale=20.0)
    cos = problem.w @ problem.x[0] / problem.w.norm(dim=1)
    problem.w.copy_(problem.w[cos.argsort(descending=order == "falling")])
    g_moments = torch.tensor([[1.0, -0.5], [1e-3, 2e-3]], device=backend.device)
    results, gradients = both_passes(backend, problem, g_moments)
    wanted, want_gradients = explicit(problem, results, g_moments)
    for got, want in zip(results[6], wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-4)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("cache_bytes", [2 * 20 * 256, 10**9])
def test_kept_cosines(backend, cache_bytes):
    problem = backend.problem(20, 600, 24, scale=16.0)
    thresholds = torch.linspace(-0.3, 0.3, 20, device=backend.device)
    negatives = torch.tensor([0.5, 0.6, 0.1], device=backend.device)
    options = {"thresholds": thresholds, "negatives": negatives}
    rng = torch.Generator().manual_seed(0)
    g_moments = torch.randn(2, 20, generator=rng, dtype=torch.float64, device="cpu").float().to(backend.device)
    plain, gradients = both_passes(backend, problem, g_moments, **options)
    results, kept = both_passes(backend, problem, g_moments, cache_bytes=cache_bytes, **options)
    for got, want in zip((*results[:5], results[6]), (*plain[:5], plain[6]), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(kept, gradients, strict=True):
        assert relative_error(got, want) <= 16 * 2.0**-15
    assert not torch.equal(kept[1], gradients[1])


@pytest.mark.parametrize("exponent", [-20, 0, 10])
@pytest.mark.parametrize("only", [0, 1])
def test_float16_g_neither_underflows_nor_overflows(backend, exponent, only):
    """Of one of the moments alone, where lse has no gradient."""
    problem = backend.problem(12, 300, 32, F16, scale=32.0)
    problem.x.mul_(2.0 ** min(0, exponent // 2)), problem.w.mul_(2.0 ** min(0, exponent // 2))
    g_moments = torch.zeros(2, 12, device=backend.device)
    g_moments[only] = 2.0**exponent
    inputs = problem.x, problem.w, problem.targets, problem.scale
    _, top, log_sum, _, _, cache, _ = ops.lmcl(*inputs, 0.3, backend.name, moments=True)
    zeros = torch.zeros_like(top)
    options = {"moments": True, "g_moments": g_moments}
    got = ops.lmcl_backward(*inputs, top, log_sum, zeros, zeros, cache, True, True, backend.name, **options)
    given = Options(moments=True, g_moments=g_moments.double())
    want = reference.backward(*double(*inputs, top, log_sum, zeros, zeros), options=given)
    for mine, exact in zip(got[:2], want[:2], strict=True):
        assert relative_error(mine, exact) < backend.rounding(F16) + 2**-11


def test_a_weight_that_is_not_normalised_leaves_no_unit(backend):
    """All cosines far below 0, which places past the last class have."""
    problem = backend.problem(6, 70, 16, F16, scale=1.0)
    rows = torch.nn.functional.normalize(problem.x.float().mean(0, keepdim=True) + 0 * problem.w.float())
    problem.x.copy_(rows[:6] + 0.05 * problem.x)
    problem.w.copy_(-2000 * rows + problem.w)
    g_moments = torch.ones(2, 6, device=backend.device)
    results, gradients = both_passes(backend, problem, g_moments, normalize_weight=False)
    _, wanted = explicit(problem, results, g_moments, normalize_weight=False)
    for got, want in zip(gradients[:2], wanted[:2], strict=True):
        assert relative_error(got, want) < 2e-2


def test_without_their_gradients_backward_is_the_plain_one(backend):
    problem = backend.problem(4, 70, 8, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    flags = []

    def record(name, launch, arguments):
        flags.append(launch.keywords.get("MOMENTS"))
        launch()

    loss, _, log_sum, *_, moments = ops.lmcl(x, w, problem.targets, problem.scale, 0.3, backend.name, moments=True)
    with launches.through(record):
        (loss + log_sum).sum().backward(retain_graph=True)
    assert flags
    assert not any(flags)
    with launches.through(record):
        moments[1].sum().backward()
    assert any(flags)


def test_a_gradient_tolerance_is_refused(backend):
    problem = backend.problem(4, 70, 8)
    g_moments = torch.zeros(2, 4, device=backend.device)
    for asked in ({"moments": True}, {"g_moments": g_moments}):
        reason = backend_triton.unsupported(problem.x, problem.w, Options(gradient_tolerance=0.1, **asked))
        assert reason == "moments with a gradient_tolerance are not on this backend yet."
    lmcl = partial(ops.lmcl, problem.x, problem.w, problem.targets, problem.scale, 0.3, backend.name)
    with pytest.raises(RuntimeError, match=r"moments with a gradient_tolerance are not on this backend yet\."):
        lmcl(moments=True, gradient_tolerance=0.1)


def test_tiles_are_chosen_apart(backend):
    problem = backend.problem(4, 70, 8)
    plain, raw, asked = (
        launch.key(problem.x, problem.w, options)
        for options in (Options(), Options(normalize_weight=False), Options(moments=True))
    )
    assert len({plain, raw, asked}) == 3
    assert not asked.plain
