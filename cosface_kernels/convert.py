"""Class weights from other projects and from checkpoints, as a plain (C, D) tensor in a safetensors file.

    python -m cosface_kernels.convert insightface OUTPUT_FOLDER weight.safetensors
    python -m cosface_kernels.convert pml loss.pt weight.safetensors --classes 1000
    python -m cosface_kernels.convert to-pml weight.safetensors loss.pt --entry W
    python -m cosface_kernels.convert checkpoint FOLDER weight.safetensors --name head/weight

`load_weight_(head.weight, "weight.safetensors")` reads it into a head, sharded or not; of one in float8, with
`weight_exponent=head.weight_exponent`. Files of torch.save are read with weights_only=True, which runs no code of
theirs.
"""

import argparse
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.tensor import DTensor

from cosface_kernels import (
    checkpoint,  # before safetensors, since it says how to install that
    float8,
    resizing,
)
from cosface_kernels.distributed import Exchange, beside, own_classes, own_rows
from cosface_kernels.float8 import FLOAT8, OF_STATE
from cosface_kernels.resizing import Keep
from cosface_kernels.storage import PARTIAL, on_every, on_first, storage
from cosface_kernels.validation import WEIGHT_DTYPES, check_exponents, check_positive

# isort: split
import safetensors
import safetensors.torch
from safetensors import SafetensorError

NAME, SCALE = "weight", "weight_scale"  # of the tensors in the file, as other quantised weights have them
ROWS_AT_ONCE = 2**16  # that are read of a file of other classes
PML = {"W": "2.x, (D, C)", "weight": "3.x, (C, D)"}  # what pytorch-metric-learning calls its weight, by version
INSIGHTFACE = ("checkpoint_gpu_*.pt", "rank_*_softmax_weight.pt")


