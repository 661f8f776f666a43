"""Train a small network on real images with CosFace and with plain softmax, and verify identities never seen.

    python examples/demo/demo.py                  # Hangul syllables in many fonts, from examples/demo/data
    python examples/demo/demo.py --data FOLDER    # your images, one sub-folder per identity

Both heads get the same network, initial weights, batches, augmentation, optimizer and schedule. The table
shows, for identities held out from training: rank-1 identification, and the true acceptance rate (TAR) at
three false acceptance rates (FAR), over all pairs of test images. Sentences below it say what it does not show:
a training that was too short, or too few pairs for a FAR. The same seed and number of threads give the same
table, bit for bit, but for the time and the memory of the head, which are measured.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from cosface_recipes.data.glyphs import load_glyphs
from cosface_recipes.data.images import MODES, Images, load_folder
from cosface_recipes.evaluation.plots import plot_roc
from cosface_recipes.evaluation.verification import Scores, allowed
from cosface_recipes.memory import peak_extra_bytes
from cosface_recipes.outputs import print_any_name
from cosface_recipes.small_training import (
    FEWEST_STEPS,
    Recipe,
    epochs_for,
    make_heads,
    make_network,
    score,
    train_and_score,
)
from cosface_recipes.tables import aligned, percent

HANGUL = Path(__file__).parent / "data" / "hangul"
FARS = (1e-2, 1e-3, 1e-4)
# Of errors, for a rate known to within 30 % of itself with 90 % confidence (Doddington et al., The NIST speaker
# recognition evaluation, Speech Communication 31, 2000).
ENOUGH = 30


@dataclass(frozen=True)
class Row:
    """A row of the table; an untrained network has no head and no losses."""

    name: str
    scores: Scores
    head_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    head_bytes: int | None = None


def head_memory(recipe: Recipe, num_classes: int, make_head: Callable[[], nn.Module]) -> int | None:
    """Peak bytes of a head's forward and backward on a batch, gradients included, inputs and weights not."""
    torch.manual_seed(recipe.seed)
    head = make_head()
    features = torch.randn(recipe.batch_size, recipe.embedding_size, requires_grad=True)
    labels = torch.randint(num_classes, (recipe.batch_size,))

    def step() -> None:
        head(features, labels).backward()
        features.grad = None
        head.zero_grad()

    return peak_extra_bytes(step)


