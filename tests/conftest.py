"""The backends and dtypes that every test of the op runs on."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from support import SAME_DTYPES, Backend

# All of these must run here: none is skipped, so a backend that was not built fails.
BACKENDS = (Backend("cpu"), Backend("reference"))

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=80, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "heavy: too much arithmetic for a backend that runs in an interpreter")
    config.addinivalue_line("markers", "float64: computes in float64, which not every backend does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unsupported = [item for item in items if not _supported(item)]
    config.hook.pytest_deselected(items=unsupported)
    items[:] = [item for item in items if item not in set(unsupported)]


def _supported(item: pytest.Item) -> bool:
    """False where a test is not for its backend: a dtype that it never takes, or too much work for it."""
    params = getattr(item, "callspec", None)
    backend = params.params.get("backend") if params else None
    if backend is None:
        return True
    dtypes = {*params.params.get("dtypes", ())}
    if item.get_closest_marker("float64"):
        dtypes.add(torch.float64)
    return dtypes <= set(backend.dtypes) and not (backend.interpreted and item.get_closest_marker("heavy"))


@pytest.fixture(params=BACKENDS, ids=str, scope="module")
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


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
