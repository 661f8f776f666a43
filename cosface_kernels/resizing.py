"""Classes that come, go and change their labels, with what is known of each: `FusedMarginLoss.resize_classes_`.

A change is told by its sources: (C_new,) int64, for each new label the old one, or NEW.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cosface_kernels import float8, optim
from cosface_kernels.collectives import naming
from cosface_kernels.distributed import Exchange, Local, class_range, own_rows, placement
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.init import normal_
from cosface_kernels.reference import compute_dtype
from cosface_kernels.validation import check_integer, check_tensor

NEW = -1

Keep = Mapping[int, int] | Sequence[int] | Tensor | None


def resize_(
    weight: Tensor,
    learned: Sequence[Tensor],
    num_classes: int,
    std: float,
    keep: Keep,
    new: int,
    init: tuple[Tensor, Tensor] | None,
    optimizer: Optimizer | None,
    exponents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Changes the weight and the optimizer's state; `FusedMarginLoss.resize_classes_` says what it raises.

    Args:
        learned: parameters beside the weight that have a number of each class, of which the state alone changes.
        num_classes: C, of the head.
        std: of new rows, where none is kept.
        exponents: (C,) of a weight in float8.

    Returns:
        The sources of the change and the number of samples of each new class, (C_new,) each, and the exponents of
        the new rows.
    """
    ranks, parameters = placement(weight), [weight, *learned]
    change = torch.empty(0, device="cpu")

    def facts() -> dict[str, object]:
        return {
            "keep": digest(change),
            "dtype of the embeddings of init": None if init is None else embeddings.dtype,
            "state of the optimizer": states_of(optimizer, weight),
        }

    with ranks.agreement(facts, ranks.weight):
        check_replaceable(weight)
        if not isinstance(optimizer, Optimizer | None):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer or None, got {optimizer!r}.")
        optim.check_between_steps(weight, optimizer)
        if len(weight) != num_classes:  # by another head with the same parameter
            raise ValueError(
                f"the weight must have the head's {num_classes} classes, got {len(weight)}: where heads share "
                "one, no more than one of them can change its classes."
            )
        change = sources(keep, new, num_classes)
        if init is not None:
            embeddings, labels = check_init(init, weight, len(change))
        if optimizer is not None:
            check_optimizer(optimizer, weight, parameters)
    counts = torch.ones_like(change)
    # (C_new, D), of which only the directions are to stay
    rows = normal_(resized_zeros(weight, len(change)), std if exponents is None else float8.INITIAL_STD)
    of_rows = None if exponents is None else resized_zeros(exponents, len(change))
    if init is not None:
        counts = class_counts(ranks, labels, change)
        place_class_means_(rows, embeddings, labels, change)
    set_lengths_(rows, of_rows, weight, exponents, change, std * math.sqrt(weight.shape[1]))
    take_rows_(rows, weight, change)
    if exponents is not None and of_rows is not None:
        take_rows_(of_rows, exponents, change)
    states = {} if optimizer is None else resized_states(optimizer, parameters, change)
    replace_(weight, rows)
    if optimizer is not None:
        optimizer.state.update(states)
    return change, counts, of_rows


def sources(keep: Keep, new: int, num_classes: int) -> Tensor:
    """
    Args:
        keep: the old labels that stay, in their new order, whose positions are the new labels; or a mapping from
            old to new labels; None for all as they are.
        new: how many classes come beside them: behind those kept, or where a mapping leaves a label free.
        num_classes: how many there were.

    Raises:
        ValueError: keep or new does not fit; the message shows the label.

    >>> sources([2, 0], 1, 3)
    tensor([ 2,  0, -1])
    >>> sources({2: 0, 0: 2}, 1, 3)
    tensor([ 2, -1,  0])
    """
    check_integer("new", new, 0)
    try:
        count = num_classes if keep is None else len(keep)
    except TypeError:  # nothing that has a length, of which `into` tells
        count = 0
    return into(keep, num_classes, count + int(new))


