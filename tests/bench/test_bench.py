"""The benchmark's command line, its rows, and what it does when an implementation cannot run. No timings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support import patience

from bench import kernels, machine, step
from bench.__main__ import main
from bench.implementations import IMPLEMENTATIONS, Implementation, Problem, Step, UnavailableError
from bench.process import FailedError, Worker
from bench.report import Row, table
from bench.sizes import summary
from bench.worker import Case, Check, make_problem

ROOT = Path(__file__).parents[2]
CASE = Case("eager", batch=8, dim=16, classes=300, dtype="float32", margin=0.35, scale=64.0, seed=0, threads=1)
COLUMNS = """impl batch dim classes dtype median_s min_s peak_extra_mib matmul_gflops fraction_of_matmul
max_rel_err threads torch commit"""
TINY = ["--batch", "8", "--dim", "16", "--threads", "1", "--rounds", "2"]


@pytest.fixture(scope="module")
def smoke(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    folder = tmp_path_factory.mktemp("bench")
    missing = "raise ModuleNotFoundError(\"No module named 'triton'\")\n"
    (folder / "cut_cross_entropy.py").write_text(missing)
    names, out = "fused,eager,cce", folder / "out.json"
    env = {name: value for name, value in os.environ.items() if name != "COSFACE_BACKEND"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            "step",
            *TINY,
            "--classes",
            "300",
            "--impl",
            names,
            "--json",
            str(out),
        ],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done, {row["impl"]: row for row in json.loads(out.read_text())}


@pytest.mark.parametrize("impl", ["fused", "eager"])
def test_row_of_each_implementation(smoke, impl: str) -> None:
    row = smoke[1][impl]
    assert set(COLUMNS.split()) <= set(row)
    assert (row["batch"], row["dim"], row["classes"], row["dtype"]) == (8, 16, 300, "float32")
    assert 0 < row["min_s"] <= row["median_s"]
    assert row["max_rel_err"] < 1e-4
    flops = {"fused": 8, "eager": 6}[impl] * 8 * 16 * 300
    assert row["fraction_of_matmul"] == pytest.approx(flops / row["median_s"] / 1e9 / row["matmul_gflops"])
    assert (row["threads"], row["rounds"], row["torch"]) == (1, 2, torch.__version__)
    assert row["note"] is None
    if machine.reset_peak("cpu") is not None:
        assert row["peak_extra_mib"] >= 0


def test_missing_package_is_a_sentence_in_the_table(smoke) -> None:
    done, rows = smoke
    sentence = "cce needs cut-cross-entropy and triton, and importing it failed: No module named 'triton'."
    assert rows["cce"]["note"] == sentence
    assert rows["cce"]["median_s"] is rows["cce"]["fraction_of_matmul"] is None
    assert sentence in done.stdout
    assert sentence in done.stderr, "progress shows it at once"


def test_table_has_times_relative_to_fused(smoke) -> None:
    lines = [line.split() for line in smoke[0].stdout.splitlines()]
    (header,) = (line for line in lines if line[:2] == ["impl", "median"])
    assert header[3:5] == ["/", "fused"]
    (fused,) = (line for line in lines if line[:1] == ["fused"])
    assert fused[5] == "1.00"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--impl", "fused,abacus"],
            f"'abacus' is not an implementation; there are {', '.join(IMPLEMENTATIONS)}.",
        ),
        (["--classes", "1000,0"], "'0' is not a positive whole number."),
        (["--batch", "2.5"], "'2.5' is not a positive whole number."),
        (["--dtype", "int8"], "'int8' is not a dtype; there are float32, float64, bfloat16, float16."),
        (["--scale", "0"], "'0' is not positive."),
        (["--margin", "inf"], "'inf' is not a finite number."),
        (["--json", "nowhere/out.json"], "'nowhere/out.json' cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(capsys, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["step", *arguments])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


class InProcess:
    """A worker without a process, so that a test can put an implementation in its way."""

    def __init__(self, make_job, *args) -> None:
        self.make_job = (lambda: make_job(*args)) if make_job is not machine.Matmul else _FakeMatmul
        self.job = None

    def turn(self):
        self.job = self.job or self.make_job()
        return self.job.turn()

    def close(self) -> None:
        pass


class _FakeMatmul:
    def turn(self) -> dict[str, float]:
        return {"square 1": 1.0, "square 2": 2.0}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, restore_threads) -> None:
    monkeypatch.setattr(step, "Worker", InProcess)
    monkeypatch.setattr("bench.worker.SECONDS_PER_TURN", 0.01)


def test_sizes_are_crossed_and_every_row_is_written(in_process, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    sizes = ["--batch", "2,8", "--classes", "1,100", "--dim", "16", "--dtype", "fp64", "--seed", "3"]
    assert main(["step", *sizes, "--threads", "1", "--rounds", "1", "--impl", "eager", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["batch"], row["classes"]) for row in rows] == [(2, 1), (2, 100), (8, 1), (8, 100)]
    assert {(row["dtype"], row["seed"], row["matmul_shape"]) for row in rows} == {("float64", 3, "square 2")}
    assert capsys.readouterr().out.count("impl ") == 4


def test_a_matmul_rate_that_fails_costs_no_other_figure(in_process, monkeypatch, tmp_path: Path, capsys) -> None:
    def fail(self):
        raise FailedError("NotImplementedError: no product of float8")

    monkeypatch.setattr(_FakeMatmul, "turn", fail)
    out = tmp_path / "out.json"
    assert main(["step", *TINY, "--classes", "300", "--impl", "eager", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row["median_s"] > 0
    assert row["matmul_gflops"] is row["matmul_shape"] is row["fraction_of_matmul"] is None
    assert "no product of float8" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_the_products_of_float8_are_in_another_dtype(monkeypatch, device: str, dtype: str) -> None:
    measured: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "device_name", lambda device: "a device")
    monkeypatch.setattr(step, "measure", lambda cases, rounds, dtype, jobs: measured.append(dtype) or ([], []))
    assert main(["train-step", *TINY, "--classes", "300", "--dtype", "fp8", "--device", device]) == 0
    assert measured == [dtype]


def test_wrong_output_is_not_timed_and_fails_the_run(in_process, monkeypatch, tmp_path: Path, capsys) -> None:
    def build_wrong(problem: Problem) -> Step:
        return IMPLEMENTATIONS["eager"].build(replace(problem, margin=problem.margin / 2))

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation(build_wrong, 6, "torch"))
    out = tmp_path / "out.json"
    assert main(["step", *TINY, "--classes", "300", "--impl", "wrong,eager", "--json", str(out)]) == 1
    wrong, eager = json.loads(out.read_text())
    assert wrong["note"].startswith("Its output is wrong and was not timed")
    assert wrong["median_s"] is None
    assert eager["median_s"] > 0


def test_problem_too_large_for_the_memory_is_reported(in_process, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2**30)
    out = tmp_path / "out.json"
    huge = ["--batch", "8", "--dim", "512", "--classes", "1000000", "--impl", "eager"]
    monkeypatch.setattr("bench.worker.CHECK_CLASSES", 100)
    assert main(["step", *huge, "--threads", "1", "--json", str(out)]) == 0
    assert json.loads(out.read_text())[0]["note"] == ("Weight and gradient take 3.8 GiB, 1.0 GiB are available.")


@pytest.mark.parametrize("impl", [name for name, row in IMPLEMENTATIONS.items() if row.definition])
def test_losses_of_the_family_are_checked_against_their_definition(restore_threads, impl: str) -> None:
    accuracy = Check(replace(CASE, impl=impl)).turn()
    assert accuracy.error <= accuracy.allowed("float32", CASE.scale)
    assert IMPLEMENTATIONS[impl].note == "its own margin"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["fused", "eager", "checkpoint", "pml", "torch-lce"])
def test_peers_compute_the_same_loss_and_gradients(restore_threads, impl: str, dtype: str) -> None:
    if impl == "torch-lce" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("linear_cross_entropy with options needs torch >= 2.13")
    if impl == "pml":
        pytest.importorskip("pytorch_metric_learning")
    accuracy = Check(replace(CASE, impl=impl, dtype=dtype)).turn()
    assert accuracy.error <= accuracy.allowed(dtype, CASE.scale)


@pytest.mark.parametrize(("dtype", "margin"), [("float32", 0.3499), ("bfloat16", 0.2), ("float64", 0.35 + 1e-12)])
def test_what_is_more_than_rounding_is_wrong_in_every_dtype(in_process, monkeypatch, dtype: str, margin: float):
    def build_wrong(problem: Problem) -> Step:
        return IMPLEMENTATIONS["fused"].build(replace(problem, margin=margin))

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation(build_wrong, 6, "torch"))
    accuracy = Check(replace(CASE, impl="wrong", dtype=dtype)).turn()
    assert accuracy.error > accuracy.allowed(dtype, CASE.scale)


def test_checkpoint_over_several_chunks(restore_threads, monkeypatch) -> None:
    monkeypatch.setattr("bench.implementations.CHECKPOINT_CLASSES", 128)
    accuracy = Check(replace(CASE, impl="checkpoint")).turn()
    assert accuracy.error <= accuracy.allowed("float32", CASE.scale)


def test_problem_does_not_depend_on_threads(monkeypatch) -> None:
    monkeypatch.setattr("bench.worker.BLOCK_ROWS", 64)
    one, three = (make_problem(replace(CASE, threads=threads)) for threads in (1, 3))
    for name in ("embeddings", "weight", "labels"):
        assert torch.equal(getattr(one, name), getattr(three, name))
    assert len(one.weight.unique(dim=0)) == CASE.classes, "no block of rows is drawn twice"


def test_implementation_without_margin_gets_none() -> None:
    assert make_problem(replace(CASE, impl="torch-lce")).margin == 0
    assert make_problem(CASE).margin == CASE.margin


@pytest.mark.parametrize(
    ("job", "error", "sentence"),
    [
        (
            (signal.raise_signal, signal.SIGKILL),
            UnavailableError,
            "It was killed, most likely because the memory",
        ),
        ((os._exit, 3), FailedError, "Its process ended with exit code 3."),
        ((int, "three"), FailedError, "ValueError: invalid literal for int"),
    ],
    ids=["killed", "exited", "raised"],
)
def test_worker_that_dies_or_raises(job: tuple, error: type, sentence: str) -> None:
    worker = Worker(*job)
    try:
        with pytest.raises(error, match=sentence):
            worker.turn()
    finally:
        worker.close()


def test_peak_memory_sees_what_was_freed() -> None:
    machine.release_memory()
    baseline = machine.reset_peak("cpu")
    if baseline is None:
        pytest.skip("this system cannot reset the peak of a process's resident memory")
    size = 64 * 2**20
    block = torch.ones(size // 4)
    del block
    assert machine.peak("cpu") - baseline == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("impl", "margin", "scale"),
    [
        ("eager", 0.2, 30.0),
        ("torch-lce", 0.0, 30.0),
        ("uncached", None, 30.0),
        ("a-softmax", None, 1.0),
        ("l-softmax", None, 1.0),
    ],
)
def test_rows_have_the_margin_and_scale_that_were_computed(impl: str, margin: float | None, scale: float) -> None:
    case = replace(CASE, impl=impl, margin=0.2, scale=30.0)
    row = step._row(step.Outcome(case), [{"square 1": 1.0}], rounds=1)
    assert (row.margin, row.scale) == (margin, scale)


def test_table_without_fused_has_no_ratio() -> None:
    values = dict.fromkeys((f.name for f in fields(Row)), None)
    row = Row(**{**values, "impl": "eager", "steps": 4, "median_s": 2.5, "min_s": 0.002, "note": "margin 0"})
    cells = " ".join(table([row]).splitlines()[1].split())
    assert cells == "eager 2.500 s 2.000 ms - - - - 4 margin 0"


def test_the_summary_of_sizes_compares_with_the_fastest_peer_of_the_same_loss() -> None:
    blank = dict.fromkeys((f.name for f in fields(Row)), None)
    sizes = {"dtype": "float32", "dim": 128, "batch": 32}
    times = {
        1000: {"fused": 2.0, "eager": 3.0, "compile": 1.0, "torch-lce": 0.1, "fused-cuda": 0.1, "uniface": 0.1},
        9000: {"fused": 1.0, "eager": 8.0, "compile": None},
        20_000: {"fused": None, "eager": 1.0},
    }
    rows = [
        Row(**{**blank, **sizes, "classes": classes, "impl": impl, "median_s": seconds})
        for classes, found in times.items()
        for impl, seconds in found.items()
    ]
    _, *lines, total = summary(rows)
    cells = [line.split() for line in lines]
    assert [(*line[3:4], *line[-3:]) for line in cells[:2]] == [
        ("1,000", "1.000", "s", "0.50"),
        ("9,000", "8.000", "s", "8.00"),
    ]
    assert cells[2][-1] == "-"
    assert total == "2 problems: 2.00 in the geometric mean, at least 0.50"


def test_sizes_run_at_every_point_of_a_grid(in_process, tmp_path, capsys):
    out = tmp_path / "rows.json"
    grid = ["--batch", "3", "--dim", "5", "--classes", "7", "--dtype", "fp32,bf16"]
    assert main(["sizes", *grid, "--impl", "fused", "--rounds", "1", "--threads", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    points = [tuple(row[size] for size in ("dtype", "dim", "batch", "classes")) for row in rows]
    assert points == [("float32", 5, 3, 7), ("bfloat16", 5, 3, 7)]
    assert len(capsys.readouterr().out.split("fastest peer")[1].splitlines()) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(capsys):
    assert main(["step", "--device", "cuda", "--classes", "100"]) == 2
    assert "--device cuda needs a CUDA or ROCm GPU" in capsys.readouterr().err


def test_kernel_report_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels"]) == 2
    assert "cannot share a process" in capsys.readouterr().err


def test_kernel_report_refuses_an_architecture_that_it_does_not_know(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["kernels", "--arch", "sm_90,sm_77"]) == 2
    assert "got sm_77." in capsys.readouterr().err


def test_kernel_report_goes_on_where_a_compiler_fails(monkeypatch):
    monkeypatch.setattr(kernels, "compile_case", lambda case: torch.zeros(1).view(2))
    case = next(kernels.all_cases(["sm_90"], 512))
    row, complaints = kernels.examine(case)
    assert complaints[0].startswith("cannot be compiled (RuntimeError: shape '[2]' is invalid")
    assert case.kernel in kernels._line(row)


def test_distributed_prints_rows_and_a_prediction(tmp_path, capsys):
    out = tmp_path / "rows.json"
    sizes = ["--batch", "6", "--dim", "8", "--classes", "11", "--steps", "2", "--threads", "1"]
    assert main(["distributed", "--ranks", "1,3", *sizes, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["ranks"] for row in rows] == [1, 3]
    assert [row["bytes_formula"] for row in rows] == [0, 2 * 6 * (8 * 4 + 60 + 8 * 4) // 3]
    for row in rows:
        assert 0 < row["min_s"] <= row["median_s"]
        assert 0 <= row["communication"] <= 1
    text = capsys.readouterr().out
    assert "A prediction, not a measurement" in text
    assert len([line for line in text.splitlines() if "100,000,000" in line]) == 4
