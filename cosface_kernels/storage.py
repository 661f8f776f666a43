"""What ranks do together with files: one works for all, all agree before any goes on, a failure has a sentence."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from cosface_kernels.collectives import agreement, naming

if find_spec("safetensors") is None:
    raise ModuleNotFoundError(
        "cosface_kernels.checkpoint and cosface_kernels.convert need safetensors, which is not installed: "
        "pip install safetensors."
    )

# isort: split
from safetensors import SafetensorError

PARTIAL = ".partial"  # ends the name of what is not yet whole
NOT_ALL = "every rank must call save and load, and another did not, has ended, hangs or cannot be reached"

T = TypeVar("T")


def on_first(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """The result of work on rank 0, or its exception, on every rank."""
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer = [work()]
        except Exception as error:  # whatever it is, the others must not wait for its result
            answer = [error]
    with naming("agreeing on files", group, NOT_ALL):
        dist.broadcast_object_list(answer, group=group, group_src=0)
    if isinstance(answer[0], Exception):
        raise answer.pop()  # one that stayed here would hold this frame until the garbage is collected
    return answer[0]


def on_every(work: Callable[[], tuple[T, Mapping[str, object]]], group: ProcessGroup | None) -> T:
    """This rank's result of work, once every rank has one, and the same facts beside it.

    Raises as `collectives.agreement` does.
    """
    if not dist.is_initialized():
        return work()[0]
    with agreement(cast(ProcessGroup, group or dist.group.WORLD), _device(group), "files") as own:
        result, own.facts = work()
    return result


def _device(group: ProcessGroup | None) -> torch.device:
    """One from which the group sends."""
    devices = [backend.split(":")[0] for backend in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


@contextmanager
def storage(
    work: str, group: ProcessGroup | None = None, alone: bool = True, kind: type[Exception] = RuntimeError
) -> Iterator[None]:
    """Without torch's warning that one process is one process; its error that is no `Exception` becomes `kind`."""
    try:
        with nullcontext() if alone else naming(work, group, NOT_ALL), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise kind(f"{work} failed on rank {rank}: {cause}") from cause
    except SafetensorError as error:
        raise kind(f"{work} failed: {error}") from error
