"""Whether a gradient is finite, to be asked for when a GPU has the answer."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def finite_rows(x: Tensor, sums: Tensor, *upstream: Tensor | None) -> Tensor:
    """(N,) bool: a sample without a gradient, or with a finite one.

    sums: (N,), of forward, over the negatives: nan or inf where a row of the weight is; -inf without negatives.
    upstream: (N,) or (2, N) gradients that the op's backward takes, or None.
    """
    gradients = torch.cat([torch.atleast_2d(g) for g in upstream if g is not None])  # (some, N)
    finite = x.isfinite().all(1) & (sums < math.inf) & gradients.isfinite().all(0)  # (N,)
    return finite | (gradients == 0).all(0)


def never() -> bool:
    return False


def both(earlier: Callable[[], bool] | None, answer: Callable[[], bool]) -> Callable[[], bool]:
    return answer if earlier is None else lambda: earlier() and answer()


def answer(flag: Tensor) -> Callable[[], bool]:
    """The flag's value, to be asked for later; on a GPU that waits for what precedes the flag and no longer."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> bool:
        copied.synchronize()
        return bool(copy)

    return wait
