"""Optimizers that move the rows of a head's weight inside backward, a tile of classes at a time.

The gradient of the weight never exists: backward has a tile of it in cache, moves these rows and forgets it. An
optimizer owns its weights: the loss functions look for the owner of the weight they are given and, if there is
one, take an autograd node whose backward calls torch.ops.cosface.lmcl_backward_update_. That node breaks the graph
of torch.compile.

    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    loss = head(embeddings, labels)
    loss.backward()      # moves head.weight; head.weight.grad holds no numbers
    optimizer.step()     # ends the step

Between backward and `step()` there is no gradient to work on: learning rate, clipping and the scale of the loss
must be known before backward. A step that was interrupted leaves some rows moved and others not; the weight then
is unusable, and the next forward, `step()` or `state_dict()` says so.

Of a weight that is sharded over ranks, each moves its own rows; the state is sharded like the weight. Forward
raises on every rank if a step has ended on some of them alone.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from cosface_kernels import ops
from cosface_kernels.backends import cpu, select
from cosface_kernels.distributed import Exchange, agreed, own_classes, own_rows, shard_like
from cosface_kernels.options import Options, Update

MARK = "_moves_in_backward"  # attribute of a weight that has or had an owner, which torch.compile can look at
_owners = WeakTensorKeyDictionary()  # weight -> weak reference to its optimizer

IDLE, MOVING, MOVED, SKIPPED = "idle", "moving", "moved", "skipped"


class RowOptimizer(Optimizer):
    """What FusedSGD and FusedAdamW share. A weight is a contiguous (C, D) float64, float32 or bfloat16 parameter,
    or a DTensor that is sharded by classes.

    Args:
        params: weights of heads, or param groups of them.
        accumulate: keep an ordinary gradient in weight.grad, summed over backward passes, and move the rows in
            `step()`: the exact mean over micro-batches, for C x D more memory. Concatenating their embeddings and
            labels gives the same mean without that memory.
        state_dtype: of the optimizer's state; None: the weight's. bfloat16 is rounded stochastically.
        grad_scaler: a `torch.amp.GradScaler` by which the loss is scaled; backward divides by its scale, and a
            gradient that is not finite, on any rank, moves nothing.
        seed: of the stochastic rounding of bfloat16; a shard adds the number of its first class.

    Options of each group, which may change between steps:
        gradient_factor: multiplies the gradient before anything else: clipping by a norm known beforehand.
        max_row_norm: a row of the gradient that is longer is scaled down to this length.

    Raises:
        ValueError: an option is out of its range, or a weight is not one; the message shows the value.
        RuntimeError: in forward, backward, `step` and `state_dict` after a step that was interrupted; in a second
            backward before `step()`.
    """

    rule: str
    state_names: tuple[str, ...]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        accumulate: bool,
        state_dtype: torch.dtype | None,
        grad_scaler: torch.amp.GradScaler | None,
        seed: int,
    ) -> None:
        self.accumulate, self.state_dtype, self.grad_scaler, self.seed = accumulate, state_dtype, grad_scaler, seed
        self._phases: dict[Tensor, str] = {}
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters, got the module {type(params).__name__}: give it "
                "head.parameters()."
            )
        if state_dtype not in (None, torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be None, float64, float32 or bfloat16, got {state_dtype}.")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            _check_weight(weight)
            self._phases[weight] = IDLE
            setattr(weight, MARK, True)
            _owners[weight] = weakref.ref(self)

    def numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The fields of `Update` that only this rule has."""
        raise NotImplementedError

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Ends the step: the rows have moved already, except with accumulate=True."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                self._check_whole(weight)
                if self.accumulate:
                    self._apply(weight, group)
                elif isinstance(weight.grad, ConsumedGradient):
                    weight.grad = None
                self._phases[weight] = IDLE
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: there is no gradient, except with accumulate=True."""
        if self.accumulate:
            super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        for weight in self._phases:
            self._check_whole(weight)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or torch.optim's optimizer of the same rule; ends an interrupted step.

        The weights must be restored as well, from the same checkpoint.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for index, weight in zip(saved_ids, self._phases, strict=True):
            if saved := state_dict["state"].get(index):
                self.state[weight] = self._loaded(weight, saved)
        self._phases = dict.fromkeys(self._phases, IDLE)

    def _loaded(self, weight: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        dtype = self.state_dtype or weight.dtype
        for name in self.state_names:
            if name in saved and _layout(saved[name]) != _layout(weight):
                raise ValueError(
                    f"{name} must be laid out like its weight, {_layout(weight)}, got {_layout(saved[name])}."
                )
        moments = {name: saved[name].to(weight.device, dtype) for name in self.state_names if name in saved}
        if "step" in saved:
            return {"step": saved["step"].clone(), **moments}
        return {"step": _count(1.0 if moments else 0.0), **moments}  # SGD of torch counts no steps

    def _check_whole(self, weight: Tensor) -> None:
        if self._phases[weight] == MOVING:
            raise RuntimeError(
                f"The last step on a weight of shape {tuple(weight.shape)} was interrupted, with some of its rows "
                "moved and others not. Restore the weight and the optimizer from a checkpoint: "
                "head.load_state_dict(...), then optimizer.load_state_dict(...)."
            )

    def _check_ready(self, weight: Tensor) -> None:
        self._check_whole(weight)
        if self._phases[weight] == MOVED:
            raise RuntimeError(
                f"backward ran twice on a weight of shape {tuple(weight.shape)} before "
                f"{type(self).__name__}.step(). Call step() after each backward; to average over micro-batches, "
                "concatenate their embeddings and labels, or construct the optimizer with accumulate=True."
            )

    def _group_of(self, weight: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(weight is param for param in group["params"]))

    def _next_update(self, weight: Tensor, group: dict[str, Any]) -> tuple[Update, list[Tensor]]:
        """The update of the step that begins now, and the state that it moves."""
        state = self.state[weight]
        if "step" not in state:
            state["step"] = _count(0.0)
        state["step"] += 1
        for name in self.state_names_of(group):
            if name not in state:
                state[name] = _zeros_like(weight, self.state_dtype or weight.dtype)
        factor = float(group["gradient_factor"]) * (-1 if group["maximize"] else 1)
        if self.grad_scaler is not None and not self.accumulate:
            factor /= self.grad_scaler.get_scale()
        update = Update(
            rule=self.rule,
            step=int(state["step"]),
            seed=self.seed + own_classes(weight).start,
            gradient_factor=factor,
            max_row_norm=float(group["max_row_norm"]),
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            **self.numbers(group),
        )
        return update, [own_rows(state[name]) for name in self.state_names_of(group)]

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _move(self, weight: Tensor, tensors: tuple[Tensor, ...], need_dx: bool, backend: str | None,
              options: Options) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dx and dscale of lmcl_backward's arguments, having moved the rows."""
        x, *_, lse, g_lse, g_cos, _ = tensors
        finite = True
        if self.grad_scaler is not None:  # lse is -inf without negatives
            rows = (x.isfinite(), lse < math.inf, g_lse.isfinite(), g_cos.isfinite())
            finite = agreed(weight, all(bool(values.all()) for values in rows))
        weight.grad = ConsumedGradient(weight, finite, self.grad_scaler)
        if not finite:
            self._phases[weight] = SKIPPED
            dx, _, dscale = ops.lmcl_backward(*tensors, need_dx, False, backend, *options.flat())
            return dx, dscale
        update, state = self._next_update(weight, self._group_of(weight))
        self._phases[weight] = MOVING
        dx, dscale = ops.lmcl_backward_update_(*tensors, state, *update.flat(), need_dx, backend, *options.flat())
        self._phases[weight] = MOVED
        return dx, dscale

    def _apply(self, weight: Tensor, group: dict[str, Any]) -> None:
        if weight.grad is None:
            return
        if weight.grad.is_sparse:
            raise RuntimeError("accumulate=True needs the gradient of all classes, got one of sampled classes.")
        update, state = self._next_update(weight, group)
        self._phases[weight] = MOVING
        with torch.no_grad():
            ops.apply_update_(own_rows(weight), own_rows(weight.grad), state, *update.flat(), None)


