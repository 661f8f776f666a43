"""Checkpoints of a training run that a crash cannot spoil and another number of ranks can load.

    folder/step-000000012000-000007/*.safetensors     each rank's rows of every sharded tensor, shares of the rest

The second number counts the checkpoints of the folder: the newest has the largest, also after a run went back to
an earlier step, and none takes the name of another. Tensors go through torch.distributed.checkpoint into
safetensors files; all else (learning rates, step counts) is JSON in a further tensor, with the tensors' shapes, by
which a file that is gone is missed. Nothing is unpickled. A checkpoint appears under its name once every rank has
written all of it, and loses that name before any of it is removed. Of a tensor that every rank has, such as
BatchNorm's statistics, it is rank 0's that is kept, as in DistributedDataParallel.
"""

import json
import math
import numbers
import os
import re
import reprlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.tensor import DTensor

from cosface_kernels.distributed import beside, check_group, own_rows
from cosface_kernels.float8 import FLOAT8, OF_STATE
from cosface_kernels.optim import restoring
from cosface_kernels.storage import PARTIAL, on_every, on_first, storage
from cosface_kernels.structure import decode, encode, places
from cosface_kernels.validation import check_integer

NAME = re.compile(r"step-(\d{12})(?:-(\d{6,}))?")
FILES = "shard-*.safetensors"  # of a checkpoint, as torch names them
STRUCTURE = "structure"  # the uint8 tensor that holds the JSON


@runtime_checkable
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
    """Writes folder/step-..., on every rank together, and removes all but the `keep` that were written last.

    Args:
        folder: on a file system that all ranks see.
        step: the number by which `load` says where to go on; it may be less than that of the checkpoint before.
        keep: how many to leave, 1 or more.
        generators: random generators, the same names on every rank, which keeps its own state of each.
        process_group: the ranks that save; None for all.
        objects: anything with state_dict and load_state_dict: the backbone (under DistributedDataParallel its
            `module`), heads, optimizers, schedulers, a GradScaler. Tensors that are one, such as tied weights
            or those of a head that is given beside the model it is in, are written once. Every rank gives the
            same, and what is sharded is sharded over the ranks that save.

    Returns:
        The checkpoint's folder. Until it has that name, the one before it is the newest.

    Raises:
        TypeError: an object has no state, or its state holds something other than dense tensors, numbers, strings
            and containers of them, or a tensor without memory or in a dtype that safetensors does not give back.
        ValueError: keep is less than 1, or step is no number of steps; the ranks differ in step, objects or
            shapes; a tensor is sharded over other ranks, or has the place of another, as those of keys 1 and "1";
            or another rank refused, with its sentence.
        OSError: the checkpoint's folder cannot be made or named, or an older one not removed.
        RuntimeError: a rank could not write its part, or made no call; the message says which and why.
    """
    if process_group is not None:
        check_group(process_group)
    root = on_first(lambda: _path(folder), process_group)

    def state() -> tuple[tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]], dict[str, object]]:
        check_integer("keep", keep, 1)
        if not isinstance(step, numbers.Integral) or not 0 <= step < 10**12:
            raise ValueError(f"step must be an integer in [0, 10^12), got {step!r}.")
        _check_objects(objects, generators)
        tensors: dict[str, Tensor] = {}
        structure = {name: encode(item.state_dict(), name, tensors) for name, item in objects.items()}
        _check_ranks(tensors, process_group)
        states = {name: generator.get_state() for name, generator in (generators or {}).items()}
        lengths = {name: len(states[name]) for name in sorted(states)}
        facts = {"step": step, "objects": sorted(objects), "generators": lengths}
        kinds = {place: f"{tensor.dtype} of shape {tuple(tensor.shape)}" for place, tensor in tensors.items()}
        return (structure, tensors, states), facts | kinds

    structure, tensors, states = on_every(state, process_group)
    partial, shared = on_first(lambda: (_begin(root, step), _shared(tensors)), process_group)
    tensors = _apart({place: tensor for place, tensor in tensors.items() if place not in shared})
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    own, ranks = _rank(process_group), dist.get_world_size(process_group) if dist.is_initialized() else 1
    for name, generator_state in states.items():
        tensors[_generator_key(name, own)] = generator_state
        shapes |= {_generator_key(name, rank): generator_state.shape for rank in range(ranks)}
    if own == 0:
        content = {"step": int(step), "objects": structure, "shared": shared, "shapes": shapes}
        tensors[STRUCTURE] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    with storage(f"writing {partial}", process_group, not dist.is_initialized()):
        save_state_dict(
            {key: tensor.contiguous() for key, tensor in tensors.items()},  # as safetensors has them
            storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=process_group,
            no_dist=not dist.is_initialized(),
        )
    return on_first(lambda: _end(partial, keep), process_group)