def compare_heads(recipe: Recipe, training: Images, test: Images, threads: int = 1) -> list[Row]:
    """Train with each head, in processes side by side; score them, and the untrained network.

    Two trainings with a thread each finish sooner than one after the other with two threads, and do not wait
    for each other where another program takes a core.
    """
    num_classes = len(training.identities)
    heads = make_heads(recipe, num_classes)
    # Sent as bytes: tensors as such would go through /dev/shm, which is small in many containers.
    job = pickle.dumps((recipe, training, test, threads))
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()  # for the lines of the progress bars
    with ProcessPoolExecutor(len(heads), context, initializer=tqdm.set_lock, initargs=(lock,)) as pool:
        futures = {name: pool.submit(train_and_score, job, name, line) for line, name in enumerate(heads)}
        rows = [Row("untrained network", score(make_network(recipe, training), test))]
        rows += [Row(name, *pickle.loads(future.result())) for name, future in futures.items()]
    # Measured last: it leaves the allocator slow.
    memory = {name: head_memory(recipe, num_classes, make_head) for name, make_head in heads.items()}
    return [replace(row, head_bytes=memory.get(row.name)) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [
        [
            "",
            "rank-1",
            *(f"TAR@FAR={far:.0e}".replace("e-0", "e-") for far in FARS),
            "head time",
            "head memory",
        ]
    ]
    for row in rows:
        rates = [row.scores.rank1, *map(row.scores.tar_at_far, FARS)]
        lines.append(
            [
                row.name,
                *map(percent, rates),
                "-" if row.head_seconds is None else f"{row.head_seconds:.1f} s",
                "-" if row.head_bytes is None else f"{row.head_bytes / 2**20:.1f} MiB",
            ]
        )
    return aligned(lines)


def doubts(rows: Sequence[Row], num_classes: int) -> list[str]:
    """A sentence for each reason not to trust a row or a column of the table."""
    untrained, *trained = rows
    sentences = []
    steps = min(len(row.losses) for row in trained)
    if steps < FEWEST_STEPS:
        sentences.append(
            f"A training of {steps} steps is too short to mean anything: it takes at least {FEWEST_STEPS}; raise "
            "--epochs or lower --batch-size."
        )
    for row in trained:
        last = row.losses[-max(1, steps // 10) :]
        loss, chance = sum(last) / len(last), math.log(num_classes)
        if loss >= chance:
            sentences.append(
                f"The loss of {row.name} is {loss:.2f} at the end; to guess among {num_classes:,} identities "
                f"costs {chance:.2f}: raise --epochs, or change --learning-rate."
            )
        if row.scores.rank1 < untrained.scores.rank1:
            sentences.append(
                f"{row.name} finds fewer of the held-out identities than the untrained network: what it learned "
                f"of {num_classes:,} identities does not tell others apart, and its rates say nothing of its loss."
            )
    impostors = len(untrained.scores.impostor)
    if few := [far for far in FARS if far * impostors < ENOUGH]:
        sentences.append(
            f"{impostors:,} impostor pairs are too few for a FAR of {max(few):g} or less: "
            f"{allowed(max(few), impostors)} of them may pass there, and it takes {ENOUGH} to know a rate "
            "to within a third; hold out more identities with --test-fraction."
        )
    return sentences


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)

    def option(name: str, help: str, **settings) -> None:
        parser.add_argument(name, help=f"{help} (default: %(default)s)", **settings)

    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images, one sub-folder per identity")
    option("--image-size", "with --data: pixels to which images are resized", type=int, default=32)
    option("--color", "with --data: how images are read", choices=tuple(MODES), default="gray")
    option("--test-fraction", "with --data: share of identities held out", type=float, default=0.2)
    option("--output", "where the ROC curves go", type=Path, default=Path("build/roc.png"), metavar="PNG")
    passes = (
        f"passes over the training images (default: {Recipe.epochs}; of few images, more: {FEWEST_STEPS} steps)"
    )
    parser.add_argument("--epochs", help=passes, type=int)
    option("--batch-size", "images per step", type=int, default=Recipe.batch_size)
    option("--learning-rate", "its peak", type=float, default=Recipe.learning_rate)
    option("--weight-decay", "of the network and of the head", type=float, default=Recipe.weight_decay)
    option("--embedding-size", "length of an embedding", type=int, default=Recipe.embedding_size)
    option("--margin", "m of CosFace", type=float, default=Recipe.margin)
    option("--scale", "s of CosFace", type=float, default=Recipe.scale)
    option("--seed", "of weights, batches and augmentation", type=int, default=Recipe.seed)
    option("--threads", "of each of the two trainings, which run side by side", type=int, default=1)
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[Images, Images]:
    if args.data is None:
        return load_glyphs("train", HANGUL), load_glyphs("test", HANGUL)
    return load_folder(args.data, size=args.image_size, color=args.color, test_fraction=args.test_fraction)


def run(args: argparse.Namespace) -> list[Row]:
    """Load, train, print the table and write the curves."""
    settings = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    recipe = Recipe(**settings | {"epochs": Recipe.epochs if args.epochs is None else args.epochs})
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"output must end in .png, the format of the ROC curves, got {args.output}.")
    if args.threads < 1:
        raise ValueError(f"threads must be at least 1, got {args.threads}.")
    training, test = load(args)
    if args.epochs is None:
        recipe = replace(recipe, epochs=epochs_for(len(training), recipe.batch_size))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"train: {len(training):,} images of {len(training.identities):,} identities, {recipe.epochs:,} times")
    print(f"test:  {len(test):,} images of {len(test.identities):,} other identities", flush=True)
    rows = compare_heads(recipe, training, test, args.threads)
    pairs = rows[0].scores
    print(f"\nAll pairs of test images: {len(pairs.genuine):,} genuine, {len(pairs.impostor):,} impostor.")
    print(f"\n{table(rows)}\n")
    print(
        f"Head: forward and backward of {len(training.identities):,} classes at batch {recipe.batch_size}; "
        "time summed over the training,\nmemory at the peak of one step, gradients included, weights and "
        "inputs not."
    )
    for sentence in doubts(rows, len(training.identities)):
        print(f"\nWarning: {sentence}")
    plot_roc({row.name: row.scores for row in rows}, args.output)
    print(f"ROC curves: {args.output}")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    args = parse_arguments(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