class FusedSGD(RowOptimizer):
    """torch.optim.SGD whose rows move inside backward; equal to it to rounding.

    Args:
        params: weights of heads, or param groups of them.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        gradient_factor, max_row_norm, accumulate, state_dtype, grad_scaler, seed: see `RowOptimizer`.

    >>> from cosface_kernels import FusedCosFaceLoss
    >>> head = FusedCosFaceLoss(num_classes=1000, embedding_size=16)
    >>> optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    >>> before = head.weight.detach().clone()
    >>> head(torch.randn(4, 16), torch.tensor([1, 17, 17, 999])).backward()
    >>> bool((head.weight != before).any())
    True
    >>> optimizer.step()
    """

    rule = "sgd"
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
        accumulate: bool = False,
        state_dtype: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay, max_row_norm=max_row_norm)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs a positive momentum and no dampening, got momentum {momentum} and "
                f"dampening {dampening}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "gradient_factor": gradient_factor,
            "max_row_norm": max_row_norm,
        }
        super().__init__(
            params,
            defaults,
            accumulate=accumulate,
            state_dtype=state_dtype,
            grad_scaler=grad_scaler,
            seed=seed,
        )

    def numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("momentum", "dampening", "nesterov")}

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()


class FusedAdamW(RowOptimizer):
    """torch.optim.AdamW whose rows move inside backward; equal to it to rounding.

    With class sampling, the bias correction counts steps of the optimizer, not of a row.

    Args:
        params: weights of heads, or param groups of them.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        gradient_factor, max_row_norm, accumulate, state_dtype, grad_scaler, seed: see `RowOptimizer`.
    """

    rule = "adamw"
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

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
        accumulate: bool = False,
        state_dtype: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay, max_row_norm=max_row_norm)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "gradient_factor": gradient_factor,
            "max_row_norm": max_row_norm,
        }
        super().__init__(
            params,
            defaults,
            accumulate=accumulate,
            state_dtype=state_dtype,
            grad_scaler=grad_scaler,
            seed=seed,
        )

    def numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]