def load(
    folder: str | os.PathLike[str],
    *,
    generators: Mapping[str, torch.Generator] | None = None,
    process_group: ProcessGroup | None = None,
    **objects: Stateful,
) -> int | None:
    """Restores the objects from the newest complete checkpoint of a folder, on every rank together.

    Args:
        folder: as for `save`; or one checkpoint, which may have been renamed or linked to.
        generators, process_group, objects: as for `save`, under the same names, on any number of ranks; what is
            not given is not loaded. A rank that did not exist leaves its generators as they are.

    Returns:
        The step with which it was saved; None if there is no checkpoint, and nothing has been changed.

    Raises:
        TypeError: an object has no state, or one that no checkpoint can hold.
        ValueError: the checkpoint lacks an object or a generator, or has other shapes or dtypes, of which the
            message shows both, or an object does not take what it holds; or another rank refused, with its
            sentence.
        RuntimeError: files of it are gone or damaged, a rank could not read its part, or made no call; the message
            says which and why.
        NotADirectoryError: the folder is a file.

    A call that raised may have changed the objects that it was given; load them again before they are used.
    """
    if process_group is not None:
        check_group(process_group)
    path = on_first(lambda: latest(folder), process_group)

    def destinations() -> tuple[tuple[_Saved, dict[str, Tensor]] | None, dict[str, object]]:
        _check_objects(objects, generators)
        if path is None:
            return None, {}
        saved = _Saved(path)
        if missing := [name for name in objects if name not in saved.objects]:
            raise ValueError(f"{path} holds {', '.join(saved.objects)}, but no {', '.join(missing)}.")
        tensors: dict[str, Tensor] = {}
        for name, item in objects.items():
            with restoring():
                likeness = _likeness(name, item)
            for place in saved.places[name]:
                key = saved.shared.get(place, place)
                tensors.setdefault(key, _destination(place, saved.tensor(key), likeness))
        for name, key in saved.generator_keys(generators or {}, _rank(process_group)).items():
            tensors[key] = _empty(saved.tensor(key))
            there, here = len(tensors[key]), len((generators or {})[name].get_state())
            if there != here:
                raise ValueError(
                    f"{key} has {there} bytes in the checkpoint, but {here} on the device of this one."
                )
        return (saved, tensors), {}

    if (found := on_every(destinations, process_group)) is None:
        return None
    saved, tensors = found
    _read(tensors, saved.path, process_group, not dist.is_initialized())
    everywhere = tensors | {place: tensors[key] for place, key in saved.shared.items() if key in tensors}

    def restore() -> tuple[int, dict[str, object]]:
        for name, item in objects.items():
            try:
                item.load_state_dict(decode(saved.objects[name], everywhere))
            except Exception as error:  # an object of one's own may raise anything
                raise ValueError(f"{name} does not take what {path} holds of it: {error}") from error
        for name, generator in (generators or {}).items():
            if (key := _generator_key(name, _rank(process_group))) in tensors:
                generator.set_state(tensors[key])
        return saved.step, {}

    return on_every(restore, process_group)


