"""gradient_tolerance of backend `cpu`: the bound of its error, what it keeps, what stays exact."""

from __future__ import annotations

import math

import pytest
import torch
from support import BF16, F32, F64, Dtypes
from support.sparse_runs import KINDS, lmcl
from support.sparsity import (
    C,
    Gradients,
    Inputs,
    N,
    Negatives,
    assert_within_bound,
    cosines,
    cosines_of,
    oracle,
    with_cosines,
)
from test_options import POLYNOMIALS
from torch import Tensor, nn

from cosface_kernels import (
    Sparsity,
    ops,
)
from cosface_kernels.backends import cpu
from cosface_kernels.options import Options

HALVES = Dtypes(torch.bfloat16, torch.float16)  # upcast by every processor


DTYPES = (F32, F64, HALVES, Dtypes(torch.float32, torch.bfloat16))


TOLERANCES = (0.3, 1e-2, 1e-3, 1e-5)


RESHAPED = (None, *POLYNOMIALS)


def reshape(i: Inputs, polynomial: str | None) -> Negatives | None:
    """Thresholds below all cosines of a sample, above all, and in gaps between, which no rounding can cross."""
    if polynomial is None:
        return None
    cos = cosines_of(i)[0].nan_to_num().sort(1).values  # (N, C)
    classes = cos.shape[1]
    thresholds = []
    for row, share in zip(cos, (None, 0.5, 1.0, 0.9, 0.99, 0.6) * len(cos), strict=False):
        first = 0 if share is None else int(share * classes)
        gaps = row[first : first + 100].diff()  # few of the cosines there are nearer to each other
        if share == 1:
            thresholds.append(float(row[-1]) + 0.1)
        elif share is None or not len(gaps) or gaps.max() < 2e-5:
            thresholds.append(float(row[0]) - 0.1)
        else:
            below = first + int(gaps.argmax())
            thresholds.append(float(row[below : below + 2].mean()))
    compute = i.scale.dtype
    return Negatives(torch.tensor(thresholds, dtype=compute), torch.tensor(POLYNOMIALS[polynomial], dtype=compute))


def backward(
    i: Inputs,
    outputs: tuple[Tensor, ...],
    tolerance: float,
    classes: Tensor | None = None,
    cache_bytes: int = 0,
    by: Negatives | None = None,
) -> Gradients:
    top, log_sum, cache = outputs[1], outputs[2], outputs[5]
    thresholds, polynomial = by or (None, None)
    return Gradients(
        *ops.lmcl_backward(
            i.x,
            i.w,
            i.targets,
            i.scale,
            top,
            log_sum,
            i.g_lse,
            i.g_cos,
            cache,
            True,
            True,
            "cpu",
            classes,
            cache_bytes,
            tolerance,
            thresholds=thresholds,
            negatives=polynomial,
        )
    )