class ConsumedGradient(Tensor):
    """weight.grad between backward and `step()`: the gradient's shape and no numbers.

    GradScaler.unscale_ finds in it whether the gradient was finite. Anything else, such as the norm that clipping
    needs, raises and says what to do instead.
    """

    _finite: bool
    _scaler: torch.amp.GradScaler | None

    @staticmethod
    def __new__(cls, weight: Tensor, finite: bool, scaler: torch.amp.GradScaler | None) -> "ConsumedGradient":
        gradient = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        gradient._finite, gradient._scaler = finite, scaler
        return gradient

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ConsumedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default:
            gradients, found_inf, inverse_scale = args
            for gradient in gradients:
                if gradient._scaler is None and inverse_scale.item() != 1:
                    raise RuntimeError(
                        "The loss was scaled, but backward has moved the weight by its gradient already: "
                        "construct the optimizer with grad_scaler=scaler, and restore the weight."
                    )
                if not gradient._finite:
                    found_inf.fill_(1)
            return None
        raise RuntimeError(
            f"{func} needs the gradient of a weight of which backward has moved the rows already, so that it no "
            "longer exists. To clip, set gradient_factor (from a norm known before backward) or max_row_norm in "
            "the optimizer's param group; to work on the gradient, construct the optimizer with accumulate=True."
        )