def into(keep: Keep, num_classes: int, total: int) -> Tensor:
    """The sources (total,) of a change to so many classes; the arguments are those of `sources`."""
    old = list(keep) if isinstance(keep, Mapping) else range(num_classes) if keep is None else keep
    old = _labels("keep", old, num_classes)  # (K,)
    if not total:
        raise ValueError(f"a head needs a class, got none to keep of {num_classes} and new=0.")
    labels = torch.arange(len(old), device="cpu")  # (K,)
    if isinstance(keep, Mapping):
        labels = _labels("the new labels of keep", list(keep.values()), total)
    elif len(old) > total:
        raise ValueError(f"keep must have at most {total} labels, got {len(old)}.")
    result = torch.full((total,), NEW, device="cpu")
    result[labels] = old
    return result


def _labels(name: str, values: Sequence[int] | Tensor, below: int) -> Tensor:
    """(K,) int64 on the CPU, distinct and in [0, below)."""
    try:
        # an array of numpy may run backwards, a tensor may not
        if hasattr(values, "__array__") and not isinstance(values, Tensor):
            values = values.copy()  # type: ignore[attr-defined]
        labels = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        labels = torch.empty((), device="cpu")  # is none
    labels = labels.long() if not labels.numel() else labels
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be a vector of integers, got {values!r}.")
    labels = labels.long()
    wrong = (labels < 0) | (labels >= below)
    if wrong.any():
        raise ValueError(f"{name} must be in [0, {below}), got {int(labels[wrong][0])}.")
    distinct, counts = labels.unique(return_counts=True)
    if len(distinct) < len(labels):
        raise ValueError(f"{name} must be distinct, got {int(distinct[counts > 1][0])} several times.")
    return labels


def digest(sources: Tensor) -> str:
    """What ranks compare of a change, and can read."""
    checksum = zlib.crc32(sources.numpy().tobytes())
    return f"{int((sources != NEW).sum())} of {len(sources)} classes, checksum {checksum:x}"


def take_rows_(rows: Tensor, old: Tensor, sources: Tensor) -> Tensor:
    """Fills `rows` (C_new, ...) with those of `old` (C, ...), both whole or both sharded; new ones stay.

    Ranks that share them send each row from its old place to its new one.
    """
    into, own = own_rows(rows), own_rows(old)
    if own.dtype is FLOAT8:  # which backends of torch.distributed do not send
        into, own = into.view(torch.uint8), own.view(torch.uint8)
    if not isinstance(old, DTensor):
        kept = (sources != NEW).to(into.device)
        into[kept] = own[sources[sources != NEW].to(own.device)]
        return rows
    group = Exchange(old).group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    before = [class_range(len(old), each, world) for each in range(world)]
    after = [
        sources[place.start : place.stop] for place in (class_range(len(rows), r, world) for r in range(world))
    ]

    def places(wanted: Tensor, owned: range) -> Tensor:
        return ((wanted >= owned.start) & (wanted < owned.stop)).nonzero()[:, 0]

    sent = [wanted[places(wanted, before[rank])] - before[rank].start for wanted in after]
    received = [places(after[rank], owned) for owned in before]
    arrived = own.new_empty(sum(map(len, received)), *own.shape[1:])
    with naming("moving classes between ranks", group):
        dist.all_to_all_single(
            arrived,
            own[torch.cat(sent).to(own.device)],
            list(map(len, received)),
            list(map(len, sent)),
            group=group,
        )
    into[torch.cat(received).to(into.device)] = arrived
    return rows


def class_counts(ranks: Local | Exchange, labels: Tensor, sources: Tensor) -> Tensor:
    """(C_new,) int64 on the CPU, the samples of each new class on all ranks.

    Raises:
        ValueError: on every rank, for a new class that has none.
    """
    counts = ranks.sum(torch.bincount(labels, minlength=len(sources)).to(ranks.weight.device)).cpu()
    missing = (sources == NEW) & (counts == 0)
    if missing.any():
        raise ValueError(
            f"init must hold an embedding of every new class, got none of class {int(missing.nonzero()[0])}."
        )
    return counts


