"""The collectives of a batch as autograd sees them, and how ranks agree on one.

Each has a name for a profiler and for the message of its failure.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.distributed.nn  # by DistributedDataParallel else, whose group its functions would hold as a default
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function
from torch.utils.weak import WeakTensorKeyDictionary

from cosface_kernels.derivatives import once_differentiable

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward sums over the ranks, in float32 at least, and keeps the rows of this one."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.counts, ctx.group = counts, group
        own = _pad(rows, [len(rows)], max(1, *counts))
        everyones = rows.new_empty(len(counts) * len(own), *rows.shape[1:])
        with naming("gathering the batch", group):
            all_gather(everyones, own, group=group)
        return torch.cat([block[:n] for block, n in zip(everyones.split(len(own)), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        dtype = torch.promote_types(grad.dtype, torch.float32)
        most = max(1, *ctx.counts)
        own = grad.new_empty(most, *grad.shape[1:], dtype=dtype)
        with naming("summing the embeddings' gradient", ctx.group):
            reduce_scatter(own, _pad(grad.to(dtype), ctx.counts, most), group=ctx.group)
        return (own[: ctx.counts[dist.get_rank(ctx.group)]].to(grad.dtype), None, None), ()


class _Combine(torch.autograd.Function):
    """log_sum = log sum_r e^{l_r} of l_r = lse_r - s top; sums of `summed`; and means, weighted by e^{l_r}.

    With p_r = e^{l_r - log_sum}, d log_sum / d l_r = p_r and d mean / d l_r = p_r (mean_r - mean). The gradient is
    that of the mean over the ranks' losses. summed is (K, N), and averaged (L, N) with L = 0 or more.
    """

    @staticmethod
    def forward(ctx, l_r, summed, averaged, group):  # type: ignore[no-untyped-def]
        masses = l_r.exp()  # (N,)
        sums = torch.cat([masses[None], summed, torch.where(masses > 0, masses * averaged, 0)])  # (1 + K + L, N)
        with naming("combining the shards", group):
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()  # (N,)
        means = torch.where(sums[0] > 0, sums[1 + len(summed) :] / sums[0], 0)  # (L, N)
        ctx.group = group
        ctx.save_for_backward(l_r, log_sum, averaged, means)
        return log_sum, sums[1 : 1 + len(summed)].clone(), means

    @staticmethod
    @once_differentiable
    def backward(ctx, g_log_sum, g_summed, g_means):  # type: ignore[no-untyped-def]
        l_r, log_sum, averaged, means = ctx.saved_tensors
        g = torch.cat([g_log_sum[None], g_summed, g_means])  # (1 + K + L, N)
        with naming("averaging the ranks' gradients", ctx.group):
            dist.all_reduce(g, group=ctx.group)
        g /= dist.get_world_size(ctx.group)
        g_log_sum, g_summed, g_means = g.tensor_split((1, 1 + len(g_summed)))
        # no gradient stays none where log_sum is nan or has no terms
        share = torch.where(l_r.isneginf(), 0, (l_r - log_sum).exp())  # (N,)
        through = torch.cat([g_log_sum, torch.where(g_means != 0, g_means * (averaged - means), 0)])  # (1 + L, N)
        g_l = torch.where(through != 0, through * share, 0).sum(0)  # (N,)
        g_averaged = torch.where(g_means != 0, g_means * share, 0)  # (L, N)
        return (g_l, g_summed, g_averaged, None), (l_r, averaged)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return (_mean(grad, ctx.group), None), ()


class _Add(torch.autograd.Function):
    """The sum over the ranks; backward averages the ranks' gradients of it."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        rows = rows.clone()
        with naming("combining the shards", group):
            dist.all_reduce(rows, group=group)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return (_mean(grad, ctx.group), None), ()


def _mean(grad: Tensor, group: ProcessGroup) -> Tensor:
    grad = grad.contiguous().clone()
    with naming("averaging the ranks' gradients", group):
        dist.all_reduce(grad, group=group)
    return grad / dist.get_world_size(group)


class _DenseGradient(torch.autograd.Function):
    """A gradient of sampled classes as one of all, because neither a DTensor nor DDP's buckets can be sparse."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad.to_dense() if grad.is_sparse else grad


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad * ctx.factor, None


gather: Callable[..., Tensor] = _Gather.apply
add: Callable[..., Tensor] = _Add.apply
combine: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Combine.apply
replicate: Callable[..., Tensor] = _Replicate.apply
dense_gradient: Callable[..., Tensor] = _DenseGradient.apply
scale_gradient: Callable[..., Tensor] = _ScaleGradient.apply


def _pad(rows: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """Blocks of counts[r] rows as blocks of `most` rows, with zeros after each."""
    if all(count == most for count in counts):
        return rows.contiguous()
    padded = rows.new_zeros(len(counts), most, *rows.shape[1:])
    for block, own in zip(padded, rows.split(list(counts)), strict=True):
        block[: len(own)] = own
    return padded.flatten(0, 1)


@contextmanager
def naming(
    work: str, group: ProcessGroup | None, cause: str = "another rank has ended, hangs or cannot be reached"
) -> Iterator[None]:
    """Names a collective to a profiler, and to the user if it fails: the backend knows an address and no rank."""
    try:
        with record_function(f"cosface: {work}"):
            yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{work} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}: {cause}, and its own "
            f"output says why. {error}"
        ) from error


TOLD = "_told_to_all_ranks"  # attribute of an exception that every rank has raised, each in its words


@dataclass
class Statement:
    """What a rank says of itself before a collective, and every rank's count once all agree.

    Attributes:
        facts: what must be the same on every rank, by its name in a message: a tensor by its dtype, shape, content
            and whether its gradient is recorded, anything else by its text.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    count: int = 0
    counts: list[int] = field(default_factory=list)