class _MovesRows(torch.autograd.Function):
    """ops.lmcl whose backward moves the weight and has no gradient for it."""

    @staticmethod
    def forward(ctx, x, w, targets, scale, margin, backend, options, owner, weight):  # type: ignore[no-untyped-def]
        ctx.margin, ctx.backend, ctx.options, ctx.owner, ctx.weight = margin, backend, options, owner, weight
        outputs = ops.lmcl(x, w, targets, scale, margin, backend, *options.flat())
        _, lse, target_cos, max_neg, cache = outputs
        ctx.set_materialize_grads(False)  # that of a cache would be as large
        ctx.mark_non_differentiable(max_neg, cache)
        ctx.save_for_backward(x, w, targets, scale, lse, target_cos, cache)
        return outputs

    @staticmethod
    def backward(ctx, g_loss, g_lse, g_cos, *_):  # type: ignore[no-untyped-def]
        ctx.owner._check_ready(ctx.weight)
        x, w, targets, scale, lse, target_cos, cache = ctx.saved_tensors
        need_dx, _, _, need_dscale, *_ = ctx.needs_input_grad
        g_lse, g_cos, dscale_of_psi = ops.fold_loss(
            targets, scale, lse, target_cos - ctx.margin, g_loss, g_lse, g_cos
        )  # (N,) each
        dx, dscale = ctx.owner._move(
            ctx.weight, (x, w, targets, scale, lse, g_lse, g_cos, cache), need_dx, ctx.backend, ctx.options
        )
        dscale = dscale + dscale_of_psi if need_dscale else None
        return dx if need_dx else None, None, None, dscale, None, None, None, None, None


def owner_of(weight: Tensor) -> RowOptimizer | None:
    """The optimizer that moves this weight's rows inside backward, if there is one."""
    reference = _owners.get(weight)
    owner = None if reference is None else reference()
    return None if owner is None or owner.accumulate else owner


# torch.compiler.disable, which imports the compiler at its first call, not here
@torch._disable_dynamo  # type: ignore[attr-defined]
def check_whole(weight: Tensor) -> None:
    """Raises RuntimeError if the weight is half-way through a step that was interrupted."""
    owner = owner_of(weight)
    if owner is not None:
        owner._check_whole(weight)


@torch._disable_dynamo  # type: ignore[attr-defined]
def progress(weight: Tensor) -> str:
    """Where the weight's owner is, for ranks to compare."""
    owner = owner_of(weight)
    if owner is None:
        return "one that moves no rows in backward"
    return f"step {int(owner.state.get(weight, {}).get('step', 0))}, {owner._phases[weight]}"


@torch._disable_dynamo  # type: ignore[attr-defined]
def lmcl(
    weight: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    margin: float,
    backend: str | None,
    **fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.lmcl`, whose backward moves w, the weight's rows that are here, if an optimizer of this module owns it.

    Raises:
        RuntimeError: the backend cannot move rows.
    """
    owner, options = owner_of(weight), Options(**fields)
    if owner is not None and torch.is_grad_enabled() and weight.requires_grad:
        select(backend, x, w, replace(options, updates=True))
        return _MovesRows.apply(x, w.detach(), targets, scale, margin, backend, options, owner, weight)  # type: ignore[no-untyped-call]
    return ops.lmcl(x, w, targets, scale, margin, backend, *options.flat())


def _check_weight(weight: Tensor) -> None:
    rows = Exchange(weight).weight if isinstance(weight, DTensor) else weight
    if weight.dim() != 2 or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(
            "A head's weight must have shape (C, D) and dtype float64, float32 or bfloat16, got shape "
            f"{tuple(weight.shape)} and {weight.dtype}; give other parameters to another optimizer."
        )
    if not rows.is_contiguous():
        raise ValueError(f"A weight must be contiguous to be moved in place, got strides {rows.stride()}.")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def _layout(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{f' as {tensor.placements}' if isinstance(tensor, DTensor) else ''}"


def _count(steps: float) -> Tensor:
    """On the CPU whatever torch's default device is, since each step reads it."""
    return torch.tensor(steps, device="cpu")


def _zeros_like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, DTensor):
        return shard_like(weight, _zeros_like(own_rows(weight), dtype))
    if weight.device.type == "cpu" and not cpu.unavailable():
        return cpu.zeros_like(weight, dtype)
    return torch.zeros_like(weight, dtype=dtype)
