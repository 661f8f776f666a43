"""Inputs, independent definitions and tolerances shared by the tests."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cosface_kernels
from cosface_kernels import FusedCosFaceLoss, FusedMarginLoss, reference
from cosface_kernels.backends import cpu
from cosface_kernels.options import PLAIN
from cosface_kernels.reference import operand_dtype

Forward = Callable[..., tuple[Tensor, ...]]
# A context for code of others that makes tensors without a device and moves them, which from "meta", the default
# device of a test of a backend on the CPU, would fail or give nothing.
DEFAULT_DEVICE = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Backend:
    """A backend under test, where its tensors live and what it accepts."""

    name: str
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    contiguous_weight: bool = False  # takes no other
    interpreted: bool = False  # too slow for tests marked `heavy`
    lacks: tuple[str, ...] = ()  # options of the op that it refuses

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def operand(self, dtypes: Dtypes) -> torch.dtype:
        """What it multiplies in the products of backward, where others upcast: G and x_hat are rounded to it."""
        if self.name == "cpu":
            return torch.bfloat16 if cpu.multiplies_bfloat16(*dtypes, PLAIN) else dtypes.compute
        if self.name == "reference" or torch.float64 in dtypes:
            return dtypes.compute
        return operand_dtype(*dtypes)

    def rounding(self, dtypes: Dtypes) -> float:
        """Relative to the terms of a gradient: once at the end, and an ulp of the operands of its products.

        Triton's interpreter cuts bfloat16 off where hardware rounds to the nearest: errors that add up.
        """
        eps = torch.finfo(dtypes.x).eps
        if self.operand(dtypes) == dtypes.compute:
            return eps
        truncated = self.interpreted and self.name == "triton"
        return eps + torch.finfo(self.operand(dtypes)).eps * (3 if truncated else 1)

    def seen(self, problem: Problem) -> Problem:
        """The problem with the weight as it is multiplied, rounded; Triton's interpreter multiplies in float32."""
        if self.interpreted and self.name == "triton":
            return problem
        return replace(problem, w=problem.w.to(self.operand(problem.dtypes)).to(problem.w.dtype))

    def problem(self, *sizes: int | Dtypes, **options) -> Problem:
        """`make_problem` on its device: where all other tensors of a test of this backend must be as well."""
        return make_problem(*sizes, device=self.device, **options)

    def head(self, *arguments, kind: type[FusedMarginLoss] = FusedCosFaceLoss, **options) -> FusedMarginLoss:
        return kind(*arguments, backend=self.name, device=self.device, **options)

    def lmcl(
        self, x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, **options
    ) -> tuple[Tensor, ...]:
        return with_lse(scale, torch.ops.cosface.lmcl(x, w, targets, scale, margin, self.name, **options))

    def loss(self, x: Tensor, w: Tensor, labels: Tensor, **options) -> Tensor:
        return cosface_kernels.cosface_loss(x, w, labels, backend=self.name, **options)


def where_taken(*several: dict[str, object]) -> list:
    """Parameters of a test, each some options of the op, for the backends that take them."""
    return [pytest.param(options, marks=pytest.mark.option(*options), id=str(options)) for options in several]


class Dtypes(NamedTuple):
    x: torch.dtype
    w: torch.dtype

    def __str__(self) -> str:
        x, w = (str(dtype).removeprefix("torch.") for dtype in self)
        return x if x == w else f"x_{x}-w_{w}"

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if torch.float64 in self else torch.float32


F32, F64, BF16, F16 = (Dtypes(d, d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16))
SAME_DTYPES = (F32, F64, BF16, F16)
MIXED_DTYPES = (
    Dtypes(torch.float32, torch.bfloat16),
    Dtypes(torch.bfloat16, torch.float32),
    Dtypes(torch.float16, torch.float32),
    Dtypes(torch.float32, torch.float16),
    Dtypes(torch.bfloat16, torch.float16),
    Dtypes(torch.float64, torch.float32),
    Dtypes(torch.bfloat16, torch.float64),
)


