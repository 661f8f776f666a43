"""The training recipe in miniature: its data, its command line, what a run leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import glyphs_to_records
import train
from cosface_kernels import checkpoint
from cosface_recipes import config, training
from cosface_recipes.data.glyphs import load_glyphs
from cosface_recipes.data.images import Images
from support import patience

TRAIN = Path(train.__file__)
HANGUL = glyphs_to_records.HANGUL
CHARACTERS, FONTS = 12, 6


def some_glyphs(split: str, fonts: int) -> Images:
    images = load_glyphs(split, HANGUL)
    total = len(images.identities)
    rows = torch.arange(len(images)).reshape(-1, total)[:fonts, :CHARACTERS].flatten()
    return Images(images.pixels[rows], images.labels[rows], images.identities[:CHARACTERS])


def as_arguments(settings: config.Config) -> list[str]:
    arguments = []
    for name, value in vars(settings).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-"))
        elif value != getattr(config.Config, name):
            arguments += [option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return arguments


def said(capsys) -> str:
    """What was printed to either stream, without the frames and line breaks of tyro's boxes."""
    printed = capsys.readouterr()
    return " ".join("".join(" " if "\u2500" <= c <= "\u257f" else c for c in printed.out + printed.err).split())


def losses(output: str) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows them."""
    events = EventAccumulator(f"{output}/tensorboard", size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def everything(output: str) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint: weights, statistics, momentum."""
    path = checkpoint.latest(Path(output) / training.CHECKPOINTS)
    names = {name for file in path.glob("*.safetensors") for name in load_file(file)} - {checkpoint.STRUCTURE}
    return {name: checkpoint.load_tensor(path, name) for name in names}


def assert_same_training(a: str, b: str) -> None:
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    assert {"head/weight", "network/8.running_var"} <= ours.keys()
    states = tuple(f"head_optimizer/state/0/{name}" for name in ("momentum_buffer", "exp_avg"))
    assert any(name.startswith(states) for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert losses(a) == losses(b)


def launch(settings: config.Config, *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(TRAIN), *as_arguments(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def launch_several(settings: config.Config, processes: int = 2) -> str:
    process = launch(settings, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{processes}")
    out, err = process.communicate(timeout=patience(240))
    assert process.returncode == 0, err
    return out
