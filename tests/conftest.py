"""The backends and dtypes that every test of the op runs on."""

from __future__ import annotations

import os
import pathlib
import tempfile
from importlib.metadata import version

import hypothesis
import pytest
import torch
from support import INTERPRETED, SAME_DTYPES, Backend, cuda_host

import cosface_kernels.backends

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
WITHOUT_FLOAT64 = (torch.float32, torch.bfloat16, torch.float16)
CPU_ALONE = ("exact_cache",)
DENSE_ALONE = ("gradient_tolerance",)
OF_THE_CPU = ("subcenters", "float8")  # and of the reference
# All of these must run here: none is skipped, so a backend that was not built fails. Under TRITON_INTERPRET=1, for
# which `make test` has a run of its own, only the Triton kernels are under test, on CPU tensors.
BACKENDS = (
    (
        Backend(
            "triton",
            dtypes=WITHOUT_FLOAT64,
            contiguous_weight=True,
            interpreted=True,
            lacks=(*CPU_ALONE, *OF_THE_CPU),
        ),
    )
    if INTERPRETED
    else (
        Backend("cpu"),
        Backend("reference", lacks=("cache_bytes", *CPU_ALONE, *DENSE_ALONE)),
        Backend("cuda_host", interpreted=True, lacks=(*CPU_ALONE, *DENSE_ALONE, "subcenters")),
    )
)
GPU_BACKENDS = (
    Backend(
        "triton",
        device="cuda",
        dtypes=WITHOUT_FLOAT64,
        contiguous_weight=True,
        lacks=(*CPU_ALONE, *OF_THE_CPU),
    ),
    Backend("cuda", device="cuda", lacks=(*CPU_ALONE, *DENSE_ALONE, "subcenters")),
)
cosface_kernels.backends.BACKENDS["cuda_host"] = cuda_host

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=80, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.register_profile("interpreted", hypothesis.settings.get_profile("ci"), max_examples=8)
hypothesis.settings.register_profile("gpu", hypothesis.settings.get_profile("ci"), max_examples=5)
hypothesis.settings.load_profile(os.environ.get("COSFACE_HYPOTHESIS") or ("interpreted" if INTERPRETED else "ci"))


# A graph in torch's cache of compiled graphs calls the ops with the schema that they had when it was compiled. The
# processes of one run share theirs, with torch's headers, which take longer than the graphs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
# Programs that tests start find the package that is under test, which need not be installed, and `support`.
TESTS = pathlib.Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")])
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "heavy: too much arithmetic for a backend that runs in an interpreter")
    config.addinivalue_line("markers", "float64: computes in float64, which not every backend does")
    config.addinivalue_line("markers", "strided_weight: has a weight that is not contiguous")
    config.addinivalue_line("markers", "option(*names): has options of the op, which not every backend takes")
    config.addinivalue_line("markers", "triton_only: tests something that no other backend has")
    config.addinivalue_line("markers", "gpu: runs on a CUDA or ROCm device")
    if INTERPRETED and (reason := _why_interpreter_fails(version("triton"), version("numpy"))):
        raise pytest.UsageError(reason)


def _why_interpreter_fails(triton: str, numpy: str) -> str | None:
    """To interpret a loop, Triton 3.6 turns an array of one element into a number, which numpy ended with 2.4."""
    triton_release, numpy_release = (tuple(map(int, text.split(".")[:2])) for text in (triton, numpy))
    if triton_release < (3, 7) and numpy_release >= (2, 4):
        return (
            f"The interpreter of triton {triton} needs numpy below 2.4, found {numpy}: install an older numpy, "
            "or triton 3.7 or newer."
        )
    return None


def pytest_report_header(config: pytest.Config) -> str | None:
    if torch.cuda.is_available():
        return f"gpu: {torch.cuda.get_device_name()}"
    return "gpu: torch sees none, so tests marked gpu are left out (with `-m gpu` they are skipped)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for_gpu = config.getoption("markexpr") == "gpu"
    selected = [item for item in items if _supported(item, asked_for_gpu)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(selected)])
    items[:] = selected
    for item in items:
        if item.get_closest_marker("gpu") and (reason := _missing_on_gpu(_backend_of(item))):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)  # after what tells of the failure
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends the process of a test that has lost the GPU, where all later ones would fail; xdist starts another."""
    if report.failed and gpu_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{report.nodeid} has lost the GPU: nothing runs on it any more in this process.")


def gpu_is_lost() -> bool:
    """Whether a kernel that failed, by an access out of bounds say, has left nothing that runs."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _backend_of(item: pytest.Item) -> Backend | None:
    params = getattr(item, "callspec", None)
    return params.params.get("backend") if params else None


def _missing_on_gpu(backend: Backend | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm GPU"
    if backend and backend.name == "cuda":  # needs nvcc or a wheel, which not every machine with a GPU has
        return cosface_kernels.backends.BACKENDS["cuda"].unavailable()
    return None


def _supported(item: pytest.Item, asked_for_gpu: bool) -> bool:
    """False where a test is not for its backend: a dtype or layout that it never takes, or too much work."""
    on_gpu = item.get_closest_marker("gpu") is not None
    if on_gpu and not (torch.cuda.is_available() or asked_for_gpu):
        return False
    backend = _backend_of(item)
    if backend is None:
        return on_gpu or not INTERPRETED
    if on_gpu and backend.device == "cpu":
        return False
    params = item.callspec.params
    if item.get_closest_marker("triton_only") and backend.name != "triton":
        return False
    if any(name in backend.lacks for mark in item.iter_markers("option") for name in mark.args):
        return False
    dtypes = {*params.get("dtypes", ()), *filter(None, [params.get("dtype")])} & FLOATS
    if item.get_closest_marker("float64"):
        dtypes.add(torch.float64)
    if backend.contiguous_weight and (
        item.get_closest_marker("strided_weight") or "w" in params.get("operand", "").split("_and_")
    ):
        return False
    return dtypes <= set(backend.dtypes) and not (backend.interpreted and item.get_closest_marker("heavy"))


@pytest.fixture(
    params=[*BACKENDS, *(pytest.param(backend, marks=pytest.mark.gpu) for backend in GPU_BACKENDS)],
    ids=lambda backend: str(backend),
    scope="module",
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=SAME_DTYPES, ids=str, scope="module")
def dtypes(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSFACE_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def stray_tensors_on_meta(request: pytest.FixtureRequest):
    """For a test of a backend on the CPU, to which a tensor made without a device is as foreign as to a GPU."""
    backend = _backend_of(request.node)
    if backend is None or backend.device != "cpu":
        yield
        return
    with torch.device("meta"):
        yield


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """Four gloo processes, started once for all tests that need several ranks."""
    from support.ranks import Ranks

    ranks = Ranks(str(tmp_path_factory.mktemp("ranks")))
    yield ranks
    ranks.close()
