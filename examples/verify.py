"""Are two images, or two folders of images, of the same identity?

    python examples/verify.py build/run alice1.jpg alice2.jpg
    python examples/verify.py build/run/model.onnx gallery/alice probes/unknown

Prints the cosine of the two embeddings, and the decision at the threshold that the evaluation chose for this
model. A folder is one identity: the mean of its images' unit embeddings. Images must be cut out and aligned as
those of the training were.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import CorruptSampleError, decode
from export import Description, Embed, load
from images import image_files
from torch import Tensor
from transforms import evaluation_transform

BATCH = 64


class Embedder:
    """Unit embeddings of image files, with an exported model."""

    def __init__(self, model: Path):
        self.embed: Embed
        self.description: Description
        self.embed, self.description = load(model)
        self.transform = evaluation_transform(self.description.image_size)

    def images(self, paths: Sequence[Path]) -> Tensor:
        """(n, embedding_size)."""
        parts = []
        for start in range(0, len(paths), BATCH):
            batch = torch.stack([self.read(path) for path in paths[start : start + BATCH]])
            x = self.embed(batch)
            parts.append(x + self.embed(batch.flip(-1)) if self.description.flip else x)
        return F.normalize(torch.cat(parts))

    def identity(self, path: Path) -> Tensor:
        """(embedding_size,) of one image, or of a folder of images of one identity."""
        paths = image_files(path) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"The folder {path} has no images.")
        return F.normalize(self.images(paths).mean(0), dim=0)

    def read(self, path: Path) -> Tensor:
        try:
            return self.transform(decode(path, self.description.color))
        except (OSError, ValueError, SyntaxError) as error:
            raise CorruptSampleError(f"The image {path} cannot be read: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="output folder of a training, or its .onnx or .safetensors file")
    parser.add_argument("a", type=Path, help="an image, or a folder of one identity")
    parser.add_argument("b", type=Path, help="another one")
    parser.add_argument("--threshold", type=float, help="least cosine of the same identity (default: the model's)")
    args = parser.parse_args(argv)
    try:
        embedder = Embedder(args.model)
        cosine = float(embedder.identity(args.a) @ embedder.identity(args.b))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    print(f"cosine {cosine:.4f}")
    print(decision(cosine, args.threshold, embedder.description))


def decision(cosine: float, threshold: float | None, description: Description) -> str:
    reason = "as given"
    if threshold is None:
        threshold, reason = description.threshold, description.chosen_on
    if threshold is None:
        return "no decision: the model was exported without a threshold; --threshold gives one"
    verdict = "same identity" if cosine > threshold else "different identities"
    return f"{verdict}: threshold {threshold:.4f} ({reason})"


if __name__ == "__main__":
    main()