@dataclass(frozen=True)
class Problem:
    """One input of the op. Targets of -1 mean "none of these classes"."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    targets: Tensor  # (N,) int64
    scale: Tensor  # (N,)
    margin: float

    @property
    def dtypes(self) -> Dtypes:
        return Dtypes(self.x.dtype, self.w.dtype)


def make_problem(
    num_samples: int,
    num_classes: int,
    dim: int,
    dtypes: Dtypes = F32,
    *,
    regime: str = "random",
    scale: float = 64.0,
    margin: float = 0.35,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Problem:
    """Draws a problem, with the same numbers on every device; None: torch's default.

    regime: "random"; "confident", embeddings at their class centre; "wrong", embeddings opposite to their
    class centre and at the centre of another class.
    """
    rng = torch.Generator().manual_seed(seed)
    double = {"generator": rng, "dtype": torch.float64, "device": "cpu"}
    # Norms differ between rows, so that a missing or doubled 1/|x| or 1/|w| cannot hide.
    w = torch.randn(num_classes, dim, **double)
    w = w * (0.25 + 2 * torch.rand(num_classes, 1, **double))
    targets = torch.randint(num_classes, (num_samples,), generator=rng, device="cpu")
    noise = torch.randn(num_samples, dim, **double)
    if regime == "random":
        x = noise
    elif regime == "confident":
        x = w[targets] + 0.1 * noise
    elif regime == "wrong":
        x = w[(targets + 1) % num_classes] - w[targets] + 0.1 * noise
    else:
        raise ValueError(regime)
    x = x * (0.25 + 2 * torch.rand(num_samples, 1, **double))
    scales = torch.full((num_samples,), scale, dtype=dtypes.compute, device=device)
    device = scales.device
    return Problem(x.to(device, dtypes.x), w.to(device, dtypes.w), targets.to(device), scales, margin)


class Upstream(NamedTuple):
    """Gradients that arrive at the differentiable outputs; None where an output is not used."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    target_cos: Tensor | None = None


def random_upstream(problem: Problem, *names: str, seed: int = 1) -> Upstream:
    """Non-uniform upstream gradients of both signs for the named outputs, rounded to the output's dtype."""
    rng = torch.Generator().manual_seed(seed)
    to = {"device": problem.x.device, "dtype": problem.dtypes.compute}
    double = {"generator": rng, "dtype": torch.float64, "device": "cpu"}
    return Upstream(**{name: torch.randn(len(problem.targets), **double).to(**to) for name in names})


