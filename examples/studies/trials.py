"""Trainings on the glyph data set that differ in loss and seed alone, two at a time, kept in a JSON file."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cosface_kernels.optim import FusedSGD
from cosface_recipes.arguments import count, whole
from cosface_recipes.data.glyphs import load_glyphs
from cosface_recipes.data.images import Images
from cosface_recipes.evaluation.protocols import cross_validate, pair_distances
from cosface_recipes.evaluation.verification import compare_all
from cosface_recipes.glyphnet import EmbeddingNet
from cosface_recipes.outputs import check_output
from cosface_recipes.small_training import Recipe, one_sgd, sgd_options, train

HANGUL = Path(__file__).parents[1] / "demo" / "data" / "hangul"
HELD_OUT = ("BM YEONSUNG", "NanumPen", "NanumSquare", "Noto Serif CJK")  # font families of the trials that choose
SYLLABLES_HELD_OUT = 4  # every fourth
IMAGES_PER_IDENTITY = 2  # in a batch, so that the losses of pairs and triplets find some
FARS = (1e-3, 1e-4)
NICENESS = 10  # of a training's process

RESULTS = Path(__file__).parent / "results"
SCALE = 12.0  # of all losses of cosines, after equation 6 of the paper: for 0.99 among 1,763 classes, s = 12.1
MARGIN = 0.25  # the demo's
EPOCHS = Recipe.epochs

# (num_classes, embedding_size, **setting) -> a module (embeddings, labels) -> loss
MakeHead = Callable[..., nn.Module]
MakeOptimizers = Callable[[Recipe, nn.Module, nn.Module], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        make_head: a module-level function or class, for it is sent to another process.
        setting: the keyword arguments of make_head; "learning_rate", if there, is the recipe's.
        held_out: test on identities and fonts held out from the training data, to choose a setting, and not on the
            test data.
        max_identities: the first so many; 0 for all. For tests.
    """

    loss: str
    make_head: MakeHead
    setting: dict[str, float]
    recipe: Recipe
    held_out: bool = False
    max_identities: int = 0

    @property
    def key(self) -> str:
        setting = " ".join(f"{name}={value:g}" for name, value in self.setting.items())
        return " | ".join(
            (self.loss, setting, "held out" if self.held_out else "test", f"seed {self.recipe.seed}")
        )

    @property
    def schedule(self) -> dict[str, float]:
        """What else decides the result."""
        names = ("epochs", "batch_size", "learning_rate", "weight_decay", "embedding_size")
        return {name: getattr(self.recipe, name) for name in names} | {"max_identities": self.max_identities}

    def run(self) -> dict[str, float]:
        """The rates of `measure`, or none if the loss became infinite or nan."""
        network, _, _ = self.train(self.make_head)
        return self.measure(network) if network else {}

    def train(
        self, make_head: MakeHead, make_optimizers: MakeOptimizers = one_sgd
    ) -> tuple[EmbeddingNet | None, float, int]:
        """The network, or None if the loss became infinite or nan; the seconds in the head; steps."""
        training = limit(load(self.held_out)[0], self.max_identities)
        setting = dict(self.setting)
        recipe = replace(self.recipe, learning_rate=setting.pop("learning_rate", self.recipe.learning_rate))
        steps = recipe.epochs * len(pairs(training.labels, recipe.batch_size, torch.Generator()))
        try:
            network, seconds, _ = train(
                recipe,
                training,
                lambda: make_head(len(training.identities), recipe.embedding_size, **setting),
                self.key,
                make_batches=pairs,
                make_optimizers=make_optimizers,
            )
        except ValueError as error:
            if "The loss of" not in str(error):
                raise
            return None, math.nan, steps
        return network, seconds, steps

    def measure(self, network: EmbeddingNet) -> dict[str, float]:
        test = limit(load(self.held_out)[1], self.max_identities)
        return measure(network.embed(test.pixels), test.labels)


def two_optimizers(
    recipe: Recipe, network: nn.Module, head: nn.Module, **of_head: Any
) -> list[torch.optim.Optimizer]:
    """torch's for the network, and one for the head that moves its rows inside backward."""
    options = sgd_options(recipe)
    return [torch.optim.SGD(network.parameters(), **options), FusedSGD(head.parameters(), **options, **of_head)]


def load(held_out: bool) -> tuple[Images, Images]:
    """Training and test images of the glyph data set; with held_out, both of its training half."""
    training = load_glyphs("train", HANGUL)
    if not held_out:
        return training, load_glyphs("test", HANGUL)
    sheets = json.loads((HANGUL / "manifest.json").read_text(encoding="utf-8"))["splits"]["train"]["sheets"]
    families = [sheet["family"] for sheet in sheets]
    fonts = torch.arange(len(sheets)).repeat_interleave(len(training.identities))  # (n,)
    theirs = torch.tensor([family in HELD_OUT for family in families])[fonts]
    first = torch.tensor([families.index(family) == i for i, family in enumerate(families)])[fonts]
    syllable = training.labels % SYLLABLES_HELD_OUT == SYLLABLES_HELD_OUT - 1
    return select(training, ~syllable & ~theirs), select(training, syllable & theirs & first)


def select(images: Images, rows: Tensor) -> Images:
    """The images that `rows` (n,) bool picks, their identities numbered anew."""
    kept, labels = images.labels[rows].unique(return_inverse=True)
    return Images(images.pixels[rows], labels, [images.identities[i] for i in kept.tolist()])