def load_tensor(folder: str | os.PathLike[str], name: str) -> Tensor:
    """One whole tensor of the newest complete checkpoint of a folder, on one process.

    Args:
        name: the object's name and the tensor's in its state, as in "head/weight".

    Raises:
        FileNotFoundError: there is no checkpoint.
        KeyError: it has no tensor of that name.
        RuntimeError: it cannot be read, or files of it are gone.
    """
    path = latest(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint.")
    saved = _Saved(path)
    key = saved.shared.get(name, name)
    if key not in saved.shapes:
        raise KeyError(f"{path} has no tensor {name}; it has {', '.join(sorted(saved.shapes | saved.shared))}.")
    tensor = _empty(saved.tensor(key))
    _read({key: tensor}, path, None, alone=True)
    return tensor


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of a folder that was written last, or the folder if it is one, or None."""
    path = _path(folder)
    if path.is_file():
        raise NotADirectoryError(f"folder must be one of checkpoints, or one of them, got the file {path}.")
    if NAME.fullmatch(path.resolve().name):
        return path
    if complete := _complete(path):
        return complete[-1]
    return path if any(path.glob(FILES)) else None  # under another name


def _path(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}.")
    return Path(folder)


def _complete(folder: Path) -> list[Path]:
    """Oldest first."""
    found = (path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=_age)


def _age(path: Path) -> tuple[int, int]:
    """The number of a checkpoint among those of its folder, or its step if it is from before they were counted."""
    step, count = map(int, cast(re.Match[str], NAME.fullmatch(path.name)).groups("0"))
    return count, step


def _begin(folder: Path, step: int) -> Path:
    """A new folder for a checkpoint that is to be written, and none of those that were never ended."""
    for abandoned in folder.glob(f"step-*{PARTIAL}"):
        _remove(abandoned)
    count = max((_age(path)[0] for path in _complete(folder)), default=0) + 1
    token = secrets.token_hex(4)  # no other run that saves here has it
    partial = folder / f"step-{step:012d}-{count:06d}.{token}{PARTIAL}"
    partial.mkdir(parents=True)
    return partial


def _end(partial: Path, keep: int) -> Path:
    """The checkpoint, under its name, once it is on the disk; then all but the newest are removed."""
    final = partial.with_name(partial.name.partition(".")[0])
    if final.exists() or not partial.exists():
        raise RuntimeError(f"{final} was not saved: another run saves into {final.parent} too.")
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)
    for old in _complete(final.parent)[:-keep]:
        _remove(old)
    return final


def _remove(path: Path) -> None:
    """Its name first, so that no run takes a part for the whole, one that still writes to it included."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path.rename(path.with_name(f"step-{secrets.token_hex(8)}{PARTIAL}")))


def _check_objects(objects: Mapping[str, object], generators: object) -> None:
    for name, item in objects.items():
        if isinstance(item, Tensor):
            raise TypeError(
                f"{name} must have state_dict and load_state_dict, got a {type(item).__name__} of shape "
                f"{tuple(item.shape)}; give the module that it is in."
            )
        if not isinstance(item, Stateful):
            raise TypeError(
                f"{name} must have state_dict and load_state_dict, got {type(item).__name__} "
                f"{reprlib.repr(item)}; a number can be kept as a buffer of a module."
            )
    if not isinstance(generators, Mapping | None) or not all(
        isinstance(each, torch.Generator) for each in (generators or {}).values()
    ):
        raise TypeError(f"generators must be a dict of torch.Generator by name, got {reprlib.repr(generators)}.")


def _check_ranks(tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Of two that are sharded over ranks of their own each, under one name, one would be kept."""
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            theirs, saving = tensor.device_mesh.mesh.flatten().tolist(), dist.get_process_group_ranks(group)
            if set(theirs) != set(saving):
                raise ValueError(
                    f"{key} is sharded over ranks {reprlib.repr(theirs)}, and ranks {reprlib.repr(saving)} save: "
                    "give it the process_group of its ranks, and the groups a folder each."
                )


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each tensor that is one with an earlier, by its place, the place of that.

    A rank that has no rows of them cannot tell; the first has rows of whatever any has.
    """
    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for place, tensor in tensors.items():
        rows = own_rows(tensor)
        view = *_memory(rows), rows.dtype, rows.shape, rows.stride(), isinstance(tensor, DTensor)
        if rows.numel() and (key := first.setdefault(view, place)) != place:
            shared[place] = key
    return shared


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all but the first view of a memory."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        place: tensor if first.setdefault(_memory(own_rows(tensor)), place) == place else tensor.clone()
        for place, tensor in tensors.items()
    }


def _memory(rows: Tensor) -> tuple[Any, ...]:
    return rows.device, rows.data_ptr()


def _likeness(name: str, item: Stateful) -> dict[str, Tensor]:
    """Tensors that are here, by key: an object's own, and for what an optimizer knows of a parameter, that."""
    tensors: dict[str, Tensor] = {}
    if isinstance(item, torch.optim.Optimizer):  # one that has not stepped yet has no state to load into
        parameters = [p for group in item.param_groups for p in group["params"]]
        encode(dict(enumerate(parameters)), f"{name}/state", tensors)
    else:
        encode(item.state_dict(), name, tensors)
    return tensors


def _destination(key: str, saved: TensorStorageMetadata, likeness: Mapping[str, Tensor]) -> Tensor:
    """Where to load a tensor: an object's own, else a new one, sharded like the parameter if it has its rows."""
    own, dtype = likeness.get(key), saved.properties.dtype
    if own is not None and (own.shape, own.dtype) == (saved.size, dtype):
        return own
    # a head takes rows to float8 and from it
    if own is not None and (own.shape != saved.size or FLOAT8 not in (own.dtype, dtype)):
        raise ValueError(
            f"{key} is {dtype} of shape {tuple(saved.size)} in the checkpoint, but {own.dtype} of shape "
            f"{tuple(own.shape)} here."
        )
    places = (key, key.rpartition("/")[0], key.removesuffix(OF_STATE))
    like = next((likeness[place] for place in places if place in likeness), None)
    if like is not None and like.dim() and saved.size in (like.shape, like.shape[:1]):
        rows = own_rows(like)
        return beside(like, rows.new_zeros(len(rows), *saved.size[1:], dtype=dtype))
    return _empty(saved)


def _empty(saved: TensorStorageMetadata) -> Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype)


