"""What only a GPU can show of backends `triton` and `cuda`: graphs, no waiting, flat memory."""

import pytest
import torch
from support import BF16, F16, F32, Backend, evaluate, random_upstream, relative_error, where_taken

from cosface_kernels.optim import FusedSGD

pytestmark = pytest.mark.gpu
MIB = 2**20
with_and_without_cache = pytest.mark.parametrize("options", where_taken({}, {"cache_bytes": 200_000}))


def _head(backend: Backend, num_classes: int, num_samples: int, dtype: torch.dtype = torch.bfloat16, **options):
    dim = 64
    head = backend.head(num_classes, dim, dtype=dtype, **options)
    x = torch.randn(num_samples, dim, device="cuda", dtype=dtype, requires_grad=True)
    return head, x, torch.randint(num_classes, (num_samples,), device="cuda")


@with_and_without_cache
@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
def test_a_captured_step_gives_the_results_of_an_eager_one(backend, dtypes, options):
    head, x, labels = _head(backend, 3001, 48, dtype=dtypes.x, **options)

    def step():
        loss = head(x, labels)
        return loss, *torch.autograd.grad(loss, (x, head.weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which draws the weight
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        labels.copy_(labels.flip(0))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_graphed_callables_and_reduced_overhead_give_the_results_of_an_eager_head(backend):
    head, x, labels = _head(backend, 3001, 48)

    def gradients(run):
        head.weight.grad = x.grad = None
        loss = run(x, labels)
        loss.backward()
        return [tensor.detach().clone() for tensor in (loss, x.grad, head.weight.grad)]

    want = gradients(head)  # chooses tiles
    for graphed in (
        lambda: torch.compile(head, mode="reduce-overhead", fullgraph=True),
        lambda: torch.cuda.make_graphed_callables(head, (x, labels)),
    ):
        run = graphed()
        for _ in range(4):  # under torch.compile the third is the first replay
            torch.compiler.cudagraph_mark_step_begin()
            got = gradients(run)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < backend.rounding(BF16)


@with_and_without_cache
def test_a_step_never_waits_for_the_device(backend, options):
    head, x, labels = _head(backend, 3001, 48, **options)
    head(x, labels).backward()  # compiles and chooses tiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _requested(when: str) -> int:
    """Bytes that tensors asked for, without what the allocator adds to fit its blocks: up to a MiB each."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def test_memory_is_flat_in_the_number_of_classes(backend):
    """Beyond the gradients and the norms of the classes, which are kept from forward to backward."""
    extra = []
    for num_classes in (100_000, 800_000):
        head, x, labels = _head(backend, num_classes, 256)
        head(x, labels).backward()
        head.weight.grad = x.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = _requested("current")
        head(x, labels).backward()
        norms = 4 * num_classes  # of float32
        known = head.weight.grad.nbytes + x.grad.nbytes + norms
        extra.append((_requested("peak") - before - known) / MIB)
        del head, x, labels
    assert abs(extra[1] - extra[0]) < 1, extra
    assert max(extra) < 128, extra


@pytest.mark.option("updates", "classes")
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_memory_of_rows_that_move_inside_backward_is_flat(backend, rate):
    """A gradient of the weight would show as 85 MiB, of half the classes as 43."""
    extra = []
    for num_classes in (100_000, 800_000):
        head, x, labels = _head(backend, num_classes, 256, sample_rate=rate)
        optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):  # the first step compiles, chooses tiles and makes the momentum
            loss = head(x, labels)
            torch.cuda.reset_peak_memory_stats()
            before = _requested("current")
            loss.backward()
            peak = _requested("peak") - before
            optimizer.step()
            x.grad = None
        extra.append(peak / MIB)
        del head, x, labels, loss, optimizer
    assert abs(extra[1] - extra[0]) < 1, extra


def test_chunk_fits_the_cache_and_changes_nothing(backend, monkeypatch):
    problem = backend.problem(256, 40_000, 64, BF16)
    upstream = random_upstream(problem, "loss")

    want = evaluate(backend.lmcl, problem, upstream)
    monkeypatch.setenv(f"COSFACE_{backend.name.upper()}_CHUNK", "4096")
    got = evaluate(backend.lmcl, problem, upstream)
    assert relative_error(got.dx, want.dx) < backend.rounding(BF16)
    if backend.name == "triton":  # sums over the samples in one order, whatever the chunk
        assert torch.equal(got.dw, want.dw)
    else:  # a library's product of another shape may sum in another order
        assert relative_error(got.dw, want.dw) < backend.rounding(BF16)


def test_labels_are_read_back_only_on_request(backend):
    head, x, _ = _head(backend, 100, 8)
    labels = torch.tensor([0, 1, 2, 100, 4, 5, 6, 7], device="cuda")
    losses = backend.loss(x, head.weight, labels, reduction="none")
    assert losses.isnan().tolist() == [i == 3 for i in range(8)]
    with pytest.raises(ValueError, match="got 100 at row 3"):
        backend.loss(x, head.weight, labels, validate_labels=True)
