"""A training from its settings to the exported model: data, backbone, fused head, checkpoints, evaluation.

The order of the images and their augmentation depend on the seed and the step alone, so a resumed training is the
uninterrupted one, on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cosface_kernels import FusedCosFaceLoss, checkpoint
from cosface_kernels.optim import FusedSGD
from cosface_recipes.config import Config, difference, dump, make, read
from cosface_recipes.data.augmentation import make_transform
from cosface_recipes.data.image_datasets import open_dataset
from cosface_recipes.evaluation.held_out import Result, evaluate, table
from cosface_recipes.export import Description, export
from cosface_recipes.models import make_model
from cosface_recipes.schedule import learning_rate_factor

CHECKPOINTS, SETTINGS = "checkpoints", "settings.yaml"
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ValueError):
    """The loss became infinite or nan; the message names the batch."""


def make_head(config: Config, num_classes: int, device: torch.device) -> FusedCosFaceLoss:
    """(embeddings, labels) -> the loss of the batch of all processes, which share out the classes."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return FusedCosFaceLoss(
        num_classes, config.embedding_size, config.margin, config.scale, process_group=group, device=device
    )


def make_optimizers(
    config: Config, backbone: nn.Module, head: nn.Module, scaler: torch.amp.GradScaler
) -> dict[str, torch.optim.Optimizer]:
    """SGD twice; the head's moves its rows inside backward where that is possible."""
    options = {
        "lr": config.learning_rate,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "weight_decay": config.weight_decay,
    }
    backbone_sgd = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], **options)
    if next(head.parameters()).device.type == "cpu":
        head_sgd = FusedSGD(head.parameters(), **options, grad_scaler=scaler if scaler.is_enabled() else None)
    else:
        head_sgd = torch.optim.SGD(head.parameters(), **options)
    return {"backbone_optimizer": backbone_sgd, "head_optimizer": head_sgd}


@dataclasses.dataclass
class Batches:
    """The samples of this process, step by step: lists of (index, seed of its augmentation).

    Each epoch is a new order of all images; what is left of it after the last whole batch is dropped.
    """

    images: int
    batch_size: int  # over all processes
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.images // self.batch_size
        order, ordered = None, None
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, per_epoch)
            if ordered != epoch:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch)[0])
                order, ordered = torch.randperm(self.images, generator=generator), epoch
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            seeds = mix(self.seed, epoch, step, count=self.batch_size)
            yield [*zip(rows, seeds, strict=True)][self.rank :: self.world]


def mix(*numbers: int, count: int = 1) -> list[int]:
    """Seeds that depend on all the numbers."""
    return np.random.SeedSequence(numbers).generate_state(count).tolist()