def run(
    i: Inputs, tolerance: float, classes: Tensor | None = None, by: Negatives | None = None
) -> tuple[Gradients, Sparsity]:
    outputs = lmcl(i, tolerance, classes, by=by)
    return backward(i, outputs, tolerance, classes, by=by), Sparsity(*ops.kept_entries(outputs[5], len(i.x)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_within_the_bound(kind, tolerance, dtypes):
    i = with_cosines(cosines(kind), dtypes)
    assert_within_bound(*run(i, tolerance), tolerance, i)


@pytest.mark.parametrize(("dtypes", "tolerance"), [(F32, 1e-2), (F64, 1e-5), (HALVES, 0.3)], ids=str)
@pytest.mark.parametrize("polynomial", POLYNOMIALS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_reshaped_negatives_are_within_the_bound(kind, polynomial, dtypes, tolerance):
    i = with_cosines(cosines(kind), dtypes)
    by = reshape(i, polynomial)
    assert_within_bound(*run(i, tolerance, by=by), tolerance, i, by=by)


@pytest.mark.parametrize("polynomial", RESHAPED)
@pytest.mark.parametrize("shape", [(1, 1000), (5, 700), (300, 2000), (513, 300)], ids=str)
def test_ragged_shapes(shape, polynomial):
    n, classes = shape
    torch.manual_seed(0)
    x, w = torch.randn(n, 21), torch.randn(classes, 21)
    targets = torch.randint(-1, classes, (n,))
    g_cos = torch.randn(n).where(targets >= 0, 0)
    i = Inputs(x, w, targets, torch.linspace(80, 60, n), torch.randn(n), g_cos)
    by = reshape(i, polynomial)
    gradients, sparsity = run(i, 1e-2, by=by)
    assert_within_bound(gradients, sparsity, 1e-2, i, by=by)
    # a reshaped batch of few samples, or one, may be flat
    assert polynomial is not None or not sparsity.exact.all()


@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
def test_dropped_is_the_mass_that_the_gradient_lacks(tolerance):
    """All light entries have cosine 0.25, so that what dscale lacks is g_lse x dropped x 0.25."""
    cos = torch.full((3, C), 0.25, dtype=torch.float64)
    cos[:, ::40] = torch.tensor([0.5, 0.45, 0.56], dtype=torch.float64)[:, None]
    i = with_cosines(cos, F64, scale=60.0)
    got, sparsity = run(i, tolerance)
    lacks = oracle(i).dscale - got.dscale
    assert bool((sparsity.dropped > 0).any())
    assert not bool(sparsity.exact.any())
    torch.testing.assert_close(lacks, i.g_lse * sparsity.dropped * 0.25, rtol=1e-6, atol=1e-10)


def test_a_gradient_lacks_the_slope_of_what_is_dropped():
    """Light entries have cosine 0.25, N = 0.1875 and N' = 1.5; heavy ones lie below, with a larger N."""
    cos = torch.full((3, C), 0.25, dtype=torch.float64)
    cos[:, ::40] = torch.tensor([-0.36, -0.37, -0.38], dtype=torch.float64)[:, None]
    i = with_cosines(cos, F64, scale=60.0)
    by = Negatives(torch.full((3,), -2.0, dtype=torch.float64), torch.tensor([3.0, 0, 0], dtype=torch.float64))
    want, (got, sparsity) = oracle(i, by), run(i, 1e-3, by=by)
    assert bool((sparsity.dropped > 1e-6).all())
    assert not bool(sparsity.exact.any())
    p = i.g_lse * sparsity.dropped  # (N,)
    torch.testing.assert_close(want.dscale - got.dscale, p * 0.1875, rtol=1e-6, atol=1e-10)
    x_hat, centre = nn.functional.normalize(i.x), nn.functional.normalize(i.w[1], dim=0)  # (N, D), (D,)
    lacks = (60 * 1.5 * p / i.x.norm(dim=1))[:, None] * (centre - 0.25 * x_hat)  # (N, D)
    torch.testing.assert_close(want.dx - got.dx, lacks, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["heavy tail", "one heavy"])
def test_keeps_little_more_than_it_must(kind):
    tolerance = 0.05
    i = with_cosines(cosines(kind, classes=20_000) * 1.0, scale=60.0)
    _, sparsity = run(i, tolerance)
    x, w = (torch.nn.functional.normalize(t.double()) for t in (i.x, i.w))
    z = 60.0 * x @ w.T
    z[i.targets >= 0, i.targets[i.targets >= 0]] = -math.inf
    p = z.softmax(1).sort(1, descending=True).values
    fewest = (p.cumsum(1) < 1 - tolerance).sum(1) + 1  # (N,)
    assert not sparsity.exact.any()
    kept = sparsity.kept * (20_000 - (i.targets >= 0).double())
    assert bool((kept >= fewest - 1e-6).all()), "fewer than any certificate allows"
    assert bool((kept <= 1.3 * fewest + 4).all()), f"{kept} of at least {fewest}"


@pytest.mark.parametrize(("spread", "least", "most"), [(5.0, 0.003, 0.03), (3.8, 0.04, 0.15), (2.0, 1, 1)])
@pytest.mark.parametrize("n", [32, 4])
def test_path_follows_density(n, spread, least, most):
    """Logits of this deviation: where most of the entries matter, the exact path."""
    rng = torch.Generator().manual_seed(0)
    cos = 0.05 * torch.randn(n, 20_000, generator=rng, dtype=torch.float64)
    i = with_cosines(cos, scale=spread / 0.05)
    got, sparsity = run(i, 1e-2)
    assert least <= float(sparsity.kept.mean()) <= most
    assert_within_bound(got, sparsity, 1e-2, i)


@pytest.mark.parametrize("polynomial", RESHAPED)
def test_loss_and_statistics_stay_exact(polynomial):
    i = with_cosines(cosines("heavy tail"))
    by = reshape(i, polynomial)
    for got, want in zip(lmcl(i, 1e-2, by=by)[:5], lmcl(i, 0.0, by=by)[:5], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("polynomial", RESHAPED)
def test_equal_logits_take_the_exact_path(polynomial):
    i = with_cosines(cosines("equal"))
    by = reshape(i, polynomial)
    got, sparsity = run(i, 1e-2, by=by)
    assert bool(sparsity.exact.all())
    for mine, exact in zip(got, run_exact(i, by), strict=True):
        assert torch.equal(mine, exact)


def run_exact(i: Inputs, by: Negatives | None = None) -> Gradients:
    return backward(i, lmcl(i, 0.0, by=by), 0.0, by=by)


@pytest.mark.parametrize("dtypes", [F32, F64, HALVES], ids=str)
def test_exact_and_sparse_samples_in_one_batch(dtypes):
    cos = torch.cat([cosines("equal", 3), cosines("one heavy", 4), cosines("equal", 2)]) * 0.8
    i = with_cosines(cos, dtypes, scale=60.0)
    got, sparsity = run(i, 1e-2)
    assert sparsity.exact.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert_within_bound(got, sparsity, 1e-2, i)


@pytest.mark.parametrize("dtypes", [F32, F64, HALVES], ids=str)
def test_samples_that_reshaping_makes_exact(dtypes):
    """Of samples that are alike, a filter flattens those with low thresholds; their thresholds go with them."""
    i = with_cosines(cosines("one heavy", 9) * 0.8, dtypes, scale=60.0)
    i.g_lse[7] = i.g_cos[7] = 0
    flat = torch.tensor([True, False, False, True, False, True, False, True, False])
    compute = dtypes.compute
    by = Negatives(torch.where(flat, -1.0, 0.25).to(compute), torch.tensor([0.0, 0.0, 0.5], dtype=compute))
    got, sparsity = run(i, 1e-2, by=by)
    assert torch.equal(sparsity.exact, flat)
    assert_within_bound(got, sparsity, 1e-2, i, by=by)


def test_bfloat16_is_exact_where_its_products_outrun_entries():
    i = with_cosines(cosines("one heavy"), BF16, scale=60.0)
    got, sparsity = run(i, 1e-2)
    units = cpu.multiplies_bfloat16(i.x.dtype, i.w.dtype, Options(gradient_tolerance=1e-2))
    assert bool(sparsity.exact.all() if units else not sparsity.exact.any())
    assert all(torch.equal(mine, exact) == units for mine, exact in zip(got[:2], run_exact(i)[:2], strict=True))


@pytest.mark.parametrize("polynomial", [None, "linear"])
def test_no_room_is_the_exact_path(polynomial):
    i = with_cosines(cosines("heavy tail"))
    by = reshape(i, polynomial)
    outputs = lmcl(i, 1e-2, None, 1000, by)
    assert bool((ops.kept_entries(outputs[5], N)[1] == 1).all())
    for mine, exact in zip(backward(i, outputs, 1e-2, None, 1000, by), run_exact(i, by), strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("polynomial", RESHAPED)
@pytest.mark.parametrize("room", [40_000, 80_000, 160_000])
def test_little_room_is_within_the_bound(room, polynomial):
    """Rows are given up, or all of them, when the buffers of a thread are full."""
    cos = torch.cat([cosines("equal", 3, 30_000), cosines("heavy tail", 5, 30_000)]) * 0.8
    i = with_cosines(cos, scale=80.0)
    by = reshape(i, polynomial)
    outputs = lmcl(i, 1e-2, None, room, by)
    sparsity = Sparsity(*ops.kept_entries(outputs[5], 8))
    assert bool(sparsity.exact[:3].all())
    assert_within_bound(backward(i, outputs, 1e-2, None, room, by), sparsity, 1e-2, i, by=by)


@pytest.mark.parametrize("polynomial", [None, "all"])
def test_bad_samples_do_not_spread(polynomial):
    i = with_cosines(cosines("heavy tail", 8))
    by = reshape(i, polynomial)
    i.x[2, 3], i.x[5] = math.nan, 0
    i.scale[4] = 0
    i.g_lse[2] = i.g_cos[2] = 0  # ignored
    got, sparsity = run(i, 1e-2, by=by)
    clean = i._replace(x=i.x.nan_to_num())
    assert_within_bound(got, sparsity, 1e-2, clean, by=by)
    assert bool((got.dx[2] == 0).all())
    i.g_lse[2] = 1
    got, sparsity = run(i, 1e-2, by=by)
    assert bool(sparsity.exact[2])
    assert bool(got.dx[2].isnan().all())
    assert bool(got.dx[[0, 1, 3]].isfinite().all())


def test_one_class_has_no_negatives():
    i = Inputs(*(torch.ones(2, 3), torch.ones(1, 3), torch.zeros(2, dtype=torch.int64)), *torch.ones(3, 2))
    got, sparsity = run(i, 0.1)
    assert sparsity.dropped.tolist() == [0, 0]
    torch.testing.assert_close(got.dx, run_exact(i).dx)
    by = Negatives(torch.tensor([-2.0, 2.0]), torch.tensor([1.0, 0.3, 0.0]))
    got, sparsity = run(i, 0.1, by=by)
    assert sparsity.dropped.tolist() == [0, 0]
    torch.testing.assert_close(got.dx, run_exact(i, by).dx)


@pytest.mark.parametrize("polynomial", [None, "linear"])
@pytest.mark.parametrize("dtypes", [F32, HALVES], ids=str)
def test_some_classes(dtypes, polynomial):
    i = with_cosines(cosines("heavy tail"), dtypes, scale=60.0)
    classes = torch.randperm(C)[:1000].sort().values
    i = i._replace(targets=torch.tensor([0, -1, 999, 5, 6, 7]))
    i.g_cos[1] = 0
    chosen = i._replace(w=i.w[classes])
    by = reshape(chosen, polynomial)
    got, sparsity = run(i, 1e-2, classes, by)
    assert not sparsity.exact.all()
    assert_within_bound(got, sparsity, 1e-2, chosen, by=by)


@pytest.mark.parametrize("polynomial", [None, "linear"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_the_same_in_every_run(threads, polynomial, restore_threads):
    torch.set_num_threads(threads)
    i = with_cosines(cosines("normal", classes=20_000), scale=60.0)
    by = reshape(i, polynomial)
    outputs = lmcl(i, 1e-2, by=by)
    first = backward(i, outputs, 1e-2, by=by)
    torch.set_num_threads(3 - threads // 2)  # forward has shared the classes out among threads
    again, anew = backward(i, outputs, 1e-2, by=by), None
    torch.set_num_threads(threads)
    anew, sparsity = run(i, 1e-2, by=by)
    assert not sparsity.exact.any()
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
