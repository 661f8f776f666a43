"""What runs here, why the rest does not, and how one backend is forced."""

import ctypes
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from support import F32, make_problem, patience, run_python

import cosface_kernels
from cosface_kernels import cosface_loss
from cosface_kernels.backends.extension import _C
from cosface_kernels.backends.triton import launch
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS
from cosface_kernels.info import DTYPES, examine_device


def _info(**env):
    return subprocess.run(
        [sys.executable, "-m", "cosface_kernels.info"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=True,
    ).stdout


def test_every_required_backend_runs_here(backend):
    problem = backend.problem(3, 5, 4, F32)
    x = problem.x.requires_grad_()
    loss = backend.loss(x, problem.w, problem.targets)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.any()


def test_info_names_versions_and_backends():
    text = _info()
    assert f"cosface_kernels {cosface_kernels.__version__}" in text
    assert torch.__version__ in text
    assert platform.python_version() in text
    assert re.search(r"^compiled module: by .*, .*_C\..*\.(so|pyd)$", text, re.MULTILINE), text
    assert re.search("^backend cpu: available", text, re.MULTILINE), text
    assert re.search("^backend reference: available", text, re.MULTILINE), text


def test_a_device_without_a_gpu_has_no_blocks_to_try():
    done = run_python(
        "import sys, runpy; sys.argv = ['info', '--device']\n"
        "runpy.run_module('cosface_kernels.info', run_name='__main__')",
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="0",
    )
    assert "No kernel was tried: torch sees no CUDA or ROCm GPU." in done.stdout, done.stdout + done.stderr


@pytest.mark.triton_only
def test_blocks_of_a_device_are_tried(backend, monkeypatch):
    """Interpreted, each kernel has one; elsewhere a line for each that was tried, one of a kernel chosen."""
    monkeypatch.delenv("COSFACE_TRITON_TUNE", raising=False)
    lines = list(examine_device(batch=20, dim=16, classes=100))
    if launch.INTERPRETED:
        assert lines == ["Each kernel has one block here, and nothing to choose from."]
    else:
        assert sum("(chosen)" in line for line in lines) >= len(GEMM_KERNELS) * len(DTYPES), lines


def test_info_says_why_a_backend_is_missing():
    done = run_python(
        "import sys, runpy\n"
        "sys.modules['cosface_kernels._C'] = None\n"
        "runpy.run_module('cosface_kernels.info', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"cpu: unavailable.*cosface_kernels\._C", done.stdout), done.stdout
    assert "reference: available" in done.stdout


@pytest.mark.parametrize("head", ["FusedCosFaceLoss", "FusedCurricularFaceLoss"])
def test_the_reference_says_once_on_the_users_line_why_it_runs(head):
    done = run_python(
        "import sys, torch\n"
        "sys.modules['cosface_kernels._C'] = None\n"
        f"from cosface_kernels import {head}\n"
        f"head = {head}(10, 8)\n"
        "for _ in range(2):\n"
        "    head(torch.randn(4, 8), torch.arange(4)).backward()\n"
    )
    said = [line for line in done.stderr.splitlines() if "The reference runs" in line]
    assert len(said) == 1, done
    assert said[0].startswith("<string>:6: UserWarning: "), done


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            "types.SimpleNamespace()",
            r"cannot be used with PyTorch \S+ \(.*'use_torch'\): build it again",
        ),
        ("None", r"cannot be imported \(.*\): it has not been built .* in \S+\. Leave that clone"),
    ],
)
def test_info_says_that_the_module_is_of_another_version(module, reason):
    done = run_python(
        "import runpy, sys, types\n"
        f"sys.modules['cosface_kernels._C'] = {module}\n"
        "runpy.run_module('cosface_kernels.info', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    for backend in ("cpu", "cuda"):
        assert re.search(f"backend {backend}: unavailable: .*cosface_kernels._C {reason}", done.stdout), (
            done.stdout
        )


def test_a_torch_with_another_dlpack_is_refused():
    """Its table of functions is then another, and where ours are in it nobody knows."""
    table, new_capsule = (ctypes.c_uint32 * 32)(2), ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    capsule = new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)
    with pytest.raises(RuntimeError, match=r"^it has version 2 of DLPack, not 1$"):
        _C.use_torch(capsule, 0, 0)
    problem = make_problem(3, 5, 4, F32)
    assert cosface_loss(problem.x, problem.w, problem.targets).isfinite()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("del torch.Tensor.__dlpack_c_exchange_api__", "no attribute '__dlpack_c_exchange_api__'"),
        ("torch.Tensor.__dlpack_c_exchange_api__ = 3", "invalid PyCapsule object"),
        ("torch.Tensor.__dlpack_c_exchange_api__ = datetime.datetime_CAPI", "incorrect name"),
        ("ctypes.CDLL = lambda path: types.SimpleNamespace()", "no attribute 'torch_parallel_for'"),
    ],
)
def test_a_torch_without_the_interface_is_named(change, reason):
    done = run_python(
        "import ctypes, datetime, runpy, torch, types\n"
        f"{change}\n"
        "runpy.run_module('cosface_kernels.info', run_name='__main__')"
    )
    said = rf"backend cpu: unavailable: .* with PyTorch \S+ \(.*{reason}.*\): build it again, with PyTorch 2\.10"
    assert re.search(said, done.stdout), done


