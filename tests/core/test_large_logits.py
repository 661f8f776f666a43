"""Logits of any size: gradients stay as exact as those of F.cross_entropy, though z and lse are rounded at |z|."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import F32, F64, relative_error, where_taken
from torch import Tensor

from cosface_kernels import FusedASoftmaxLoss, FusedLSoftmaxLoss, FusedSoftmaxLoss
from cosface_kernels.functional import margin_softmax_loss

SIZES = (1.0, 3e3, 3e5, 3e7, 3e10, 1e20, 1e30)  # of logits
N, C, D = 12, 70, 8
NAMES = ("losses", "dx", "dw", "dscale")


def draw(size: float, close: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and labels with <x_i, w_j> up to `size`; `close`: no rounding, and a few ulp between them, or none."""
    rng = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    root = 2.0 ** round(math.log2(size) / 2)  # its products are exact
    labels = torch.randint(C, (N,), **rng)
    if close:
        x = F.one_hot(torch.arange(N, device="cpu") % D, D).to(dtype) * root
        ulps = torch.randint(-3, 4, (C, D), **rng).to(dtype)
        return x, root * (1 + torch.finfo(dtype).eps * ulps), labels
    x, w = (torch.randn(rows, D, dtype=torch.float64, **rng).to(dtype) for rows in (N, C))
    return x * root / D, w * root, labels


def evaluate(loss: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    """The losses, and the gradients of their sum with respect to the inputs."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
    losses = loss(*leaves)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def natural(x: Tensor, w: Tensor, labels: Tensor, scale: float, hat_x: bool, hat_w: bool) -> list[Tensor]:
    """For the losses and each gradient, in float64, the norm of the terms that it is summed from."""
    x_norm, w_norm = (v.norm(dim=1, keepdim=True) for v in (x, w))  # (N, 1), (C, 1)
    x_hat, w_hat = x / x_norm if hat_x else x, w / w_norm if hat_w else w
    z = scale * x_hat @ w_hat.T  # (N, C)
    g = (z.softmax(1) - F.one_hot(labels, C)).abs()  # (N, C)
    dx, dw = scale * g @ w_hat.norm(dim=1), scale * g.T @ x_hat.norm(dim=1)
    return [
        z.abs().amax(1).norm(),
        (dx / x_norm[:, 0] if hat_x else dx).norm(),
        (dw / w_norm[:, 0] if hat_w else dw).norm(),
        (g * z.abs()).sum() / scale,
    ]


@pytest.mark.parametrize(
    ("hat_x", "hat_w", "close"),
    [(False, False, True), (False, False, False), (False, True, False), (True, False, False), (True, True, False)],
    ids=["close", "x_w", "x_hat_w", "hat_x_w", "hat_x_hat_w"],
)
@pytest.mark.parametrize(("dtypes", "size"), [*((F32, size) for size in SIZES), (F64, 3e7), (F64, 1e30)], ids=str)
def test_as_exact_as_cross_entropy(backend, dtypes, size, hat_x, hat_w, close):
    """To twice its error, and a few ulp of the terms that a gradient is summed from."""
    x, w, labels = (t.to(backend.device) for t in draw(1.0 if hat_x or hat_w else size, close, dtypes.x))
    scale = torch.tensor(size if hat_x or hat_w else 1.0, device=backend.device)

    def plain(x, w, scale):
        x, w = F.normalize(x) if hat_x else x, F.normalize(w) if hat_w else w
        return F.cross_entropy(scale * (x @ w.T), labels, reduction="none")

    def ours(x, w, scale):
        return margin_softmax_loss(
            x, w, labels, margin=0.0, scale=scale, backend=backend.name, reduction="none",
            normalize_embeddings=hat_x, normalize_weight=hat_w,
        )  # fmt: skip

    want = evaluate(plain, torch.float64, x, w, scale)
    got, theirs = (evaluate(f, dtypes.x, x, w, scale) for f in (ours, plain))
    terms = natural(x.double(), w.double(), labels, float(scale), hat_x, hat_w)
    eps = torch.finfo(dtypes.x).eps
    for name, mine, exact, other, size_of_terms in zip(NAMES, got, want, theirs, terms, strict=True):
        error, allowed = (mine - exact).norm(), 2 * (other - exact).norm() + 40 * eps * size_of_terms
        assert error <= allowed, f"{name} is {error:.3g} off, allowed {allowed:.3g}, of {exact.norm():.3g}"


@pytest.mark.parametrize("kind", [FusedSoftmaxLoss, FusedLSoftmaxLoss, FusedASoftmaxLoss])
@pytest.mark.parametrize("size", [3e5, 3e10, 1e18])
def test_heads_that_do_not_normalise(kind, size):
    """The target's logit stands far from the others, so that all that counts is who is the largest."""
    x, w, labels = draw(1.0, False, torch.float32)
    x = x * size
    heads = [kind(C, D, reduction="none", dtype=dtype) for dtype in (torch.float32, torch.float64)]
    results = []
    for head in heads:
        head.weight.data.copy_(w)
        losses = head(x := x.to(head.weight.dtype).requires_grad_(), labels)
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), (x, head.weight))])
    for mine, exact in zip(*results, strict=True):
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize("options", where_taken({"cache_bytes": 10**6}, {"gradient_tolerance": 1e-3}))
def test_no_probability_is_above_one(backend, options):
    """Cosines of a cache are off by 2^-17, which s = 1e8 makes 763 of a logit, and e^763 of a gradient."""
    x, w, labels = (t.to(backend.device) for t in draw(1.0, False, torch.float32))
    head = backend.head(C, D, 0.0, 1e8, reduction="sum", **options)
    head.weight.data.copy_(w)
    head(x.requires_grad_(), labels).backward()
    for gradient, rows in ((x.grad, x), (head.weight.grad, w)):
        assert bool((gradient.norm(dim=1) <= 2e8 * N / rows.norm(dim=1)).all())
