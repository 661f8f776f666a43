"""The collectives of a batch as autograd sees them, and how ranks agree on one.

Each has a name for a profiler and for the message of its failure.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

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


def agree(
    group: ProcessGroup,
    device: torch.device,
    facts: Mapping[str, object],
    count: int = 0,
    refusal: Exception | None = None,
    about: str = "the batch",
) -> list[int]:
    """Every rank's count, once no rank has refused and all know the same facts; waits for the device.

    Raises:
        ValueError: on every rank, if the facts differ or another rank has refused, with its sentence.
        Exception: the refusal, on the rank that has one.
    """
    said = {name: str(fact) for name, fact in facts.items()}
    own = torch.tensor([count, refusal is not None, zlib.crc32(repr(said).encode())], device=device)  # (3,)
    table = own.new_empty(dist.get_world_size(group) * 3)
    with naming(f"agreeing on {about}", group):
        all_gather(table, own, group=group)
    counts, refused, digests = table.view(-1, 3).T.tolist()
    if not any(refused) and len(set(digests)) == 1:
        return counts
    answers: list[tuple[dict[str, str], str | None]] = [({}, None)] * len(counts)
    dist.all_gather_object(answers, (said, refusal and f"{refusal}"), group=group)
    if refusal is not None:
        raise refusal
    for rank, (_, sentence) in enumerate(answers):
        if sentence is not None:
            raise ValueError(f"rank {rank} refused: {sentence}")
    first = answers[0][0]
    rank, theirs = next((rank, theirs) for rank, (theirs, _) in enumerate(answers) if theirs != first)
    name = next(name for name in {**first, **theirs} if first.get(name) != theirs.get(name))
    raise ValueError(
        f"{name} must be the same on every rank, got {first.get(name)} on rank 0 and {theirs.get(name)} on rank "
        f"{rank}."
    )
