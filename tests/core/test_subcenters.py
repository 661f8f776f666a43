"""The op with several rows of a class, of which the nearest counts."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import BF16, F32, F64, Problem, relative_error
from torch import Tensor

from cosface_kernels import ops, optim, reference
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.options import Options

pytestmark = pytest.mark.option("subcenters")

K = [1, 2, 3, 7]


class Outputs(NamedTuple):
    """Differentiable: lse (N,), target_cos as targets, and of the moments the mean and the sum, (N,) each."""

    lse: Tensor
    target_cos: Tensor
    mean: Tensor
    sum: Tensor


def _problem(backend, samples: int, classes: int, dim: int, k: int, *dtypes, **options) -> Problem:
    """Of a weight with k rows of each class, whose targets are classes."""
    problem = backend.problem(samples, classes * k, dim, *dtypes, **options)
    problem.targets.div_(k, rounding_mode="floor")
    return problem


def _options(problem: Problem, k: int, polynomial: tuple[float, ...] | None = None, **more) -> dict:
    options: dict = {"subcenters": k, **more}
    if polynomial:
        to = {"dtype": problem.dtypes.compute, "device": problem.x.device}
        options["thresholds"] = torch.linspace(-0.4, 0.7, len(problem.x), **to)
        options["negatives"] = torch.tensor(polynomial, **to)
    return options


def _two(problem: Problem, classes: int) -> Tensor:
    """(2, N) different targets, where some samples have but one."""
    first = problem.targets
    second = (first + 1 + torch.arange(len(first), device=first.device) % (classes - 1)) % classes
    return torch.stack([first, second.where(torch.arange(len(first), device=first.device) % 4 > 0, -1)])


def _explicit(
    x, w, targets, scale, *, subcenters, normalize_weight=True, thresholds=None, negatives=None, **_
) -> Outputs:
    """By the words of the definition, in the dtype of the inputs, for autograd."""
    rows = F.normalize(x) @ (F.normalize(w) if normalize_weight else w).T  # (N, C K)
    of_classes = rows.view(len(x), len(w) // subcenters, subcenters)
    cos = of_classes.gather(2, of_classes.argmax(2, keepdim=True))[..., 0]  # (N, C)
    each = torch.atleast_2d(targets)
    others = torch.ones_like(cos, dtype=torch.bool)
    for one in each:
        others[one >= 0, one[one >= 0]] = False
    shaped = cos
    if thresholds is not None:
        q, a, b = negatives
        shaped = torch.where((cos > thresholds[:, None]) & others, q * cos.square() + a * cos + b, cos)
    z = torch.where(others, scale[:, None] * shaped, -torch.inf)
    p = torch.where(others, z.softmax(1).nan_to_num(), 0)
    of_targets = [torch.where(one >= 0, cos.gather(1, one.clamp_min(0)[:, None])[:, 0], 0) for one in each]
    return Outputs(
        z.logsumexp(1),
        torch.stack(of_targets).view(targets.shape),
        (p * shaped).sum(1),
        torch.where(others, shaped, 0).sum(1),
    )


def _of_op(name: str):
    def lmcl(x, w, targets, scale, **options) -> Outputs:
        _, top, log_sum, target_cos, _, _, moments = ops.lmcl(x, w, targets, scale, 0.0, name, **options)
        if not len(moments):
            return Outputs(scale * top + log_sum, target_cos, top.new_zeros(len(x)), top.new_zeros(len(x)))
        return Outputs(
            scale * top + log_sum, target_cos, torch.where(log_sum.isneginf(), 0, top - moments[0]), moments[1]
        )

    return lmcl


def _gradients(lmcl, x, w, targets, scale, upstream: list[Tensor], options: dict):
    x, w, scale = (t.detach().requires_grad_() for t in (x, w, scale))
    outputs = lmcl(x, w, targets, scale, **options)
    total = sum(
        (torch.where(row.isfinite(), row, 0) * g.to(row.dtype)).sum()
        for row, g in zip(outputs, upstream, strict=True)
    )
    gradients = torch.autograd.grad(total, (x, w, scale), allow_unused=True, materialize_grads=True)
    return outputs, gradients


def _upstream(problem: Problem, targets: Tensor, moments: bool) -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    shapes = [problem.targets.shape, targets.shape, *[problem.targets.shape] * 2]
    drawn = [torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu") for shape in shapes]
    return [g.to(problem.x.device) * (moments or place < 2) for place, g in enumerate(drawn)]


def _check(backend, problem: Problem, options: dict, targets: Tensor | None = None) -> None:
    """Outputs and gradients against autograd through the definition in float64."""
    targets = problem.targets if targets is None else targets
    moments = options.get("moments", False)
    upstream = _upstream(problem, targets, moments)
    got, got_gradients = _gradients(
        _of_op(backend.name), problem.x, problem.w, targets, problem.scale, upstream, options
    )
    seen = backend.seen(problem)
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    double = seen.x.double(), seen.w.double(), targets, seen.scale.double()
    want, want_gradients = _gradients(_explicit, *double, upstream, exact)
    largest = max(1.0, float(seen.scale.max())) if len(seen.x) else 1.0
    tolerance = 10 * largest * torch.finfo(problem.dtypes.compute).eps + 4 * backend.rounding(problem.dtypes)
    names = (*Outputs._fields, "dx", "dw", "dscale")
    for name, g, r in zip(names, (*got, *got_gradients), (*want, *want_gradients), strict=True):
        if name in ("mean", "sum") and not moments:
            continue
        g, r = g.double(), r.double()
        assert torch.equal(g.isinf(), r.isinf()), name
        finite = r.isfinite()
        error, size = (g - r)[finite].norm(), r[finite].norm()
        assert error <= tolerance * (size + 1e-2 * largest), f"{name}: error {error:.3g}, norm {size:.3g}"


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("polynomial", [None, (1.0, 0.3, 0.0)], ids=["plain", "reshaped"])
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("dtypes", [F32, F64], ids=str)
def test_agrees_with_autograd(backend, k, regime, polynomial, dtypes):
    problem = _problem(backend, 33, 301, 24, k, dtypes, regime=regime, scale=64.0)
    problem.targets[4] = -1
    _check(backend, problem, _options(problem, k, polynomial))


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 5), (1, 2, 4), (7, 1, 8), (300, 90, 17), (257, 131, 40), (0, 9, 4)], ids=str
)
def test_ragged_sizes(backend, k, sizes):
    problem = _problem(backend, *sizes, k, scale=10.0)
    _check(backend, problem, _options(problem, k, normalize_weight=False))
    _check(backend, problem, _options(problem, k))


@pytest.mark.parametrize("k", [5, 64])
def test_many_centres(backend, k):
    problem = _problem(backend, 20, 70, 16, k, scale=20.0)
    _check(backend, problem, _options(problem, k))


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("polynomial", [None, (0.0, 1.2, 0.2)], ids=["plain", "reshaped"])
def test_moments_and_two_targets(backend, k, polynomial):
    problem = _problem(backend, 19, 140, 24, k, scale=20.0)
    options = _options(problem, k, polynomial, moments=True)
    _check(backend, problem, options)
    _check(backend, problem, options, _two(problem, 140))


@pytest.mark.parametrize("k", [2, 3])
def test_half_precision(backend, k):
    problem = _problem(backend, 16, 200, 32, k, BF16, scale=4.0)
    _check(backend, problem, _options(problem, k))


def test_one_centre_is_the_plain_op_bit_for_bit(backend):
    problem = backend.problem(40, 700, 24)
    upstream = _upstream(problem, problem.targets, False)
    inputs = problem.x, problem.w, problem.targets, problem.scale, upstream
    (plain, plain_gradients), (one, one_gradients) = (
        _gradients(_of_op(backend.name), *inputs, options) for options in ({}, {"subcenters": 1})
    )
    for a, b in zip((*plain, *plain_gradients), (*one, *one_gradients), strict=True):
        assert torch.equal(a, b)


def test_of_equal_centres_the_first_has_the_gradient(backend):
    problem = _problem(backend, 12, 60, 16, 3, scale=8.0)
    w = problem.w.view(60, 3, 16)
    w[:, 1] = w[:, 0]  # equal in every bit
    w = w.view(180, 16).requires_grad_()
    ops.lmcl(problem.x, w, problem.targets, problem.scale, 0.3, backend.name, subcenters=3)[0].sum().backward()
    dw = w.grad.view(60, 3, 16)
    assert [bool(dw[:, k].any()) for k in range(3)] == [True, False, True]
    _check(backend, problem, _options(problem, 3))


def test_centres_of_zero(backend):
    """Their cosine is 0, which may be the largest; beside others and as all of a class."""
    problem = _problem(backend, 12, 60, 16, 3, scale=8.0)
    problem.w[::3] = 0
    problem.w[6:9] = 0
    problem.x[2] = 0
    _check(backend, problem, _options(problem, 3))


def test_a_centre_that_is_not_a_number_counts(backend):
    problem = _problem(backend, 5, 30, 8, 3)
    problem.w[10] = torch.nan
    loss, *_ = ops.lmcl(problem.x, problem.w, problem.targets, problem.scale, 0.3, backend.name, subcenters=3)
    assert loss.isnan().all()


def test_rows_without_a_gradient_have_none(backend):
    problem = _problem(backend, 6, 50, 16, 2, scale=10.0)
    problem.x[2] = torch.nan
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    loss, *_ = ops.lmcl(x, w, problem.targets, problem.scale, 0.3, backend.name, subcenters=2)
    asked = torch.ones(6, device=x.device)
    asked[2] = 0
    loss.backward(asked)
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()
    assert [bool(row.any()) for row in x.grad[2:4]] == [False, True]


@pytest.mark.parametrize("k", [2, 7])
def test_chosen_classes(backend, k):
    problem = _problem(backend, 11, 60, 16, k, scale=8.0)
    chosen = torch.arange(3, 60, 4, device=backend.device)
    rows = (chosen[:, None] * k + torch.arange(k, device=backend.device)).flatten()
    targets = problem.targets % len(chosen)
    upstream = _upstream(problem, targets, False)
    got, (dx, dw, _) = _gradients(
        _of_op(backend.name), problem.x, problem.w, targets, problem.scale, upstream,
        {"subcenters": k, "classes": rows},
    )  # fmt: skip
    want, (want_dx, want_dw, _) = _gradients(
        _explicit, problem.x, problem.w[rows], targets, problem.scale, upstream, {"subcenters": k}
    )
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.target_cos, want.target_cos, rtol=1e-5, atol=1e-5)
    assert relative_error(dx, want_dx) < 1e-5
    assert relative_error(dw.to_dense()[rows], want_dw) < 1e-5


@pytest.mark.option("cache_bytes")
@pytest.mark.parametrize("cache_bytes", [0, 20_000, None])
def test_the_cache_of_cosines_changes_no_bit(backend, cache_bytes):
    problem = _problem(backend, 33, 301, 24, 3)
    upstream = _upstream(problem, problem.targets, False)
    inputs = problem.x, problem.w, problem.targets, problem.scale, upstream
    runs = [
        _gradients(_of_op(backend.name), *inputs, {"subcenters": 3, **options})
        for options in ({"cache_bytes": 0}, {"cache_bytes": cache_bytes, "exact_cache": True})
    ]
    for first, second in zip(*((*outputs, *gradients) for outputs, gradients in runs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.option("exact_cache")
def test_a_cache_of_16_bits(backend):
    problem = _problem(backend, 33, 301, 24, 3, scale=8.0)
    upstream = _upstream(problem, problem.targets, False)
    inputs = problem.x, problem.w, problem.targets, problem.scale, upstream
    (_, exact), (_, rounded) = (
        _gradients(_of_op(backend.name), *inputs, {"subcenters": 3, "cache_bytes": 2**20, "exact_cache": kept})
        for kept in (True, False)
    )
    for a, b in zip(exact, rounded, strict=True):
        assert relative_error(b, a) < 1e-3


@pytest.mark.option("exact_cache")
@pytest.mark.parametrize("tile", ["1", "13", "100", "999"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_tile_holds_whole_classes(backend, monkeypatch, restore_threads, tile, threads):
    monkeypatch.setenv("COSFACE_CPU_TILE", tile)
    torch.set_num_threads(threads)
    problem = _problem(backend, 33, 61, 24, 3)
    _check(backend, problem, _options(problem, 3))
    _check(backend, problem, _options(problem, 3, cache_bytes=0))


@pytest.mark.option("exact_cache")
@pytest.mark.parametrize("threads", [3, 4])
def test_teams_of_threads(backend, restore_threads, threads):
    """Where copies of dx_hat for all threads are too much memory, a few threads share the rows of a tile."""
    torch.set_num_threads(threads)
    problem = _problem(backend, 2600, 130, 1600, 3, scale=4.0)
    _check(backend, problem, _options(problem, 3))


@pytest.mark.option("updates")
@pytest.mark.parametrize("optimizer", [FusedSGD, FusedAdamW])
def test_rows_that_move_inside_backward_move_by_the_same_gradient(backend, optimizer):
    problem = _problem(backend, 6, 90, 16, 3, scale=8.0)
    moved, plain = (problem.w.clone().requires_grad_() for _ in range(2))
    fused = optimizer([moved], lr=0.1)
    theirs = (torch.optim.SGD if optimizer is FusedSGD else torch.optim.AdamW)(
        [plain], lr=0.1, weight_decay=fused.param_groups[0]["weight_decay"]
    )
    for _ in range(2):
        for weight in (moved, plain):
            arguments = problem.x, weight, problem.targets, problem.scale, 0.3, backend.name
            if weight is moved:
                loss, *_ = optim.lmcl(weight, *arguments, subcenters=3)
            else:
                loss, *_ = ops.lmcl(*arguments, *Options(subcenters=3).flat())
            loss.sum().backward()
        fused.step()
        with torch.device(backend.device):  # torch 2.10 makes AdamW's step on the default device, and reads it
            theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-5)


def test_the_same_on_every_run(backend):
    problem = _problem(backend, 40, 700, 24, 3)
    inputs = problem.x, problem.w, problem.targets, problem.scale, _upstream(problem, problem.targets, True)
    options = _options(problem, 3, (0.0, 1.2, 0.2), moments=True)
    runs = [_gradients(_of_op(backend.name), *inputs, options) for _ in range(2)]
    for first, second in zip(*((*outputs, *gradients) for outputs, gradients in runs), strict=True):
        assert torch.equal(first, second)


def test_opcheck(backend):
    problem = _problem(backend, 5, 40, 8, 3)
    inputs = (problem.x.requires_grad_(), problem.w.requires_grad_(), problem.targets, problem.scale, 0.3)
    torch.library.opcheck(torch.ops.cosface.lmcl.default, (*inputs, backend.name), {"subcenters": 3})


def test_what_does_not_fit_is_refused(backend):
    problem = backend.problem(5, 40, 8)
    inputs = problem.x, problem.w, problem.targets, problem.scale, 0.3, backend.name
    with pytest.raises(ValueError, match=r"must be a multiple of subcenters 3, got 40\."):
        ops.lmcl(*inputs, subcenters=3)
    for k in (0, -1, 65):
        with pytest.raises(ValueError, match=rf"subcenters must be in \[1, 64\], got {k}\."):
            ops.lmcl(*inputs, subcenters=k)
    rows = torch.arange(5, device=backend.device)
    with pytest.raises(ValueError, match=r"must be a multiple of subcenters 2, got 5\."):
        ops.lmcl(*inputs, subcenters=2, classes=rows)


@pytest.mark.option("gradient_tolerance")
def test_a_tolerance_is_refused(backend):
    problem = backend.problem(5, 40, 8)
    inputs = problem.x, problem.w, problem.targets, problem.scale, 0.3, backend.name
    with pytest.raises(ValueError, match="gradient_tolerance"):
        ops.lmcl(*inputs, subcenters=2, gradient_tolerance=0.1)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_that_do_not_know_it_say_so(name):
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, is_contiguous=lambda: True)
    assert BACKENDS[name].unsupported(x, x, Options()) is None
    assert "option 'subcenters' is not" in BACKENDS[name].unsupported(x, x, Options(subcenters=2))


def test_the_reference_s_backward_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (7, 30))
    scale, targets = torch.full((7,), 5.0, dtype=torch.float64), torch.arange(7)
    options = {"subcenters": 3, "moments": True}
    upstream = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(4)]
    _, got = _gradients(_of_op("reference"), x, w, targets, scale, upstream, options)
    _, want = _gradients(_explicit, x, w, targets, scale, upstream, options)
    for g, r in zip(got, want, strict=True):
        assert relative_error(g, r) < 1e-12
    assert reference.forward(x, w, targets, scale, 0.3, Options(subcenters=3))[0].shape == (7,)
