"""The op on a device: library matrix products and the kernels of csrc/cuda, chunk by chunk of the classes.

With chosen classes, their rows of one chunk at a time are copied, because a library's product cannot read rows
that lie apart. Nothing here waits for the device, and memory is torch's: a CUDA graph can capture it. Nor is
anything specific to a GPU but what a `Device` says, so that it also runs over the kernels on the host.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosface_kernels import float8
from cosface_kernels.backends.chunks import (
    CHUNK_STEP,
    cdiv,
    chunk_classes,
    chunk_in_environment,
    embeddings,
    units,
)
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import WORKSPACE_BYTES, Options
from cosface_kernels.reference import compute_dtype, operand_dtype

KEPT_STEP = 8  # cosines; rows of the cache stay aligned to any load
CACHE_STEP = 64  # bytes; where cosines begin in the cache
BLOCKS_PER_PROCESSOR = 4  # that share the rows of a chunk


@dataclass(frozen=True)
class Device:
    """Where the kernels run.

    Attributes:
        kernels: the compiled module that has them.
        stream: a cudaStream_t.
        largest_workspace: in bytes; less only in tests.
    """

    kernels: Any
    stream: int
    processors: int
    largest_workspace: int = 1 << 62


# On a device, from the first of some classes on, by the gradient of their rows.
Move = Callable[[Device, int, Tensor], None]


def multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out (+)= a b, with sums in the dtype of out."""
    if a.dtype == out.dtype or not a.is_cuda:  # torch has the product of narrow numbers in wide sums on GPUs alone
        a, b = a.to(out.dtype), b.to(out.dtype)
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Cache:
    """What forward leaves for backward. No chunk shows in it, for those of backward may be others than forward's.

    Attributes:
        w_inv_norm: (C,) 1 / |w_j|, if weights are normalised; x_inv_norm: (N,).
        cosines: (N x stride) of the first `kept` classes in order; of float32 in 16 bits.
    """

    def __init__(self, memory: Tensor, n: int, classes: int, options: Options, dtype: torch.dtype) -> None:
        norms = classes if options.normalize_weight else 0
        size, needed = memory.numel(), (norms + n) * dtype.itemsize
        if needed > size:
            raise ValueError(
                f"cache must hold the norms of {norms} classes and {n} embeddings in {needed} bytes, got {size}."
            )
        self.w_inv_norm, self.x_inv_norm = memory[:needed].view(dtype).split([norms, n])
        of_cosine = dtype if dtype is torch.float64 else torch.int16
        first, every = min(cdiv(needed, CACHE_STEP) * CACHE_STEP, size), cdiv(classes, KEPT_STEP) * KEPT_STEP
        room = (size - first) // (max(n, 1) * of_cosine.itemsize)
        self.stride = room // CHUNK_STEP * CHUNK_STEP if room < every else every
        self.kept = min(self.stride, classes)
        self.cosines = memory[first : first + n * self.stride * of_cosine.itemsize].view(of_cosine)