def limit(images: Images, identities: int) -> Images:
    return select(images, images.labels < identities) if identities else images


def pairs(labels: Tensor, batch_size: int, random: torch.Generator) -> list[Tensor]:
    """The batches of an epoch, in which each identity has two images or none (or four, if it is drawn twice).

    An identity with an odd number of images leaves one out, another in each epoch.
    """
    shuffled = torch.randperm(len(labels), generator=random)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # (n,) an identity's images side by side
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[grouped]]  # (n,) within the identity
    even = counts - counts % IMAGES_PER_IDENTITY
    grouped = grouped[place < even[labels[grouped]]].view(-1, IMAGES_PER_IDENTITY)
    order = torch.randperm(len(grouped), generator=random)
    return [rows.flatten() for rows in grouped[order].split(batch_size // IMAGES_PER_IDENTITY)]


def measure(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Rates in [0, 1] over images of identities not trained on.

    accuracy: 10-fold verification as on LFW, of all genuine pairs and as many impostor pairs, the same for every
    network. rank-1: MegaFace's, the images of all other identities being the distractors. TAR@FAR: over all pairs.
    """
    scores = compare_all(embeddings, labels)
    chosen, same = balanced_pairs(labels)
    rates = {"accuracy": cross_validate(pair_distances(embeddings, chosen), same).accuracy, "rank-1": scores.rank1}
    return rates | {tar_name(far): scores.tar_at_far(far) for far in FARS}


def tar_name(far: float) -> str:
    """TAR@FAR=1e-3."""
    return f"TAR@FAR={far:.0e}".replace("e-0", "e-")


COLUMNS = {"accuracy": "10-fold accuracy", "rank-1": "rank-1"} | {name: name for name in map(tar_name, FARS)}


def summary(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, in per cent."""
    if any(map(math.isnan, values)):
        return "n/a"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def balanced_pairs(labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All genuine pairs and as many random impostor pairs, (n, 2), and which is genuine, in random order."""
    random = torch.Generator().manual_seed(seed)
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    same = labels[first] == labels[second]
    genuine, impostor = same.nonzero().flatten(), (~same).nonzero().flatten()
    drawn = impostor[torch.randperm(len(impostor), generator=random)[: len(genuine)]]
    chosen = torch.cat([genuine, drawn])
    chosen = chosen[torch.randperm(len(chosen), generator=random)]
    return torch.stack([first[chosen], second[chosen]], 1), same[chosen]


def run_all(trials: Sequence[Trial], path: Path, processes: int = 2) -> list[dict[str, float]]:
    """The rates of each trial. Those that `path` has, with the same schedule, are not run again.

    Each trial has a process and a thread of its own, of low priority, so that its rates do not depend on what
    runs beside it. The file is written after each. Where one fails, or is interrupted, no other begins; what those
    beside it still measure is kept, and then its exception is raised.

    Raises:
        ValueError: the file is of something else, or cannot be written.
    """
    check_output(path)
    stored = read(path) if path.exists() else {}
    missing = [trial for trial in trials if stored.get(trial.key, {}).get("schedule") != trial.schedule]
    if missing:
        threads, lock = ThreadPoolExecutor(processes), threading.Lock()
        modest = environment(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
        with modest, tqdm(total=len(missing), unit="trial", disable=None) as bar:

            def keep(trial: Trial) -> None:
                try:
                    rates = in_a_process(trial)
                    with lock:
                        stored[trial.key] = {"schedule": trial.schedule, "rates": rates}
                        write(path, stored)
                        bar.update()
                except BaseException:
                    with lock:  # not while trials are still submitted; and before this thread takes the next one
                        threads.shutdown(wait=False, cancel_futures=True)
                    raise

            try:
                with lock:
                    running = [threads.submit(keep, trial) for trial in missing]
                for done in as_completed(running):
                    done.result()
            finally:
                threads.shutdown(cancel_futures=True)
    return [stored[trial.key]["rates"] for trial in trials]


def make_parser(description: str | None, results: Path, processes: int = 2) -> argparse.ArgumentParser:
    """With the options of every comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, help: str, **settings: Any) -> None:
        parser.add_argument(name, help=f"{help} (default: %(default)s)", **settings)

    option("--seeds", "trainings of each", type=count, default=3)
    option("--epochs", "passes over the training images", type=count, default=EPOCHS)
    option("--processes", "trainings side by side, with a thread each", type=count, default=processes)
    option("--identities", "train and test on the first so many; 0: all", type=whole, default=0)
    option("--results", "what was measured; it is not measured again", type=Path, default=results, metavar="JSON")
    return parser


def in_a_process(trial: Trial) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=be_modest) as process:
        return process.submit(trial.run).result()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Variables of the processes that start meanwhile, which read them as they import."""
    before = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def be_modest() -> None:
    os.nice(max(0, NICENESS - os.nice(0)))
    torch.set_num_threads(1)


def read(path: Path) -> dict[str, dict]:
    """What `write` wrote."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if all(entry.keys() == {"schedule", "rates"} for entry in stored.values()):
            return stored
    except (ValueError, AttributeError):  # no JSON; no mapping of mappings
        pass
    raise ValueError(f"{path} is no file of measured trials.")


def write(path: Path, stored: dict[str, dict]) -> None:
    """A line per trial, sorted; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(stored[key])}" for key in sorted(stored)]
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)