def with_lse(scale: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, target_cos and max_neg of the op's outputs."""
    loss, top, log_sum, target_cos, max_neg, *_ = outputs
    return loss, scale * top + log_sum, target_cos, max_neg


def specification(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return with_lse(scale, reference.forward(x, w, targets, scale, margin))


class Result(NamedTuple):
    loss: Tensor
    lse: Tensor
    target_cos: Tensor
    max_neg: Tensor
    dx: Tensor
    dw: Tensor
    dscale: Tensor


def evaluate(forward: Forward, problem: Problem, upstream: Upstream) -> Result:
    """Forward and backward of `forward`, which has the op's arguments and outputs."""
    x, w, scale = (t.detach().requires_grad_() for t in (problem.x, problem.w, problem.scale))
    outputs = forward(x, w, problem.targets, scale, problem.margin)
    used = [(out, g) for out, g in zip(outputs, upstream, strict=False) if g is not None]
    grads = torch.autograd.grad(
        [out for out, _ in used],
        [x, w, scale],
        [g for _, g in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return Result(*(t.detach() for t in outputs), *grads)


def evaluate_oracle(problem: Problem, upstream: Upstream) -> Result:
    """The specification on float64 copies."""
    doubled = replace(problem, x=problem.x.double(), w=problem.w.double(), scale=problem.scale.double())
    return evaluate(specification, doubled, Upstream(*(g if g is None else g.double() for g in upstream)))


def logits(x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float) -> Tensor:
    """(N, C) scaled cosines with the margin taken off the target column: what most people write."""
    z = scale[:, None] * (F.normalize(x) @ F.normalize(w).T)  # (N, C)
    has_target = targets >= 0
    one_hot = F.one_hot(targets.clamp(min=0), w.shape[0]).to(z.dtype) * has_target[:, None].to(z.dtype)
    return z - scale[:, None] * margin * one_hot


def plain_forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eager PyTorch with F.cross_entropy, with float32 arithmetic on inputs of lower precision.

    Its distance from the float64 oracle is what a dtype can fairly be held to.
    """
    compute = Dtypes(x.dtype, w.dtype).compute
    x, w, scale = x.to(compute), w.to(compute), scale.to(compute)
    loss = F.cross_entropy(logits(x, w, targets, scale, margin), targets, ignore_index=-1, reduction="none")
    cos = F.normalize(x) @ F.normalize(w).T  # (N, C)
    is_target = targets[:, None] == torch.arange(w.shape[0], device=w.device)  # (N, C)
    lse = torch.logsumexp((scale[:, None] * cos).masked_fill(is_target, -math.inf), dim=1)
    target_cos = (cos * is_target).sum(dim=1)
    return loss, lse, target_cos, cos.detach().masked_fill(is_target, -math.inf).amax(dim=1)


def brute_force_losses(problem: Problem) -> list[float]:
    """log(1 + sum_j e^(z_j - z_y)) with Python numbers, one sample at a time: no torch, no cancellation."""

    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.sqrt(math.fsum(p * p for p in a)), math.sqrt(math.fsum(q * q for q in b))
        return math.fsum(p * q for p, q in zip(a, b, strict=True)) / (max(norms[0], 1e-12) * max(norms[1], 1e-12))

    classes = problem.w.tolist()
    losses = []
    for x, target, s in zip(problem.x.tolist(), problem.targets.tolist(), problem.scale.tolist(), strict=True):
        if target < 0:
            losses.append(0.0)
            continue
        target_logit = s * (cosine(x, classes[target]) - problem.margin)
        others = (s * cosine(x, centre) for j, centre in enumerate(classes) if j != target)
        losses.append(math.log1p(math.fsum(math.exp(z - target_logit) for z in others)))
    return losses


def natural_norms(problem: Problem, upstream: Upstream) -> Result:
    """For each output and gradient, the norm of the terms it is summed from, over all rows."""
    return Result(*(rows.norm() for rows in natural_rows(problem, upstream)))


def natural_rows(problem: Problem, upstream: Upstream) -> Result:
    """For each row of each output and gradient, the size of the terms it is summed from.

    The terms can cancel (for D = 1 the gradients vanish): rounding is relative to the terms, not to the rest.
    """
    x, w, s = problem.x.double(), problem.w.double(), problem.scale.double()
    zeros = torch.zeros_like(s)
    g_loss, g_lse, g_cos = (zeros if g is None else g.double() for g in upstream)
    _, lse, target_cos, _ = (t.detach() for t in specification(x, w, problem.targets, s, problem.margin))
    has_target = (problem.targets >= 0).double()
    sigma = torch.sigmoid(lse - s * (target_cos - problem.margin)) * has_target  # (N,)
    is_target = problem.targets[:, None] == torch.arange(w.shape[0], device=w.device)
    z = s[:, None] * (F.normalize(x) @ F.normalize(w).T)
    p = torch.softmax(z.masked_fill(is_target, -math.inf), dim=1).nan_to_num(
        0.0
    )  # (N, C), rows without negatives: 0
    from_lse = g_lse.abs() + g_loss.abs() * sigma  # (N,)
    from_cos = g_cos.abs() * has_target + s * g_loss.abs() * sigma  # (N,)
    terms = s[:, None] * from_lse[:, None] * p + from_cos[:, None] * is_target  # (N, C) bounds |G|
    return Result(
        loss=(sigma + torch.where(lse.isinf(), zeros, F.softplus(lse - s * (target_cos - problem.margin)))),
        lse=(1 + lse.nan_to_num(0.0, 0.0, 0.0).abs() / s),
        target_cos=torch.ones_like(s),
        max_neg=torch.ones_like(s),
        dx=(terms.sum(dim=1) / x.norm(dim=1).clamp(min=1e-12)),
        dw=(terms.sum(dim=0) / w.norm(dim=1).clamp(min=1e-12)),
        dscale=(from_lse + g_loss.abs() * sigma * (1 + problem.margin)),
    )


# Where plain PyTorch itself loses everything (F.cross_entropy of a confident sample), twice its error would
# allow anything; no result may be further off than this, relative to the terms it is summed from.
ERROR_CAP = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
LOGIT_ULPS = 4  # an ulp of a logit is s * eps, and moves e^z by as much, relatively


def assert_as_good_as_plain(
    name: str,
    got: Tensor,
    want: Tensor,
    plain: Tensor,
    natural: Tensor | float,
    *,
    scale: float,
    compute: torch.dtype,
    operand: torch.dtype | None = None,
) -> None:
    """|got - want| <= 2 |plain - want| + one rounding to got's dtype + a few ulp of the logits.

    Where gradients are products of operands of lower precision, an ulp of these operands is allowed as well.

    `want` and `natural` (the norm of the terms summed) are float64. Infinities and NaN must be at the same
    places.
    """
    assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    finite = want.to(got.dtype).isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name} is not finite where the reference is, or the reverse"
    infinite = ~finite & ~want.isnan()
    assert torch.equal(got[infinite].double().sign(), want[infinite].sign()), f"{name}: infinity of the wrong sign"
    assert bool(got[want.isnan()].isnan().all()), f"{name} is infinite where the reference is NaN"
    got, want, plain = got[finite], want[finite], plain[finite]
    info = torch.finfo(got.dtype)
    error = float((got.double() - want).norm())
    plain_error = float((plain.double() - want).norm())
    allowed = (
        min(2 * plain_error, ERROR_CAP[got.dtype] * float(natural))
        + info.eps / 2 * float(want.norm())
        + info.smallest_normal * info.eps / 2 * math.sqrt(got.numel())
        + LOGIT_ULPS * torch.finfo(compute).eps * max(1.0, scale) * float(natural)
    )
    if name in ("dx", "dw") and operand not in (None, compute):
        allowed += torch.finfo(operand).eps * float(natural)
    assert error <= allowed, (
        f"{name} is {error:.3g} away from float64, allowed {allowed:.3g}; plain PyTorch {plain_error:.3g}, "
        f"norm {float(want.norm()):.3g}, dtype {got.dtype}"
    )


def check_result(got: Result, problem: Problem, upstream: Upstream, operand: torch.dtype | None = None) -> None:
    """Every output and gradient against float64, with the tolerance plain PyTorch earns on this input."""
    compute = problem.dtypes.compute
    assert {t.dtype for t in got[:4]} == {compute}, "outputs are float32, or float64 if an input is"
    assert (got.dx.dtype, got.dw.dtype) == problem.dtypes, "a gradient has the dtype of its input"
    want, plain = evaluate_oracle(problem, upstream), evaluate(plain_forward, problem, upstream)
    natural = natural_norms(problem, upstream)
    scale = float(problem.scale.max()) if len(problem.scale) else 1.0
    scale += math.log(len(problem.w))  # lse, which is subtracted from a logit, may be this much larger
    for name in Result._fields:
        assert_as_good_as_plain(
            name,
            *(getattr(r, name) for r in (got, want, plain, natural)),
            scale=scale,
            compute=compute,
            operand=operand,
        )


def check_backend(backend: Backend, problem: Problem, upstream: Upstream | None = None) -> Result:
    """Runs the op and checks all of it; by default through random gradients of the loss."""
    if upstream is None:
        upstream = random_upstream(problem, "loss")
    got = evaluate(backend.lmcl, problem, upstream)
    check_result(got, backend.seen(problem), upstream, backend.operand(problem.dtypes))
    return got


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def patience(seconds: float) -> float:
    """When a test gives up on other processes, in seconds, for `seconds` that are plenty on an idle machine.

    COSFACE_TEST_PATIENCE, a factor, stretches every such limit where the machine has other work.
    """
    return seconds * float(os.environ.get("COSFACE_TEST_PATIENCE", "1"))


def run_python(code: str, *args: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter: for settings read once, and for memory that must not be shared."""
    paths = [str(pathlib.Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        capture_output=True,
        text=True,
        timeout=patience(timeout),
        check=False,
    )