def from_insightface(folder: str | os.PathLike[str]) -> Tensor:
    """The (C, D) class weights that insightface's ranks saved, a file each, in one tensor.

    Args:
        folder: with checkpoint_gpu_0.pt, ... of `train_v2.py`, or rank_0_softmax_weight.pt, ... of the first
            PartialFC.

    Raises:
        OSError: a file cannot be read; a FileNotFoundError if there are none, or that of a rank is missing.
        KeyError: a file has no weight.
        ValueError: the files' embedding sizes differ, or one is damaged or holds more than tensors and plain
            numbers.

    Source: insightface, recognition/arcface_torch: train_v2.py, partial_fc_v2.py, partial_fc.py.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder that is there.")
    found = (sorted(Path(folder).glob(pattern), key=_rank_of) for pattern in INSIGHTFACE)
    files = next((files for files in found if files), [])
    if [_rank_of(file) for file in files] != list(range(len(files))) or not files:
        names = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(
            f"{folder} should have files of ranks 0, 1, ... named {' or '.join(INSIGHTFACE)}, got {names}."
        )
    shards = []
    for file in files:
        content = _load(file, mmap=True)
        if isinstance(content, Mapping):
            content = _entry(_entry(content, "state_dict_softmax_fc", file), "weight", file)
        shards.append(_matrix(content, f"the weight in {file}"))
    if len({shard.shape[1:] for shard in shards}) != 1:
        shapes = ", ".join(
            f"{tuple(shard.shape)} in {file.name}" for file, shard in zip(files, shards, strict=True)
        )
        raise ValueError(f"the weights of all ranks must have one embedding size, got {shapes}.")
    return torch.cat([shard.detach() for shard in shards])


def from_pytorch_metric_learning(state: Mapping[str, Tensor], num_classes: int | None = None) -> Tensor:
    """The (C, D) weight from the state_dict of a loss such as `CosFaceLoss`, or of a module that has one.

    Args:
        state: with one entry `W`, (D, C), as 2.x has it; without, with one entry `weight`, (C, D), as 3.x has it.
        num_classes: C, if it is to be checked: `SubCenterArcFaceLoss` has several centres a class, which only
            their number tells.

    Raises:
        TypeError: the state is none, such as the loss itself.
        KeyError: the state has neither, or more than one.
        ValueError: it is no matrix, or has not num_classes centres, or that is no number of classes.

    Source: pytorch-metric-learning 2.9, losses/large_margin_softmax_loss.py; 3.0's page of `BaseProxyLoss`.
    """
    if num_classes is not None:
        check_positive("num_classes", num_classes)
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a state_dict, got {type(state).__name__}.")
    name, entry = _pml_entry(state)
    matrix = _matrix(state[name], name).detach()
    weight = (matrix.T if entry == "W" else matrix).contiguous()
    if num_classes not in (None, len(weight)):
        raise ValueError(
            f"{entry} should have a centre for each of {num_classes} classes, got {len(weight)} centres. "
            "Several of a class, as SubCenterArcFaceLoss has them, are for FusedSubCenterArcFaceLoss."
        )
    return weight


def to_pytorch_metric_learning(weight: Tensor, entry: str = "W") -> dict[str, Tensor]:
    """The state_dict of a loss of pytorch-metric-learning, such as `CosFaceLoss`, with this weight.

    Args:
        weight: (C, D), on one process.
        entry: "W" for 2.x, which keeps (D, C); "weight" for 3.x, which keeps (C, D).

    Raises:
        ValueError: the entry is another, the weight no matrix, or sharded.

    >>> state = to_pytorch_metric_learning(torch.ones(1000, 128))
    >>> state["W"].shape
    torch.Size([128, 1000])
    """
    if entry not in PML:
        raise ValueError(f"entry must be {' or '.join(map(repr, PML))}, got {entry!r}.")
    if isinstance(weight, DTensor):
        raise ValueError(f"weight must be on one process, got one sharded over {weight.device_mesh.size()} ranks.")
    if isinstance(weight, Tensor) and weight.dtype is FLOAT8:
        raise ValueError(
            f"weight must be in a dtype that multiplies, got {weight.dtype}: take head.float(), or "
            "cosface_kernels.float8.values(weight, exponents, torch.float32)."
        )
    matrix = _matrix(weight, "weight").detach()
    return {entry: (matrix.T if entry == "W" else matrix).contiguous()}


def save_weight(weight: Tensor, path: str | os.PathLike[str], weight_exponent: Tensor | None = None) -> None:
    """Writes a (C, D) weight under the name "weight"; one that is sharded, on all of its ranks together.

    A sharded weight is never whole in memory: the ranks write their rows, and rank 0 joins the files.

    Args:
        weight_exponent: of a weight in float8, that of its head. The file then has "weight_scale" too, (C,)
            float32, by which each row is multiplied.

    Raises:
        OSError: the file cannot be written.
        TypeError: the weight is no tensor, such as a head.
        ValueError: the weight is no matrix or in a dtype that no head has, or weight_exponent is missing; or
            another rank refused, with its sentence.
        RuntimeError: another rank made no call, or has ended.
    """
    path = Path(path)
    if not isinstance(weight, DTensor):
        tensors, partial = _named(weight, weight_exponent, path), _partial(path)
        try:
            safetensors.torch.save_file({name: each.contiguous() for name, each in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        partial.replace(path)
        return
    group = Exchange(weight).group
    tensors = on_every(lambda: (_named(weight, weight_exponent, path), {}), group)
    partial = on_first(lambda: _emptied(_partial(path)), group)
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True, enable_consolidation=True)
    with storage(f"writing {path}", group, alone=False, kind=OSError):
        save_state_dict(tensors, storage_writer=writer, process_group=group)
    on_first(lambda: _take(partial, path), group)


@torch.no_grad()
def load_weight_(
    weight: Tensor, path: str | os.PathLike[str], keep: Keep = None, weight_exponent: Tensor | None = None
) -> Tensor:
    """Fills a (C, D) weight from a file of `save_weight`; of one that is sharded, each rank reads its rows.

    Rows come to the weight's dtype, to float8 rounded to the nearest, a block of them at a time.

    Args:
        keep: where the file is of other classes: the file's labels in the order of the weight's first ones, or a
            mapping from the file's labels to the weight's. The rows of all other classes stay as they are. None:
            the classes are the same.
        weight_exponent: of a weight in float8, that of its head, which is filled as well.

    Raises:
        OSError: there is no such file, or it cannot be read.
        TypeError: the weight is no tensor, such as a head.
        ValueError: the weight is no matrix or in a dtype that no head has; the file's shape is not the weight's,
            or without its classes; a label of keep does not fit; it is no file of `save_weight`; or
            weight_exponent is missing.
    """
    _check_weight(weight, weight_exponent)
    with _weights(path) as file:
        rows, scale = _rows_and_scale(file, path)
        theirs = tuple(rows.get_shape())
        if keep is None and theirs != tuple(weight.shape):
            raise ValueError(
                f"{path} has a weight of shape {theirs}, not {tuple(weight.shape)}; keep says which of other "
                "classes to take."
            )
        if theirs[1:] != tuple(weight.shape[1:]):
            raise ValueError(f"{path} has embedding size {theirs[1]}, not {weight.shape[1]}.")
        own = own_classes(weight)

        if keep is None:
            for first in range(own.start, own.stop, ROWS_AT_ONCE):
                last = min(first + ROWS_AT_ONCE, own.stop)
                places = slice(first - own.start, last - own.start)
                _put(weight, weight_exponent, places, rows[first:last], scale and scale[first:last])
            return weight
        wanted = resizing.into(keep, theirs[0], weight.shape[0])[own.start : own.stop]  # (C_r,)
        for first in range(0, theirs[0], ROWS_AT_ONCE):
            here = (wanted >= first) & (wanted < first + ROWS_AT_ONCE)
            if here.any():
                block = slice(first, first + ROWS_AT_ONCE)
                chosen = wanted[here] - first
                of_block = scale and scale[block][chosen]
                _put(weight, weight_exponent, here.to(weight.device), rows[block][chosen], of_block)
    return weight


def _named(weight: Tensor, weight_exponent: Tensor | None, path: Path) -> dict[str, Tensor]:
    """What the file is to hold."""
    _check_weight(weight, weight_exponent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not the name of a file to write.")
    tensors = {NAME: weight.detach()}
    if weight_exponent is not None:
        scale = float8.units(own_rows(weight_exponent), torch.float32).flatten()
        tensors[SCALE] = beside(weight_exponent, scale)
    return tensors


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _take(folder: Path, path: Path) -> None:
    """The one file of a folder, which goes."""
    (joined,) = folder.glob("*.safetensors")
    joined.replace(path)
    shutil.rmtree(folder)


def _check_weight(weight: Tensor, weight_exponent: Tensor | None) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, such as head.weight, got {type(weight).__name__}.")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight must be in a dtype that a head can have, got {weight.dtype}.")
    check_exponents(_matrix(weight, "weight"), weight_exponent, needed=True)


def _put(
    weight: Tensor, exponents: Tensor | None, here: slice | Tensor, rows: Tensor, scale: Tensor | None
) -> None:
    """Rows of a file, each times its scale if there is one, to those of the weight that are here."""
    rows = _scaled(rows, scale)
    if exponents is not None:
        rows, of_rows = float8.quantized(rows)
        own_rows(exponents)[here] = of_rows.to(weight.device)
    own_rows(weight)[here] = rows.to(weight.device, weight.dtype)


def _rows_and_scale(file: Any, path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Slices of the weight, and of what its rows are to be multiplied by, or None."""
    rows = file.get_slice(NAME)
    if SCALE not in file.keys():  # noqa: SIM118
        return rows, None
    scale, count = file.get_slice(SCALE), rows.get_shape()[0]
    if scale.get_shape() not in ([count], [count, 1]):
        raise ValueError(
            f"{SCALE} of {path} must have a number of each of {count} rows, got shape {scale.get_shape()}."
        )
    return rows, scale


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows.float() * scale.view(-1, 1)