def test_a_module_that_lacks_symbols_is_to_be_built_again(tmp_path):
    """What an import of one for another system raises."""
    done = run_python(
        "import importlib, runpy\n"
        "plain = importlib.import_module\n"
        "def load(name, *rest):\n"
        "    if name == 'cosface_kernels._C': raise ImportError('undefined symbol: _ZSt4')\n"
        "    return plain(name, *rest)\n"
        "importlib.import_module = load\n"
        "runpy.run_module('cosface_kernels.info', run_name='__main__')"
    )
    assert re.search(r"cpu: unavailable: .*undefined symbol: _ZSt4\): build it again", done.stdout), done


def test_info_shows_the_forced_backend():
    assert re.search("COSFACE_BACKEND.*reference", _info(COSFACE_BACKEND="reference"))


def _spy(monkeypatch, called):
    for name, module in cosface_kernels.backends.BACKENDS.items():
        for way in {"forward", "loss"} & set(vars(module)):
            real = getattr(module, way)

            def wrapped(*args, name=name, real=real, **options):
                called.append(name)
                return real(*args, **options)

            monkeypatch.setattr(module, way, wrapped)


def test_environment_forces_a_backend(backend, monkeypatch):
    problem, called = backend.problem(3, 5, 4, F32), []
    _spy(monkeypatch, called)
    monkeypatch.setenv("COSFACE_BACKEND", backend.name)
    cosface_loss(problem.x, problem.w, problem.targets)
    assert called == [backend.name]


def test_priority_without_force(monkeypatch):
    problem, called = make_problem(3, 5, 4, F32), []
    _spy(monkeypatch, called)
    cosface_loss(problem.x, problem.w, problem.targets)
    assert called == ["cpu"]


def test_tensors_on_the_cpu_start_no_gpu(monkeypatch):
    """To ask a GPU's backend whether it runs starts CUDA and a compiler: not for tensors that it never takes."""
    for name in ("triton", "cuda"):
        backend = cosface_kernels.backends.BACKENDS[name]
        monkeypatch.setattr(backend, "unavailable", lambda: pytest.fail("a backend of GPUs was asked"))
    problem = make_problem(3, 5, 4, F32)
    assert cosface_loss(problem.x, problem.w, problem.targets).isfinite()


def test_named_backend_is_the_one_that_runs(backend, monkeypatch):
    problem, called = backend.problem(3, 5, 4, F32), []
    _spy(monkeypatch, called)
    backend.loss(problem.x, problem.w, problem.targets)
    assert called == [backend.name]


def test_unknown_backend_in_the_environment_is_refused(monkeypatch):
    problem = make_problem(3, 5, 4, F32)
    monkeypatch.setenv("COSFACE_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"cpu.*reference.*'abacus'"):
        cosface_loss(problem.x, problem.w, problem.targets)


def test_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", cosface_kernels.__version__)
