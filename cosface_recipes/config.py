"""The settings of a training: from a YAML file, then from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
import tyro
import yaml

from cosface_recipes.data.augmentation import AUGMENTATIONS
from cosface_recipes.losses import LOSSES, parse_options
from cosface_recipes.schedule import SCHEDULES

# What a resumed run may change: everything else would make it another training.
FREE_TO_CHANGE = {
    "output",
    "resume",
    "epochs",
    "steps",
    "workers",
    "device",
    "threads",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "test",
    "far",
}
PEAKS = {"sgd": 0.1, "adamw": 1e-3}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # YAML 1.1's
DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a training. Raises ValueError with the value that is out of range."""

    train: str = ""  # training data: a folder with a sub-folder per identity, or a .rec file
    test: tuple[str, ...] = ()  # test data of other identities: folders, .rec files, LFW-style .bin files
    output: str = "build/run"  # folder of the checkpoint, the logs and the exported model
    resume: bool = False  # go on from the output folder's checkpoint, if there is one
    init: str = ""  # trained weights to begin with: a training's output or model.safetensors, or a backbone.pth

    image_size: int = 112  # pixels of an image's side
    color: Literal["rgb", "gray"] = "rgb"  # how images are read
    augmentation: Literal[AUGMENTATIONS] = "face"  # of the training images
    on_corrupt: Literal["raise", "skip"] = "raise"  # what to do with an image that cannot be read
    workers: int = 2  # processes that read images, per training process; 0: the training process itself

    model: str = "iresnet50"  # iresnet18, 34, 50, 100, glyphnet, or timm:NAME
    embedding_size: int = 512  # length of an embedding
    loss: Literal[tuple(LOSSES)] = "cosface"  # of cosface_kernels.family; docs/losses.md says which is for what
    margin: tuple[float, ...] = ()  # of the loss, one number or as many as it takes; its own default if empty
    scale: float | None = None  # s of the loss; its own default if none
    loss_options: tuple[str, ...] = ()  # further settings of the loss, as NAME=VALUE, such as t=0.3
    sample_rate: float = 1.0  # share of the classes in a step, the batch's own among them (Partial FC)
    gradient_tolerance: float = 0.0  # softmax mass that the head's backward may leave out of a sample; 0: exact

    head_dtype: Literal[DTYPES] = "float32"  # of the class centres
    head_state_dtype: Literal[("", *DTYPES)] = ""  # of their momentum; empty: as they, of float8_e4m3fn bfloat16

    epochs: float = 20.0  # passes over the training images
    steps: int = 0  # length of the training in steps, instead of epochs
    batch_size: int = 512  # images per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # of backbone and head; the head's moves rows inside backward
    learning_rate: float | None = None  # its peak; if none, 0.1 for sgd and 0.001 for adamw
    backbone_learning_rate: float | None = None  # of the backbone, if another; 0 leaves its parameters as they are
    schedule: Literal[SCHEDULES] = "polynomial"  # how the learning rate falls
    power: float = 2.0  # of the polynomial schedule
    milestones: tuple[float, ...] = ()  # of the step schedule, as shares of the training
    warm_up: float = 0.0  # share of the steps in which the learning rate rises to its peak
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # sgd's momentum is Nesterov's
    weight_decay: float = 5e-4  # of the backbone and of the head
    clip: float = 0.0  # norm to which the backbone's gradient is clipped, not the head's; 0: it is not
    ema: float = 0.0  # decay of a running average of the backbone, which is then tested and exported; 0: none
    amp: Literal["no", "bf16", "fp16"] = "no"  # of the backbone's matrix products; the head sums in float32 always

    evaluate_every: int = 1  # epochs between evaluations; 0: at the end alone
    far: float = 1e-3  # false acceptance rate at which the decision threshold is chosen
    flip: bool = True  # test embeddings are those of an image and of its mirror image, added
    checkpoint_every: int = 0  # steps between checkpoints; 0: an epoch
    log_every: int = 20  # steps between TensorBoard scalars
    device: str = ""  # cpu, cuda, ...; empty: a GPU if there is one
    threads: int = 0  # of PyTorch on the CPU; 0: PyTorch's default
    seed: int = 0  # of weights, batches, augmentation and sampled classes

    def __post_init__(self) -> None:
        for name, least in {
            **{"image_size": 8, "embedding_size": 1, "batch_size": 2, "log_every": 1, "steps": 0, "workers": 0},
            **{"evaluate_every": 0, "checkpoint_every": 0, "threads": 0, "seed": 0},
        }.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in ("epochs", "learning_rate", "scale", "power"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        for name in ("backbone_learning_rate", "weight_decay", "clip"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
        for name in ("warm_up", "momentum", "ema", "gradient_tolerance"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
        if not all(map(math.isfinite, self.margin)):
            raise ValueError(f"margin must be finite, got {' '.join(map(str, self.margin))}.")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, got {self.seed}.")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be above 0 and at most 1, got {self.sample_rate}.")
        if not 0 < self.far < 1:
            raise ValueError(f"far must be above 0 and below 1, got {self.far}.")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0.0.")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones must rise between 0 and 1, got {list(self.milestones)}.")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule step needs milestones, such as 0.5 0.8.")
        parse_options(self.loss, self.loss_options)

    @property
    def channels(self) -> int:
        return {"rgb": 3, "gray": 1}[self.color]

    @property
    def torch_device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def peaks(self) -> tuple[float, float]:
        """The peaks of the learning rate: the backbone's, the head's."""
        head = PEAKS[self.optimizer] if self.learning_rate is None else self.learning_rate
        return head if self.backbone_learning_rate is None else self.backbone_learning_rate, head

    def length(self, images: int) -> int:
        """Steps of the whole training."""
        return self.steps or max(1, round(self.epochs * (images // self.batch_size)))


def parse(argv: Sequence[str] | None, description: str | None = None) -> Config:
    """The settings of a command line: defaults, then --config FILE.yaml, then the options, the last one counting.

    Raises:
        SystemExit: a setting does not exist or has a wrong value, which is printed; or --help was asked for.
        ValueError: the file is no YAML of settings.
        OSError: the file cannot be read.

    >>> parse(["--train", "faces", "--epochs", "3", "--no-flip"]).epochs
    3.0
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    file, options = parser.parse_known_args(argv)
    of_file = read(file.config) if file.config else []
    try:
        return tyro.cli(
            Config, args=[*of_file, *options], description=description, config=(tyro.conf.DisallowNone,)
        )
    except SystemExit as end:
        if end.code and of_file:
            print(f"The configuration {file.config} was read as {shlex.join(of_file)}", file=sys.stderr)
        raise


def load(path: Path) -> Config:
    """The settings of a YAML file alone."""
    return parse(["--config", str(path)])


class WordLoader(yaml.SafeLoader):
    """Leaves `no` a word, which YAML 1.1 reads as false: `amp: no` is one of three names."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read(path: Path) -> list[str]:
    """The settings in a YAML file, as options of the command line."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), WordLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The configuration {path} must be lines of `name: value`, got {settings!r}.")
    known = [field.name for field in dataclasses.fields(Config)]
    options = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            advice = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"There is no setting {name!r}, which {path} has{advice}")
        option = name.replace("_", "-")
        if isinstance(getattr(Config, name), bool):
            if str(value).lower() not in BOOLEANS:
                raise ValueError(f"{name} must be true or false, got {value!r} in {path}.")
            options.append(f"--{option}" if BOOLEANS[str(value).lower()] else f"--no-{option}")
        elif isinstance(value, list):
            if wrong := [item for item in value if re.match("--|-[A-Za-z]", str(item))]:
                raise ValueError(f"{name} cannot have {wrong[0]!r}, which {path} has: it would be an option.")
            options += [f"--{option}", *map(str, value)]
        elif isinstance(value, dict) and name == "loss_options":
            items = {key: item if isinstance(item, str) else json.dumps(item) for key, item in value.items()}
            options += [f"--{option}", *(f"{key}={item}" for key, item in items.items())]
        elif isinstance(value, dict):
            raise ValueError(f"{name} cannot be {value!r}, which {path} has.")
        elif value is not None:  # an empty value stands for the default
            options.append(f"--{option}={value}")
    return options


def dump(config: Config) -> str:
    """The settings as YAML."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    return yaml.safe_dump(settings, sort_keys=False)


def difference(old: Config, new: Config) -> str:
    """The settings in which a resumed run differs, as text; those that it may change left out."""
    changed = [name for name in vars(old) if getattr(old, name) != getattr(new, name)]
    return ", ".join(
        f"{name} was {shown(getattr(old, name))} and is {shown(getattr(new, name))}"
        for name in changed
        if name not in FREE_TO_CHANGE
    )


def shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
