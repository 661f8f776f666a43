"""The nearest classes: those of float64, in one order, whatever the sizes, dtypes, tiles and threads."""

import json
import re
import weakref

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import BF16, F16, F32, F64, MIXED_DTYPES, SAME_DTYPES, relative_error, run_python
from support.memory import FORGET
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedSoftmaxLoss,
    NearestClasses,
    margin_softmax_loss,
    nearest_classes,
    reference,
)
from cosface_kernels.backends import chunks
from cosface_kernels.optim import FusedSGD
from cosface_kernels.options import PLAIN, Options

MIB = 2**20


def exact(x: Tensor, w: Tensor) -> Tensor:
    """(N, C) cosines in float64."""
    return F.normalize(x.double()) @ F.normalize(w.double()).T


def check(found: NearestClasses, cosines: Tensor, k: int, allowed: float) -> None:
    """That `found` are k largest of cosines (N, C), up to an error of `allowed`, in their order."""
    assert found.cosines.shape == found.classes.shape == (len(cosines), k)
    assert found.classes.dtype == torch.int64
    assert not found.cosines.requires_grad
    for row in found.classes:
        assert len(row.unique()) == k
    assert (found.cosines - cosines.gather(1, found.classes)).abs().amax() <= allowed
    assert (found.cosines - cosines.topk(k).values).abs().amax() <= allowed
    assert (found.cosines.diff() <= 0).all()


@pytest.mark.parametrize("dtypes", [*SAME_DTYPES, *MIXED_DTYPES], ids=str)
@pytest.mark.parametrize(("samples", "classes", "k"), [(5, 700, 7), (3, 1, 1), (300, 40, 40), (70, 1300, 300)])
def test_those_of_float64(backend, dtypes, samples, classes, k):
    problem = backend.problem(samples, classes, 24, dtypes)
    found = nearest_classes(problem.x, problem.w, k, backend=backend.name)
    assert found.cosines.dtype == dtypes.compute
    # products of bfloat16 are exact and summed in float32
    check(found, exact(problem.x, problem.w), k, 1e-12 if torch.float64 in dtypes else 2e-6)


@pytest.mark.parametrize("dtypes", [F32, F64, BF16, F16], ids=str)
def test_of_equal_cosines_the_lower_class_is_first(backend, dtypes):
    """Rows of one length along the axes: cosines are 0, 0.5 and 1 without any rounding."""
    classes = torch.randint(8, (900,), generator=torch.Generator().manual_seed(0), device="cpu")
    w = torch.eye(8, device="cpu")[classes].to(backend.device, dtypes.w)
    x = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 4], [0] * 8], device="cpu")
    x = x.to(backend.device, dtypes.x)
    for k in (1, 3, 400, 900):
        got = nearest_classes(x, w, k, backend=backend.name)
        want = reference.nearest(x, w, k)
        assert torch.equal(got.cosines, want[0])
        assert torch.equal(got.classes, want[1])


def test_order_of_what_is_no_number(backend):
    """Of 600 classes with a cosine of 0.6 or -0.6 some are nan or infinite, and one sample is."""
    w = torch.tensor([[3.0, 4.0], [-3.0, 4.0]], device="cpu").repeat(300, 1)
    w[[7, 200, 599], 0] = torch.nan
    x = torch.tensor([[1.0, 0.0], [torch.nan, 1.0]], device="cpu")
    got = nearest_classes(x.to(backend.device), w.to(backend.device), 6, backend=backend.name)
    assert got.classes.tolist() == [[7, 200, 599, 0, 2, 4], [0, 1, 2, 3, 4, 5]]
    assert got.cosines.isnan().sum(1).tolist() == [3, 6]


@pytest.mark.parametrize("k", [1, 5, 64])
def test_no_tile_or_thread_changes_the_order(monkeypatch, k):
    """Rows of -1 and 1, of length 4, whose cosines are exact in any order: many are equal."""
    rng = torch.Generator().manual_seed(1)
    w = torch.randint(0, 2, (1000, 16), generator=rng).float() * 2 - 1
    x = torch.randint(0, 2, (300, 16), generator=rng).float() * 2 - 1
    want = nearest_classes(x, w, k, backend="cpu")
    for got, ordered in zip(want, reference.nearest(x, w, k), strict=True):
        assert torch.equal(got, ordered)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            for tile in ("1", "14", "70", "252"):
                monkeypatch.setenv("COSFACE_CPU_TILE", tile)
                got = nearest_classes(x, w, k, backend="cpu")
                assert torch.equal(got.cosines, want.cosines)
                assert torch.equal(got.classes, want.classes)
    finally:
        torch.set_num_threads(threads)


