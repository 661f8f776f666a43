"""The quick starts: each shows the loss falling and a rate rising."""

import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from support import patience

import linear_to_cosface
from cosface_kernels import FusedCosFaceLoss

FOLDER = Path(linear_to_cosface.__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HEADS = {
    "linear": linear_to_cosface.LinearHead,
    "cosface": lambda size, classes: FusedCosFaceLoss(classes, size, margin=0.2, scale=16.0),
}


@pytest.mark.parametrize("head", HEADS)
def test_linear_to_cosface(head, monkeypatch, capsys, restore_threads):
    torch.set_num_threads(1)
    monkeypatch.setattr(linear_to_cosface, "STEPS", 200)
    linear_to_cosface.train(HEADS[head](linear_to_cosface.SIZE, linear_to_cosface.CLASSES))
    check(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        pytest.param("from_pytorch_metric_learning.py", (), id="from_pytorch_metric_learning"),
        pytest.param("from_insightface.py", (), id="from_insightface"),
        pytest.param("from_insightface.py", TORCHRUN, id="from_insightface-torchrun"),
        pytest.param("with_lightning.py", (), id="with_lightning"),
        pytest.param("with_accelerate.py", (), id="with_accelerate"),
    ],
)
def test_as_its_reader_runs_it(script, launcher, tmp_path):
    """In a process of its own, whose path for modules begins with the script's folder."""
    command = [sys.executable, *launcher, str(FOLDER / script)]
    limit = patience(300)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=limit, check=False)
    assert run.returncode == 0, run.stderr
    check(run.stdout)
    assert not list(tmp_path.iterdir())


def check(output: str) -> None:
    """Curves with a heading between them: in each the loss falls and the rate rises, in the last past 80 %."""
    lines = re.findall(r"^(?:step.*?loss +([\d.]+) .* ([\d.]+)%|.+)$", output, re.MULTILINE)
    curves = [list(curve) for is_curve, curve in groupby(lines, key=any) if is_curve]
    for curve in curves:
        losses, rates = zip(*[(float(loss), float(rate)) for loss, rate in curve], strict=True)
        assert len(curve) >= 3
        assert list(losses) == sorted(losses, reverse=True)
        assert list(rates) == sorted(rates)
    assert rates[-1] > 80


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_is_short(script):
    assert len((FOLDER / script).read_text().splitlines()) < 60
