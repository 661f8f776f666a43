"""Cosines kept from forward to backward: the same gradients to their rounding, however many of them fit."""

from functools import partial

import numpy as np
import pytest
import torch
from support import (
    BF16,
    F16,
    F32,
    F64,
    Backend,
    Problem,
    evaluate,
    evaluate_oracle,
    random_upstream,
    relative_error,
)
from torch import Tensor

from cosface_kernels import margin_softmax_loss
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedSGD
from cosface_kernels.options import CACHE_BYTES, LARGEST_TILE, Options

pytestmark = pytest.mark.option("cache_bytes")
STEP = 2.0**-16  # of a cosine in 16-bit fixed point, by which it may be off
PLENTY = 10**7


def cached(backend: Backend, bytes_: int, **options):
    return partial(backend.lmcl, cache_bytes=bytes_, **options)


@pytest.mark.parametrize(
    ("regime", "dtypes", "share"),  # every pair of two of them
    [
        (regime, dtypes, (0, 0.5, 2)[(i + j) % 3])
        for i, regime in enumerate(["random", "confident", "wrong"])
        for j, dtypes in enumerate([F32, F64, BF16, F16])
    ],
    ids=str,
)
def test_gradients_are_right_to_the_rounding_of_a_cosine(backend, regime, dtypes, share):
    """p moves by s STEP, relative to itself; every gradient is a sum of terms in p."""
    sizes = samples, classes = (20, 600) if backend.interpreted else (300, 1500)
    bytes_ = int(share * samples * classes * (8 if dtypes == F64 else 2))
    problem = backend.problem(*sizes, 40, dtypes, regime=regime)
    upstream = random_upstream(problem, "loss", "lse")
    got, plain = evaluate(cached(backend, bytes_), problem, upstream), evaluate(backend.lmcl, problem, upstream)
    for name in ("loss", "lse", "target_cos", "max_neg"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
    want = evaluate_oracle(problem, upstream)
    allowed = 64 * STEP if dtypes.compute == torch.float32 else 0
    for name in ("dx", "dw", "dscale"):
        mine, exact = getattr(got, name), getattr(want, name)
        assert relative_error(mine, exact) <= 2 * relative_error(getattr(plain, name), exact) + allowed + 1e-12
    if not share or (dtypes == F64 and backend.device == "cpu"):  # a GPU's library may sum in another order
        assert torch.equal(got.dw, plain.dw)
    elif dtypes == F32:
        assert not torch.equal(got.dw, plain.dw)


@pytest.mark.parametrize("bytes_", [1, 63, 64, 1000])
def test_what_holds_the_cosines_of_no_tile_changes_nothing(backend, bytes_):
    problem = backend.problem(20, 300, 8)
    upstream = random_upstream(problem, "loss")
    got, plain = (evaluate(cached(backend, some), problem, upstream) for some in (bytes_, 0))
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(plain, name))


def between_cosines(problem: Problem, rank: int) -> Tensor:
    """(N,) thresholds in the widest gap between those of a sample's cosines whose rank is about `rank`."""
    x, w = (torch.nn.functional.normalize(rows.double()) for rows in (problem.x, problem.w))
    largest = (x @ w.T).topk(rank + 20).values[:, -40:]  # (N, 40)
    gap = (largest[:, :-1] - largest[:, 1:]).argmax(1, keepdim=True)  # (N, 1)
    return (largest.gather(1, gap) + largest.gather(1, gap + 1))[:, 0] / 2


