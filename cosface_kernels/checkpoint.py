"""Checkpoints of a training run that a crash cannot spoil and another number of ranks can load.

    folder/step-000000012000-000007/*.safetensors     each rank's rows of every sharded tensor, shares of the rest

The second number counts the checkpoints of the folder: the newest has the largest, also after a run went back to
an earlier step, and none takes the name of another. Tensors go through torch.distributed.checkpoint into
safetensors files; all else (learning rates, step counts) is JSON in a further tensor. Nothing is unpickled. A
checkpoint appears under its name once every rank has written all of it, and loses that name before any of it is
removed. Of a tensor that every rank has, such as BatchNorm's statistics, it is rank 0's that is kept, as in
DistributedDataParallel.
"""

import json
import numbers
import os
import re
import reprlib
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.tensor import DTensor

from cosface_kernels.collectives import naming
from cosface_kernels.distributed import beside, check_group, own_rows
from cosface_kernels.float8 import FLOAT8, OF_STATE
from cosface_kernels.optim import restoring
from cosface_kernels.validation import check_integer

if find_spec("safetensors") is None:
    raise ModuleNotFoundError(
        "cosface_kernels.checkpoint and cosface_kernels.convert need safetensors, which is not installed: "
        "pip install safetensors."
    )

# isort: split
from safetensors import SafetensorError

NAME, PARTIAL = re.compile(r"step-(\d{12})(?:-(\d{6,}))?"), ".partial"
STRUCTURE = "structure"  # the uint8 tensor that holds the JSON
NOT_ALL = "every rank must call save and load, and another did not, has ended, hangs or cannot be reached"


T = TypeVar("T")


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
        generators: random generators, of which each rank keeps its own state.
        process_group: the ranks that save; None for all.
        objects: anything with state_dict and load_state_dict: the backbone (under DistributedDataParallel its
            `module`), heads, optimizers, schedulers, a GradScaler. Tensors that are one, such as tied weights
            or those of a head that is given beside the model it is in, are written once.

    Returns:
        The checkpoint's folder. Until it has that name, the one before it is the newest.

    Raises:
        TypeError: an object has no state, or its state holds something other than dense tensors, numbers, strings
            and containers of them.
        ValueError: keep is less than 1, or step is no number of steps.
        RuntimeError: a rank could not write its part, or made no call; the message says which and why.
    """
    check_integer("keep", keep, 1)
    if not isinstance(step, numbers.Integral) or not 0 <= step < 10**12:
        raise ValueError(f"step must be an integer in [0, 10^12), got {step!r}.")
    _check_call(objects, process_group)
    tensors: dict[str, Tensor] = {}
    structure = {name: _encode(item.state_dict(), name, tensors) for name, item in objects.items()}
    shared = _drop_shared(tensors)
    rank = _rank(process_group)
    for name, generator in (generators or {}).items():
        tensors[_generator_key(name, rank)] = generator.get_state()
    if rank == 0:
        content = {"step": int(step), "objects": structure, "shared": shared}
        tensors[STRUCTURE] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    partial = _on_first(lambda: _begin(_path(folder), step), process_group)
    with _storage(f"writing {partial}", process_group, not dist.is_initialized()):
        save_state_dict(
            {key: tensor.contiguous() for key, tensor in tensors.items()},  # as safetensors has them
            storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=process_group,
            no_dist=not dist.is_initialized(),
        )
    return _on_first(lambda: _end(partial, keep), process_group)


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
        generators, process_group, objects: as for `save`, under the same names, on any number of ranks; what is
            not given is not loaded. A rank that did not exist leaves its generators as they are.

    Returns:
        The step with which it was saved; None if there is no checkpoint, and nothing has been changed.

    Raises:
        TypeError: an object has no state.
        ValueError: the checkpoint lacks an object, or has other shapes or dtypes, of which the message shows both,
            or an object does not take what it holds.
        RuntimeError: a rank could not read its part, or made no call; the message says which and why.

    A call that raised may have changed the objects that it was given; load them again before they are used.
    """
    _check_call(objects, process_group)
    path = _on_first(lambda: latest(folder), process_group)
    if path is None:
        return None
    saved, content = _contents(path, process_group, not dist.is_initialized())
    if missing := [name for name in objects if name not in content["objects"]]:
        raise ValueError(f"{path} holds {', '.join(content['objects'])}, but no {', '.join(missing)}.")
    shared = content.get("shared", {})  # absent before tensors could be shared
    tensors: dict[str, Tensor] = {}
    for name, item in objects.items():
        with restoring():
            likeness = _likeness(name, item)
        for place in _places(content["objects"][name]):
            key = shared.get(place, place)
            tensors.setdefault(key, _destination(place, saved[key], likeness))
    own = {name: _generator_key(name, _rank(process_group)) for name in generators or {}}
    tensors |= {key: _empty(saved[key]) for key in own.values() if key in saved}
    _read(tensors, path, process_group, not dist.is_initialized())
    everywhere = tensors | {place: tensors[key] for place, key in shared.items() if key in tensors}
    for name, item in objects.items():
        try:
            item.load_state_dict(_decode(content["objects"][name], everywhere))
        except (KeyError, RuntimeError, ValueError) as error:  # what torch's modules and optimizers raise
            raise ValueError(f"{name} does not take what {path} holds of it: {error}") from error
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
    saved, content = _contents(path, None, alone=True)
    shared = content.get("shared", {})
    key = shared.get(name, name)
    if key not in saved:
        names = sorted((saved.keys() | shared.keys()) - {STRUCTURE})
        raise KeyError(f"{path} has no tensor {name}; it has {', '.join(names)}.")
    tensor = _empty(saved[key])
    _read({key: tensor}, path, None, alone=True)
    return tensor


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of a folder that was written last, or the folder if it is one, or None."""
    path = _path(folder)
    complete = [path] if NAME.fullmatch(path.name) else _complete(path)
    return complete[-1] if complete else None


def _path(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}.")
    return Path(folder)


def _complete(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=_age)


def _age(path: Path) -> tuple[int, int]:
    """The number of a checkpoint among those of its folder, or its step if it is from before they were counted."""
    step, count = map(int, cast(re.Match[str], NAME.fullmatch(path.name)).groups("0"))
    return count, step


def _begin(folder: Path, step: int) -> Path:
    """A new folder for a checkpoint that is to be written, and none of those that were never ended."""
    for abandoned in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(abandoned)
    count = max((_age(path)[0] for path in _complete(folder)), default=0) + 1
    partial = folder / f"step-{step:012d}-{count:06d}{PARTIAL}"
    partial.mkdir(parents=True)
    return partial


def _end(partial: Path, keep: int) -> Path:
    """The checkpoint, under its name, once it is on the disk; then all but the newest are removed."""
    _sync(partial)
    final = partial.rename(partial.with_suffix(""))
    _sync(final.parent)
    for old in _complete(final.parent)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
    return final


def _check_call(objects: Mapping[str, object], group: ProcessGroup | None) -> None:
    if group is not None:
        check_group(group)
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


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with the key of each tensor in its place."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            advice = (
                " For a head of sampled classes take FusedSGD, or torch.optim.SGD without momentum."
                if key.endswith("/momentum_buffer")
                else ""
            )
            raise TypeError(f"{key} is a sparse tensor; a checkpoint holds dense ones.{advice}")
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):  # as pairs, because an optimizer's keys are integers
        kind = (
            "counter" if isinstance(value, Counter) else "dict"
        )  # MultiStepLR has one, and asks for its elements
        return {kind: [[k, _encode(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
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
    pairs = {k: _decode(v, tensors) for k, v in content}
    return Counter(pairs) if kind == "counter" else pairs


def _drop_shared(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Leaves of tensors that are one the first; of each other, by its place, the place of that.

    Of tensors that are different views of one memory, all but the first become copies.
    """
    first: dict[tuple[Any, ...], str] = {}
    views: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    shared = {}
    for place, tensor in list(tensors.items()):
        if not (rows := own_rows(tensor)).numel():
            continue
        memory = rows.device, rows.data_ptr()
        view = rows.dtype, rows.shape, rows.stride(), isinstance(tensor, DTensor)
        key = first.setdefault(memory, place)
        if key == place:
            views[memory] = view
        elif views[memory] == view:
            shared[place] = key
            del tensors[place]
        else:
            tensors[place] = tensor.clone()
    return shared


