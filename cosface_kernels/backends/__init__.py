"""The backends in priority order, and the choice among them.

A backend is a module with these functions; `cosface_kernels.reference` defines what they return, and
`cosface_kernels.options` what else they may be asked for:

    unavailable()                None if it can run on this machine, else the reason
    unsupported(x, w, options)   None if it takes these tensors and `Options`, else the reason
    describe()                   how it runs on this machine
    cache_size(x, w, options)    bytes that forward leaves for backward, also of tensors without memory
    forward(x, w, targets, scale, margin, options)
        -> loss, top, log_sum, target_cos, max_neg, each (N,), and cache, uint8
    backward(x, w, targets, scale, top, log_sum, g_lse, g_cos, cache, options=..., need_dx=..., need_dw=...)
        -> dx (N, D), dw (C, D), dscale (N,); what is not needed comes back empty
    sigmoid(x, w, targets, scale, bias, g, g_cos, options=..., need_dx=..., need_dw=...)
        -> `reference.sigmoid_sums`, (2, N), and backward's dx, dw and dscale by the gradients g of its first row
        and g_cos of the targets' cosines, in one pass; zeros for a row whose gradients are 0. Only where
        `unsupported` takes options.sigmoid, with which backward and backward_update_ take an empty cache
    nearest(x, w, k, options)
        -> cosines and classes, (N, k) each, as `reference.nearest` defines them
    backward_update_(..., state=..., finite=..., update=..., options=..., need_dx=...), the same tensors
        -> dx, dscale; w and the optimizer's state move, unless the 0-d `finite` is there and false. Only where
        `unsupported` takes options.updates, and so
    apply_update_(w, dw, state, update)
    loss(x, w, labels, options, scale=..., margin=..., reduction=..., ignore_index=..., validate_labels=...)
        -> plain LMCL as `functional.cosface_loss` has it, from labels to the reduced loss, differentiable; only of
        a backend for which that is one call
"""

import os
from typing import Protocol

from torch import Tensor

from cosface_kernels.backends import cpu, cuda, reference, triton
from cosface_kernels.options import PLAIN, Options, Update
from cosface_kernels.validation import warn


class Backend(Protocol):
    def unavailable(self) -> str | None: ...

    def unsupported(self, x: Tensor, w: Tensor, options: Options) -> str | None: ...

    def describe(self) -> str: ...

    def cache_size(self, x: Tensor, w: Tensor, options: Options) -> int: ...

    def forward(
        self, x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
    ) -> tuple[Tensor, ...]: ...

    def backward(
        self, *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def sigmoid(
        self, *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def nearest(self, x: Tensor, w: Tensor, k: int, options: Options) -> tuple[Tensor, Tensor]: ...


class UpdatingBackend(Backend, Protocol):
    def backward_update_(
        self,
        *tensors: Tensor,
        state: list[Tensor],
        finite: Tensor | None,
        update: Update,
        options: Options,
        need_dx: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def apply_update_(self, w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None: ...


BACKENDS: dict[str, Backend] = {"triton": triton, "cuda": cuda, "cpu": cpu, "reference": reference}


def check_name(name: str | None) -> None:
    """Raises ValueError, with the valid names, for a backend that does not exist."""
    if name is not None and (not isinstance(name, str) or name not in BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}.")


def select(name: str | None, x: Tensor, w: Tensor, options: Options = PLAIN) -> Backend:
    """The named backend, else the one in COSFACE_BACKEND, else the first that takes these tensors and options.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot run here, or not on these tensors and options; the message says why.
    """
    name = name or os.environ.get("COSFACE_BACKEND") or None
    check_name(name)
    reasons: list[str] = []
    for candidate in [name] if name else BACKENDS:
        backend = BACKENDS[candidate]
        if name:
            reason = backend.unavailable() or backend.unsupported(x, w, options)
        else:  # the other way around: tensors on a CPU must not start a GPU and a compiler
            reason = backend.unsupported(x, w, options) or backend.unavailable()
        if reason is None:
            if reasons and backend is reference:
                warn(f"The reference runs, with all logits in memory, because {' '.join(reasons)}")
            return backend
        reasons.append(f"backend {candidate!r} cannot run: {reason}")
    raise RuntimeError(" ".join(reasons))
