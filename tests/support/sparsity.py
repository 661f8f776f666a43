"""Problems with given cosines, and the bounds of what a gradient_tolerance leaves out of their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosface_kernels import Sparsity, margin_softmax_loss, ops, reference
from cosface_kernels.distributed import empty_weight, own_classes, own_rows
from cosface_kernels.margins import Margin, Rows
from cosface_kernels.options import Options
from support import F32, Dtypes

N, C, SCALE = 6, 3000, 20.0


class Inputs(NamedTuple):
    """Of the op and of its backward."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    targets: Tensor  # (N,)
    scale: Tensor  # (N,)
    g_lse: Tensor  # (N,)
    g_cos: Tensor  # (N,)


class Negatives(NamedTuple):
    """What reshapes them, as the op takes it."""

    thresholds: Tensor  # (N,)
    polynomial: Tensor  # (3,) or (6,)

    def double(self) -> Negatives:
        return Negatives(*(t.double() for t in self))

    def of(self, cos: Tensor) -> tuple[Tensor, Tensor]:
        """N(cos) and N'(cos), (N, C)."""
        q, a, b, r, u, v = options_of(self).coefficients(self.polynomial.dtype)
        hard = cos > self.thresholds[:, None]
        return torch.where(hard, (q * cos + a) * cos + b, r * cos), torch.where(hard, u * cos + v, r)


class Gradients(NamedTuple):
    dx: Tensor
    dw: Tensor
    dscale: Tensor


def with_cosines(cos: Tensor, dtypes: Dtypes = F32, dim: int = 256, scale: float = SCALE) -> Inputs:
    """Embeddings and centres with these (N, C) cosines, which must leave a length below 1 to every centre."""
    n, classes = cos.shape
    rest = 1 - cos.square().sum(0)  # (C,)
    assert n < dim
    assert bool((rest > 0).all())
    rng = torch.Generator().manual_seed(0)
    lengths = [0.5 + torch.rand(rows, 1, generator=rng, dtype=torch.float64) for rows in (n, classes)]
    x = torch.eye(n, dim, dtype=torch.float64) * lengths[0]
    w = torch.zeros(classes, dim, dtype=torch.float64)
    w[:, :n], w[:, n] = cos.T, rest.sqrt()
    targets = torch.randint(classes, (n,), generator=rng)
    targets[1] = ops.IGNORED
    g_lse, g_cos = torch.randn(2, n, generator=rng, dtype=torch.float64)
    compute = dtypes.compute
    return Inputs(
        x.to(dtypes.x),
        (w * lengths[1]).to(dtypes.w),
        targets,
        torch.full((n,), scale, dtype=compute),
        g_lse.to(compute),
        g_cos.where(targets >= 0, 0).to(compute),
    )


