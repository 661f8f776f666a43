"""The samples of a training: their order and their augmentation depend on the seed and the step alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cosface_recipes.config import Config


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


def fit_batch(config: Config, images: int, world: int) -> tuple[Config, str]:
    """The settings with a batch that the data can fill, and a warning where that is a smaller one.

    Raises:
        ValueError: the processes cannot share the batch, or have fewer than two images each.
    """
    if config.batch_size % world:
        raise ValueError(f"batch_size must divide by the {world} processes, got {config.batch_size}.")
    if config.batch_size < 2 * world:
        raise ValueError(f"batch_size must be two images for each of {world} processes, got {config.batch_size}.")
    if config.batch_size <= images:
        return config, ""
    largest = images - images % world
    if largest < 2 * world:
        raise ValueError(f"A training needs two images for each process, got {images} in {config.train}.")
    smaller = dataclasses.replace(config, batch_size=largest)
    return smaller, (
        f"Warning: batch_size {config.batch_size} is more than the {images} images in {config.train}. It is "
        f"reduced to {largest}, so that an epoch is 1 step and the training {smaller.length(images):,}: a smaller "
        "--batch-size, or more --epochs, makes more of them."
    )
