"""Trained weights to begin a training with, and the head's, left for the next."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from cosface_kernels import FusedMarginLoss, convert
from cosface_recipes.data.image_datasets import ImageDataset
from cosface_recipes.export import WEIGHTS
from cosface_recipes.first import first
from cosface_recipes.outputs import give_mode_of_open

HEAD, IDENTITIES = "head.safetensors", "identities.json"
SHOWN = 6  # names in a message


def load_backbone(network: nn.Module, file: Path) -> None:
    """Fills a backbone from model.safetensors, or from a state_dict of torch.save (insightface's backbone.pth).

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or weights of other names or shapes, which the message shows.
    """
    state = read_state(file)
    own = network.state_dict()
    wrong = [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is not in the model" for name in state if name not in own),
        *(
            f"{name} is {tuple(state[name].shape)} and should be {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{file} does not fit the model: {', '.join(wrong[:SHOWN])}{more}.")
    network.load_state_dict(state)


def read_state(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that torch.save did not write can raise anything
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{file} is no state_dict of torch.save that loads without running code: {reason}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} must hold a state_dict of tensors, got {type(state).__name__} of other things.")
    return state


def load_head(head: FusedMarginLoss, file: Path, data: ImageDataset) -> str:
    """Fills a head from head.safetensors beside the backbone's file, if that is of the same classes.

    Returns:
        What became of the head, as a sentence.
    """
    weights, names = file.with_name(HEAD), file.with_name(IDENTITIES)
    if file.name != WEIGHTS or not weights.is_file():
        return f"The head is new: there is no {HEAD} beside {file.name}."
    try:
        theirs = json.loads(names.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"The head is new: {names}, which tells whose {weights} is, cannot be read: {error}."
    if theirs != identities(data):
        return f"The head is new: {weights} is of other identities."
    try:
        convert.load_weight_(head.weight, weights, weight_exponent=head.weight_exponent)
    except ValueError as error:  # of another embedding size
        return f"The head is new: {error}"
    return f"The head is that of {weights}, of the same identities."


def save_head(head: FusedMarginLoss, folder: Path, data: ImageDataset) -> None:
    """On all processes together."""
    convert.save_weight(head.weight, folder / HEAD, head.weight_exponent)

    def finish() -> None:
        give_mode_of_open(folder / HEAD)
        (folder / IDENTITIES).write_text(json.dumps(identities(data)) + "\n", encoding="utf-8")

    first(finish, head.weight.device)


def identities(data: ImageDataset) -> list[str] | int:
    """The names of the folders in the order of their labels; of records, which have none, how many there are."""
    return getattr(data, "identities", data.num_classes)


def whose_images(data: ImageDataset) -> str:
    """How many images there are, and whose each is, in a line that is another for other identities or labels."""
    content = json.dumps(identities(data)).encode() + data.labels.numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    return f"{len(data):,} images of {data.num_classes:,} identities (labels {digest})"