def _places(value: Any) -> Iterator[str]:
    """Those of the tensors in a structure."""
    if isinstance(value, list):
        for item in value:
            yield from _places(item)
    elif isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            yield content
        else:
            yield from _places([v for _, v in content] if kind == "dict" else content)


def _likeness(name: str, item: Stateful) -> dict[str, Tensor]:
    """Tensors that are here, by key: an object's own, and for what an optimizer knows of a parameter, that."""
    if isinstance(item, torch.optim.Optimizer):  # one that has not stepped yet has no state to load into
        parameters = [p for group in item.param_groups for p in group["params"]]
        return {f"{name}/state/{i}": p for i, p in enumerate(parameters)}
    tensors: dict[str, Tensor] = {}
    _encode(item.state_dict(), name, tensors)
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


def _contents(path: Path, group: ProcessGroup | None, alone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of each tensor, and the JSON."""
    with _storage(f"reading {path}"):
        saved: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    if STRUCTURE not in saved:
        raise RuntimeError(f"reading {path} failed: its files are gone, or some; an earlier one may be whole.")
    structure = _empty(saved[STRUCTURE])
    _read({STRUCTURE: structure}, path, group, alone)
    return saved, json.loads(structure.numpy().tobytes())


def _read(tensors: dict[str, Tensor], path: Path, group: ProcessGroup | None, alone: bool) -> None:
    reader = HuggingFaceStorageReader(str(path))
    with _storage(f"reading {path}", group, alone):
        load_state_dict(tensors, storage_reader=reader, process_group=group, no_dist=alone)


@contextmanager
def _storage(work: str, group: ProcessGroup | None = None, alone: bool = True) -> Iterator[None]:
    """Without torch's warning that one process is one process, and its error that is no `Exception`."""
    try:
        with nullcontext() if alone else naming(work, group, NOT_ALL), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"{work} failed on rank {rank}: {cause}") from cause
    except SafetensorError as error:
        raise RuntimeError(f"{work} failed: {error}") from error


def _generator_key(name: str, rank: int) -> str:
    return f"generators/{name}/{rank}"


def _rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _on_first(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """The result of work on rank 0, or its exception, on every rank."""
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer = [work()]
        except Exception as error:  # whatever it is, the others must not wait for its result
            answer = [error]
    with naming("agreeing on a checkpoint", group, NOT_ALL):
        dist.broadcast_object_list(answer, group=group, group_src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _sync(folder: Path) -> None:
    """Waits until the folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