@hypothesis.given(
    samples=st.integers(0, 300),
    classes=st.integers(1, 900),
    dim=st.integers(1, 40),
    share=st.floats(0, 1),
    dtypes=st.sampled_from(SAME_DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size(samples, classes, dim, share, dtypes, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(dim, samples, generator=rng).T.to(dtypes.x)  # not contiguous
    w = torch.randn(classes, 2 * dim, generator=rng)[:, ::2].to(dtypes.w)
    k = max(1, round(share * classes))
    found = nearest_classes(x, w, k, backend="cpu")
    if samples:
        check(found, exact(x, w), k, 1e-12 if dtypes == F64 else 2e-6)
    assert found.classes.shape == (samples, k)


@pytest.mark.parametrize("lengths", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_lengths_count_where_they_are_not_divided_by(backend, lengths):
    of_x, of_w = lengths
    problem = backend.problem(20, 300, 24)
    found = nearest_classes(
        problem.x, problem.w, 9, normalize_embeddings=of_x, normalize_weight=of_w, backend=backend.name
    )
    x, w = problem.x.double(), problem.w.double()
    products = (F.normalize(x) if of_x else x) @ (F.normalize(w) if of_w else w).T
    assert relative_error(found.cosines, products.topk(9).values) < 1e-6
    assert relative_error(found.cosines, products.gather(1, found.classes)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_is_a_stable_sort(dtype):
    rng = torch.Generator().manual_seed(0)
    some = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40])
    values = some.to(dtype)[torch.randint(len(some), (50, 80), generator=rng)]
    ordered, places = values.sort(stable=True, dim=1, descending=True)
    for k in (1, 7, 80):
        got, where = chunks.largest(values, k)
        assert torch.equal(where, places[:, :k])
        assert torch.equal(got.nan_to_num(7), ordered[:, :k].nan_to_num(7))


def test_chunks_of_any_size(monkeypatch):
    x, w = torch.randn(9, 8), torch.randn(100, 8)
    want = reference.nearest(x, w, 12)
    for classes in (1, 7, 33, 100, 1000):
        class_bytes = chunks.ENTRY_BYTES * 9 + chunks.ROW_COPIES * 8 * 4
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", class_bytes * classes)
        got = chunks.nearest(x, w, 12, PLAIN)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0])


class Live(TorchDispatchMode):
    """The most bytes that results of operators have taken at once, in memory that is not the inputs'."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.seen = {each.untyped_storage().data_ptr() for each in inputs}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in (each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)):
            place = storage.data_ptr()
            if storage.nbytes() and place not in self.seen:
                self.seen.add(place)
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._free, place, storage.nbytes())
        return result

    def _free(self, place: int, size: int) -> None:
        self.seen.remove(place)
        self.bytes -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("samples", [1, 16, 256])
def test_memory_of_chunks_counts_their_rows(monkeypatch, samples, dtype):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", MIB)
    x, w = torch.randn(samples, 128), torch.randn(20_000, 128).to(dtype)
    for options in (PLAIN, Options(normalize_weight=False, exponents=torch.zeros(20_000, dtype=torch.int8))):
        with Live(x, w) as live:
            chunks.nearest(x, w, 5, options)
        assert MIB / 4 < live.most < 1.5 * MIB


def test_candidates_of_many_samples_take_turns():
    """200 x 20,000 of them would take 61 MiB, for which there is room of 32."""
    x, w = torch.randn(200, 4, dtype=torch.float64), torch.randn(20_000, 4, dtype=torch.float64)
    found, want = nearest_classes(x, w, 20_000), exact(x, w)
    assert (found.cosines - want.sort(1, descending=True).values).abs().amax() < 1e-12
    assert (found.cosines - want.gather(1, found.classes)).abs().amax() < 1e-12


@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedSoftmaxLoss])
def test_of_a_head_they_are_those_of_its_logits(kind):
    head, x = kind(200, 16), torch.randn(10, 16, requires_grad=True)
    with torch.no_grad():
        logits, classes = (head.get_logits(x) / head.scale).topk(5)
    found = head.topk(x, 5)
    torch.testing.assert_close(found.cosines, logits)
    assert torch.equal(found.classes, classes)
    assert not found.cosines.requires_grad
    FusedSGD(head.parameters(), lr=0.1)
    assert torch.equal(head.topk(x, 5).classes, classes)


def test_compiles_to_one_graph():
    head, x = FusedCosFaceLoss(200, 16), torch.randn(10, 16)
    eager = head.topk(x, 3)
    compiled = torch.compile(head.topk, fullgraph=True, backend="aot_eager")(x, 3)
    assert torch.equal(compiled.cosines, eager.cosines)
    assert torch.equal(compiled.classes, eager.classes)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k must be an integer of at least 1, got 0."),
        (2.5, "k must be an integer of at least 1, got 2.5."),
        (4, "k must be at most num_classes, 3, got 4."),
    ],
)
def test_refuses(k, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        nearest_classes(torch.ones(2, 5), torch.ones(3, 5), k)


def test_refuses_tensors_that_do_not_fit():
    with pytest.raises(ValueError, match="embeddings have size 5 but the weight expects embedding_size 6"):
        nearest_classes(torch.ones(2, 5), torch.ones(3, 6), 1)
    with pytest.raises(ValueError, match="backend must be None or one of"):
        nearest_classes(torch.ones(2, 5), torch.ones(3, 5), 1, backend="tpu")


PEAK = """
import json, sys, torch
from support.memory import raised_by
from cosface_kernels import nearest_classes
torch.set_num_threads(2)
peaks = {}
for classes in (2000, 50_000, 200_000):
    x, w = torch.randn(256, 16), torch.randn(classes, 16)
    peaks[classes] = raised_by(lambda: nearest_classes(x, w, 10, backend=sys.argv[1]))
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not FORGET.exists(), reason="reads peaks from Linux's /proc")
def test_memory_does_not_grow_with_classes():
    peaks = {}
    for backend in ("cpu", "reference"):
        done = run_python(PEAK, backend, MALLOC_MMAP_THRESHOLD_="65536")
        assert done.returncode == 0, done.stderr
        peaks[backend] = json.loads(done.stdout)
    assert max(peaks["cpu"].values()) < 8 * MIB, peaks
    assert peaks["reference"]["200000"] > 195 * MIB, "the measurement does not see cosines"


