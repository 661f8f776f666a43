"""Backend `cuda` beyond the op's suite, which runs on `cuda_host`: chunks, refusals, the compiler's report."""

import re

import pytest
import torch
from support import BF16, F16, F32, F64, Backend, Dtypes, check_backend, evaluate, make_problem, random_upstream

from bench import cuda_kernels
from bench.__main__ import main
from cosface_kernels import cosface_loss
from cosface_kernels.backends import cuda

HOST = Backend("cuda_host", interpreted=True)
CHUNK = "COSFACE_CUDA_CHUNK"


@pytest.mark.parametrize("num_classes", [255, 256, 257, 1023])
@pytest.mark.parametrize("dtypes", [F32, BF16, F16, F64, Dtypes(torch.bfloat16, torch.float32)], ids=str)
def test_any_number_of_chunks(dtypes, num_classes, monkeypatch):
    problem = make_problem(9, num_classes, 24, dtypes)
    monkeypatch.setenv(CHUNK, "1")  # rounded up to 256
    check_backend(HOST, problem)
    monkeypatch.setenv(CHUNK, "100000")
    check_backend(HOST, problem)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_chunk_must_be_a_number_of_classes(value, monkeypatch):
    monkeypatch.setenv(CHUNK, value)
    with pytest.raises(ValueError, match=re.escape(f"positive number of classes, got '{value}'.")):
        HOST.loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))


def test_projection_is_orthogonal_to_the_rows():
    """A gradient through a norm has no component along its row, whatever the dtype of the products."""
    problem = make_problem(16, 400, 32, BF16)
    result = evaluate(HOST.lmcl, problem, random_upstream(problem, "loss"))
    for gradient, rows in ((result.dx, problem.x), (result.dw, problem.w)):
        g, v = gradient.double(), rows.double()
        along = (g * v).sum(1).abs() / v.norm(dim=1)
        assert bool((along <= 2 * torch.finfo(torch.bfloat16).eps * g.norm(dim=1) + 1e-12).all())


def test_says_what_it_lacks():
    if torch.cuda.is_available() and cuda.unavailable() is None:
        pytest.skip("it lacks nothing here")
    reason = r"(was built without CUDA; .* CUDA build of torch .* nvcc|torch sees no CUDA device\.)"
    with pytest.raises(RuntimeError, match=rf"backend 'cuda' cannot run: .*{reason}"):
        cosface_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="cuda")


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7cosface57_GLOBAL__N__cd_kernels_cu21normalize_rows_kernelIfLi32EEvPKT0_' for 'sm_90'
ptxas info    : Function properties for _ZN7cosface57_GLOBAL__N__cd_kernels_cu21normalize_rows_kernelIfLi32EEvPKT0_
    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 32 bytes smem, 408 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN24finish_statistics_kernelIfEEvPK' for 'sm_90'
ptxas info    : Function properties for _ZN24finish_statistics_kernelIfEEvPK
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 424 bytes cmem[0]
"""  # noqa: E501


def test_report_of_the_compiler_is_read():
    spilling, clean = cuda_kernels.read_report(REPORT)
    assert (spilling["kernel"], spilling["arch"], spilling["registers"]) == ("normalize_rows", "sm_90", 29)
    assert (spilling["spill_bytes"], spilling["shared_bytes"]) == (16, 32)
    assert (clean["kernel"], clean["registers"]) == ("finish_statistics", 40)
    assert (clean["spill_bytes"], clean["shared_bytes"]) == (0, 0)


@pytest.mark.parametrize(("spill", "status"), [("0", 0), ("4", 1)])
def test_a_spill_fails_the_check(spill, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    report = REPORT.replace(
        "8 bytes stack frame, 16 bytes spill stores, 4", f"{spill} bytes stack frame, 0 bytes spill stores, 0"
    )
    nvcc.write_text(f"#!/bin/sh\ncat <<'END'\n{report}END\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(["cuda-kernels", "--arch", "sm_90"]) == status
    shown = capsys.readouterr()
    assert ("spills 4 bytes a thread on sm_90." in shown.err) == bool(status)
    assert f"2 compiled, {status} spill." in shown.out


def test_missing_nvcc_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["cuda-kernels"]) == 2
    assert "nvcc is neither on PATH nor in CUDA_HOME." in capsys.readouterr().err