def place_class_means_(rows: Tensor, embeddings: Tensor, labels: Tensor, sources: Tensor) -> None:
    """Gives each new row of `rows` (C_new, D) the direction of the mean of its class's unit embeddings.

    Raises:
        ValueError: on every rank, for a mean that has no direction.

    Source: Qi et al., Low-Shot Learning with Imprinted Weights, arXiv:1712.07136, Section 3.2.
    """
    ranks = placement(rows)
    x_hat = F.normalize(embeddings.to(compute_dtype(embeddings, rows)))  # (M, D)
    for rank in range(ranks.world_size):  # one after the other, so that no more than a shard is in memory
        owned = class_range(len(rows), rank, ranks.world_size)
        here = (labels >= owned.start) & (labels < owned.stop)
        sums = x_hat.new_zeros(len(owned), rows.shape[1])
        sums = ranks.sum(sums.index_add_(0, labels[here] - owned.start, x_hat[here]))
        lengths = torch.linalg.vector_norm(sums, dim=1)
        new = sources[owned.start : owned.stop] == NEW
        wrong = new & ~((lengths > 0) & lengths.isfinite()).cpu()
        if wrong.any():
            label = owned.start + int(wrong.nonzero()[0])
            raise ValueError(
                f"the mean of the embeddings of init must have a direction, got length "
                f"{lengths[label - owned.start].item():g} for class {label}."
            )
        if rank == ranks.rank:
            new = new.to(rows.device)
            means = sums[new]
            own_rows(rows)[new] = float8.quantized(means)[0] if rows.dtype is FLOAT8 else means.to(rows.dtype)


def set_lengths_(
    rows: Tensor,
    of_rows: Tensor | None,
    old: Tensor,
    of_old: Tensor | None,
    sources: Tensor,
    otherwise: float,
) -> None:
    """Makes new rows as long as the kept ones are in the mean, so that a step turns both as far.

    of_rows, of_old: the exponents of both, in float8.
    """
    ranks, before = placement(rows), placement(old)
    kept = torch.zeros(len(old), dtype=torch.bool, device="cpu")
    kept[sources[sources != NEW]] = True
    kept = kept[before.classes.start : before.classes.stop].to(old.device)
    lengths = float8.lengths(own_rows(old)[kept], None if of_old is None else own_rows(of_old)[kept])
    total, count = ranks.sum(torch.stack([lengths.sum(), lengths.new_tensor(len(lengths))])).tolist()
    own = own_rows(rows)
    new = (sources[ranks.classes.start : ranks.classes.stop] == NEW).to(rows.device)
    directions = F.normalize(own[new].to(compute_dtype(own, own)))
    moved = directions * (total / count if count else otherwise)
    if of_rows is None:
        own[new] = moved.to(own.dtype)
    else:
        own[new], own_rows(of_rows)[new] = float8.quantized(moved)


def check_init(init: tuple[Tensor, Tensor], weight: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The (M, D) embeddings and (M,) labels of it, on the weight's device."""
    if not isinstance(init, tuple | list) or len(init) != 2:
        raise ValueError(f"init must be None or a pair (embeddings, labels), got {type(init).__name__}.")
    embeddings, labels = init
    check_tensor("the embeddings of init", embeddings)
    check_tensor("the labels of init", labels)
    if embeddings.dim() != 2 or embeddings.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the embeddings of init must have shape (M, {weight.shape[1]}), got {tuple(embeddings.shape)}."
        )
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"the labels of init must be {len(embeddings)} integers, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(f"the labels of init must be in [0, {num_classes}), got {int(labels[wrong][0])}.")
    return embeddings.detach().to(weight.device), labels.long().to(weight.device)


