"""gradient_tolerance on backend `triton`: what test_sparse.py asks of backend `cpu`, small enough to interpret."""

import math

import pytest
import torch
from support import BF16, DEFAULT_DEVICE, F16, F32, Backend, Dtypes
from support.sparsity import Gradients, Inputs, assert_within_bound, cosines, run_sharded, with_cosines
from torch import Tensor

from cosface_kernels import Sparsity, ops
from cosface_kernels.optim import FusedAdamW, FusedSGD

pytestmark = [pytest.mark.triton_only, pytest.mark.option("gradient_tolerance")]
C = 500
DTYPES = (BF16, F16, Dtypes(torch.float32, torch.bfloat16), Dtypes(torch.bfloat16, torch.float32))


def inputs(backend: Backend, kind: str | Tensor, n: int = 5, dtypes: Dtypes = F32, scale: float = 60.0) -> Inputs:
    """Those of `with_cosines`, and the weight as the backend multiplies it."""
    with DEFAULT_DEVICE:
        i = with_cosines(cosines(kind, n, C) if isinstance(kind, str) else kind, dtypes, scale=scale)
        if not backend.interpreted:
            i = i._replace(w=i.w.to(backend.operand(dtypes)).to(i.w.dtype))
        return Inputs(*(tensor.to(backend.device) for tensor in i))


def run(backend: Backend, i: Inputs, tolerance: float, **options) -> tuple[Gradients, Sparsity]:
    inputs_ = i.x, i.w, i.targets, i.scale
    _, top, log_sum, _, _, cache, _ = ops.lmcl(
        *inputs_, 0.35, backend.name, gradient_tolerance=tolerance, **options
    )
    got = ops.lmcl_backward(
        *inputs_, top, log_sum, i.g_lse, i.g_cos, cache, True, True, backend.name, gradient_tolerance=tolerance,
        **options,
    )  # fmt: skip
    return Gradients(*got), Sparsity(*ops.kept_entries(cache, len(i.x))) if tolerance else None


def check(backend: Backend, got: Gradients, sparsity: Sparsity, tolerance: float, i: Inputs) -> None:
    """Within the bound and what rounding adds, of operands too: cosines of exact samples are of rounded rows."""
    dtypes = Dtypes(i.x.dtype, i.w.dtype)
    rounded = Gradients(*(gradient.double() for gradient in got))
    with DEFAULT_DEVICE:
        assert_within_bound(rounded, sparsity, tolerance, i, rounding=backend.rounding(dtypes))


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        *((kind, F32) for kind in ("equal", "one heavy", "heavy tail", "late flood")),
        *((kind, dtypes) for kind in ("equal", "heavy tail") for dtypes in DTYPES),
    ],
    ids=str,
)
def test_gradients_are_within_the_bound(backend, kind, dtypes):
    i = inputs(backend, kind, dtypes=dtypes)
    got, sparsity = run(backend, i, 1e-2)
    assert bool(sparsity.exact.all()) == (kind in ("equal", "late flood"))
    check(backend, got, sparsity, 1e-2, i)


@pytest.mark.parametrize("kind", ["one heavy", "heavy tail", "late flood"])
def test_shards_are_within_the_bound(backend, ranks, kind):
    if not backend.interpreted:
        pytest.skip("The ranks of these tests work on the CPU.")
    got, sparsity, i = run_sharded(ranks, 3, inputs(backend, kind, 6), 1e-2, backend.name)
    assert bool((sparsity.dropped > 0).any())
    check(backend, got, sparsity, 1e-2, i)


@pytest.mark.parametrize("tolerance", [0.3, 1e-5])
@pytest.mark.parametrize("kind", ["normal", "steps", "ascending"])
def test_other_tolerances(backend, kind, tolerance):
    i = inputs(backend, kind)
    got, sparsity = run(backend, i, tolerance)
    check(backend, got, sparsity, tolerance, i)
    assert not sparsity.exact.all() or tolerance < 1e-3  # which keeps more than half of so few classes


@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
def test_exact_and_sparse_samples_in_one_batch(backend, dtypes):
    """Over several blocks of rows, the exact ones first in none of them."""
    with DEFAULT_DEVICE:
        cos = torch.cat([cosines("one heavy", 3, C), cosines("equal", 1, C)]).repeat(10, 1) * 0.1
    i = inputs(backend, cos[:37], dtypes=dtypes, scale=600.0)
    got, sparsity = run(backend, i, 1e-2)
    assert sparsity.exact.tolist() == ([False] * 3 + [True]) * 9 + [False]
    check(backend, got, sparsity, 1e-2, i)


