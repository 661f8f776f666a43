"""Training an embedding network with one head or the other."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cosface_kernels import FusedCosFaceLoss
from cosface_recipes.data.images import Images
from cosface_recipes.evaluation.verification import Scores, compare_all
from cosface_recipes.glyphnet import EmbeddingNet, augment

WARM_UP = 0.1  # share of the steps in which the learning rate rises to its peak
# With few steps the running statistics of batch normalisation (momentum 0.1), with which a network is tested, are
# still those of its first weights: 8 steps, on 16 identities of 6 images, make it worse than it was untrained.
FEWEST_STEPS = 200
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training, apart from the data."""

    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 0.3
    weight_decay: float = 5e-4
    embedding_size: int = 128
    margin: float = 0.25
    scale: float = 12.0  # equation 6 of the paper: at 1,763 classes, a probability of 0.99 needs s = 12.1
    seed: int = 0

    def __post_init__(self) -> None:
        for field, least in (("epochs", 1), ("batch_size", 2), ("embedding_size", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}.")
        for field in ("learning_rate", "scale"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be positive and finite, got {getattr(self, field)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}.")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}.")


def epochs_for(images: int, batch_size: int) -> int:
    """Passes that make FEWEST_STEPS to MOST_STEPS; between the two, those of a Recipe."""
    steps = max(1, math.ceil(images / batch_size))  # of an epoch
    return max(min(Recipe.epochs, MOST_STEPS // steps), math.ceil(FEWEST_STEPS / steps), 1)


class SoftmaxLoss(nn.Linear):
    """The plain head: a linear layer and its cross-entropy."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(super().forward(embeddings), labels)


def make_heads(recipe: Recipe, num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """By name, functions that make a module (embeddings, labels) -> loss."""
    return {
        "plain softmax": lambda: SoftmaxLoss(recipe.embedding_size, num_classes),
        "CosFace": lambda: FusedCosFaceLoss(num_classes, recipe.embedding_size, recipe.margin, recipe.scale),
    }


def shuffled(labels: Tensor, batch_size: int, random: torch.Generator) -> list[Tensor]:
    """The images of an epoch in random order; without a last batch of one, which has no variance to normalise."""
    batches = torch.randperm(len(labels), generator=random).split(batch_size)
    return [rows for rows in batches if len(rows) > 1]


def one_sgd(recipe: Recipe, network: nn.Module, head: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([*network.parameters(), *head.parameters()], **sgd_options(recipe))]


def sgd_options(recipe: Recipe) -> dict[str, Any]:
    return {
        "lr": recipe.learning_rate,
        "momentum": 0.9,
        "weight_decay": recipe.weight_decay,
        "nesterov": True,
    }


def train(
    recipe: Recipe,
    images: Images,
    make_head: Callable[[], nn.Module],
    name: str,
    bar_position: int = 0,
    make_batches: Callable[[Tensor, int, torch.Generator], list[Tensor]] = shuffled,
    make_optimizers: Callable[[Recipe, nn.Module, nn.Module], list[torch.optim.Optimizer]] = one_sgd,
) -> tuple[EmbeddingNet, float, list[float]]:
    """Train a network from scratch.

    Args:
        make_head: gives a module that maps (embeddings, labels) to a loss.
        name: shown by the progress bar.
        bar_position: lines between the cursor and the progress bar.
        make_batches: from labels, batch size and generator to the rows of each batch of an epoch; of every epoch
            as many.
        make_optimizers: of network and head.

    Returns:
        The network, the seconds spent in the head, forward and backward, and the loss of each step.
    """
    network = make_network(recipe, images)
    head = make_head()
    random = torch.Generator().manual_seed(recipe.seed)
    optimizers = make_optimizers(recipe, network, head)
    steps = recipe.epochs * len(make_batches(images.labels, recipe.batch_size, torch.Generator()))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    head_seconds, losses = 0.0, []
    with tqdm(total=steps, desc=f"{name:13}", unit="step", position=bar_position, mininterval=0.5) as bar:
        for _ in range(recipe.epochs):
            for rows in make_batches(images.labels, recipe.batch_size, random):
                embeddings = network(augment(images.pixels[rows], random))
                # The head's graph is cut off at the embeddings, so that its backward can be timed on its own.
                features = embeddings.detach().requires_grad_()
                start = time.perf_counter()
                loss = head(features, images.labels[rows])
                loss.backward()
                head_seconds += time.perf_counter() - start
                embeddings.backward(features.grad)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"The loss of {name} became {value} at step {bar.n} of {steps}; a learning rate "
                        f"below {recipe.learning_rate:g} may help."
                    )
                losses.append(value)
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    return network, head_seconds, losses


def make_network(recipe: Recipe, images: Images) -> EmbeddingNet:
    """A fresh network; for a seed always the same."""
    torch.manual_seed(recipe.seed)
    return EmbeddingNet(images.pixels.shape[1], recipe.embedding_size)


def learning_rate_factor(step: int, steps: int) -> float:
    """A linear rise over the first tenth of the steps, then half a cosine down to 0."""
    return min((step + 1) / (WARM_UP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def score(network: EmbeddingNet, test: Images) -> Scores:
    return compare_all(network.embed(test.pixels), test.labels)


def train_and_score(job: bytes, name: str, line: int) -> bytes:
    """In a process of its own: the scores of a trained network, the seconds in its head, and its losses."""
    recipe, training, test, threads = pickle.loads(job)
    torch.set_num_threads(threads)
    make_head = make_heads(recipe, len(training.identities))[name]
    network, seconds, losses = train(recipe, training, make_head, name, line)
    return pickle.dumps((score(network, test), seconds, losses))
