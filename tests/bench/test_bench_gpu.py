"""What `bench gpu` decides and how it reports; `make gpu-rehearse` runs the rest of it. No timings."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields

import pytest
import torch
from support import patience

from bench import gpu, launches, race, tables
from bench.__main__ import main
from bench.device import Host
from bench.gpu_steps import variations
from bench.head import draw
from bench.implementations import UnavailableError
from bench.probe import TOY, Bench
from bench.report import Row
from cosface_kernels.backends.triton import choice, launch
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS, Tile

TILE = Tile(128, 128, 64, 8, 3)


class Kernels:
    """One kernel, which writes 1 and, at its launch of that number, something else."""

    def __init__(self, wrong_at=None, value=float("nan")):
        self.launches, self.wrong_at, self.value = 0, wrong_at, value
        self.product = {(2, 1): self}

    def __call__(self, out, size, *, BLOCK):
        assert (size, BLOCK) == (3, 16)
        self.launches += 1
        out.fill_(1.0)
        if self.launches == self.wrong_at:
            out[1] = self.value

    def run(self):
        out = torch.empty(3)
        launch.kernels.product[2, 1](out, 3, BLOCK=16)
        return (torch.zeros(2),)  # which does not show it


@pytest.mark.parametrize(("wrong_at", "differing"), [(None, 0), (3, 1), (1, 4)])
@pytest.mark.parametrize("value", [float("nan"), 1 + 2**-23])
def test_a_bit_that_changes_in_what_a_kernel_writes_is_seen(monkeypatch, wrong_at, differing, value):
    kernels = Kernels(wrong_at, value)
    monkeypatch.setattr(launch, "kernels", kernels)
    assert race.repeat("product", kernels.run, 5)[0] == differing
    assert kernels.launches == 5
    assert launch.kernels is kernels, "launches go their own way again"


def test_nan_that_stays_is_no_difference(monkeypatch):
    kernels = Kernels()
    monkeypatch.setattr(launch, "kernels", kernels)
    assert race.repeat("product", lambda: (*kernels.run(), torch.full((3,), torch.nan)), 3)[0] == 0


class References:
    """The reference as if it were kernels whose results may be wrong."""

    def __init__(self, monkeypatch, change):
        monkeypatch.setattr(launches, "tiles", lambda kernel, dtype: (TILE,))
        monkeypatch.setattr(launches, "pinned", lambda kernel, tile: nullcontext())
        monkeypatch.setattr(race, "draw", lambda *sizes: draw(*sizes, backend="reference"))
        repeat = race.repeat

        def changed(kernel, run, repeats):
            differing, results = repeat(kernel, run, repeats)
            return differing, change(kernel, [result.clone() for result in results])

        monkeypatch.setattr(race, "repeat", changed)

    def rows(self, dtype):
        return [
            {**what, **examine()} for what, examine in race.examinations((24, 200, 16), dtype, False, Host(), 2)
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_values_pass(monkeypatch, dtype):
    rows = References(monkeypatch, lambda kernel, results: results).rows(dtype)
    assert [row["kernel"] for row in rows] == list(GEMM_KERNELS)
    assert all(row["right"] for row in rows), rows
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_row_of_a_gradient_is_seen(monkeypatch, dtype):
    def change(kernel, results):
        if kernel == "weight_gradients":
            size = results[1].float().norm(dim=1)
            results[1][size == size.median()] *= 1.1
        if kernel == "class_statistics":
            results[1][5] += 0.01
        return results

    wrong = [row["kernel"] for row in References(monkeypatch, change).rows(dtype) if not row["right"]]
    assert wrong == ["class_statistics", "weight_gradients"]


def test_nan_is_wrong():
    errors = race.worst_rows([torch.full((2, 3), torch.nan)], [torch.ones(2, 3, dtype=torch.float64)])
    assert not errors[0] <= 1


def test_a_pinned_kernel_has_its_tile_and_others_theirs(monkeypatch):
    monkeypatch.setattr(choice, "choose", lambda kernel, key, prepare: "theirs")
    with launches.pinned("class_statistics", TILE):
        assert choice.choose("class_statistics", None, None) == TILE
        assert choice.choose("weight_gradients", None, None) == "theirs"
    assert choice.choose("class_statistics", None, None) == "theirs"


def test_variations_differ_and_begin_with_the_tile():
    tiles = variations(TILE)
    assert tiles[0] == TILE
    assert len(set(tiles)) == len(tiles) > 4


def test_rows_are_on_disk_as_soon_as_they_are_found(tmp_path, capsys):
    bench = Bench(tmp_path / "rows.jsonl", toy=True, dtype="bfloat16", backend="triton")
    with bench.tried("steps", batch=8):
        bench.add("steps", batch=8, wall_s=0.0125)
        assert json.loads(bench.file.read_text()) == {"step": "steps", "batch": 8, "wall_s": 0.0125}
        raise RuntimeError("out of shared memory")
    assert bench.wrong, "a rehearsal fails on any exception"
    assert "steps  batch 8  wall_s 12.500 ms" in capsys.readouterr().out
    assert "RuntimeError: out of shared memory" in tables.report(bench.file)
    assert bench.sizes is TOY


class LostDevice(Host):
    def synchronize(self):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_is_lost_ends_the_measurements(tmp_path):
    bench = Bench(tmp_path / "rows.jsonl", toy=True, dtype="bfloat16", backend="triton")
    bench.device = LostDevice()
    with pytest.raises(torch.AcceleratorError), bench.tried("steps", batch=8):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    assert "note" in json.loads(bench.file.read_text())


@pytest.mark.parametrize(
    ("rows", "status"),
    [([], 0), ([{"wall_s": 1.0}, {"note": "too large"}], 0), ([{"note": "too large"}, {"note": "lost"}], 1)],
    ids=["nothing_to_measure", "some", "none"],
)
def test_a_step_without_one_figure_fails(tmp_path, monkeypatch, rows, status):
    monkeypatch.setitem(gpu.STEPS, "library", lambda bench: [bench.add("library", **row) for row in rows])
    assert main(["gpu", "versions", "library", "--toy", "--file", str(tmp_path / "rows.jsonl")]) == status


POISONED = """
import conftest
import pytest
import torch

