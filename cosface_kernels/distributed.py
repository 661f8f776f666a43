"""Class-parallel training: each rank of a process group owns some class centres and sees the whole batch.

    x = all_gather(x_r)                             (N, D), N = sum of the ranks' N_r
    top_r, log_sum_r, cos_r, max_r = op(x, w_r, y)  each (N,), over the classes of this rank
    lse = log sum_r e^{lse_r},  cos_y = sum_r cos_r,  max_neg = max_r max_r,  where lse_r = s top_r + log_sum_r
    dropped = sum_r e^{lse_r - lse} dropped_r       (N,), with a gradient_tolerance
    dx_r = reduce_scatter(dx)

A rank leaves out of a sample at most the tolerance of the softmax over its own negatives. What all ranks drop is a
mean of those shares, so it is within the tolerance too, and no rank waits for the others' lse to choose.

Between gathering and reducing, every rank computes the same numbers from the same (N,) vectors, so margins, their
batch statistics and reductions are those of the global batch and need no collective of their own.

dx is complete only after the last tile of classes, so none of it can be reduced behind the others. A pass for dx
ahead of one for dw would compute the cosines once more, 2 N D C/W operations to hide 4 N D bytes: slower unless a
rank owns fewer classes than twice the operations it does in the time of a byte, 20,000 at 400 TFLOP/s and 40 GB/s.
Half the samples at a time would read w twice, and rows that move in backward need the gradient of all samples.

Gradients are those of the mean over the ranks of the losses that the ranks call backward on, as under
DistributedDataParallel and FSDP: the weight's is exact, and the embeddings' is `world size` times what it would be
on one process, so that averaging the backbone's gradient over the ranks makes it exact too.
"""

import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, _redistribute
from torch.func import functional_call
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import collectives, ops
from cosface_kernels.collectives import Statement, naming
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.gradients import GradScaler as GradScaler
from cosface_kernels.gradients import clip_grad_norm_ as clip_grad_norm_
from cosface_kernels.softmax import Softmax
from cosface_kernels.validation import check_integer, check_positive, is_integer, warn


def class_range(num_classes: int, rank: int, world_size: int) -> range:
    """The classes that a rank owns, as `torch.chunk` and DTensor's Shard(0) share them out; the last may own none.

    >>> class_range(10, 0, 4), class_range(10, 3, 4)
    (range(0, 3), range(9, 10))
    >>> class_range(3, 3, 4)
    range(3, 3)

    Raises:
        ValueError: a number is none, or out of its range.
    """
    check_integer("num_classes", num_classes, 0)
    check_positive("world_size", world_size)
    if not is_integer(rank) or not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank!r}.")
    most = -(-num_classes // world_size)
    return range(min(rank * most, num_classes), min((rank + 1) * most, num_classes))


def empty_weight(
    num_classes: int,
    embedding_size: int,
    group: ProcessGroup,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DTensor:
    """A (num_classes, embedding_size) weight of which this rank holds its `class_range`, not initialised.

    Raises:
        TypeError: the group is something other than a process group.
        ValueError: this rank is not in the group; on every rank, if the sizes differ between ranks.
    """
    check_group(group)
    device = torch.device(device) if device is not None else torch.get_default_device()
    with collectives.agreement(group, device, "the weight") as own:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        own.facts = {"num_classes": num_classes, "embedding_size": embedding_size, "dtype": dtype}
        classes = class_range(num_classes, dist.get_rank(group), dist.get_world_size(group))
        rows = torch.empty(len(classes), embedding_size, device=device, dtype=dtype)
    return DTensor.from_local(
        rows,
        DeviceMesh.from_group(group, device.type),
        [Shard(0)],
        shape=torch.Size((num_classes, embedding_size)),
        stride=(embedding_size, 1),
    )


def check_group(group: object) -> None:
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"rank {dist.get_rank()} is not in process_group, of which new_group() returned {group!r} here: leave "
            "the call to the ranks that are."
        )
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}.")


def destroy_process_group() -> None:
    """`torch.distributed.destroy_process_group()`, and the end of its groups' threads.

    What holds a group keeps its threads, and one of gloo's that is at work while Python below 3.14 ends aborts the
    process. This clears what is out of reach: DTensor's caches, the cycle that DistributedDataParallel is, and the
    frames of an exception that is being handled. Variables it leaves: let the function that has backbone, head and
    optimizer return, or raise, before.

        torch.distributed.init_process_group("gloo")
        try:
            train()
        finally:
            destroy_process_group()
    """
    _clear_frames(sys.exc_info()[1])
    _clear_caches()
    gc.collect()
    dist.destroy_process_group()