@dataclasses.dataclass(frozen=True)
class Seeded(Dataset):
    """(image, label, index) of an (index, seed), augmented as the seed says, in whatever process."""

    dataset: Dataset

    def __getitem__(self, sample: tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = sample
        torch.default_generator.manual_seed(seed)
        image, label = self.dataset[index]
        return image, label, index


def detach_worker(_: int) -> None:
    """A scheduler or Ctrl-C that signals the process group must leave the loader to the training process."""
    torch.set_num_threads(1)
    os.setpgrp()


class Training:
    """A training from its configuration to the exported model.

    Attributes:
        step: optimizer steps done.
        stopping: set by SIGTERM; the training ends after the step in hand, and saves.
    """

    def __init__(self, config: Config):
        self.config = config
        self.output = Path(config.output)
        self.device = device_of(config)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if config.batch_size % self.world:
            raise ValueError(f"batch_size must divide by the {self.world} processes, got {config.batch_size}.")
        if not config.train:
            raise ValueError("train must name the training data: --train FOLDER or --train FILE.rec.")
        transform = make_transform(config.augmentation, config.image_size)
        self.data = open_dataset(config.train, transform, on_corrupt=config.on_corrupt, color=config.color)
        self.steps_per_epoch = len(self.data) // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size must be at most the {len(self.data)} images, got {config.batch_size}.")
        self.steps = config.steps or max(1, round(config.epochs * self.steps_per_epoch))

        torch.manual_seed(config.seed)
        self.network = make_model(
            config.model,
            channels=config.channels,
            image_size=config.image_size,
            embedding_size=config.embedding_size,
        ).to(self.device)
        self.backbone = DistributedDataParallel(self.network) if dist.is_initialized() else self.network
        self.head = make_head(config, self.data.num_classes, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.optimizers = make_optimizers(config, self.network, self.head, self.scaler)
        self.step = 0
        self.stopping = False

    @property
    def state(self) -> dict[str, checkpoint.Stateful]:
        return {"network": self.network, "head": self.head, "scaler": self.scaler, **self.optimizers}

    def begin(self) -> None:
        """From the first step, or from the newest checkpoint."""
        folder, file = self.output / CHECKPOINTS, self.output / SETTINGS
        if checkpoint.latest(folder) is None:
            if self.rank == 0:
                self.output.mkdir(parents=True, exist_ok=True)
                file.write_text(dump(self.config), encoding="utf-8")
            return
        if not self.config.resume:
            raise ValueError(f"{folder} exists: --resume goes on from it, another --output starts anew.")
        if changed := difference(make(read(file)), self.config):
            raise ValueError(f"{folder} is of another training: {changed}.")
        self.step = checkpoint.load(folder, **self.state)

    def run(self) -> list[Result] | None:
        """Train, evaluate, export. None if a SIGTERM came first."""
        self.begin()
        self.say(
            f"{len(self.data):,} images of {self.data.num_classes:,} identities, "
            f"steps {self.step:,} to {self.steps:,}, {self.steps_per_epoch:,} an epoch, on {self.device}"
        )
        with sigterm(self), self.writer() as self.log:
            try:
                finished = self.learn_all()
            finally:
                if corrupt := self.data.corrupt:
                    self.say(f"{len(corrupt)} images could not be read and were skipped: {shorten(corrupt)}")
            if not finished:
                self.say(f"SIGTERM: saved step {self.step:,} in {self.output}; --resume goes on from there.")
                return None
            results = self.evaluate()
        self.export(results)
        return results

    def learn_all(self) -> bool:
        """All steps that are left; False if SIGTERM ends them early."""
        config = self.config
        checkpoint_every = config.checkpoint_every or self.steps_per_epoch
        evaluate_every = config.evaluate_every * self.steps_per_epoch
        with tqdm(
            total=self.steps * config.batch_size,
            initial=self.step * config.batch_size,
            unit=" samples",
            unit_scale=True,
            disable=self.rank > 0,
            mininterval=0.5,
        ) as bar:
            for images, labels, indices in self.loader():
                value, accuracy, stop = self.learn(images, labels, indices)
                bar.update(config.batch_size)
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if self.step % config.log_every == 0:
                    self.scalars({"train/loss": value, "train/accuracy": accuracy})
                    self.scalars({"train/samples_per_second": bar.format_dict["rate"] or 0.0})
                    self.scalars({"train/learning_rate": self.optimizers["head_optimizer"].param_groups[0]["lr"]})
                if stop or self.step % checkpoint_every == 0 or self.step == self.steps:
                    self.save()
                if stop:
                    return False
                if evaluate_every and self.step % evaluate_every == 0 and self.step < self.steps:
                    bar.clear()
                    self.evaluate()
        return True

    def learn(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[float, float, bool]:
        """One step: loss and accuracy of the batch of all processes, and whether one of them was told to stop."""
        config = self.config
        images = images.to(self.device, non_blocking=True)  # (n, channels, size, size)
        labels = labels.to(self.device, non_blocking=True)  # (n,)
        torch.manual_seed(mix(config.seed, self.step, self.rank)[0])  # dropout's, say
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = config.learning_rate * learning_rate_factor(
                self.step,
                self.steps,
                config.schedule,
                warm_up=config.warm_up,
                power=config.power,
                milestones=config.milestones,
            )
        precision = AUTOCAST[config.amp]
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            embeddings = self.backbone(images)  # (n, embedding_size) float32
        loss, stats = self.head(embeddings, labels, return_stats=True)
        value = loss.item()
        if not math.isfinite(value):
            raise self.non_finite(value, indices)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.step += 1
        return value, float(stats.accuracy), self.any_process(self.stopping)

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process: all of them must leave the loop after the same step."""
        if self.world == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.uint8, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def non_finite(self, value: float, indices: Tensor) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"The loss became {value} at step {self.step} of {self.steps}, on the images "
            f"{', '.join(str(self.data.keys[i]) for i in indices.tolist())}. If these are sound, a learning rate "
            f"below {self.config.learning_rate:g} or a longer warm-up may help."
        )

    def loader(self) -> DataLoader:
        config = self.config
        batches = Batches(
            len(self.data), config.batch_size, config.seed, self.step, self.steps, self.rank, self.world
        )
        return DataLoader(
            Seeded(self.data),
            batch_sampler=batches,
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=detach_worker,
        )

    def save(self) -> None:
        checkpoint.save(self.output / CHECKPOINTS, self.step, **self.state)

    def evaluate(self) -> list[Result]:
        """On the first process; the others wait."""
        results = []
        if self.rank == 0 and self.config.test:
            results = evaluate(self.network, self.config, self.device)
            for result in results:
                self.scalars({f"test/{result.name}/{name}": rate for name, rate in result.rates.items()})
            tqdm.write(f"step {self.step:,}\n{table(results)}", file=sys.stdout)
        if self.world > 1:
            dist.barrier()
        return results

    def export(self, results: Sequence[Result]) -> None:
        if self.rank:
            return
        config = self.config
        first = results[0] if results else None
        description = Description(
            config.model,
            config.color,
            config.image_size,
            config.embedding_size,
            config.flip,
            first and first.threshold,
            first.chosen if first else "no test data",
        )
        difference = export(self.network, description, self.output)
        self.say(
            f"Exported to {self.output}: model.safetensors reproduces the embeddings, model.onnx with a relative "
            f"difference of {difference:.0e}."
        )

    @contextlib.contextmanager
    def writer(self) -> Iterator[SummaryWriter | None]:
        if self.rank:
            yield None
            return
        with SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step + 1) as writer:
            yield writer

    def scalars(self, values: dict[str, float]) -> None:
        if self.log is not None:
            for name, value in values.items():
                self.log.add_scalar(name, value, self.step)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def shorten(keys: Sequence[str], most: int = 20) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


@contextlib.contextmanager
def sigterm(training: Training) -> Iterator[None]:
    """While this lasts, SIGTERM asks the training to save and end."""

    def stop(*_: object) -> None:
        training.stopping = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def device_of(config: Config) -> torch.device:
    """Of this process: torchrun numbers those of a machine."""
    device = torch.device(config.torch_device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[None]:
    """Joins the processes of torchrun; without it, there is one process and no group."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    device = device_of(config)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