def test_equal_logits_take_the_exact_path(backend):
    i = inputs(backend, "equal", scale=20.0)
    got, sparsity = run(backend, i, 1e-2)
    exact, _ = run(backend, i, 0.0)
    assert bool(sparsity.exact.all())
    if backend.interpreted:  # on a GPU the library has a part in one of them
        for mine, want in zip(got, exact, strict=True):
            assert torch.equal(mine, want)


@pytest.mark.parametrize("kind", ["one heavy", "heavy tail"])
def test_keeps_little_more_than_it_must(backend, kind):
    i, tolerance = inputs(backend, kind), 0.05
    _, sparsity = run(backend, i, tolerance)
    x, w = (torch.nn.functional.normalize(t.double()) for t in (i.x, i.w))
    z = 60.0 * x @ w.T
    is_target = torch.arange(C, device=backend.device) == i.targets[:, None]
    p = z.masked_fill(is_target, -math.inf).softmax(1).sort(1, descending=True).values
    fewest = (p.cumsum(1) < 1 - tolerance).sum(1) + 1  # (N,)
    kept = sparsity.kept * (C - (i.targets >= 0).double())
    assert not sparsity.exact.any()
    assert bool((kept >= fewest - 1e-6).all())
    assert bool((kept <= 1.6 * fewest + 4).all()), f"{kept} of at least {fewest}"