@contextmanager
def agreement(group: ProcessGroup | None, device: torch.device, about: str = "the batch") -> Iterator[Statement]:
    """What one rank raises in the body, or states there unlike the others, all ranks raise behind it.

    A rank that raised alone would leave the others waiting for it in the next collective.

    Args:
        group: None for a process of its own, which agrees with itself.
    """
    own, refusal = Statement(), None
    try:
        yield own
    except Exception as error:  # whatever it is, it must be told before it is raised
        if group is None or getattr(error, TOLD, False):
            raise
        refusal = error
    facts = own.facts if refusal is None else {}
    own.counts = [own.count] if group is None else agree(group, device, facts, own.count, refusal, about)


def agree(
    group: ProcessGroup,
    device: torch.device,
    facts: Mapping[str, object],
    count: int = 0,
    refusal: Exception | None = None,
    about: str = "the batch",
) -> list[int]:
    """Every rank's count, once no rank has refused and all state the same facts; waits for the device, once.

    Raises:
        ValueError: on every rank, if the facts differ or another rank has refused, with its sentence.
        Exception: the refusal, on the rank that has one.
    """
    try:
        said, contents = _stated(facts, device)
    except Exception as failure:  # as a sparse tensor raises: the others wait for this rank already
        said, contents, facts, refusal = {}, 0, {}, refusal or failure
    text = repr(sorted(said.items()))  # in an order that is the same on every rank
    own = torch.tensor([count, refusal is not None, zlib.crc32(text.encode()), 0], device=device)  # (4,)
    own[3] = contents
    table = own.new_empty(dist.get_world_size(group) * 4)
    with naming(f"agreeing on {about}", group):
        all_gather(table, own, group=group)
    counts, refused, *digests = table.view(-1, 4).T.tolist()
    if not any(refused) and all(len(set(each)) == 1 for each in digests):
        return counts
    said |= {name: f"{_content(fact)}{said[name]}" for name, fact in facts.items() if isinstance(fact, Tensor)}
    answers: list[tuple[dict[str, str], str | None]] = [({}, None)] * len(counts)
    dist.all_gather_object(answers, (said, refusal and f"{refusal}"), group=group)
    told = refusal or ValueError(_difference(answers))
    setattr(told, TOLD, True)
    try:
        raise told
    finally:
        del told, refusal  # which would hold this frame, and it the group, until the garbage is collected


def _stated(facts: Mapping[str, object], device: torch.device) -> tuple[dict[str, str], Tensor | int]:
    """The facts as text, a tensor's by its kind; and 0-d int64 of the contents of all tensors."""
    said = {name: _kind(fact) if isinstance(fact, Tensor) else str(fact) for name, fact in facts.items()}
    tensors = [fact for _, fact in sorted(facts.items()) if isinstance(fact, Tensor)]
    return said, _mixed(torch.stack([digest(each).to(device) for each in tensors])) if tensors else 0


def _difference(answers: Sequence[tuple[dict[str, str], str | None]]) -> str:
    for rank, (_, sentence) in enumerate(answers):
        if sentence is not None:
            return f"rank {rank} refused: {sentence}"
    first = answers[0][0]
    for rank, (theirs, _) in enumerate(answers):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                return (
                    f"{name} must be the same on every rank, got {first.get(name)} on rank 0 and "
                    f"{theirs.get(name)} on rank {rank}."
                )
    return f"{', '.join(first)} must be the same on every rank; one of them differed, and has changed meanwhile."


def _kind(tensor: Tensor) -> str:
    shape = f" of shape {tuple(tensor.shape)}" if tensor.dim() else ""
    recorded = ", with a gradient" if tensor.requires_grad and torch.is_grad_enabled() else ""
    return f" ({tensor.dtype}{shape}{recorded})"


def _content(tensor: Tensor) -> str:
    if not tensor.dim() and (value := tensor.item()) == value:  # one nan is not another
        return f"{value}"
    low, high = tensor.double().aminmax() if tensor.numel() else (math.nan, math.nan)
    return f"numbers in [{low:.6g}, {high:.6g}], checksum {int(digest(tensor)) % 2**64:x}"


_digests = WeakTensorKeyDictionary()  # of a tensor: the state it was read in, and its digest; not saved with it
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
AT_ONCE = 2**20  # numbers, each of 8 bytes while they are mixed


@torch.no_grad()
@torch._disable_dynamo  # type: ignore[attr-defined]
def digest(tensor: Tensor) -> Tensor:
    """0-d int64 of a tensor's bits and their order, on its device, without waiting for it.

    A table that does not learn is read once, and again where autograd has seen it change, so not through `.data`.
    One that learns, of which the ranks average a gradient as large, is read at each batch.
    """
    bits = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    bits = bits.view(INTEGERS.get(bits.element_size(), torch.int64))
    if len(bits) == 1:
        return bits[0].long()
    keeps = not (tensor.requires_grad or tensor.is_inference())
    state = (tensor._version, tensor.data_ptr()) if keeps else None
    known, found = _digests.get(tensor, (None, bits))
    if not keeps or known != state:
        parts = [_mixed(part, k * AT_ONCE) for k, part in enumerate(bits.split(AT_ONCE))]
        found = torch.stack(parts).sum()
        if keeps:
            _digests[tensor] = state, found
    return found


def _mixed(bits: Tensor, start: int = 0) -> Tensor:
    """0-d sum of what the steps of splitmix64 make of each number and its place."""
    places = torch.arange(start, start + len(bits), device=bits.device)
    mixed = bits + places * -0x61C8864680B583EB  # 2^64 over the golden ratio
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)).sum()
