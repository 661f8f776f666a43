"""C x D beyond 2^31 elements: the far end of a weight of 4.2 million classes is read and written in its place."""

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from support import run_python

from cosface_kernels import cosface_loss

DIM = 512
EDGE = 2**31 // DIM  # first class whose offset does not fit in 32 bits
NUM_CLASSES = EDGE + 5003
SPECIAL = [0, 5, EDGE // 2, EDGE - 1, EDGE, EDGE + 1, NUM_CLASSES - 2, NUM_CLASSES - 1]
LABELS = [NUM_CLASSES - 1, EDGE, EDGE - 1, -100]
SCALE, MARGIN = 16.0, 0.35
MAX_PEAK_GIB = 10.0  # bfloat16 weight and gradient are 8.1 GiB


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, the special rows, and the one row that all other classes share: cheap in float64."""
    special = torch.randn(len(SPECIAL), DIM).bfloat16()
    shared = torch.randn(DIM).bfloat16()
    x = torch.randn(len(LABELS), DIM) + 0.3 * special[: len(LABELS)] + 0.2 * shared
    return x.bfloat16(), special, shared


def _expected(x, special, shared):
    """Loss, dx, and dw of the special rows and of each shared row, from distinct rows and their counts."""
    x = x.double().requires_grad_()
    rows = torch.cat([special, shared[None]]).double().requires_grad_()  # (K + 1, D)
    counts = torch.ones(len(rows), dtype=torch.float64)
    counts[-1] = NUM_CLASSES - len(SPECIAL)
    valid = torch.tensor(LABELS) >= 0
    target = torch.tensor([SPECIAL.index(y) if y >= 0 else 0 for y in LABELS])
    cos = F.normalize(x) @ F.normalize(rows).T  # (N, K + 1)
    is_target = F.one_hot(target, len(rows)).bool()
    lse = torch.logsumexp((SCALE * cos + counts.log()).masked_fill(is_target, -torch.inf), dim=1)
    loss = F.softplus(lse - SCALE * (cos[is_target] - MARGIN)) * valid
    loss.sum().backward()
    return loss.detach(), x.grad, rows.grad / counts[:, None]


def _row_errors(got, want):
    return (got.double() - want).norm(dim=1) / want.norm(dim=1)


def main(backend: str = "cpu", device: str = "cpu") -> None:
    """Runs the step and checks it; in a process of its own, so that the memory is given back."""
    torch.manual_seed(0)
    x, special, shared = _problem()
    w = torch.empty(NUM_CLASSES, DIM, dtype=torch.bfloat16, device=device)
    w[:] = shared.to(device)
    w[SPECIAL] = special.to(device)
    assert w.numel() > 2**31
    leaf = x.to(device, copy=True).requires_grad_()
    w.requires_grad_()
    labels = torch.tensor(LABELS)
    loss = cosface_loss(leaf, w, labels.to(device), scale=SCALE, margin=MARGIN, reduction="none", backend=backend)
    loss.sum().backward()
    loss, dx = loss.detach().cpu(), leaf.grad.cpu()

    want_loss, want_dx, want_dw = _expected(x, special, shared)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=0)
    rounding = 2.0**-8  # a bfloat16 has 8 significant bits
    valid = labels >= 0
    assert float(_row_errors(dx[valid], want_dx[valid]).max()) < rounding
    assert not dx[~valid].any()
    assert float(_row_errors(w.grad[SPECIAL].cpu(), want_dw[:-1]).max()) < rounding
    ordinary = torch.ones(NUM_CLASSES, dtype=torch.bool)
    ordinary[SPECIAL] = False
    ordinary[: EDGE - 1000] &= torch.arange(EDGE - 1000) % 499 == 3
    sampled = ordinary.nonzero()[:, 0]  # all from shortly before 2^31 to the end, and some of the rest
    assert len(sampled) > 10_000
    for block in sampled.split(4096):
        assert (
            float(_row_errors(w.grad[block.to(device)].cpu(), want_dw[-1:].expand(len(block), DIM)).max())
            < rounding
        )


def _available_gib() -> float:
    try:
        meminfo = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return 0.0
    return int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) / 2**20


def test_weight_beyond_32_bit_offsets():
    if (available := _available_gib()) < MAX_PEAK_GIB + 1:  # now, whatever there was when tests were collected
        pytest.skip(f"needs {MAX_PEAK_GIB + 1:.0f} GiB of free memory, read {available:.1f} from /proc/meminfo")
    code = (
        "import re, pathlib\n"
        "from core import test_large\n"
        "test_large.main()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    done = run_python(code, timeout=600)
    assert done.returncode == 0, done.stderr
    peak_gib = int(done.stdout) / 2**20
    assert peak_gib < MAX_PEAK_GIB


@pytest.mark.gpu
def test_weight_beyond_32_bit_offsets_on_a_gpu(backend):
    main(backend.name, backend.device)