def _clear_frames(error: BaseException | None) -> None:
    """Those that the error left behind, and the errors that it came of."""
    left, seen = [error], set()
    while left:
        error = left.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            left += [error.__cause__, error.__context__]


def _clear_caches() -> None:
    """DTensor's, of which none is public, and each version of torch has others."""
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and f"{each.__module__}".startswith(DTensor.__module__):
            each.cache_clear()
    for module, clear in (
        (_redistribute, "clear_redistribute_planner_cache"),
        (torch._C, "_clear_DTensor_sharding_propagator_cache"),
    ):
        if hasattr(module, clear):
            getattr(module, clear)()


def several_ranks() -> bool:
    """Whether this process is one of several, which DistributedDataParallel may then keep alike."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def warn_of_drift() -> None:
    """Of a head that no group shards, in a forward pass of one of several ranks that DDP knows nothing of."""
    if DistributedDataParallel._active_ddp_module is None:
        warn(
            f"Each of {dist.get_world_size()} ranks trains a copy of this head by its own samples, and the copies "
            "drift apart, unless their gradients are averaged: construct the head with process_group=..., or make "
            "it part of the module that DistributedDataParallel wraps and calls. torch.distributed.group.WORLD is "
            "None before init_process_group(), and a head that is constructed with it then is not sharded."
        )


IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # attribute of a module that is to be wrapped


def leave_to_its_rank(head: nn.Module, *names: str) -> None:
    """Keeps DistributedDataParallel from what is sharded, whatever module it wraps: the head, or Lightning's."""
    for name in names:
        getattr(head, name)._ddp_ignored = True  # torch's mark of those
    # torch looks for both where it wraps the owner itself
    vars(head)[IGNORED_BY_DDP] = [each for name in names for each in (name, f".{name}")]
    _watch_modules()


@functools.cache  # once
def _watch_modules() -> None:
    register_module_module_registration_hook(_pass_ignored_on)


def _pass_ignored_on(module: nn.Module, name: str, part: nn.Module | None) -> None:
    """Adds the sharded weights of a part, which is about to become one, to those that DDP is to ignore."""
    known = vars(module).get(IGNORED_BY_DDP)  # by vars, since torch.compile's wrapper looks for others in its part
    held = [] if part is None else [*part.named_parameters(), *part.named_buffers()]
    sharded = [n for n, tensor in held if getattr(tensor, "_ddp_ignored", False)]
    if known is not None or sharded:
        others = [each for each in known or () if not each.startswith(f"{name}.")]
        vars(module)[IGNORED_BY_DDP] = [*others, *(f"{name}.{each}" for each in sharded)]


def own_classes(weight: Tensor) -> range:
    """The classes whose rows are here: all of a plain weight, this rank's of a sharded one."""
    return placement(weight).classes


def own_rows(tensor: Tensor) -> Tensor:
    """The rows that are here, in the tensor's own memory, without a gradient."""
    rows = tensor.detach()
    return rows.to_local() if isinstance(rows, DTensor) else rows


def shard_like(weight: DTensor, rows: Tensor) -> DTensor:
    """The DTensor of which each rank holds its rows, or a number of each, shared out like the weight's."""
    shape, stride = torch.Size((len(weight), *rows.shape[1:])), weight.stride()[-rows.dim() :]
    return DTensor.from_local(rows, weight.device_mesh, weight.placements, shape=shape, stride=stride)


def beside(weight: Tensor, rows: Tensor) -> Tensor:
    """What this rank has of something, whole or sharded as the weight is."""
    return shard_like(weight, rows) if isinstance(weight, DTensor) else rows


def zero_exponents(weight: Tensor) -> Tensor:
    """Those of the rows of something in float8, laid out like the weight."""
    rows = own_rows(weight)
    return beside(weight, rows.new_zeros(len(rows), dtype=torch.int8))


def whole(tensor: Tensor) -> Tensor:
    """All rows of something that may be sharded, on each of its ranks, which must all make the call."""
    if not isinstance(tensor, DTensor):
        return tensor
    with naming("gathering all rows", tensor.device_mesh.get_group()):
        if tensor.dtype is FLOAT8:  # which gloo does not send
            return shard_like(tensor, own_rows(tensor).view(torch.uint8)).full_tensor().view(FLOAT8)
        return tensor.full_tensor()


@contextmanager
def agreement_on_rows(weight: Tensor, about: str) -> Iterator[Statement]:
    """`collectives.agreement` of the ranks that share the weight, or of the one process that has it."""
    group = weight.device_mesh.get_group() if isinstance(weight, DTensor) else None
    with collectives.agreement(group, weight.device, about) as own:
        yield own


def placement(weight: Tensor) -> "Local | Exchange":
    """What a batch has to do with other ranks; `Exchange` says what each method is for."""
    return Exchange(weight) if isinstance(weight, DTensor) else Local(weight)