def test_loss_and_statistics_stay_exact(backend):
    i = inputs(backend, "heavy tail")
    some, exact = (
        ops.lmcl(i.x, i.w, i.targets, i.scale, 0.35, backend.name, gradient_tolerance=tolerance)[:5]
        for tolerance in (1e-2, 0.0)
    )
    for got, want in zip(some, exact, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("room", [1, 200, 1000, 10**9])
def test_caches_from_too_small_to_enough(backend, room):
    i = inputs(backend, "heavy tail")
    got, sparsity = run(backend, i, 1e-2, cache_bytes=room)
    check(backend, got, sparsity, 1e-2, i)
    assert int(sparsity.exact.sum()) in {1: [5], 200: range(1, 5)}.get(room, [0])


@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
def test_some_classes(backend, dtypes, monkeypatch):
    """In chunks, of which the last is not full."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    i = inputs(backend, "heavy tail", dtypes=dtypes)
    few, all_ = (torch.arange(*ends, device=backend.device) for ends in ((0, C - 100, 2), (C - 100, C)))
    classes = torch.cat([few, all_])  # 300
    targets = torch.tensor([0, -1, len(classes) - 1, 5, 6], device=backend.device)
    i = i._replace(targets=targets)
    i.g_cos[1] = 0
    got, sparsity = run(backend, i, 1e-2, classes=classes)
    assert not sparsity.exact.any()
    check(backend, got, sparsity, 1e-2, i._replace(w=i.w[classes]))


def test_bad_samples_do_not_spread(backend):
    i = inputs(backend, "heavy tail", 8)
    i.x[2, 3], i.x[5] = math.nan, 0
    i.scale[4] = 0
    i.g_lse[2] = i.g_cos[2] = 0  # ignored
    got, sparsity = run(backend, i, 1e-2)
    check(backend, got, sparsity, 1e-2, i._replace(x=i.x.nan_to_num()))
    assert bool((got.dx[2] == 0).all())
    i.g_lse[2] = 1
    got, sparsity = run(backend, i, 1e-2)
    assert bool(sparsity.exact[2])
    assert bool(got.dx[2].isnan().all())
    assert bool(got.dx[[0, 1, 3]].isfinite().all())


def test_one_class_has_no_negatives(backend):
    ones = {"device": backend.device}
    i = Inputs(
        torch.ones(2, 3, **ones), torch.ones(1, 3, **ones), torch.zeros(2, dtype=torch.int64, **ones),
        *torch.ones(3, 2, **ones),
    )  # fmt: skip
    got, sparsity = run(backend, i, 0.1)
    assert sparsity.dropped.tolist() == sparsity.kept.tolist() == [0, 0]
    torch.testing.assert_close(got.dx, run(backend, i, 0.0)[0].dx)


def test_a_row_of_zeros_in_the_weight(backend):
    i = inputs(backend, "heavy tail")
    zero = torch.zeros(C, dtype=torch.bool, device=backend.device)
    zero[[7, int(i.targets[0])]] = True
    i.w[zero] = 0
    got, exact = (run(backend, i, tolerance)[0] for tolerance in (1e-4, 0.0))
    # Apart: what is divided by the clamped norm is so large that beside it nothing would be wrong.
    pairs = [(got.dw[rows], exact.dw[rows]) for rows in (zero, ~zero)]
    for mine, want in (*pairs, (got.dx, exact.dx), (got.dscale, exact.dscale)):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_weights_that_are_not_normalised(backend):
    i = inputs(backend, "heavy tail")
    i = i._replace(w=torch.nn.functional.normalize(i.w))
    (got, sparsity), (want, same) = (
        run(backend, i, 1e-2, normalize_weight=normalize) for normalize in (False, True)
    )
    torch.testing.assert_close(sparsity.kept, same.kept)
    torch.testing.assert_close(got.dx, want.dx, rtol=1e-3, atol=1e-4)


def test_bitwise_the_same_in_every_run(backend):
    """With samples of both kinds; and backward leaves the cache as it is."""
    with DEFAULT_DEVICE:
        cos = torch.cat([cosines("heavy tail", 3, C), cosines("equal", 2, C)]) * 0.8
    i = inputs(backend, cos)
    first, again = (run(backend, i, 1e-2) for _ in range(2))
    assert 0 < int(first[1].exact.sum()) < 5
    for mine, same in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(mine, same)


def test_a_sample_of_the_classes_says_where_to_cut(backend, monkeypatch):
    """A cut that fits too little makes a sample exact, never wrong; one that is too low keeps more."""
    from cosface_kernels.backends.triton import sparse

    monkeypatch.setattr(sparse, "SAMPLED_TILES", 2)
    i = inputs(backend, "heavy tail")
    got, sparsity = run(backend, i, 0.1)
    check(backend, got, sparsity, 0.1, i)
    assert not sparsity.exact.any()


def test_no_samples(backend):
    i = inputs(backend, "heavy tail")
    i = Inputs(i.x[:0], i.w, *(values[:0] for values in i[2:]))
    got, _ = run(backend, i, 1e-2)
    assert got.dx.shape == (0, i.x.shape[1])
    assert not bool(got.dw.any())


@pytest.mark.parametrize("optimizer", [FusedSGD, FusedAdamW])
@pytest.mark.option("updates")
def test_rows_that_move_inside_backward(backend, optimizer, monkeypatch):
    """The same step through a dense dw of the same tolerance, of rows with and without entries, chunk by chunk."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    i, heads = inputs(backend, "heavy tail", 4), []
    labels = i.targets.clamp_min(0)
    for accumulate in (True, False):
        head = backend.head(C, i.x.shape[1], scale=60.0, gradient_tolerance=1e-2)
        head.weight.data.copy_(i.w)
        step = optimizer(head.parameters(), lr=0.1, weight_decay=0.1, accumulate=accumulate)
        loss, stats = head(i.x, labels, return_stats=True)
        assert not stats.sparsity.exact.any()
        loss.backward()
        step.step()
        heads.append(head.weight.detach())
    assert not bool((heads[0] == i.w).all(1).any())
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache_bytes", [0, 1000])
def test_opcheck(backend, cache_bytes):
    i = inputs(backend, "heavy tail")
    x, w = i.x.requires_grad_(), i.w.requires_grad_()
    arguments = (x, w, i.targets, i.scale, 0.35, backend.name, None, cache_bytes, 1e-2)
    torch.library.opcheck(torch.ops.cosface.lmcl, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_graph(backend):
    i = inputs(backend, "heavy tail")
    head = backend.head(C, i.x.shape[1], scale=60.0, gradient_tolerance=1e-2)
    head.weight.data.copy_(i.w)
    x, labels = i.x.requires_grad_(), i.targets.clamp_min(0)
    head(x, labels).backward()
    eager, head.weight.grad, x.grad = (x.grad, head.weight.grad), None, None
    torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")(x, labels).backward()
    assert torch.equal(x.grad, eager[0])
    assert torch.equal(head.weight.grad, eager[1])


def test_reshaped_negatives_are_refused(backend):
    i = inputs(backend, "one heavy")
    with pytest.raises(RuntimeError, match="reshaped negatives with a gradient_tolerance are not on this backend"):
        ops.lmcl(
            i.x, i.w, i.targets, i.scale, 0.35, backend.name, gradient_tolerance=0.1, thresholds=i.scale,
            negatives=i.scale[:3],
        )  # fmt: skip
