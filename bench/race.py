"""Whether a kernel gives the same bits every time, and the right ones: a race seldom shows in one run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import launches
from bench.head import MARGIN, SCALE, Head, draw
from bench.worker import FEW_ULP
from cosface_kernels import reference
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS, Tile

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TF32_EPS = 2.0**-10
SMALLEST_ROW = 2.0**-24  # relative to the largest; G in float16 holds no smaller parts of its row's unit
FLOAT32_EPS = torch.finfo(torch.float32).eps


def examinations(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    tf32: bool,
    device: Any,
    repeats: int,
    tiles: Callable[[str, torch.dtype], Sequence[Tile]] | None = None,
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Each kernel with a matrix product and each of its tiles, and what gives the figures of it."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    head = draw(*sizes, dtype, device)
    backward = head.backward()
    allowed, wanted = _expectations(head, dtype, tf32)
    # What no kernel writes is filled, and so the same in every run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for kernel in GEMM_KERNELS:
            is_forward = kernel == GEMM_KERNELS[0]
            run = head.forward if is_forward else backward
            for tile in (tiles or launches.tiles)(kernel, dtype):

                def examine(kernel=kernel, is_forward=is_forward, run=run, tile=tile) -> dict[str, Any]:  # type: ignore[no-untyped-def]
                    with launches.pinned(kernel, tile):
                        differing, first = repeat(kernel, run, repeats)
                    errors = worst_rows(first[1:5] if is_forward else first[:2], wanted[is_forward])
                    right = all(e <= a for e, a in zip(errors, allowed[is_forward], strict=True))
                    return {
                        "repeats": repeats,
                        "differing": differing,
                        "errors": errors,
                        "allowed": allowed[is_forward],
                        "right": right and differing == 0,
                    }

                name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
                yield {"kernel": kernel, "tile": launches.name(tile), "dtype": name}, examine
    finally:
        torch.use_deterministic_algorithms(False)


def repeat(kernel: str, run: Callable[[], Sequence[Tensor]], repeats: int) -> tuple[int, Sequence[Tensor]]:
    """How many runs differ from the first in a bit of results or of the kernel's tensors; the first's results."""
    left: list[Tensor] = []

    def keep(name: str, launch: Callable[[], None], arguments: tuple[Any, ...]) -> None:
        launch()
        if name == kernel:
            left.extend(argument for argument in arguments if isinstance(argument, Tensor))

    with launches.through(keep):
        first = run()
        seen = [*first, *left]
        differing = torch.zeros((), dtype=torch.int64, device=seen[0].device)
        for _ in range(repeats - 1):
            left.clear()
            differing += _differ([*run(), *left], seen)
    return int(differing), first


def _differ(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.numel() and a.data_ptr() != b.data_ptr()]
    bits = [(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize])) for a, b in pairs]  # nan equals nan
    return torch.stack([(a != b).any() for a, b in bits]).any()


def _expectations(
    head: Head, dtype: torch.dtype, tf32: bool
) -> tuple[tuple[list[float], list[float]], tuple[list[Tensor], list[Tensor]]]:
    """For backward (dx, dw) and forward (top, log_sum, target_cos, max_neg): errors allowed, and float64's.

    Allowed is twice the error of float32 arithmetic on the same inputs, and a few ulp, of logits and of operands.
    """
    _, top, log_sum, target_cos, *_ = head.forward()
    upstream = (top, log_sum, *head.upstream(top, log_sum, target_cos))

    def evaluate(number: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        given = replace(head, x=head.x.to(number), w=head.w.to(number), scale=head.scale.to(number))
        inputs = (given.x, given.w, given.labels, given.scale)
        gradients = reference.backward(*inputs, *(t.to(number) for t in upstream))[:2]
        return list(gradients), list(reference.forward(*inputs, MARGIN)[1:5])

    wanted, plain = evaluate(torch.float64), evaluate(torch.float32)
    of_logits = FEW_ULP * SCALE * FLOAT32_EPS
    of_operands = FEW_ULP * (TF32_EPS if tf32 else torch.finfo(dtype).eps)
    rounding = of_logits + of_operands, of_logits + (of_operands if tf32 else 0)  # cosines' products are exact
    errors = (worst_rows(p, w) for p, w in zip(plain, wanted, strict=True))
    backward, forward = ([2 * e + r for e in es] for es, r in zip(errors, rounding, strict=True))
    return (backward, forward), wanted


def worst_rows(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """The largest error of a row of each, relative to that row; of vectors, relative to their largest element.

    By rows, because a tile that is wrong may be one in thousands, and its classes' gradients small.
    """
    errors = []
    for g, w in zip(got, wanted, strict=True):
        error, size = g.double() - w, w
        if w.dim() == 2:
            error, size = error.norm(dim=1), w.norm(dim=1)
            floor = torch.finfo(g.dtype).smallest_normal * w.shape[1] ** 0.5
            size = size.clamp_min(max(floor, SMALLEST_ROW * float(size.max())))
        else:
            size = w.abs().max()
        errors.append(float((error.abs() / size).max()))
    return errors