@pytest.mark.parametrize(
    ("sizes", "chosen", "reshaped"),  # every pair of two of them
    [
        (sizes, chosen, chosen == equal)
        for sizes, equal in (((1, 700), True), ((37, 1030), False), ((40, 512), True))
        for chosen in (False, True)
    ],
    ids=str,
)
def test_options_and_ragged_sizes(backend, sizes, chosen, reshaped):
    samples, classes = sizes
    problem = backend.problem(*sizes, 24, F32, scale=16.0)
    upstream = random_upstream(problem, "loss", "lse", "target_cos")
    options = {}
    if chosen:
        options["classes"] = torch.arange(3, classes, 2, device=backend.device)
        problem.targets.remainder_(len(options["classes"]))
    if reshaped:
        options["thresholds"] = between_cosines(problem, classes // 10).float()
        options["negatives"] = torch.tensor([1.0, 0.3, 0.05], device=backend.device)
    plain = evaluate(partial(backend.lmcl, **options), problem, upstream)
    for bytes_ in (2 * 300 * samples, PLENTY):
        got = evaluate(cached(backend, bytes_, **options), problem, upstream)
        assert torch.equal(got.loss, plain.loss)
        for name in ("dx", "dw", "dscale"):
            mine, exact = (getattr(result, name).to_dense() for result in (got, plain))
            assert relative_error(mine, exact) <= 16 * STEP, (name, bytes_)


def test_no_samples(backend):
    problem = backend.problem(0, 300, 8)
    got = evaluate(cached(backend, PLENTY), problem, random_upstream(problem, "loss"))
    assert got.dx.shape == (0, 8)
    assert not bool(got.dw.any())


def test_every_tile_fits_and_counts(backend):
    """Where all cosines are kept, backward computes none."""
    problem = backend.problem(20, 1000, 8, scale=10.0)
    size = BACKENDS[backend.name].cache_size(problem.x, problem.w, Options(cache_bytes=PLENTY))
    norms = 0 if backend.name == "cpu" else 4 * 1020
    assert size < norms + 64 + 2 * 20 * 1300
    inputs = (problem.x, problem.w, problem.targets, problem.scale)
    _, top, log_sum, target_cos, _, cache, _ = torch.ops.cosface.lmcl(*inputs, 0.35, backend.name, None, PLENTY)
    assert cache.numel() == size
    zeroed = cache.clone()
    zeroed[64 if backend.name == "cpu" else norms :] = 0
    backward = [
        torch.ops.cosface.lmcl_backward(
            *inputs, top, log_sum, torch.ones_like(top), torch.zeros_like(top), kept, True, True, backend.name,
            None, PLENTY,
        )[2]
        for kept in (cache, zeroed)
    ]  # fmt: skip
    assert bool((backward[0] != 0).all())
    assert not bool(backward[1].any())  # dscale sums p cos, and all cosines are 0
    assert float(target_cos.abs().max()) <= 1


@pytest.mark.parametrize("bytes_", [20_000, PLENTY])
def test_another_number_of_threads_and_another_tile_in_backward(backend, bytes_, restore_threads, monkeypatch):
    problem = backend.problem(30, 700, 16)
    upstream = random_upstream(problem, "loss")
    want = evaluate(cached(backend, bytes_), problem, upstream)
    x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()
    loss = cached(backend, bytes_)(x, w, problem.targets, problem.scale, problem.margin)[0]
    torch.set_num_threads(5)
    monkeypatch.setenv("COSFACE_CPU_TILE", "17")
    monkeypatch.setenv("COSFACE_CUDA_CHUNK", "100000")
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "100000")
    dx, dw = torch.autograd.grad(loss, (x, w), upstream.loss)
    assert relative_error(dx, want.dx) < 1e-5
    assert relative_error(dw, want.dw) < 1e-5


