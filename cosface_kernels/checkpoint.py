"""Checkpoints of a training run that a crash cannot spoil and another number of ranks can load.

    folder/step-000000012000/*.safetensors     each rank's rows of every sharded tensor, shares of the rest

Tensors go through torch.distributed.checkpoint into safetensors files; all else (learning rates, step counts) is
JSON in a further tensor. Nothing is unpickled. A checkpoint appears under its name once every rank has written all
of it. Of a tensor that every rank has, such as BatchNorm's statistics, it is rank 0's that is kept, as in
DistributedDataParallel.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

PREFIX, PARTIAL = "step-", ".partial"
STRUCTURE = "structure"  # the uint8 tensor that holds the JSON


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save(
    folder: str | os.PathLike[str],
    step: int,
    *,
    keep: int = 2,
    generators: Mapping[str, torch.Generator] | None = None,
    process_group: ProcessGroup | None = None,
    **objects: Stateful,
) -> Path:
    """Writes folder/step-..., on every rank together, and removes all but the newest `keep`.

    Args:
        folder: on a file system that all ranks see.
        step: the number by which `load` says where to go on.
        generators: random generators, of which each rank keeps its own state.
        process_group: the ranks that save; None for all.
        objects: anything with state_dict and load_state_dict: the backbone (under DistributedDataParallel its
            `module`), heads, optimizers, schedulers, a GradScaler.

    Returns:
        The checkpoint's folder. Until it has that name, the one before it is the newest.

    Raises:
        TypeError: a state holds something other than tensors, numbers, strings and containers of them.
        ValueError: keep is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    tensors: dict[str, Tensor] = {}
    structure = {name: _encode(item.state_dict(), name, tensors) for name, item in objects.items()}
    rank = _rank(process_group)
    for name, generator in (generators or {}).items():
        tensors[_generator_key(name, rank)] = generator.get_state()
    final = Path(folder) / f"{PREFIX}{step:012d}"
    partial = final.with_name(final.name + PARTIAL)
    if rank == 0:
        tensors[STRUCTURE] = torch.frombuffer(
            bytearray(json.dumps({"step": step, "objects": structure}).encode()), dtype=torch.uint8
        )
        for abandoned in Path(folder).glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
    _barrier(process_group)
    with _silence():
        save_state_dict(
            {key: tensor.contiguous() for key, tensor in tensors.items()},  # as safetensors has them
            storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=process_group,
            no_dist=not dist.is_initialized(),
        )
    if rank == 0:
        if final.exists():  # the same step of an earlier run
            shutil.rmtree(final)
        partial.rename(final)
        _sync(final.parent)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier(process_group)
    return final


def load(
    folder: str | os.PathLike[str],
    *,
    generators: Mapping[str, torch.Generator] | None = None,
    process_group: ProcessGroup | None = None,
    **objects: Stateful,
) -> int | None:
    """Restores the objects from the newest complete checkpoint of a folder, on every rank together.

    Args:
        folder: as for `save`; or one checkpoint in it.
        generators, process_group, objects: as for `save`, under the same names, on any number of ranks. A rank
            that did not exist leaves its generators as they are.

    Returns:
        The step with which it was saved; None if there is no checkpoint, and nothing has been changed.

    Raises:
        ValueError: names, shapes or dtypes are not those of the checkpoint; the message shows both.
    """
    path = latest(folder)
    if path is None:
        return None
    saved: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    structure = _empty(saved[STRUCTURE])
    _read({STRUCTURE: structure}, path, process_group)
    content = json.loads(structure.numpy().tobytes())
    if content["objects"].keys() != objects.keys():
        raise ValueError(
            f"{path} holds {', '.join(content['objects'])}, but {', '.join(objects)} were to be loaded from it."
        )
    tensors: dict[str, Tensor] = {}
    for name, item in objects.items():
        likeness = _likeness(name, item)
        for key in _tensor_keys(content["objects"][name]):
            tensors[key] = _destination(key, saved[key], likeness)
    own = {name: _generator_key(name, _rank(process_group)) for name in generators or {}}
    tensors |= {key: _empty(saved[key]) for key in own.values() if key in saved}
    _read(tensors, path, process_group)
    for name, item in objects.items():
        item.load_state_dict(_decode(content["objects"][name], tensors))
    for name, generator in (generators or {}).items():
        if own[name] in tensors:
            generator.set_state(tensors[own[name]])
    return content["step"]


def load_tensor(folder: str | os.PathLike[str], name: str) -> Tensor:
    """One whole tensor of the newest complete checkpoint of a folder, on one process.

    Args:
        name: the object's name and the tensor's in its state, as in "head/weight".

    Raises:
        FileNotFoundError: there is no checkpoint.
        KeyError: it has no tensor of that name.
    """
    path = latest(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint.")
    saved: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    if name not in saved:
        raise KeyError(f"{path} has no tensor {name}; it has {', '.join(sorted(saved.keys() - {STRUCTURE}))}.")
    tensor = _empty(saved[name])
    _read({name: tensor}, path, None)
    return tensor


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a folder, or the folder if it is one, or None."""
    complete = [Path(folder)] if Path(folder).name.startswith(PREFIX) else _complete(folder)
    return complete[-1] if complete else None


def _complete(folder: str | os.PathLike[str]) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in Path(folder).glob(f"{PREFIX}*") if path.suffix != PARTIAL)


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with the key of each tensor in its place."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):  # as pairs, because an optimizer's keys are integers
        return {"dict": [[k, _encode(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        items = [_encode(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{key} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and containers of them."
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(v, tensors) for v in content)
    return {k: _decode(v, tensors) for k, v in content}


def _tensor_keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _tensor_keys(item)
    elif isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            yield content
        else:
            yield from _tensor_keys([v for _, v in content] if kind == "dict" else content)


def _likeness(name: str, item: Stateful) -> dict[str, Tensor]:
    """Tensors that are here, by key: an object's own, and for what an optimizer knows of a parameter, that."""
    if isinstance(item, torch.optim.Optimizer):  # one that has not stepped yet has no state to load into
        parameters = [p for group in item.param_groups for p in group["params"]]
        return {f"{name}/state/{i}": p for i, p in enumerate(parameters)}
    tensors: dict[str, Tensor] = {}
    _encode(item.state_dict(), name, tensors)
    return tensors


def _destination(key: str, saved: TensorStorageMetadata, likeness: Mapping[str, Tensor]) -> Tensor:
    """Where to load a tensor: an object's own, else a new one, sharded like the parameter if it has its shape."""
    own, parameter = likeness.get(key), likeness.get(key.rpartition("/")[0])
    if own is not None:
        if (own.shape, own.dtype) != (saved.size, saved.properties.dtype):
            raise ValueError(
                f"{key} is {saved.properties.dtype} of shape {tuple(saved.size)} in the checkpoint, but "
                f"{own.dtype} of shape {tuple(own.shape)} here."
            )
        return own
    if parameter is not None and parameter.shape == saved.size:
        return torch.zeros_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
    return _empty(saved)


def _empty(saved: TensorStorageMetadata) -> Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _read(tensors: dict[str, Tensor], path: Path, group: ProcessGroup | None) -> None:
    reader = HuggingFaceStorageReader(str(path))
    with _silence():
        load_state_dict(tensors, storage_reader=reader, process_group=group, no_dist=not dist.is_initialized())


@contextmanager
def _silence() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _generator_key(name: str, rank: int) -> str:
    return f"generators/{name}/{rank}"


def _rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _barrier(group: ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def _sync(folder: Path) -> None:
    """Waits until the folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