def check_replaceable(weight: Tensor) -> None:
    """Raises ValueError for what a module computes anew from its parameters, which would keep the old rows."""
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            "the head's weight must be a Parameter to be given other rows, got a "
            f"{type(weight).__name__} of shape {tuple(weight.shape)} that is computed from another, as by "
            "weight_norm or prune: remove that first."
        )


def replace_(weight: Tensor, rows: Tensor) -> None:
    """Gives the parameter other rows (C_new, ...), laid out like its own, so that all that hold it hold these."""
    weight.grad = None
    torch.autograd.graph.increment_version(weight)  # a graph of before must not go backward through other rows
    # Of a graph that is still alive autograd keeps the gradient's shape, unless the dtype changes in between.
    other = torch.float16 if rows.dtype is torch.float32 else torch.float32
    weight.data = resized_zeros(rows, 0).to(other)
    weight.data = rows
    if isinstance(weight, DTensor):
        weight._local_tensor, weight._spec = rows._local_tensor, rows._spec  # type: ignore[attr-defined]


def check_optimizer(optimizer: Optimizer, weight: Tensor, parameters: Iterable[Tensor]) -> None:
    """Raises ValueError if it is without the weight, or has state of the parameters that is not of each class."""
    if not any(member is weight for group in optimizer.param_groups for member in group["params"]):
        raise ValueError(
            f"the optimizer must hold the head's weight, got a {type(optimizer).__name__} without it."
        )
    for parameter in parameters:
        for name, moment in optimizer.state.get(parameter, {}).items():
            if isinstance(moment, Tensor) and (not moment.dim() or _is_of_each_class(moment, parameter)):
                continue
            if moment is None or isinstance(moment, int | float):
                continue
            got = f"shape {tuple(moment.shape)}" if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(
                f"the optimizer's state of a parameter of shape {tuple(parameter.shape)} must be of that shape, "
                f"got {name} of {type(optimizer).__name__}, {got}, which belongs "
                "to no class: make the optimizer anew."
            )


def _is_of_each_class(moment: Tensor, parameter: Tensor) -> bool:
    """Laid out like the parameter, or the exponents of rows that are."""
    return moment.shape in (parameter.shape, parameter.shape[:1])


def states_of(optimizer: Optimizer | None, weight: Tensor) -> list[str]:
    """The names of what ranks exchange of it."""
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    return sorted(name for name, moment in state.items() if isinstance(moment, Tensor) and moment.dim())


def resized_states(
    optimizer: Optimizer, parameters: Iterable[Tensor], sources: Tensor
) -> dict[Tensor, dict[str, object]]:
    """The optimizer's state of those parameters that have a row or a number of each class, with 0 for new ones."""
    states = {}
    for parameter in parameters:
        if parameter in optimizer.state:
            states[parameter] = {
                name: _resized(moment, sources)
                if isinstance(moment, Tensor) and _is_of_each_class(moment, parameter)
                else moment
                for name, moment in sorted(optimizer.state[parameter].items())  # alike on every rank
            }
    return states


def _resized(moment: Tensor, sources: Tensor) -> Tensor:
    rows = moment.to_dense()  # that of sampled classes is sparse in torch.optim.SGD
    rows = take_rows_(resized_zeros(rows, len(sources)), rows, sources)
    return rows.to_sparse(1) if moment.is_sparse else rows


def resized_zeros(tensor: Tensor, num_classes: int) -> Tensor:
    """(num_classes, ...) zeros, sharded like the tensor."""
    shape = torch.Size((num_classes, *tensor.shape[1:]))
    if not isinstance(tensor, DTensor):
        return tensor.new_zeros(shape)
    ranks = Exchange(tensor)
    own = class_range(num_classes, ranks.rank, ranks.world_size)
    rows = own_rows(tensor).new_zeros(len(own), *shape[1:])
    return DTensor.from_local(rows, tensor.device_mesh, tensor.placements, shape=shape, stride=tensor.stride())
