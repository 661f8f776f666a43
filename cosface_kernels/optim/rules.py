"""The optimizers: a rule, its options and its state each."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.optim.checks import check_amsgrad
from cosface_kernels.optim.row_optimizer import RowOptimizer


class FusedSGD(RowOptimizer):
    """torch.optim.SGD whose rows move inside backward; equal to it to rounding.

    Args:
        params: parameters, heads' weights among them, or param groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        gradient_factor, max_row_norm, weight_norm, accumulate, state_dtype, grad_scaler, nonfinite, seed: see
            `RowOptimizer`.

    >>> from cosface_kernels import FusedCosFaceLoss
    >>> head = FusedCosFaceLoss(num_classes=1000, embedding_size=16)
    >>> optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    >>> before = head.weight.detach().clone()
    >>> head(torch.randn(4, 16), torch.tensor([1, 17, 17, 999])).backward()
    >>> bool((head.weight != before).any())
    True
    >>> optimizer.step()
    """

    rule, of_torch, of_this_rule = "sgd", torch.optim.SGD, ("momentum", "dampening", "nesterov")
    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        gradient_factor: float = 1.0,
        max_row_norm: float = math.inf,
        weight_norm: float | None = None,
        accumulate: bool = False,
        state_dtype: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        nonfinite: str = "raise",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "gradient_factor": gradient_factor,
            "max_row_norm": max_row_norm,
            "weight_norm": weight_norm,
        }
        super().__init__(
            params,
            defaults,
            accumulate=accumulate,
            state_dtype=state_dtype,
            grad_scaler=grad_scaler,
            nonfinite=nonfinite,
            seed=seed,
        )

    def own_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("momentum", "dampening", "nesterov")}

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()


class FusedAdamW(RowOptimizer):
    """torch.optim.AdamW whose rows move inside backward; equal to it to rounding.

    With class sampling, the bias correction counts steps of the optimizer, not of a row.

    Args:
        params: parameters, heads' weights among them, or param groups.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        amsgrad: as there, but not with states in float8: of squares that are rounded stochastically the maximum
            keeps those that were rounded up, so that steps become ever shorter. In bfloat16 they do so by less.
        gradient_factor, max_row_norm, weight_norm, accumulate, state_dtype, grad_scaler, nonfinite, seed: see
            `RowOptimizer`.
    """

    rule, of_torch, of_this_rule = "adamw", torch.optim.AdamW, ("betas", "eps", "amsgrad")
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    squares = state_names[1:]

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        gradient_factor: float = 1.0,
        max_row_norm: float = math.inf,
        weight_norm: float | None = None,
        accumulate: bool = False,
        state_dtype: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        nonfinite: str = "raise",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "gradient_factor": gradient_factor,
            "max_row_norm": max_row_norm,
            "weight_norm": weight_norm,
        }
        super().__init__(
            params,
            defaults,
            accumulate=accumulate,
            state_dtype=state_dtype,
            grad_scaler=grad_scaler,
            nonfinite=nonfinite,
            seed=seed,
        )
        check_amsgrad(amsgrad, state_dtype)

    def _check_fits(self, weight: Tensor) -> None:
        super()._check_fits(weight)
        squares = self.state.get(weight, {}).get("exp_avg_sq")  # as it was loaded, it may be in float8
        check_amsgrad(self._group_of(weight)["amsgrad"], self.state_dtype or getattr(squares, "dtype", None))

    def own_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]