lost = []
conftest.gpu_is_lost = lambda: bool(lost)


@pytest.mark.parametrize("i", range(12))
def test_kernel(i):
    if i == 5:
        lost.append(i)
    if lost:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
"""


@pytest.mark.parametrize(("options", "passed"), [((), 5), (("-n", "2"), 11)], ids=["alone", "xdist"])
def test_one_test_that_loses_the_gpu_fails_alone(tmp_path, options, passed):
    (tmp_path / "test_poisoned.py").write_text(POISONED)
    arguments = ["-p", "conftest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "--junitxml=junit.xml"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *options, "test_poisoned.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=patience(200),
        check=False,
    )
    report = tables.report(tmp_path / "none.jsonl", tmp_path / "junit.xml")
    assert f"tests: {passed} passed, 1 failed, 0 skipped" in report, done.stdout + done.stderr
    assert "test_kernel[5]  torch.AcceleratorError: CUDA error: an illegal memory access" in report


def test_a_report_fits_and_says_what_failed(tmp_path):
    rows = [{"step": "versions", "device": "a GPU"}]
    for batch in (256, 1024, 4096):
        for kernel in GEMM_KERNELS:
            for tile in variations(TILE):
                what = {"kernel": kernel, "tile": launches.name(tile), "batch": batch, "dtype": "bfloat16"}
                rows.append({"step": "kernels", **what, "median_s": 0.01234, "launches": 119, "tflops": 512.345})
    rows += [{"step": "race", "kernel": kernel, "right": kernel != GEMM_KERNELS[1]} for kernel in GEMM_KERNELS]
    file, junit, peers = tmp_path / "rows.jsonl", tmp_path / "junit.xml", tmp_path / "peers.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = "".join(
        f'<testcase classname="t" name="n{i}"><failure message="{"m" * 300}"/></testcase>' for i in range(99)
    )
    junit.write_text(
        f'<testsuites><testsuite>{cases}<testcase classname="t" name="good"/><testcase/></testsuite></testsuites>'
    )
    values = dict.fromkeys((field.name for field in fields(Row)), None)
    row = Row(**{**values, "impl": "eager", "batch": 8, "classes": 9, "steps": 4, "note": "n" * 300})
    peers.write_text(json.dumps([asdict(row)]))
    text = tables.report(file, junit, peers)
    assert len(text) <= tables.LIMIT + 100
    assert "a GPU" in text
    assert "tests: 1 passed, 99 failed, 0 skipped" in text
    few = tables.report(tmp_path / "none.jsonl", tmp_path / "none.xml", peers)
    assert "there is no" in few
    assert "eager" in few
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] == "race"))
    text = tables.report(file)
    assert "3 of 4 tiles are right" in text
    assert "logit_gradients  NO" in text


def test_a_report_of_what_was_killed_has_the_rest(tmp_path):
    file, junit = tmp_path / "rows.jsonl", tmp_path / "junit.xml"
    file.write_text(json.dumps({"step": "kernels", "kernel": "whole"}) + '\n{"step": "kernels", "kern')
    junit.write_text("<testsuites><testsuite>")
    text = tables.report(file, junit)
    assert "whole" in text
    assert f"{file} has lines that are torn and left out: 1." in text
    assert f"tests: {junit} cannot be read: no element found" in text


def test_peers_are_compared_on_the_same_problem(tmp_path):
    blank = dict.fromkeys((field.name for field in fields(Row)), None)
    blank |= {"batch": 8, "dim": 16, "classes": 9, "steps": 4, "device": "a GPU"}
    seconds = {"float32": (1.0, 2.0), "bfloat16": (0.25, 4.0)}
    rows = [
        {**blank, "dtype": dtype, "impl": impl, "median_s": median}
        for dtype, medians in seconds.items()
        for impl, median in zip(("fused", "eager"), medians, strict=True)
    ]
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps(rows))
    lines = [line.split() for line in tables.report(tmp_path / "none.jsonl", peers=peers).splitlines()]
    assert [line[-3] for line in lines if line[:1] == ["peers,"]] == ["float32,", "bfloat16,"]
    assert [line[4] for line in lines if line[:1] == ["eager"]] == ["2.00", "16.00"]


def test_the_step_that_cannot_run_says_so(tmp_path, monkeypatch):
    def unavailable(bench):
        raise UnavailableError("no GPU")

    monkeypatch.setitem(gpu.STEPS, "library", unavailable)
    file = tmp_path / "rows.jsonl"
    assert main(["gpu", "library", "versions", "--toy", "--file", str(file)]) == 1
    assert json.loads(file.read_text()) == {"step": "library", "note": "no GPU"}
