"""Whether backends `triton` and `cuda` can run here: why not, and that the question itself is answered right."""

import re
import subprocess
import types

import pytest
import torch
from support import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from cosface_kernels import FusedCosFaceLoss, cosface_loss
from cosface_kernels.backends import cuda
from cosface_kernels.backends import triton as backend_triton
from cosface_kernels.backends.triton import forward_pass, launch


def test_triton_without_a_gpu_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: torch sees no CUDA or ROCm GPU"):
        cosface_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="triton")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("sys.modules['triton'] = None", "triton cannot be imported"),
        (
            "import types; sys.modules['triton'] = types.SimpleNamespace(__version__='3.5.1')\n"
            "sys.modules['cosface_kernels.backends.triton.kernels'] = types.SimpleNamespace()",
            "it needs triton 3.6 or newer, found 3.5.1",
        ),
    ],
    ids=["missing", "too_old"],
)
def test_why_triton_cannot_run(module, reason):
    done = run_python(
        f"import sys\n{module}\nfrom cosface_kernels.backends import triton\nprint(triton.unavailable())",
        TRITON_INTERPRET="1",
    )
    assert re.search(reason, done.stdout), done.stdout + done.stderr


@pytest.fixture
def gpu_of_triton(monkeypatch):
    """A GPU of capability 7.5 as far as the backend can see; its tensors are on the CPU."""
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch, "ones", lambda *size, device, **others: ones(*size, device="cpu", **others))
    monkeypatch.setattr(launch, "triton", None)
    monkeypatch.setattr(launch, "kernels", None)
    backend_triton.unavailable.cache_clear()
    yield monkeypatch
    backend_triton.unavailable.cache_clear()


def test_gpu_that_is_too_old_for_triton(gpu_of_triton):
    assert "capability 8.0 or newer, found 7.5." in backend_triton.unavailable()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, "gcc"),  # Python's headers are missing
        AssertionError("libcuda.so cannot found!"),
        NotImplementedError("a compiler of the future"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_kernel_that_cannot_be_compiled_hands_over_to_the_next_backend(gpu_of_triton, error):
    def fail(*arguments):
        raise error

    gpu_of_triton.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu_of_triton.setattr(forward_pass, "forward", fail)
    reason = backend_triton.unavailable()
    assert reason == f"a kernel cannot be compiled or launched ({type(error).__name__}: {error})."
    x = torch.eye(2, 3)
    assert cosface_loss(x, x, torch.tensor([0, 1])).isfinite()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: a kernel cannot be compiled"):
        cosface_loss(x, x, torch.tensor([0, 1]), backend="triton")


def _exported():
    x, labels = torch.eye(2, 3), torch.tensor([0, 1])
    torch.export.export(FusedCosFaceLoss(4, 3, backend="triton"), (x, labels))


def _with_fake_tensors():
    with FakeTensorMode():
        backend_triton.unavailable()


def _with_float64():
    torch.set_default_dtype(torch.float64)
    try:
        backend_triton.unavailable()
    finally:
        torch.set_default_dtype(torch.float32)


def _on_meta():
    with torch.device("meta"):
        backend_triton.unavailable()


@pytest.mark.parametrize("first_use", [_exported, _with_fake_tensors, _with_float64, _on_meta])
def test_whether_kernels_run_here_is_asked_outside_of_what_the_first_caller_does(gpu_of_triton, first_use):
    launched = []
    gpu_of_triton.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu_of_triton.setattr(backend_triton, "unsupported", lambda x, w, options: None)
    gpu_of_triton.setattr(forward_pass, "forward", lambda *arguments: launched.append(arguments))
    first_use()
    assert backend_triton.unavailable() is None
    ((x, w, saved, targets, scale, *_),) = launched  # once
    assert [type(tensor) for tensor in (x, w, *saved, targets, scale)] == [torch.Tensor] * 7
    assert x.device.type == "cpu"
    assert x.dtype == w.dtype == scale.dtype == torch.float32
    assert x.data_ptr()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("out of memory")])
def test_a_full_memory_is_not_remembered(gpu_of_triton, error):
    def fail(*arguments):
        raise error

    gpu_of_triton.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu_of_triton.setattr(forward_pass, "forward", fail)
    with pytest.raises(type(error), match="out of memory"):
        backend_triton.unavailable()
    gpu_of_triton.setattr(forward_pass, "forward", lambda *arguments: None)
    assert backend_triton.unavailable() is None


def test_cuda_says_what_it_lacks():
    if torch.cuda.is_available() and cuda.unavailable() is None:
        pytest.skip("it lacks nothing here")
    reason = r"(was built without CUDA; .* needs nvcc, .* COSFACE_CUDA=0\.|torch \S+ sees no CUDA device\.)"
    with pytest.raises(RuntimeError, match=rf"backend 'cuda' cannot run: .*{reason}"):
        cosface_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="cuda")


@pytest.fixture
def gpu_of_cuda(monkeypatch):
    """A GPU of capability 7.5 as far as the backend can see; its tensors are on the CPU. Its kernels' module."""
    ones, kernels = torch.ones, types.SimpleNamespace(cuda_version=13000, row_norms=lambda *rows: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch, "ones", lambda *size, device, **others: ones(*size, device="cpu", **others))
    monkeypatch.setattr(cuda, "_C", kernels)
    cuda._launch_failure.cache_clear()
    yield kernels
    cuda._launch_failure.cache_clear()


def test_kernel_that_cannot_be_launched_hands_over_to_the_next_backend(gpu_of_cuda):
    def fail(*rows):
        raise RuntimeError("no kernel image is available")

    gpu_of_cuda.row_norms = fail
    reason = "a kernel cannot be launched on a GPU of compute capability 7.5 (no kernel image is available)."
    assert cuda.unavailable() == reason
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cuda' cannot run: {reason}")):
        cosface_loss(torch.eye(2, 3), torch.eye(2, 3), torch.tensor([0, 1]), backend="cuda")


def test_kernel_is_tried_on_memory_though_a_compiler_traces(gpu_of_cuda):
    tried = []
    gpu_of_cuda.row_norms = lambda *rows: tried.extend(rows)
    with FakeTensorMode():
        assert cuda.unavailable() is None
    assert [type(rows) for rows in tried] == [torch.Tensor, torch.Tensor, int]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("out of memory")])
def test_a_memory_that_was_full_leaves_cuda_for_later(gpu_of_cuda, error):
    def fail(*rows):
        raise error

    launches, gpu_of_cuda.row_norms = gpu_of_cuda.row_norms, fail
    with pytest.raises(type(error), match="out of memory"):
        cuda.unavailable()
    gpu_of_cuda.row_norms = launches
    assert cuda.unavailable() is None
