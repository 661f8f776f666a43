"""Peak memory does not grow with batch x classes: beyond w and dw it is flat in C."""

import functools
import json

import pytest
import torch
from support import run_python
from support.memory import FORGET, raised_by

from cosface_kernels import FusedCosFaceLoss, cosface_loss
from cosface_kernels.options import CACHE_BYTES

MIB = 2**20
NUM_SAMPLES, DIM = 256, 64
FEW, MANY = 160_000, 320_000  # their logits take 156 and 312 MiB
SLACK_MIB = 8  # tiles of every thread, partial sums, allocator; with the cache, less than the logits of FEW
MODES = ("both", "dx", "dw", "none")  # which gradients are wanted

pytestmark = pytest.mark.skipif(not FORGET.exists(), reason="peak memory is read from Linux's /proc")


def _peak_beyond_inputs(backend: str, mode: str, num_classes: int, dtype: torch.dtype) -> int:
    """Bytes by which one step raises the resident memory of this process."""
    w = torch.randn(num_classes, DIM).to(dtype)
    x, labels = torch.randn(NUM_SAMPLES, DIM), torch.randint(num_classes, (NUM_SAMPLES,))
    x.requires_grad_(mode in ("both", "dx"))
    w.requires_grad_(mode in ("both", "dw"))

    def step() -> None:
        loss = cosface_loss(x, w, labels, backend=backend)
        if loss.requires_grad:
            loss.backward()

    return raised_by(step)


def main(backend: str, *modes: str) -> None:
    """Prints the peaks of one backend as JSON; runs in a process of its own."""
    _peak_beyond_inputs(backend, "both", 2000, torch.float32)  # threads and libraries take their memory once
    peaks = {
        f"{mode} {num_classes} {dtype}": _peak_beyond_inputs(backend, mode, num_classes, dtype)
        for mode in modes
        for num_classes in (FEW, MANY)
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(json.dumps(peaks))


@functools.cache
def _peaks(backend: str, *modes: str) -> dict[str, int]:
    # a fixed threshold makes glibc give freed blocks back, so that no step hides in the memory of the one before
    done = run_python(
        "import sys; from core import test_memory; test_memory.main(*sys.argv[1:])",
        backend,
        *modes,
        MALLOC_MMAP_THRESHOLD_="65536",
        COSFACE_REUSE_GRADIENT="0",  # likewise
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_flat_in_classes(mode, dtype):
    extra, most = {}, SLACK_MIB + (CACHE_BYTES / MIB if mode != "none" else 0)
    for num_classes in (FEW, MANY):
        dw = num_classes * DIM * dtype.itemsize if mode in ("both", "dw") else 0
        extra[num_classes] = (_peaks("cpu", *MODES)[f"{mode} {num_classes} {dtype}"] - dw) / MIB
        assert extra[num_classes] < most, f"{extra[num_classes]:.0f} MiB beyond inputs and gradients"
    assert extra[MANY] - extra[FEW] < 4, f"grows with the number of classes: {extra} MiB"


def test_the_measurement_sees_logits():
    """The reference keeps them: if it looked flat as well, the test above would prove nothing."""
    logits = NUM_SAMPLES * MANY * 4
    assert _peaks("reference", "none")[f"none {MANY} {torch.float32}"] > logits


def peak_of_many_threads() -> None:
    """Prints by how much a step raises the resident memory; runs in a process of its own."""
    torch.set_num_threads(64)
    w, x = torch.randn(1000, 512, requires_grad=True), torch.randn(4096, 512, requires_grad=True)
    labels = torch.randint(1000, (4096,))
    cosface_loss(x[:512], w, labels[:512], backend="cpu").backward()  # threads take their memory once
    print(raised_by(lambda: cosface_loss(x, w, labels, backend="cpu").backward()) / MIB)


def test_threads_share_sums_of_samples():
    """A dx of its own for each of 64 threads would take 512 MiB."""
    done = run_python(
        "from core import test_memory; test_memory.peak_of_many_threads()", OMP_WAIT_POLICY="passive"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150


LARGE = (20_000, 512)  # 39 MiB of float32: a gradient whose pages are kept for the next


def test_next_gradient_takes_the_pages_of_the_one_freed():
    head = FusedCosFaceLoss(*LARGE, backend="cpu")
    embeddings, labels = torch.randn(2, LARGE[1]), torch.tensor([0, 1])
    places = set()
    for _ in range(3):
        head.weight.grad = None
        head(embeddings, labels).backward()
        places.add(head.weight.grad.data_ptr())
    assert len(places) == 1


def test_gradient_in_use_is_never_handed_out():
    weights = [torch.full(LARGE, value, requires_grad=True) for value in (0.5, 1.0, 2.0)]
    embeddings, labels = torch.randn(2, LARGE[1]), torch.tensor([0, 1])
    for _ in range(2):
        grads = []
        for weight in weights:
            loss = cosface_loss(embeddings, weight, labels, backend="cpu")
            grads += torch.autograd.grad(loss, weight)
        assert len({grad.data_ptr() for grad in grads}) == len(weights)
        # the gradient is inversely proportional to the norm of the centre
        torch.testing.assert_close(grads[0] / 4, grads[2])
        del grads


def test_reuse_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("COSFACE_REUSE_GRADIENT", "0")
    weight = torch.randn(*LARGE, requires_grad=True)
    loss = cosface_loss(torch.randn(2, LARGE[1]), weight, torch.tensor([0, 1]), backend="cpu")
    (kept_on,) = torch.autograd.grad(loss, weight, retain_graph=True)
    monkeypatch.delenv("COSFACE_REUSE_GRADIENT")
    (taken,) = torch.autograd.grad(loss, weight)
    assert torch.equal(kept_on, taken)