class Local:
    """`Exchange` where nobody shares the weight: there is nothing to agree on, to take or to bring."""

    rank, world_size = 0, 1

    def __init__(self, weight: Tensor) -> None:
        self.weight = self.whole = weight

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def classes(self) -> range:
        return range(self.weight.shape[0])

    def agreement(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def keep_own(self, rows: Tensor) -> Tensor:
        return rows

    def replicate(self, parameter: float | Tensor) -> float | Tensor:
        return parameter

    def share(self, parameter: Tensor) -> Tensor:
        return parameter

    def apply(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return function(rows)

    def enter(
        self, x: Tensor, targets: Tensor, scale: Tensor, sampled: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight = collectives.dense_gradient(self.weight) if sampled and several_ranks() else self.weight  # (C, D)
        return x, weight, targets, scale

    def combine(self, _: Tensor, loss: Tensor, *results: Tensor) -> tuple[Tensor, Softmax]:
        return loss, Softmax.of(*results)

    def count(self, classes: int) -> int:
        return classes

    def keep_nearest(self, cosines: Tensor, classes: Tensor, _: int) -> tuple[Tensor, Tensor]:
        return cosines, classes

    def takes_part(self, asked: bool) -> bool:
        return asked

    def combine_kept(self, dropped: Tensor, kept: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return dropped, kept

    def sum(self, rows: Tensor) -> Tensor:
        return rows

    def add(self, rows: Tensor) -> Tensor:
        return rows

    def of_own_classes(self, rows: Tensor) -> Tensor:
        return rows


class Exchange:
    """What one batch takes to and from the other ranks that share a weight.

    Args:
        weight: (num_classes, D) DTensor, Shard(0) of a one-dimensional mesh.

    Attributes:
        num_classes: C, of all ranks.
        weight: (C_r, D), the rows of this rank, connected to the DTensor's gradient.
        classes: the global numbers of these rows.
        whole: None; the weight, (C, D), where all of it is on one process.
    """

    whole = None

    def __init__(self, weight: DTensor) -> None:
        if weight.device_mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
            raise ValueError(
                "a distributed weight must be sharded on dimension 0 of a one-dimensional mesh, got "
                f"{weight.placements} on a mesh of shape {tuple(weight.device_mesh.shape)}."
            )
        self.group = weight.device_mesh.get_group()
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.shape = weight.shape
        self.num_classes = weight.shape[0]
        self.classes = class_range(weight.shape[0], self.rank, self.world_size)
        self.weight = collectives.dense_gradient(weight.to_local())
        self._counts: list[int] = []
        self._lse_from_top: Tensor  # (N,) lse_r - s top

    @contextmanager
    def agreement(
        self, describe: Callable[[], dict[str, object]], embeddings: Tensor, *per_sample: Tensor | None
    ) -> Iterator[None]:
        """Checks the batch in its body; what one rank raises there, or states unlike the others, all ranks raise.

        Args:
            describe: gives what must be the same on every rank, by its name in a message.
            embeddings, per_sample: inputs that all ranks must have, or lack, and differentiate, or not.
        """
        with collectives.agreement(self.group, self.weight.device) as own:
            yield
            inputs = (embeddings, *per_sample, self.weight)
            own.count = len(embeddings)
            own.facts = {
                **describe(),
                "num_classes": self.shape[0],
                "embedding_size": self.shape[1],
                "dtype of the weight": self.weight.dtype,
                "dtype of embeddings": embeddings.dtype,
                "presence of optional inputs": [t is not None for t in inputs],
                "recording of gradients": [t is not None and t.requires_grad for t in inputs]
                if torch.is_grad_enabled()
                else "off",
            }
        self._counts = own.counts

    def gather(self, rows: Tensor) -> Tensor:
        """(N, ...) rows of all ranks, in their order, from the (N_r, ...) of this rank."""
        return collectives.gather(rows, self._counts, self.group)

    def keep_own(self, rows: Tensor) -> Tensor:
        """(N_r, ...) rows of this rank's samples, from the (N, ...) of all."""
        return rows.split(self._counts)[self.rank]

    def replicate(self, parameter: float | Tensor) -> float | Tensor:
        """A 0-d parameter of which every rank has a copy, shared; anything else as it is."""
        return parameter if not isinstance(parameter, Tensor) or parameter.dim() else self.share(parameter)

    def share(self, parameter: Tensor) -> Tensor:
        """A parameter of which every rank has a copy; its gradient becomes the same on all."""
        return collectives.replicate(parameter, self.group)

    def apply(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """function(rows); of a module, which knows no ranks, the parameters are shared."""
        if not isinstance(function, nn.Module):
            return function(rows)
        shared = {name: self.share(own) for name, own in function.named_parameters() if own.requires_grad}
        return functional_call(function, shared, (rows,)) if shared else function(rows)

    def enter(
        self, x: Tensor, targets: Tensor, scale: Tensor, sampled: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, targets and scale for the op on this rank's classes, or on a sample of them.

        The op's gradients are those of the mean over the ranks' losses, while each rank's graph is that of its own
        loss, of which gathering takes the sum: hence the factor.
        """
        inside = (targets >= self.classes.start) & (targets < self.classes.stop)  # (N,)
        targets = torch.where(inside, targets - self.classes.start, ops.IGNORED)
        return self.of_own_classes(x), self.weight, targets, self.of_own_classes(scale)

    def of_own_classes(self, rows: Tensor) -> Tensor:
        """What every rank has alike, on its way into a sum over this rank's classes; see `enter`."""
        return collectives.scale_gradient(rows, self.world_size)

    def combine(
        self,
        scale: Tensor,
        loss: Tensor,
        top: Tensor,
        log_sum: Tensor,
        target_cos: Tensor,
        max_neg: Tensor,
        moments: Tensor,
    ) -> tuple[None, Softmax]:
        """The results of the op over all classes from those over each rank's.

        That of the loss is None: it follows from the others, and from those of the ranks it does not. Two
        reductions, because no bound on lse_r that all ranks know keeps e^{lse_r - bound} from underflow.
        """
        largest = torch.stack([top.masked_fill(log_sum.isneginf(), -torch.inf), max_neg])  # (2, N)
        with naming("combining the shards", self.group):
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        all_top = largest[0].masked_fill(largest[0].isneginf(), 0)  # (N,)
        lse_from_top = log_sum + scale * (top - all_top)  # (N,)
        self._lse_from_top = lse_from_top.detach()
        summed = torch.cat([torch.atleast_2d(target_cos), moments[1:]])
        below = moments[:1] + (all_top - top)  # (1, N), or (0, N)
        log_sum, summed, below = collectives.combine(lse_from_top, summed, below, self.group)
        rows = target_cos.dim()  # of targets
        target_cos, moments = summed[:rows].view(target_cos.shape), torch.cat([below, summed[rows:]])
        return None, Softmax.of(all_top, log_sum, target_cos, largest[1].clone(), moments)

    def count(self, classes: int) -> Tensor:
        """How many classes take part on all ranks, 0-d, from how many do here."""
        return self.sum(torch.tensor(classes, device=self.weight.device))

    def keep_nearest(self, cosines: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest cosines of this rank's samples, and their classes, over those of all ranks."""
        owned = [len(class_range(self.shape[0], rank, self.world_size)) for rank in range(self.world_size)]
        everyones = []  # (N_r, k or fewer of every rank) each
        for rows in (cosines, classes + self.classes.start):
            padded = F.pad(rows, (0, k - rows.shape[1]))  # (N, k), for ranks that own fewer classes
            blocks = collectives.gather(padded, [len(padded)] * self.world_size, self.group)
            blocks = blocks.view(self.world_size, len(padded), k)
            everyones.append(
                torch.cat([self.keep_own(block)[:, :n] for block, n in zip(blocks, owned, strict=True)], 1)
            )
        # lower classes are on lower ranks, so that a stable order has them first
        cosines, order = everyones[0].sort(stable=True, dim=1, descending=True)
        return cosines[:, :k], everyones[1].gather(1, order)[:, :k]

    def takes_part(self, asked: bool) -> bool:
        """Whether this rank is in a sum that is asked for, here or, of which it cannot know, on another."""
        return True

    def combine_kept(
        self, dropped: Tensor, kept: Tensor, targets: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """dropped and kept, each (N,), of the negatives of all ranks from those of each rank's, after `combine`.

        Args:
            targets: (N,), negative where the target is no class of this rank.
            num_classes: of this rank, that take part.
        """
        negatives = num_classes - (targets >= 0).double()  # (N,)
        mass = self._lse_from_top.double().exp()  # (N,), by which the mean of dropped is weighted
        sums = self.sum(torch.stack([mass * dropped, mass, negatives * kept, negatives]))  # (4, N)
        # in a sample without negatives, or of which a logit is nan, nothing is dropped
        return torch.where(sums[0] > 0, sums[0] / sums[1], 0), sums[2] / sums[3].clamp_min(1)

    def sum(self, rows: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient."""
        rows = rows.clone()
        with naming("combining the shards", self.group):
            dist.all_reduce(rows, group=self.group)
        return rows

    def add(self, rows: Tensor) -> Tensor:
        """The sum over the ranks, whose gradient is that of the mean over the ranks' losses."""
        return collectives.add(rows, self.group)