def cosines(kind: str, n: int = N, classes: int = C) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    if kind == "equal":
        return torch.full((n, classes), 0.1, dtype=torch.float64)
    if kind == "one heavy":
        cos = torch.full((n, classes), 0.02, dtype=torch.float64)
        cos[:, [7, classes // 2, classes - 1]] = torch.tensor([0.39, -0.1, 0.38], dtype=torch.float64)
        return cos
    if kind == "heavy tail":  # z is exponential: p falls as a power of the rank
        z = torch.empty(n, classes, dtype=torch.float64).exponential_(0.7, generator=rng)
        return (z / SCALE).clamp(max=0.39)
    if kind == "normal":
        return (0.1 * torch.randn(n, classes, generator=rng, dtype=torch.float64)).clamp(-0.39, 0.39)
    if kind == "steps":  # thousands of ties, exactly at the edges of the bins by which a cut is chosen
        below = torch.randint(1, 60, (n, classes), generator=rng)
        below[:, classes // 3] = 0
        return 0.375 - below / (8 * SCALE)
    if kind == "ascending":
        return cosines("normal", n, classes).sort(1).values
    if kind == "descending":
        return cosines("normal", n, classes).sort(1, descending=True).values
    if kind == "late flood":  # what was safe to drop at first is most of the mass in the end
        cos = torch.full((n, classes), 0.2, dtype=torch.float64)
        cos[:, : classes // 10] = cosines("normal", n, classes // 10) - 0.1
        cos[:, 0] = 0.36
        return cos
    raise ValueError(kind)


def cosines_of(i: Inputs) -> tuple[Tensor, Tensor]:
    """(N, C) in double, and which are those of negatives."""
    cos = nn.functional.normalize(i.x.double()) @ nn.functional.normalize(i.w.double()).T
    return cos, i.targets[:, None] != torch.arange(len(i.w))


def options_of(by: Negatives | None) -> Options:
    return Options(thresholds=by.thresholds, negatives=by.polynomial) if by else Options()


def oracle(i: Inputs, by: Negatives | None = None) -> Gradients:
    x, w, scale, g_lse, g_cos = (t.double() for t in (i.x, i.w, i.scale, i.g_lse, i.g_cos))
    options = options_of(by and by.double())
    _, top, log_sum, *_ = reference.forward(x, w, i.targets, scale, 0.35, options)
    return Gradients(*reference.backward(x, w, i.targets, scale, top, log_sum, g_lse, g_cos, options=options))


def assert_within_bound(
    got: Gradients,
    sparsity: Sparsity,
    tolerance: float,
    i: Inputs,
    rounding: float = 0.0,
    by: Negatives | None = None,
) -> None:
    """The bounds of `Sparsity`, with what rounding may add to the same sums; `rounding`, that of operands."""
    want = oracle(i, by)
    largest = steepest = torch.ones(len(i.x), dtype=torch.float64)  # (N,): at least |N| and |N'|
    if by:
        cos, others = cosines_of(i)
        largest, steepest = (v.abs().where(others, 0).amax(1).clamp_min(1) for v in by.double().of(cos))
    assert bool((sparsity.dropped <= tolerance).all())
    assert bool((sparsity.dropped[sparsity.exact] == 0).all())
    g = (i.scale * i.g_lse).abs().double() * steepest  # (N,)
    x_norm, w_norm = i.x.double().norm(dim=1), i.w.double().norm(dim=1)
    terms = g + i.g_cos.abs()  # (N,), bounds sum_j |G_ij|
    # of an e^z, as in support.LOGIT_ULPS, and of sums of C terms, whose roundings add up where terms are equal
    slope = float(steepest.amax()) if len(i.x) else 1.0
    ulp = torch.finfo(i.scale.dtype).eps * (8 * float(i.scale.max()) * slope + 8 * len(i.w) ** 0.5)
    own = {name: ulp + rounding + torch.finfo(getattr(i, name).dtype).eps for name in ("x", "w")}
    dx_error = (got.dx.double() - want.dx).norm(dim=1) * x_norm  # (N,)
    assert bool((dx_error <= g * sparsity.dropped + own["x"] * terms).all())
    dw_error = ((got.dw.double() - want.dw).norm(dim=1) * w_norm).sum()
    assert dw_error <= (g * sparsity.dropped).sum() + own["w"] * terms.sum()
    dscale_error = (got.dscale.double() - want.dscale).abs()
    assert bool((dscale_error <= i.g_lse.abs() * largest * (sparsity.dropped + ulp)).all())


SAMPLES = {1: (6,), 2: (4, 2), 3: (0, 5, 1), 4: (2, 0, 3, 1)}  # of each rank, by the number of ranks


def on_rank(
    rank: int, group, i: Inputs, tolerance: float, backend: str, margin: float | Margin
) -> tuple[Gradients, Sparsity | None]:
    """Of this rank's samples and classes; the losses have the gradients g_lse."""
    weight = nn.Parameter(empty_weight(*i.w.shape, group, dtype=i.w.dtype))
    own = own_classes(weight)
    own_rows(weight).copy_(i.w[own.start : own.stop])
    x, labels, scale, upstream = (
        t.split(SAMPLES[group.size()])[rank].clone() for t in (i.x, i.targets, i.scale, i.g_lse)
    )
    loss, stats = margin_softmax_loss(
        x.requires_grad_(), weight, labels, margin=margin, scale=scale.requires_grad_(), reduction="none",
        ignore_index=ops.IGNORED, backend=backend, gradient_tolerance=tolerance, return_stats=True,
    )  # fmt: skip
    loss.backward(upstream)
    return Gradients(x.grad, weight.grad.to_local() * group.size(), scale.grad), stats.sparsity


def run_sharded(
    ranks, world: int, i: Inputs, tolerance: float, backend: str = "cpu", margin: float | Margin = 0.35
) -> tuple[Gradients, Sparsity | None, Inputs]:
    """Of all samples and classes, as the op has them on one process, and the inputs that it would have."""
    results = ranks.results(world, on_rank, i, tolerance, backend, margin)
    dx, dw, dscale = (torch.cat(parts) for parts in zip(*(gradients for gradients, _ in results), strict=True))
    sparsity = None
    if tolerance:
        sparsity = Sparsity(*map(torch.cat, zip(*(sparsity for _, sparsity in results), strict=True)))
    x, w, scale, g_loss = (t.double() for t in (i.x, i.w, i.scale, i.g_lse))
    options = options_of(negatives_of(margin, i))
    _, top, log_sum, target_cos, _ = reference.forward(x, w, i.targets, scale, 0.0, options)
    psi = margin(target_cos, None) if callable(margin) else target_cos - margin  # (N,), of slope 1
    g = ops.fold(i.targets, scale, top, log_sum, psi, 0.0, top, g_loss, None, None, None)  # (N,) each
    return Gradients(dx, dw, dscale - g.dscale), sparsity, i._replace(g_lse=g.g_lse, g_cos=g.g_cos)


def negatives_of(margin: float | Margin, i: Inputs) -> Negatives | None:
    """In double."""
    if not callable(margin):
        return None
    cos, others = cosines_of(i)
    return Negatives(*margin.negatives(cos.masked_fill(others, 0).sum(1), Rows(i.x, i.targets)))