@pytest.mark.parametrize("k", [1, 2, 5, 19, 20])
def test_accuracy_among_the_k_nearest(backend, k):
    """Of equal cosines, of which there are many, and all exact, a sample's own is the last."""
    x, w = (torch.randint(2, shape, device=backend.device) * 2.0 - 1 for shape in ((200, 4), (20, 4)))
    labels = torch.randint(20, (200,), device=backend.device)
    labels[::7] = -100
    _, stats = margin_softmax_loss(x, w, labels, margin=0.35, backend=backend.name, return_stats=k)
    valid = labels >= 0
    cos = (F.normalize(x) @ F.normalize(w).T)[valid].double()
    own = cos.gather(1, labels[valid, None])
    as_near = (cos >= own).sum(1) - 1  # others
    torch.testing.assert_close(stats.top_k_accuracy, (as_near < k).float().mean())
    if k == 1:
        torch.testing.assert_close(stats.top_k_accuracy, stats.accuracy)


def test_accuracy_is_of_all_classes_where_some_are_drawn(backend):
    head = backend.head(50, 6, sample_rate=0.1)
    x, labels = torch.randn(30, 6, device=backend.device), torch.randint(5, (30,), device=backend.device)
    _, stats = head(x, labels, return_stats=3)
    own = head.topk(x, 3).classes == labels[:, None]
    assert stats.top_k_accuracy == own.any(1).float().mean()
    assert head(x, labels, return_stats=True)[1].top_k_accuracy is None


@pytest.mark.parametrize("k", [-1, 1.5, "k", None])
def test_refuses_stats(k):
    with pytest.raises(ValueError, match="return_stats must be True, False or a number k"):
        FusedCosFaceLoss(5, 3)(torch.randn(2, 3), torch.tensor([0, 1]), return_stats=k)


@pytest.mark.parametrize("options", [{}, {"subcenters": 2}, {"sample_rate": 0.4}], ids=str)
def test_refuses_more_nearest_classes_than_there_are(options):
    head, batch = FusedCosFaceLoss(5, 3, **options), (torch.randn(2, 3), torch.tensor([0, 1]))
    assert head(*batch, return_stats=5)[1].top_k_accuracy == 1
    with pytest.raises(ValueError, match="return_stats must be at most num_classes, 5, got 6"):
        head(*batch, return_stats=6)