@pytest.mark.parametrize("bytes_", [100, 20_000, PLENTY])
def test_backward_leaves_the_cache_as_it_is(backend, dtypes, bytes_):
    problem = backend.problem(17, 700, 16, dtypes)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    loss = cached(backend, bytes_)(x, w, problem.targets, problem.scale, problem.margin)[0]
    first, second = (torch.autograd.grad(loss.sum(), (x, w), retain_graph=True) for _ in range(2))
    for mine, again in zip(first, second, strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.option("updates")
def test_module_with_an_optimizer_that_moves_rows(backend, rate):
    heads, (classes, steps) = [], (300, 3) if backend.interpreted else (900, 5)
    for cache_bytes in (0, 30_000, PLENTY):
        torch.manual_seed(1)
        head = backend.head(classes, 16, scale=16.0, cache_bytes=cache_bytes, sample_rate=rate)
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        rng = torch.Generator().manual_seed(2)
        for _ in range(steps):
            x = torch.randn(40, 16, generator=rng, device="cpu").to(backend.device)
            labels = torch.randint(classes, (40,), generator=rng, device="cpu").to(backend.device)
            head(x, labels).backward()
            optimizer.step()
        heads.append(head.weight.detach())
    for weight in heads[1:]:
        assert not torch.equal(weight, heads[0])
        assert relative_error(weight, heads[0]) < 16 * STEP


def test_opcheck_with_a_cache(backend):
    problem = backend.problem(4, 30, 8)
    arguments = (problem.x, problem.w, problem.targets, problem.scale, 0.35, backend.name, None, 1000)
    torch.library.opcheck(
        torch.ops.cosface.lmcl,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_nothing_is_kept_without_a_gradient(backend, monkeypatch):
    head = backend.head(50, 8, cache_bytes=10**6)
    x, labels = torch.randn(3, 8, device=backend.device), torch.tensor([1, 2, 3], device=backend.device)
    asked, module = [], BACKENDS[backend.name]
    for way in {"forward", "loss"} & set(vars(module)):  # by the op, and in one call
        real = getattr(module, way)

        def note(*tensors, real=real, **rule):
            asked.append(tensors[-1].cache_bytes)
            return real(*tensors, **rule)

        monkeypatch.setattr(module, way, note)
    for return_stats in (False, True):
        with torch.no_grad():
            head(x, labels, return_stats=return_stats)
        head(x, labels, return_stats=return_stats)
    assert asked == [0, 10**6] * 2


def test_takes_an_integer_of_numpy(backend):
    head = backend.head(50, 8, cache_bytes=np.int64(1000))
    head(torch.randn(3, 8, device=backend.device), torch.tensor([1, 2, 3], device=backend.device)).backward()
    assert bool(head.weight.grad.any())


@pytest.mark.parametrize("options", [{"cache_bytes": 1000}, {"exact_cache": False}], ids=str)
def test_a_weight_that_is_not_normalized_is_refused(backend, options):
    problem = backend.problem(2, 5, 3)
    arguments = (problem.x, problem.w, problem.targets, problem.scale, 0.35)
    with pytest.raises(RuntimeError, match="without normalize_weight an exact_cache is needed"):
        backend.lmcl(*arguments, normalize_weight=False, **options)


# What is kept by default, too, where it is asked not to be exact; whether a tolerance stands beside it or not.
@pytest.mark.parametrize("exact", [None, True, False])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("cache_bytes", [None, 0, 1000, 10**6])
def test_cosines_beyond_one_are_kept_exactly_or_refused(exact, tolerance, cache_bytes):
    torch.manual_seed(0)
    x, w, labels = torch.randn(40, 32), torch.randn(300, 32), torch.arange(40)

    def gradients(**options):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        losses = {"margin": 0.0, "scale": 1.0, "normalize_weight": False, "backend": "cpu"}
        return torch.autograd.grad(margin_softmax_loss(*leaves, labels, **losses, **options), leaves)

    options = {"exact_cache": exact, "cache_bytes": cache_bytes, "gradient_tolerance": tolerance}
    keeps_cosines = cache_bytes is None or (cache_bytes > 0 and tolerance == 0)
    keeps_exactly = cache_bytes is None if exact is None else exact
    if keeps_cosines and not keeps_exactly:
        with pytest.raises(RuntimeError, match="an exact_cache is needed"):
            gradients(**options)
        return
    for got, want in zip(gradients(**options), gradients(), strict=True):
        assert relative_error(got, want) < max(tolerance, 1e-5)


@pytest.mark.parametrize("rows", ["x", "w"])
def test_rows_whose_norm_overflows(backend, rows):
    """1e20 squared is infinite in float32, and the row counts as 0, cached or not."""
    problem = backend.problem(6, 40, 8, scale=10.0)
    getattr(problem, rows)[3] = 1e20
    upstream = random_upstream(problem, "loss")
    got, plain = (evaluate(cached(backend, bytes_), problem, upstream) for bytes_ in (10**6, 0))
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=1e-2, atol=1e-3)
        assert getattr(got, name).isfinite().all()


@pytest.mark.option("exact_cache")
@pytest.mark.parametrize("bytes_", [None, 100_000, PLENTY])
@pytest.mark.parametrize("variant", ["plain", "chosen", "reshaped", "not normalised"])
def test_an_exact_cache_changes_no_bit(backend, variant, bytes_, dtypes):
    """Nor does a sample without gradient, whose embedding may be anything."""
    problem = backend.problem(300, 700, 24, dtypes, scale=16.0)
    problem.x[5], problem.targets[5] = torch.nan, -1
    upstream = random_upstream(problem, "loss")
    options = {"normalize_weight": variant != "not normalised"}
    if variant == "chosen":
        options["classes"] = torch.arange(3, 700, 2, device=backend.device)
        problem.targets[problem.targets >= 0] %= len(options["classes"])
    if variant == "reshaped":
        options["thresholds"] = torch.full_like(problem.scale, 0.1)
        options["negatives"] = torch.tensor([1.0, 0.3, 0.05], device=backend.device, dtype=dtypes.compute)
    got, plain = (
        evaluate(cached(backend, some, exact_cache=exact, **options), problem, upstream)
        for some, exact in ((bytes_, None if bytes_ is None else True), (0, None))
    )
    for name in ("loss", "lse", "dx", "dw", "dscale"):
        mine, want = (getattr(result, name).to_dense() for result in (got, plain))
        assert torch.equal(mine.nan_to_num(), want.nan_to_num()), name
    assert bool((got.dx[5] == 0).all())
    assert bool(got.dw.to_dense().isfinite().all())


@pytest.mark.option("exact_cache")
def test_by_default_some_mebibytes_are_kept_whatever_the_number_of_classes(backend):
    sizes = [
        BACKENDS[backend.name].cache_size(torch.empty(64, 8), torch.empty(1, 8).expand(classes, 8), Options())
        for classes in (100, 10_000, 10**6, 10**8)
    ]
    assert sizes == [*(64 + 4 * 64 * (few + LARGEST_TILE) for few in (100, 10_000)), CACHE_BYTES, CACHE_BYTES]


@pytest.mark.option("exact_cache")
def test_what_the_default_keeps_is_not_computed_again(backend):
    problem = backend.problem(20, 1000, 8, scale=10.0)
    inputs = (problem.x, problem.w, problem.targets, problem.scale)
    _, top, log_sum, _, _, cache, _ = torch.ops.cosface.lmcl(*inputs, 0.35, backend.name)
    cache[64:] = 0
    dscale = torch.ops.cosface.lmcl_backward(
        *inputs, top, log_sum, torch.ones_like(top), torch.zeros_like(top), cache, True, True, backend.name
    )[2]
    assert not bool(dscale.any())  # it sums p cos
