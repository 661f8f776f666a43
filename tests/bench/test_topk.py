"""`python -m bench topk` at tiny sizes: every implementation is right, and a wrong one is found; no timings."""

import json

import pytest
import torch

from bench import topk
from bench.__main__ import main
from bench.report import Row
from bench.worker import Case
from cosface_kernels import NearestClasses

OWN = [name for name in topk.IMPLEMENTATIONS if name != "faiss"]  # which is not among the packages of the tests


def case_of(impl: str, dtype: str = "float32") -> Case:
    return Case(impl, 8, 16, 300, dtype, margin=0.35, scale=64.0, seed=0, threads=1)


def test_command_writes_the_rows_of_step(tmp_path, capsys):
    out = tmp_path / "rows.json"
    tiny = ["--batch", "8", "--dim", "16", "--classes", "300", "--threads", "1", "--rounds", "1", "--k", "3"]
    assert main(["topk", *tiny, "--impl", "fused,forward,logits", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    found = [(row["impl"], row["margin"], row["scale"]) for row in rows]
    assert found == [("fused", None, None), ("forward", 0.35, 64.0), ("logits", None, None)]
    for row in rows:
        assert set(row) == set(Row.__dataclass_fields__)
        assert row["median_s"] > 0
        assert 0 < row["max_rel_err"] < 1e-6
    assert "fused" in capsys.readouterr().out


@pytest.mark.parametrize("impl", OWN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finds_what_float64_finds(impl, dtype):
    case = case_of(impl, dtype)
    accuracy = topk.Check(case, k=5).turn()
    assert 0 < accuracy.error <= accuracy.allowed(dtype, case.scale)
    assert topk.Measure(case, k=5).turn().seconds


def test_check_finds_a_class_that_is_not_among_the_nearest(monkeypatch):
    def wrong(problem, k):
        find = topk._fused(problem, k)
        return lambda: NearestClasses(find().cosines, find().classes.roll(1, 0))

    monkeypatch.setitem(topk.IMPLEMENTATIONS, "fused", topk.Implementation(wrong))
    accuracy = topk.Check(case_of("fused"), k=5).turn()
    assert accuracy.error > 100 * accuracy.allowed("float32", 64.0)


def test_check_finds_a_wrong_loss(monkeypatch):
    def wrong(problem, k):
        forward = topk._forward(problem, k)
        return lambda: forward() + torch.tensor(1.0)

    monkeypatch.setitem(topk.IMPLEMENTATIONS, "forward", topk.Implementation(wrong))
    accuracy = topk.Check(case_of("forward"), k=5).turn()
    assert accuracy.error > 100 * accuracy.allowed("float32", 64.0)
