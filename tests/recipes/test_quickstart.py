"""The quick starts, with fewer steps: each shows the loss falling and a rate rising."""

import re

import pytest
import torch

import linear_to_cosface
from cosface_kernels import FusedCosFaceLoss

HEADS = {
    "linear": linear_to_cosface.LinearHead,
    "cosface": lambda size, classes: FusedCosFaceLoss(classes, size, margin=0.2, scale=16.0),
}


@pytest.mark.parametrize("head", HEADS)
def test_linear_to_cosface(head, monkeypatch, capsys, restore_threads):
    torch.set_num_threads(1)
    monkeypatch.setattr(linear_to_cosface, "STEPS", 200)
    linear_to_cosface.train(HEADS[head](linear_to_cosface.SIZE, linear_to_cosface.CLASSES))
    lines = re.findall(r"loss +([\d.]+) .* ([\d.]+)%", capsys.readouterr().out)
    losses, rates = zip(*[(float(loss), float(rate)) for loss, rate in lines], strict=True)
    assert list(losses) == sorted(losses, reverse=True)
    assert list(rates) == sorted(rates)
    assert rates[-1] > 80
