"""A trained backbone as files that other programs read: ONNX and safetensors, with a description beside them.

model.onnx          input "images" (n, channels, size, size) float32, (x - 127.5) / 127.5; output "embeddings"
model.safetensors   the same weights under their PyTorch names
model.json          the fields of `Description`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cosface_recipes.models import make_model
from cosface_recipes.outputs import safetensors_of

ONNX, WEIGHTS, DESCRIPTION = "model.onnx", "model.safetensors", "model.json"
CHANNELS = {"rgb": 3, "gray": 1}
TOLERANCE = 1e-4  # relative; float32 sums of 25,088 products in another order differ by less than 1e-5


@dataclasses.dataclass(frozen=True)
class Description:
    """What a program must know to use an exported model, and to decide with it."""

    model: str
    color: str  # "rgb" or "gray"
    image_size: int
    embedding_size: int
    flip: bool  # the threshold holds for embeddings of an image and its mirror image, added
    threshold: float | None  # of the cosine: a pair above it is of the same identity; None if there was no test
    chosen_on: str  # the test data, and the rate at which the threshold was chosen

    def __post_init__(self) -> None:
        for name, kind in {"model": str, "color": str, "flip": bool, "chosen_on": str}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} cannot be {value!r}.")
        for name in ("image_size", "embedding_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} cannot be {value!r}.")
        if not isinstance(self.threshold, float | int | None):
            raise ValueError(f"threshold cannot be {self.threshold!r}.")
        if self.color not in CHANNELS:
            raise ValueError(f"color must be one of {', '.join(CHANNELS)}, got {self.color!r}.")
        if self.threshold is not None and not -math.inf < self.threshold < math.inf:
            raise ValueError(f"threshold must be finite, got {self.threshold}.")

    @property
    def channels(self) -> int:
        return CHANNELS[self.color]


Embed = Callable[[Tensor], Tensor]  # (n, channels, size, size) in [-1, 1] -> (n, embedding_size)


def export(backbone: nn.Module, description: Description, folder: Path) -> float:
    """Write the three files, read them back, and check that they reproduce the backbone's embeddings.

    Returns:
        The greatest relative difference between the embeddings of the ONNX file and the backbone's.

    Raises:
        OSError: a file cannot be written.
        RuntimeError: a file does not reproduce the embeddings.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    backbone = backbone.cpu().eval()
    weights = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    with safetensors_of(folder / WEIGHTS):
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(description), indent=1) + "\n")
    size = description.image_size
    images = torch.rand(4, description.channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_onnx(backbone, images[:2], folder / ONNX)
    with torch.no_grad():
        expected = backbone(images)
    worst = 0.0
    for file in (ONNX, WEIGHTS):
        embeddings = load(folder / file)[0](images)
        worst = max(worst, float((embeddings - expected).norm() / expected.norm()))
        if not worst <= TOLERANCE:
            raise RuntimeError(f"{folder / file} does not reproduce the embeddings: they differ by {worst:.1e}.")
    return worst


def write_onnx(backbone: nn.Module, images: Tensor, path: Path) -> None:
    exporter_log = logging.getLogger("torch.onnx")  # warns of operators of torchvision, which no backbone here has
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.onnx.export(
                backbone,
                (images,),
                path,
                dynamo=True,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                external_data=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)


def weights_of(path: Path) -> Path:
    """The file that a path to an exported model means."""
    return path / WEIGHTS if path.is_dir() else path


def digest(path: Path) -> str:
    """Sixteen hexadecimal digits that tell models apart, of the SHA-256 of the file.

    Of a model.onnx it is that of the model.safetensors beside it, which has the same weights.
    """
    file = weights_of(path)
    if file.name == ONNX and (file.parent / WEIGHTS).is_file():
        file = file.parent / WEIGHTS
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()[:16]


def load(path: Path) -> tuple[Embed, Description]:
    """An exported model: the folder of a training, or its .safetensors or .onnx file; the description lies beside.

    Raises:
        ValueError: it is none of these, or the description does not fit.
        OSError: a file is missing.
    """
    file = weights_of(path)
    if not (file.parent / DESCRIPTION).is_file() or not path.exists():
        raise FileNotFoundError(f"There is no exported model {path}, with a {DESCRIPTION} beside it or in it.")
    try:
        fields = json.loads((file.parent / DESCRIPTION).read_text(encoding="utf-8"))
        description = Description(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.parent / DESCRIPTION} does not describe an exported model: {error}") from error
    if file.suffix == ".safetensors":
        return load_weights(file, description), description
    if file.suffix == ".onnx":
        return load_onnx(file, description), description
    raise ValueError(f"An exported model is a folder, a .safetensors or an .onnx file, got {path}.")


def load_weights(file: Path, description: Description) -> Embed:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    backbone = make_model(
        description.model,
        channels=description.channels,
        image_size=description.image_size,
        embedding_size=description.embedding_size,
    ).eval()
    try:
        backbone.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold the weights of {description.model}: {error}") from error
    return torch.no_grad()(backbone.__call__)


def load_onnx(file: Path, description: Description) -> Embed:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
    except Exception as error:  # each status of onnxruntime is a class of its own, below Exception alone
        raise ValueError(f"{file} is no ONNX model that can be run: {error}") from error
    size = description.image_size
    expected = [[description.channels, size, size], [description.embedding_size]]
    shapes = [item.shape[1:] for item in (session.get_inputs()[0], session.get_outputs()[0])]
    if shapes != expected:
        raise ValueError(
            f"{file} takes images {shapes[0]} to embeddings {shapes[1]}; {DESCRIPTION} has {expected[0]} and "
            f"{expected[1]}."
        )

    def embed(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return embed
