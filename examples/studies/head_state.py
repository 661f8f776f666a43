"""Writes the state of a trained head for `python -m bench train-step --state FILE`.

    python examples/studies/head_state.py build/runs/hangul state.pt      # of the output folder of train.py
    python examples/studies/head_state.py million.pt state.pt             # of a checkpoint of million.py

The file has embeddings, their labels, the weight, s and m: of the batch that would come next in train.py's
training, or of new samples of random identities of million.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cosface_kernels import float8
from cosface_recipes import synthetic
from cosface_recipes.batches import Batches, Seeded
from cosface_recipes.config import load
from cosface_recipes.outputs import check_output
from cosface_recipes.training import SETTINGS, Training


def rows(weight: Tensor, exponents: Tensor | None) -> Tensor:
    """(C, D), in float32 those of float8, in which torch computes nothing."""
    return weight.detach() if exponents is None else float8.values(weight.detach(), exponents, torch.float32)


@torch.no_grad()
def of_training(folder: Path, batch: int) -> dict[str, Tensor | float]:
    """Of train.py's newest checkpoint; batch normalisation as in training."""
    config = dataclasses.replace(load(folder / SETTINGS), output=str(folder), resume=True, device="cpu")
    training = Training(config)
    if callable(training.head.margin):
        raise ValueError(f"{folder} has the loss {config.loss!r}; the bench's steps are of CosFace's margin.")
    training.begin()
    next_one = Batches(len(training.data), batch, config.seed, training.step, training.step + 1)
    ((images, labels, _),) = DataLoader(Seeded(training.data), batch_sampler=next_one)
    weight = rows(training.head.weight, training.head.weight_exponent)
    return {"embeddings": training.network(images), "weight": weight, "labels": labels} | {
        "scale": training.head.scale,
        "margin": training.head.margin,
    }


@torch.no_grad()
def of_million(path: Path, batch: int) -> dict[str, Tensor | float]:
    saved = synthetic.load_checkpoint(path)
    weight = rows(saved["head"]["weight"], saved["head"].get("weight_exponent"))
    network = synthetic.make_network(weight.shape[1])
    network.load_state_dict(saved["network"])
    generator = torch.Generator().manual_seed(saved["steps"])
    labels = torch.randint(len(weight), (batch,), generator=generator)
    embeddings = network(synthetic.views(labels, synthetic.TEST_SEED + saved["steps"]))
    return {"embeddings": embeddings, "weight": weight, "labels": labels} | {
        "scale": synthetic.SCALE,
        "margin": synthetic.MARGIN,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="train.py's output folder, or million.py's checkpoint")
    parser.add_argument("file", type=Path, help="to write")
    parser.add_argument("--batch", type=int, default=256, help="samples (default: 256)")
    args = parser.parse_args(argv)
    try:
        check_output(args.file)
        state = (of_training if args.source.is_dir() else of_million)(args.source, args.batch)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    args.file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, args.file)
    shapes = ", ".join(f"{name} {tuple(state[name].shape)}" for name in ("embeddings", "weight"))
    print(f"{args.file}: {shapes}, s = {state['scale']:g}, m = {state['margin']:g}")


if __name__ == "__main__":
    main()