@contextmanager
def _weights(path: str | os.PathLike[str]) -> Iterator[Any]:
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file of save_weight.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file with a {NAME}: {error}") from error


def _pml_entry(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The name of the weight, and the part of it behind the last dot."""
    for entry in PML:
        names = [name for name in state if name.rpartition(".")[2] == entry]
        if len(names) == 1:
            return names[0], entry
        if names:
            break
    raise KeyError(f"the state should have one entry named {' or '.join(PML)}, got {', '.join(state)}.")


def _entry(content: Any, key: str, file: Path) -> Any:
    if not isinstance(content, Mapping) or key not in content:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise KeyError(f"{file} should have an entry named {key}, got {names}.")
    return content[key]


def _matrix(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} should be a tensor with two dimensions, got {got}.")
    return value


def _load(file: Path, **options: Any) -> Any:
    """What torch.save wrote, if it is tensors, numbers and text in dicts and lists."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, not a file of torch.save.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # bytes that torch.save did not write can raise anything
        if not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{file} is damaged, or no file of torch.save: {error!r}") from error
        if not _is_pickled(file):
            raise ValueError(f"{file} is damaged, or no file of torch.save.") from error
        raise ValueError(
            f"{file} holds more than tensors and numbers: a whole module, or numpy's numbers. Reading it "
            "could run code of whoever wrote it. If that is you, save its state_dict, or the dict without those "
            "numbers."
        ) from error


def _is_pickled(file: Path) -> bool:
    """As torch.save does it: in an archive, before torch 1.6 in none."""
    with file.open("rb") as content:
        return zipfile.is_zipfile(file) or content.read(1) == pickle.PROTO


def _save_state(state: Mapping[str, Tensor], path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not the name of a file to write.")
    partial = _partial(path)
    try:
        torch.save(state, partial)
    except RuntimeError as error:  # of torch's own writer
        raise OSError(f"{path} could not be written: {error}") from error
    partial.replace(path)


def _rank_of(file: Path) -> int:
    """The number in a file's name."""
    digits = re.search(r"\d+", file.name)
    return int(digits[0]) if digits else -1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cosface_kernels.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=("insightface", "pml", "to-pml", "checkpoint"))
    parser.add_argument(
        "input",
        type=Path,
        help="a folder of per-rank files, a file of torch.save, a checkpoint; of to-pml, safetensors",
    )
    parser.add_argument("output", type=Path, help="the safetensors file to write; of to-pml, one of torch.save")
    parser.add_argument(
        "--classes", type=int, help="how many the weight must have; one of pml may hold several centres each"
    )
    parser.add_argument(
        "--entry", choices=PML, default="W", help="of to-pml: W for pytorch-metric-learning 2.x, weight for 3.x"
    )
    parser.add_argument("--name", default="head/weight", help="of the weight in a checkpoint (%(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.output.resolve() == args.input.resolve():
            raise ValueError(f"{args.output} is the input, which would be lost; name another file to write.")
        if args.source == "insightface":
            weight = from_insightface(args.input)
        elif args.source == "pml":
            state = _load(args.input)
            if not isinstance(state, Mapping):
                raise ValueError(f"{args.input} should hold a state_dict, got {type(state).__name__}.")
            weight = from_pytorch_metric_learning(state, args.classes)
            name, entry = _pml_entry(state)
            print(f"{args.input}: {name} of pytorch-metric-learning {PML[entry]}")
            if args.classes is None:
                print(f"--classes was not given: a {entry} of SubCenterArcFaceLoss would pass.", file=sys.stderr)
        elif args.source == "to-pml":
            with _weights(args.input) as file:
                rows, scale = _rows_and_scale(file, args.input)
                weight = _scaled(rows[:], scale and scale[:])
        else:
            weight = _matrix(checkpoint.load_tensor(args.input, args.name), args.name)
            if weight.dtype is FLOAT8:
                exponents = checkpoint.load_tensor(args.input, args.name + OF_STATE)
                weight = float8.values(weight, exponents, torch.float32)
        if args.classes not in (None, len(weight)):
            raise ValueError(f"{args.input} has {len(weight):,} classes, not the {args.classes:,} of --classes.")
        if args.source == "to-pml":
            _save_state(to_pytorch_metric_learning(weight, args.entry), args.output)
        else:
            save_weight(weight, args.output)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        print(error.args[-1] if isinstance(error, KeyError) else error, file=sys.stderr)
        return 1
    print(f"{args.output}: {weight.shape[0]:,} classes, embedding size {weight.shape[1]}, {weight.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