class Step:
    """One call's inputs, and a workspace that all chunks share.

    Attributes:
        operand: what the matrix products multiply.
        segments: blocks that share a row of a chunk.
    """

    def __init__(
        self,
        device: Device,
        x: Tensor,
        w: Tensor,
        targets: Tensor,
        scale: Tensor,
        options: Options,
        cache: Tensor | None,
    ) -> None:
        self.device, self.options = device, options
        self.normalize_weight = options.normalize_weight
        x = embeddings(x, w, options)
        self.sums, self.operand = compute_dtype(x, w), operand_dtype(x.dtype, w.dtype)
        self.exponents = None if options.normalize_weight else options.exponents
        if self.sums is torch.float64:
            self.operand = self.sums
        elif self.operand is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
            self.operand = self.sums  # with which torch has no product of float16 in wider sums
        self.new = functools.partial(torch.empty, device=x.device)
        self.new_sums = functools.partial(self.new, dtype=self.sums)
        self.x, self.targets = x.to(self.operand).contiguous(), targets.contiguous()
        self.scale = scale.to(self.sums).contiguous()
        self.w = w if w.stride(1) == 1 or w.shape[1] == 1 else w.contiguous()
        (self.n, self.d), self.classes = x.shape, options.count(w)
        workspace = min(options.workspace_bytes, device.largest_workspace)
        self.chunk = chunk_in_environment("COSFACE_CUDA_CHUNK", self.classes) or chunk_classes(
            self.n, self.d, self.classes, class_bytes=self._class_bytes(), workspace_bytes=workspace
        )
        blocks = BLOCKS_PER_PROCESSOR * device.processors // max(self.n, 1)
        self.segments = max(1, min(blocks, self.chunk // CHUNK_STEP))
        self.is_alone = cache is None  # no forward precedes backward
        if cache is None:
            norms = self.n + (self.classes if self.normalize_weight else 0)
            cache = self.new(norms * self.sums.itemsize, dtype=torch.uint8)
        self.cache = Cache(cache, self.n, self.classes, options, self.sums)
        self.dot: Tensor | None = None
        self.ones = None if self.normalize_weight else torch.ones(self.chunk, dtype=self.sums, device=x.device)
        self.chosen = None if options.classes is None else options.classes.contiguous()
        self.w_chosen = None if self.chosen is None else self.new(self.chunk, self.d, dtype=w.dtype)
        self.w_operands = None if w.dtype is self.operand else self.new(self.chunk, self.d, dtype=self.operand)
        self.tau = self.coefficients = None
        if options.thresholds is not None:
            self.tau = options.thresholds.to(self.sums).contiguous()
            self.coefficients = options.coefficients(self.sums).contiguous()

    def _class_bytes(self) -> int:
        """What a chunk takes for each of its classes, in backward.

        Its products, G, the gradient of its row, and its row as operands or normalised, of float8 in float16 both,
        and apart from those that are not chosen.
        """
        both = self.w.dtype is FLOAT8 and self.operand is torch.float16
        row = self.sums.itemsize + (2 if both else 1) * self.operand.itemsize
        if self.options.classes is not None:
            row += self.w.itemsize
        return self.n * (self.sums.itemsize + self.operand.itemsize) + self.d * row

    def each_chunk(self, *, is_forward: bool = False) -> Iterator[tuple[Any, int, int, Tensor]]:
        """The kernels' chunk, its first class, how many it has, and their (classes, D) rows of w as operands.

        In order, each of classes that are all in the cache or none. The first pass fills the cache's norms of a
        chunk before; backward makes products only where there are no cosines.
        """
        first, kernels = 0, self.device.kernels
        if is_forward or self.cache.kept < self.classes:
            self.dot = self.new_sums(self.n * self.chunk)
        while first < self.classes:
            is_kept = first < self.cache.kept
            count = min(self.chunk, (self.cache.kept if is_kept else self.classes) - first)
            rows = self.operand_rows(first, count)
            inv_norm = self.cache.w_inv_norm[first : first + count] if self.ones is None else self.ones[:count]
            if self.normalize_weight and (is_forward or self.is_alone):
                kernels.row_norms(rows, inv_norm, self.device.stream)
            if is_forward or not is_kept:
                assert self.dot is not None
                multiply(self.beginning(self.dot, count), self.x, rows.T)
            chunk = kernels.Chunk(
                self.dot, count, first, self.cache.x_inv_norm, inv_norm, self.targets, self.scale, self.segments,
                self.tau, self.coefficients, self.cache.cosines[first:] if is_kept else None, self.cache.stride,
            )  # fmt: skip
            yield chunk, first, count, rows
            first += count

    def beginning(self, memory: Tensor, count: int) -> Tensor:
        """(N, count), of memory for a chunk."""
        return memory[: self.n * count].view(self.n, count)

    def of_chunk(self, rows: Tensor, first: int, count: int, out: Tensor | None = None) -> Tensor:
        """Of these rows, one of each row of w, those of a chunk."""
        if self.chosen is None:
            return rows[first : first + count]
        return torch.index_select(rows, 0, self.chosen[first : first + count], out=out)

    def row_units(self, first: int, count: int) -> Tensor:
        """(count, 1) 2^e_j of a weight in float8 whose length counts."""
        assert self.exponents is not None
        return float8.units(self.of_chunk(self.exponents, first, count), self.sums)

    def operand_rows(self, first: int, count: int) -> Tensor:
        """Of a weight in float8 whose length counts, what is stored times 2^e_j."""
        raw = self.of_chunk(self.w, first, count, None if self.w_chosen is None else self.w_chosen[:count])
        if self.w_operands is None:
            return raw
        rows = self.w_operands[:count].copy_(raw)
        return rows if self.exponents is None else rows.mul_(self.row_units(first, count))


def forward(step: Step, margin: float) -> list[Tensor]:
    """loss, top, log_sum, target_cos, max_neg and moments, empty if not wanted."""
    n, (kernels, stream) = step.n, (step.device.kernels, step.device.stream)
    target_cos = torch.zeros(step.targets.shape, dtype=step.sums, device=step.x.device)
    moments = step.new_sums(4 if step.options.moments else 0, n)
    results = [*(step.new_sums(n) for _ in range(3)), target_cos, step.new_sums(n), moments]
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=step.x.device)
    tops = step.new_sums(step.segments, n).fill_(torch.finfo(step.sums).min)
    max_cos = tops if step.tau is None else tops.clone()
    sums = zeros(4, step.segments, n) if step.options.moments else None
    running = tops, max_cos, zeros(step.segments, n), sums
    kernels.row_norms(step.x, step.cache.x_inv_norm, stream)
    for chunk, *_ in step.each_chunk(is_forward=True):
        kernels.class_statistics(chunk, running, target_cos, stream)
    kernels.merge_statistics(running, step.targets, step.scale, margin, results, stream)
    return results


def any_of(*gradients: Tensor | None) -> Tensor:
    """(N,) whether the row of any of these, (N,) or (2, N) each, is not 0."""
    flows = [g.ne(0) if g.dim() == 1 else g.ne(0).any(0) for g in gradients if g is not None]
    return functools.reduce(torch.logical_or, flows)


def backward(
    step: Step, upstream: list[Tensor], *, need_dx: bool, need_dw: bool, move: Move | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw, dscale and, with a sigmoid, its sums, (2, N); with `move`, rows of w move by what is then no dw.

    upstream: top, log_sum, g_lse and g_cos.
    """
    options, x, n, d = step.options, step.x, step.n, step.d
    kernels, stream = step.device.kernels, step.device.stream
    top, log_sum, g_lse, g_cos = (rows.contiguous() for rows in upstream)
    g_moments = None if options.g_moments is None else options.g_moments.contiguous()
    given = top, log_sum, g_lse, g_cos, g_moments
    is_sigmoid = options.sigmoid is not None
    divided = step.operand is not torch.float16  # as csrc/cuda/kernels.h's is_divided

    polynomials = None if options.polynomials is None else options.polynomials.to(step.sums).contiguous()
    # Where a factor is 0, so is what it makes: a row without gradient takes no part, even if its x is not finite.
    active, unit = any_of(g_lse, g_cos, g_moments), units(step.scale, g_lse, g_cos, options)
    largest_unit = unit.amax() if n else torch.ones((), dtype=step.sums, device=x.device)
    lift, x_lift = kernels.GRADIENT_LIFT, kernels.EMBEDDING_LIFT
    to_x_hat, from_dx_hat = unit / largest_unit * x_lift * active, unit / lift * active
    from_dw_hat = largest_unit / (lift * x_lift)

    new_operands = functools.partial(step.new, dtype=step.operand)
    x_hat = new_operands(n, d)
    w_hat = new_operands(step.chunk, d) if need_dx and step.normalize_weight and not divided else None
    dx_hat = torch.zeros(n, d, dtype=step.sums, device=x.device) if need_dx else None
    dw_hat = step.new_sums(step.chunk, d) if need_dw or move else None
    dw = step.new(step.classes, d, dtype=step.w.dtype) if need_dw and not move else step.new(0, dtype=step.w.dtype)
    of_rows = torch.zeros(3 if is_sigmoid else 1, step.segments, n, dtype=torch.float64, device=x.device)
    if is_sigmoid:
        kernels.row_norms(x, step.cache.x_inv_norm, stream)
    kernels.normalize_rows(x, step.cache.x_inv_norm, to_x_hat, x_hat, stream)
    g_memory = None
    for chunk, first, count, rows in step.each_chunk():
        if g_memory is None:
            over_products = step.dot if step.operand is step.sums else None
            g_memory = new_operands(n * step.chunk) if over_products is None else over_products
        g = step.beginning(g_memory, count)
        if is_sigmoid:
            kernels.sigmoid_gradients(chunk, given, polynomials, unit, g, of_rows, stream)
        else:
            kernels.logit_gradients(chunk, given, unit, g, of_rows, stream)
        if w_hat is not None:
            inv_norm = step.cache.w_inv_norm[first : first + count]
            kernels.normalize_rows(rows, inv_norm, None, w_hat, stream)
        if dx_hat is not None:
            multiply(dx_hat, g, rows if w_hat is None else w_hat[:count], accumulate=True)
        if dw_hat is None:
            continue
        sums = dw_hat[:count]
        multiply(sums, g.T, x_hat)
        out = sums if move else dw[first : first + count]
        if step.normalize_weight:
            inv_norm = step.cache.w_inv_norm[first : first + count]
            project(step, sums, divided, rows, inv_norm, from_dw_hat, out)
        else:
            torch.mul(sums, from_dw_hat, out=out)
            if step.exponents is not None:
                out.mul_(step.row_units(first, count))  # for what is stored of them
        if move:
            move(step.device, first, sums)  # nothing after this reads these rows
    dx = step.new(0, dtype=x.dtype)
    if dx_hat is not None:
        dx = step.new(n, d, dtype=x.dtype)
        project(step, dx_hat, False, x, step.cache.x_inv_norm, from_dx_hat, dx)
    sums = of_rows[1:].sum(1).to(step.sums) if is_sigmoid else step.new_sums(0)
    return dx, dw, of_rows[0].sum(0).to(step.sums), sums


def project(
    step: Step, g: Tensor, divided: bool, v: Tensor, inv_norm: Tensor, factor: Tensor, out: Tensor
) -> None:
    """out from g; where the kernel does not write the dtype of out, over g and by a copy."""
    result = out if out.dtype in (v.dtype, g.dtype) else g
    step.device.kernels.project_rows(g, divided, v, inv_norm, factor, result, step.device.stream)
    if result is not out:
        out.copy_(result)


def apply(device: Device, w: Tensor, dw: Tensor, move: Move) -> None:
    """Moves all rows of w by dw, chunk by chunk."""
    (classes, d), dtype = w.shape, compute_dtype(w, w)
    workspace = min(WORKSPACE_BYTES, device.largest_workspace)
    chunk = chunk_classes(0, d, classes, class_bytes=d * dtype.itemsize, workspace_bytes=workspace)
    for first in range(0, classes, chunk):
        move(device, first, dw[first : first + chunk].to(dtype).contiguous())