class _Saved:
    """What a checkpoint says that it holds, and which of it is there.

    Attributes:
        objects: by name, with the key of each tensor in its place.
        shared: the key of each tensor that is kept under another, by its place.
        places: of each object, the keys of its tensors.
        shapes: of every tensor, by its key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read_structure()
        except (RuntimeError, OSError, LookupError, TypeError, ValueError) as error:  # bytes that no save wrote
            what = f"{error}"
            if not isinstance(error, RuntimeError):
                what = f"reading {path} failed: {type(error).__name__}: {error}"
            if others := sorted(each.name for each in path.glob("*.safetensors") if not each.match(FILES)):
                what += f" {', '.join(others)} in it may be none of its files."
            raise RuntimeError(what) from error

    def _read_structure(self) -> None:
        with storage(f"reading {self.path}"):
            there: dict[str, Any] = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        self._there: dict[str, TensorStorageMetadata] = there
        self.shapes = {key: known.size for key, known in there.items()}  # as the files that are left say
        structure = _empty(self.tensor(STRUCTURE))
        _read({STRUCTURE: structure}, self.path, None, alone=True)
        content = json.loads(structure.numpy().tobytes())
        self.step: int = content["step"]
        self.objects: dict[str, Any] = content["objects"]
        self.places = {name: [*places(item)] for name, item in self.objects.items()}
        self.shared: dict[str, str] = content.get("shared", {})  # absent before tensors could be shared
        del self.shapes[STRUCTURE]
        if "shapes" in content:  # absent before they were kept
            self.shapes = {key: torch.Size(shape) for key, shape in content["shapes"].items()}

    def tensor(self, key: str) -> TensorStorageMetadata:
        """What is known of a tensor, all of which is there."""
        there = self._there.get(key)
        here = sum(math.prod(chunk.sizes) for chunk in there.chunks) if there else 0
        if there is None or there.size != self.shapes.get(key) or here != there.size.numel():
            twice = there is not None and here > there.size.numel()
            what = "some of its files are there twice" if twice else "its files are gone, or some"
            raise RuntimeError(
                f"reading {self.path} failed: {what}, and {key} is not whole; an earlier checkpoint may be."
            )
        return there

    def generator_keys(self, names: Iterable[str], rank: int) -> dict[str, str]:
        """Of a rank's states of generators, by their names; none if there was no such rank."""
        if missing := [name for name in names if _generator_key(name, 0) not in self.shapes]:
            known = [key.split("/")[1] for key in self.shapes if re.fullmatch("generators/.*/0", key)]
            raise ValueError(f"{self.path} holds generators {known}, but no {', '.join(missing)}.")
        keys = {name: _generator_key(name, rank) for name in names}
        return {name: key for name, key in keys.items() if key in self.shapes}


def _read(tensors: dict[str, Tensor], path: Path, group: ProcessGroup | None, alone: bool) -> None:
    reader = HuggingFaceStorageReader(str(path))
    with storage(f"reading {path}", group, alone):
        load_state_dict(tensors, storage_reader=reader, process_group=group, no_dist=alone)


def _generator_key(name: str, rank: int) -> str:
    return f"generators/{name}/{rank}"


def _rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _sync(folder: Path) -> None:
    """Waits until the folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
