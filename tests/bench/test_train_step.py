"""`python -m bench train-step` at tiny sizes: every implementation is right and learns; no timings."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.report import Row
from bench.train_step import IMPLEMENTATIONS, Check, Measure, Training
from bench.worker import Case

CASE = Case("fused+FusedSGD", 8, 16, 300, "float32", margin=0.35, scale=64.0, seed=0, threads=1)
QUICK = [name for name in IMPLEMENTATIONS if name != "compile+SGD"]
IN_FLOAT8 = [name for name in QUICK if name.startswith("fused+FusedSGD")]


def test_command_writes_the_rows_of_step(tmp_path, capsys):
    out = tmp_path / "rows.json"
    tiny = ["--batch", "8", "--dim", "16", "--classes", "300", "--threads", "1", "--rounds", "1"]
    assert main(["train-step", *tiny, "--impl", "fused+FusedSGD", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row["impl"] == "fused+FusedSGD"
    assert set(row) == set(Row.__dataclass_fields__)
    assert row["median_s"] > 0
    assert "PyTorch needs at least" in row["note"]
    assert "(computed)" in row["note"]
    assert "fused+FusedSGD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *((impl, dtype) for impl in QUICK for dtype in ("float32", "bfloat16")),
        *((impl, "float8_e4m3fn") for impl in IN_FLOAT8),
    ],
)
def test_moves_the_weight_as_float64_does_and_learns(impl, dtype):
    case = Case(impl, 8, 16, 300, dtype, margin=0.35, scale=64.0, seed=0, threads=torch.get_num_threads())
    if impl == "pml+SGD":
        pytest.importorskip("pytorch_metric_learning")
    accuracy = Check(case).turn()
    assert accuracy.error <= accuracy.allowed(dtype, case.scale)
    turn = Measure(case).turn()
    assert turn.losses[1] < turn.losses[0]
    assert len(turn.seconds) == 3


def test_check_finds_a_weight_that_moves_otherwise(monkeypatch):
    step = Training.step

    def and_grow(self):
        step(self)
        if self.parameter.grad is None:  # FusedSGD's: plain PyTorch moves as it should
            self.parameter.data.mul_(1.01)

    monkeypatch.setattr(Training, "step", and_grow)
    accuracy = Check(CASE).turn()
    assert accuracy.error > 100 * accuracy.allowed("float32", CASE.scale)


def test_gradient_of_the_weight_never_exists():
    training = Training(CASE)
    training.step()
    assert training.parameter.grad is None
    assert training.state_bytes() == 300 * 16 * 4 + 4
    assert math.isfinite(training.step())


@pytest.mark.parametrize(("batch", "kept"), [(8, 2 * 8 * 20_000), (256, 64 * 20_000)])
def test_extra_memory_is_beyond_the_cosines_that_are_kept(monkeypatch, batch, kept):
    """A small batch leaves most of the cache's bytes, a quarter of the weight's, as they were."""
    monkeypatch.setattr("bench.machine.reset_peak", lambda device: 0)
    monkeypatch.setattr("bench.machine.peak", lambda device: 2**30)
    monkeypatch.setattr("bench.train_step.TIMED_STEPS", 1)
    turn = Measure(replace(CASE, impl="fused+FusedSGD+cache", batch=batch, dim=64, classes=20_000)).turn()
    state = 64 * 20_000 * 4 + 4
    assert 2**30 - state - turn.peak_extra_bytes == pytest.approx(kept, rel=0.1)


def test_too_large_a_problem_is_refused(monkeypatch):
    monkeypatch.setattr("bench.machine.available_bytes", lambda device: 30_000)
    with pytest.raises(RuntimeError, match=r"Weight, momentum and cache take .* are available"):
        Training(CASE)
