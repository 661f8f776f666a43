"""A problem on the device and the op's calls on it, as `bench gpu` checks and times them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosface_kernels import cosface_loss
from cosface_kernels.ops import fold

SCALE, MARGIN = 64.0, 0.35


@dataclass(frozen=True)
class Head:
    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    labels: Tensor  # (N,)
    scale: Tensor  # (N,)
    backend: str

    @property
    def flops(self) -> int:
        """Of one of the four matrix products."""
        return 2 * self.x.numel() * len(self.w)

    def forward(self) -> tuple[Tensor, ...]:
        """loss, top, log_sum, target_cos, max_neg, each (N,), the cache and no moments."""
        return torch.ops.cosface.lmcl(self.x, self.w, self.labels, self.scale, MARGIN, self.backend)

    def upstream(self, top: Tensor, log_sum: Tensor, target_cos: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss's gradients of lse and target_cos, (N,) each; the mean's might not fit float16."""
        ones = torch.ones_like(top)
        folded = fold(self.labels, self.scale, top, log_sum, target_cos, MARGIN, top, ones, None, None, None)
        return folded.g_lse, folded.g_cos

    def backward(self) -> Callable[..., tuple[Tensor, ...]]:
        """Of (need_dx, need_dw), gives dx, dw and dscale again and again, from one forward."""
        _, *rows, _, cache, _ = self.forward()  # top, log_sum, target_cos
        saved = (self.x, self.w, self.labels, self.scale, *rows[:2], *self.upstream(*rows), cache)
        return lambda need_dx=True, need_dw=True: torch.ops.cosface.lmcl_backward(
            *saved, need_dx, need_dw, self.backend
        )

    def step(self) -> Callable[[], tuple[Tensor, ...]]:
        """Loss, dx and dw, as a user gets them."""
        x, w = self.x.detach().requires_grad_(), self.w.detach().requires_grad_()

        def run() -> tuple[Tensor, ...]:
            loss = cosface_loss(x, w, self.labels, scale=SCALE, margin=MARGIN, backend=self.backend)
            return loss, *torch.autograd.grad(loss, (x, w))

        return run


def draw(batch: int, classes: int, dim: int, dtype: torch.dtype, device: Any, backend: str = "triton") -> Head:
    rng = torch.Generator(device.name).manual_seed(0)
    on = {"device": device.name, "generator": rng}
    return Head(
        x=torch.randn(batch, dim, **on).to(dtype),
        w=torch.empty(classes, dim, dtype=dtype, device=device.name).normal_(std=dim**-0.5, generator=rng),
        labels=torch.randint(classes, (batch,), **on),
        scale=torch.full((batch,), SCALE, device=device.name),
        backend=backend,
    )
