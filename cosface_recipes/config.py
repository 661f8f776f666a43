"""The settings of a training: from a YAML file, then from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from cosface_recipes.data.augmentation import AUGMENTATIONS
from cosface_recipes.schedule import SCHEDULES

CHOICES = {
    "color": ("rgb", "gray"),
    "augmentation": AUGMENTATIONS,
    "on_corrupt": ("raise", "skip"),
    "schedule": SCHEDULES,
    "amp": ("no", "bf16", "fp16"),
}
# What a resumed run may change: everything else would make it another training.
FREE_TO_CHANGE = {
    "output",
    "resume",
    "workers",
    "device",
    "threads",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "test",
    "far",
}


def setting(default: object, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a training. Raises ValueError with the value that is out of range."""

    train: str = setting("", "training data: a folder with a sub-folder per identity, or a .rec file")
    test: tuple[str, ...] = setting((), "test data of other identities: folders, .rec files, LFW-style .bin files")
    output: str = setting("build/run", "folder of the checkpoint, the logs and the exported model")
    resume: bool = setting(False, "go on from the output folder's checkpoint, if there is one")

    image_size: int = setting(112, "pixels of an image's side")
    color: str = setting("rgb", "how images are read")
    augmentation: str = setting("face", "of the training images")
    on_corrupt: str = setting("raise", "what to do with an image that cannot be read")
    workers: int = setting(2, "processes that read images, per training process; 0: the training process itself")

    model: str = setting("iresnet50", "iresnet18, 34, 50, 100, glyphnet, or timm:NAME")
    embedding_size: int = setting(512, "length of an embedding")
    margin: float = setting(0.35, "m of CosFace")
    scale: float = setting(64.0, "s of CosFace")

    epochs: float = setting(20.0, "passes over the training images")
    steps: int = setting(0, "length of the training in steps, instead of epochs")
    batch_size: int = setting(512, "images per step, over all processes")
    learning_rate: float = setting(0.1, "its peak")
    schedule: str = setting("polynomial", "how the learning rate falls")
    power: float = setting(2.0, "of the polynomial schedule")
    milestones: tuple[float, ...] = setting((), "of the step schedule, as shares of the training")
    warm_up: float = setting(0.0, "share of the steps in which the learning rate rises to its peak")
    momentum: float = setting(0.9, "of SGD")
    nesterov: bool = setting(False, "SGD's momentum is Nesterov's")
    weight_decay: float = setting(5e-4, "of the backbone and of the head")
    amp: str = setting("no", "precision of the backbone's matrix products; the head sums in float32 in any case")

    evaluate_every: int = setting(1, "epochs between evaluations; 0: at the end alone")
    far: float = setting(1e-3, "false acceptance rate at which the decision threshold is chosen")
    flip: bool = setting(True, "test embeddings are those of an image and of its mirror image, added")
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: an epoch")
    log_every: int = setting(20, "steps between TensorBoard scalars")
    device: str = setting("", "cpu, cuda, ...; empty: a GPU if there is one")
    threads: int = setting(0, "of PyTorch on the CPU; 0: PyTorch's default")
    seed: int = setting(0, "of weights, batches and augmentation")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        for name, least in {
            **{"image_size": 8, "embedding_size": 1, "batch_size": 2, "log_every": 1, "steps": 0, "workers": 0},
            **{"evaluate_every": 0, "checkpoint_every": 0, "threads": 0, "seed": 0},
        }.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in ("epochs", "learning_rate", "scale", "power"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        for name in ("warm_up", "momentum"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}.")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}.")
        if not 0 < self.far < 1:
            raise ValueError(f"far must be above 0 and below 1, got {self.far}.")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0.0.")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones must rise between 0 and 1, got {list(self.milestones)}.")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule step needs milestones, such as 0.5 0.8.")

    @property
    def channels(self) -> int:
        return {"rgb": 3, "gray": 1}[self.color]

    @property
    def torch_device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


def parse(argv: Sequence[str] | None, description: str | None = None) -> Config:
    """The settings of a command line: defaults, then --config FILE.yaml, then the options, the last one counting.

    Raises:
        ValueError: a setting does not exist or has a wrong value.
        OSError: the file cannot be read.

    >>> parse(["--train", "faces", "--epochs", "3", "--no-flip"]).epochs
    3.0
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="file of settings, under the names below")
    for name, field in FIELDS.items():
        kind = TYPES[name]
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shown = {"help": f"{field.metadata['help']} (default: {default if default != '' else 'none'})"}
        if kind is bool:
            shown["action"] = argparse.BooleanOptionalAction
        elif name in CHOICES:
            shown["choices"] = CHOICES[name]
        elif typing.get_origin(kind) is tuple:
            shown |= {"nargs": "*", "metavar": "VALUE"}
        else:
            shown["metavar"] = "VALUE"
        parser.add_argument(f"--{name.replace('_', '-')}", **shown)
    options = vars(parser.parse_args(argv))
    file = options.pop("config", None)
    settings = read(file) if file else {}
    return make(settings | options)


def read(path: Path) -> dict[str, object]:
    """The settings in a YAML file."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The configuration {path} must be lines of `name: value`, got {settings!r}.")
    return settings


def make(settings: dict[str, object]) -> Config:
    """A Config from names and values that may still be text."""
    for name in settings:
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, n=1)
            raise ValueError(f"There is no setting {name!r}{f'; did you mean {close[0]}?' if close else '.'}")
    return Config(**{name: convert(name, value) for name, value in settings.items()})


def convert(name: str, value: object) -> object:
    kind = TYPES[name]
    try:
        if value is None:
            raise ValueError
        if typing.get_origin(kind) is tuple:
            values = value if isinstance(value, list | tuple) else [value]
            return tuple(map(typing.get_args(kind)[0], values))
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and int(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"{name} must be {expected.get(kind, 'a list of values')}, got {value!r}.") from None


def dump(config: Config) -> str:
    """The settings as YAML."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    return yaml.safe_dump(settings, sort_keys=False)


def difference(old: Config, new: Config) -> str:
    """The settings in which a resumed run differs, as text; those that it may change left out."""
    changed = {name: (getattr(old, name), getattr(new, name)) for name in FIELDS if name not in FREE_TO_CHANGE}
    return ", ".join(f"{name} was {a!r} and is {b!r}" for name, (a, b) in changed.items() if a != b)
