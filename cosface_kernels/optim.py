"""Optimizers that move the rows of a head's weight inside backward, a tile of classes at a time.

The gradient of the weight never exists: backward has a tile of it in cache, moves these rows and forgets it. An
optimizer owns its weights: the loss functions look for the owner of the weight they are given and, if there is
one, take an autograd node whose backward calls torch.ops.cosface.lmcl_backward_update_. That node breaks the graph
of torch.compile.

    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    loss = head(backbone(images), labels)
    loss.backward()      # moves head.weight; head.weight.grad holds no numbers
    optimizer.step()     # moves all others by their gradients, and ends the step

Rows move in a backward that a step was meant by: one that would have added to weight.grad, in training mode. A
weight whose gradient is needed as a whole (another loss has one too, several heads share it in one backward, or
torch.autograd.grad asks for it) gets an ordinary one, which `step()` takes as torch.optim does. The table of what
moves, what adds up and what is refused is in docs/optimizers.md.

Between backward and `step()` there is no gradient to work on: learning rate, clipping and the scale of the loss
must be known before backward. A step that was interrupted leaves some rows moved and others not; the weight then
is unusable, and whatever reads it says so.

Of a weight that is sharded over ranks, each moves its own rows; the state is sharded like the weight. Forward
raises on every rank if a step has ended on some of them alone.
"""

import itertools
import math
import numbers
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from cosface_kernels import ops
from cosface_kernels.backends import cpu, select
from cosface_kernels.distributed import agreed, own_classes, own_rows, placement, shard_like
from cosface_kernels.options import Options, Update
from cosface_kernels.validation import is_capturing

MARK = "_moves_in_backward"  # attribute of a weight that has or had an owner, which torch.compile can look at
OWNERSHIP = "_ownership"  # the attribute that is its Ownership

IDLE, MOVING, MOVED, SKIPPED, REFUSED = "idle", "moving", "moved", "skipped", "refused"
NONFINITE = ("raise", "skip")
MOVABLE = (torch.float64, torch.float32, torch.bfloat16)
OF_THE_OPTIMIZER = ("accumulate", "state_dtype", "grad_scaler", "nonfinite", "seed")  # and of no group
WEIGHT_SEEDS = 2**40  # between those of an optimizer's weights: more than there are classes


@dataclass
class Ownership:
    """What is known of a parameter that an optimizer of this module holds.

    Attributes:
        optimizer: a reference to the one that was made last.
        number: of the parameter among that optimizer's.
        phase: where its step is.
        finite: whether its gradient in this step was; on a GPU an answer to wait for. None: it had none.
        is_head: a loss function has been given it.
        nodes: autograd nodes that have not run backward.
    """

    optimizer: "weakref.ref[RowOptimizer] | None"
    number: int
    phase: str = IDLE
    finite: Callable[[], bool] | None = None
    is_head: bool = False
    nodes: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)

    def owner(self) -> "RowOptimizer | None":
        return None if self.optimizer is None else self.optimizer()

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a parameter that is pickled nothing is known, before its optimizer is unpickled."""
        return Ownership, (None, 0)

    def check_whole(self, weight: Tensor) -> None:
        if self.phase == MOVING and not _restoring:
            raise RuntimeError(
                f"The last step on a weight of shape {tuple(weight.shape)} was interrupted, with some of its rows "
                "moved and others not. Restore the weight and the optimizer from a checkpoint: "
                "head.load_state_dict(...), then optimizer.load_state_dict(...)."
            )

    def end_step(self) -> None:
        self.phase, self.finite = IDLE, None


_restoring: list[None] = []  # something, while interrupted steps are mended


@contextmanager
def restoring() -> Iterator[None]:
    """In it what is half moved can be read, to be overwritten."""
    _restoring.append(None)
    try:
        yield
    finally:
        _restoring.pop()


def ownership_of(weight: Tensor) -> Ownership | None:
    """Kept as an attribute: a dict of weights would hold weak references, and torch.utils.swap_tensors, by which
    Module.to casts a sharded weight, refuses a tensor that has some.
    """
    return getattr(weight, OWNERSHIP, None)


class RowOptimizer(Optimizer):
    """What FusedSGD and FusedAdamW share.

    A head's weight is a contiguous (C, D) float64, float32 or bfloat16 parameter, or a DTensor that is sharded by
    classes. Any other parameter is moved by `step()`, as torch.optim does it.

    Args:
        params: parameters, heads' weights among them, or param groups.
        accumulate: keep an ordinary gradient in weight.grad, summed over backward passes, and move the rows in
            `step()`: the exact mean over micro-batches, for C x D more memory. Concatenating their embeddings and
            labels gives the same mean without that memory.
        state_dtype: of a head's state; None: the weight's. bfloat16 is rounded stochastically.
        grad_scaler: the `torch.amp.GradScaler` by which the loss is scaled; backward divides by its scale, and a
            gradient that is not finite, on any rank, moves nothing. A copy of the optimizer has a copy of it.
        nonfinite: what a backward does whose gradient is not finite, besides moving nothing, where there is no
            grad_scaler. "raise": tell the first such sample. "skip", and on a GPU, which is not waited for, both:
            count it in `skipped`, and leave all other parameters out of the next `step()`. With accumulate there
            is nothing before `step()` to look at, which moves by what it finds, as torch.optim's does.
        seed: of the stochastic rounding of bfloat16; a shard adds the number of its first class.

    Options of each group, which may change between steps, for heads alone:
        gradient_factor: multiplies the gradient before anything else: clipping by a norm known beforehand.
        max_row_norm: a row of the gradient that is longer is scaled down to this length.

    Raises:
        TypeError, ValueError: an option is out of its range, or a head's weight is not one; the message shows the
            value.
        RuntimeError: in whatever reads a weight after a step that was interrupted; in a second backward before
            `step()`, and in a `step()` after that or after a gradient that came too late; in backward, for a
            gradient that is not finite.
    """

    rule: str
    of_torch: type[torch.optim.SGD] | type[torch.optim.AdamW]
    of_this_rule: str  # an option of its groups
    state_names: tuple[str, ...]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        accumulate: bool,
        state_dtype: torch.dtype | None,
        grad_scaler: torch.amp.GradScaler | None,
        nonfinite: str,
        seed: int,
    ) -> None:
        self.accumulate, self.state_dtype, self.grad_scaler, self.seed = accumulate, state_dtype, grad_scaler, seed
        self.nonfinite = nonfinite
        self._skipped: dict[torch.device, Tensor] = {}
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters, got the module {type(params).__name__}: give it "
                "head.parameters()."
            )
        if state_dtype not in (None, *MOVABLE):
            raise ValueError(f"state_dtype must be None, float64, float32 or bfloat16, got {state_dtype}.")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}.")
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {grad_scaler!r}.")
        if not isinstance(seed, numbers.Integral):
            raise ValueError(f"seed must be an integer, got {seed!r}.")
        _check_group(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in OF_THE_OPTIMIZER:
            if name in param_group:
                raise ValueError(
                    f"{name} is one for all of {type(self).__name__}, got {param_group[name]!r} in a param group: "
                    "give it to an optimizer of its own."
                )
        before = sum(1 for _ in self._members())
        super().add_param_group(param_group)
        for number, weight in enumerate(self.param_groups[-1]["params"], before):
            self._own(weight, number)

    def _own(self, weight: Tensor, number: int) -> Ownership:
        """From now on the weight is this optimizer's; one that had it before says so in its `step()`."""
        known, ownership = ownership_of(weight), Ownership(weakref.ref(self), number)
        if known is not None and (known.owner() is not None or known.phase == MOVING):
            ownership = replace(known, optimizer=ownership.optimizer, number=number)
        setattr(weight, MARK, True)
        setattr(weight, OWNERSHIP, ownership)
        return ownership

    def _members(self) -> Iterator[tuple[dict[str, Any], Tensor, Ownership]]:
        """Of each parameter; one that was put into a group without add_param_group becomes this optimizer's."""
        numbers = itertools.count()
        for group in getattr(self, "param_groups", []):
            for weight, number in zip(group["params"], numbers, strict=False):
                known = ownership_of(weight)
                yield group, weight, self._own(weight, number) if known is None or known.owner() is None else known

    def own_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The fields of `Update` that only this rule has."""
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """How many gradients that were not finite moved nothing, without a grad_scaler; waits for a GPU.

        A checkpoint has no count of them.
        """
        return sum(int(count) for count in self._skipped.values())

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves what has an ordinary gradient and ends the step; heads' rows have moved already.

        Nothing moves where the gradient of a head in this step was not finite.

        Raises:
            RuntimeError: nothing has been moved by this call, since a weight is half-way through a step that was
                interrupted, is another optimizer's by now, or has a gradient that came after its rows had moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, weight, ownership in self._members():
            self._check_own(weight, ownership)
        ordinary = [member for member in self._members() if _has_ordinary_gradient(member[1])]
        if ordinary and all(ownership.finite() for *_, ownership in self._members() if ownership.finite):
            for group, weight, ownership in ordinary:
                if ownership.is_head:
                    self._apply(weight, group)
            if others := {weight for _, weight, ownership in ordinary if not ownership.is_head}:
                self._move_others(others)
        for _, weight, ownership in self._members():
            if isinstance(weight.grad, ConsumedGradient):
                weight.grad = None
            ownership.end_step()
        return loss

    def _check_own(self, weight: Tensor, ownership: Ownership) -> None:
        ownership.check_whole(weight)
        if ownership.is_head and ownership.owner() is not self:
            raise RuntimeError(
                f"A weight of shape {tuple(weight.shape)} belongs to another optimizer, which was made later: its "
                "rows move by that one's rules, and step() of this one would end nothing. Keep one of them."
            )
        if ownership.phase == REFUSED:
            raise RuntimeError(
                f"A weight of shape {tuple(weight.shape)} has moved by one gradient, and another was refused: "
                "step() would end half an update. Call zero_grad() to go on with the first alone."
            )
        if not ownership.is_head or not _has_ordinary_gradient(weight):
            return
        if weight.grad is not None and weight.grad.is_sparse:
            raise RuntimeError(
                f"step() needs the gradient of all classes of a weight of shape {tuple(weight.shape)}, got one of "
                "sampled classes, of which rows move inside backward alone: construct the optimizer without "
                "accumulate=True, or the head with sample_rate=1."
            )
        self._check_fits(weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops ordinary gradients. Rows that have moved stay so, and their step is not over before `step()`.

        Except with a grad_scaler, which leaves out `step()` where the gradient of another parameter overflowed.
        """
        consumed = {}
        for _, weight, ownership in self._members():
            if isinstance(weight.grad, ConsumedGradient):
                consumed[weight], weight.grad = weight.grad, None
            if ownership.phase == SKIPPED or (ownership.phase != MOVING and self._scaler() is not None):
                ownership.end_step()
            elif ownership.phase == REFUSED:
                ownership.phase = MOVED
        super().zero_grad(set_to_none)
        for weight, gradient in consumed.items():
            if self._ownership(weight).phase in (MOVED, MOVING):
                weight.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        for _, weight, ownership in self._members():
            ownership.check_whole(weight)
            # a scaler leaves step() out, and then nothing but the next zero_grad() tells that the step is over
            if ownership.phase in (MOVED, REFUSED) and self._scaler() is None and not _restoring:
                raise RuntimeError(
                    f"backward has moved a weight of shape {tuple(weight.shape)}, and its step is not over: a run "
                    "that resumed from here would move it by the same batch again. Save after step()."
                )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or torch.optim's optimizer of the same rule; ends an interrupted step.

        The weights must be restored as well, from the same checkpoint.

        Raises:
            ValueError: it is the state of another rule, or does not fit the weights.
        """
        for group in state_dict["param_groups"]:
            if self.of_this_rule not in group:
                raise ValueError(
                    f"{type(self).__name__} loads the state of its like or of torch.optim."
                    f"{self.of_torch.__name__}, got groups without {self.of_this_rule}, with {', '.join(group)}."
                )
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        members = [weight for _, weight, _ in self._members()]
        loaded = {
            weight: self._loaded(weight, state_dict["state"][index])
            for index, weight in zip(saved_ids, members, strict=False)
            if state_dict["state"].get(index)
        }
        super().load_state_dict({**state_dict, "state": {}})  # which also says if there are more or fewer of them
        self.state.update(loaded)
        for group, _, ownership in self._members():
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            ownership.end_step()

    def _loaded(self, weight: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        moments = {name: saved[name] for name in self.state_names if saved.get(name) is not None}
        for name, moment in moments.items():
            if _layout(moment) != _layout(weight):
                raise ValueError(
                    f"{name} must be laid out like its weight, {_layout(weight)}, got {_layout(moment)}. Were the "
                    "parameters given in another order?"
                )
            if not isinstance(moment, DTensor):
                moments[name] = moment.to(weight.device).contiguous()
        if "step" in saved:
            return {"step": _count(float(saved["step"])), **moments}
        return {"step": _count(1.0 if moments else 0.0), **moments}  # SGD of torch counts no steps

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in OF_THE_OPTIMIZER},
            "_skipped": self._skipped,
            "phases": [(ownership.phase, ownership.is_head) for *_, ownership in self._members()],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        phases = state.pop("phases", None)  # which load_state_dict of Optimizer does not give
        super().__setstate__(state)
        for number, ((_, weight, _), known) in enumerate(zip(self._members(), phases or [], strict=False)):
            ownership = self._own(weight, number)
            ownership.phase, ownership.is_head = known
            ownership.finite = _no if ownership.phase == SKIPPED else None

    def _check_ready(self, weight: Tensor) -> None:
        ownership = self._ownership(weight)
        ownership.check_whole(weight)
        if self._scaler() is not None and weight.grad is None:
            ownership.end_step()  # step() was left out, and the gradient dropped by another's zero_grad()
        if ownership.phase in (MOVED, REFUSED):
            ownership.phase = REFUSED
            raise RuntimeError(
                f"backward ran twice on a weight of shape {tuple(weight.shape)} before "
                f"{type(self).__name__}.step(). Call step() after each backward; to average over micro-batches, "
                "concatenate their embeddings and labels, or construct the optimizer with accumulate=True."
            )

    def _check_fits(self, weight: Tensor) -> None:
        if is_capturing():
            raise RuntimeError(
                f"A CUDA graph would move a weight of shape {tuple(weight.shape)} by the learning rate, the step "
                "count and the random numbers of its capture at every replay: construct the optimizer with "
                "accumulate=True and call step() outside of the graph."
            )
        _check_group(self._group_of(weight))
        _check_weight(weight)
        self._check_state(weight, self.state.get(weight, {}))

    def _check_movable(self, weight: Tensor) -> None:
        """Raises where backward could not move the rows, or would be wrong to."""
        self._check_fits(weight)
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"A hook on a weight of shape {tuple(weight.shape)} would see no gradient, because its rows move "
                "inside backward: remove the hook, or construct the optimizer with accumulate=True."
            )
        around = None if isinstance(weight, DTensor) else DistributedDataParallel._active_ddp_module
        if around is not None and any(weight is parameter for parameter in around.parameters()):
            raise RuntimeError(
                f"DistributedDataParallel averages gradients, but a weight of shape {tuple(weight.shape)} has "
                f"none: {type(self).__name__} moves its rows inside backward, on each rank by its own samples. "
                "Give the head a process_group and leave it outside of DistributedDataParallel, so that its "
                "classes are sharded over the ranks, or construct the optimizer with accumulate=True."
            )

    def _check_state(self, weight: Tensor, state: dict[str, Any]) -> None:
        for name in self.state_names:
            if name in state and _layout(state[name]) != _layout(weight):
                raise ValueError(
                    f"{name} must be laid out like its weight, {_layout(weight)}, got {_layout(state[name])}: "
                    "the weight was replaced by one of another shape. Give the new one to a new optimizer, or "
                    "drop the old state with optimizer.state.pop(weight)."
                )
            if name in state and state[name].device != weight.device:
                raise ValueError(
                    f"{name} must be on device {weight.device}, as its weight is, got it on {state[name].device}."
                )

    def _group_of(self, weight: Tensor) -> dict[str, Any]:
        return next(group for group, member, _ in self._members() if member is weight)

    def _holds(self, weight: Tensor) -> bool:
        return any(member is weight for group in self.param_groups for member in group["params"])

    def _ownership(self, weight: Tensor) -> Ownership:
        return ownership_of(weight) or self._own(weight, 0)

    @contextmanager
    def _next_update(
        self, weight: Tensor, group: dict[str, Any], loss_scale: float = 1.0
    ) -> Iterator[tuple[Update, list[Tensor]]]:
        """The update of the step that begins now, and the state that its body moves.

        TypeError and ValueError are refusals: what raises them does so before any row has moved, and it is as if
        this step had not begun. Anything else leaves the weight half moved.
        """
        ownership, before = self._ownership(weight), self.state[weight]
        phase, dtype = ownership.phase, self.state_dtype or weight.dtype
        try:
            self.state[weight] = state = {**before, "step": before.get("step", _count(0.0)) + 1}
            numbers = self.own_numbers(group)
            for name in self.state_names_of(group):
                if name not in state:
                    state[name] = _zeros_like(weight, dtype)
                    numbers |= {"dampening": 0.0} if self.rule == "sgd" else {}  # as in torch: its first gradient
                elif state[name].dtype != dtype and (self.state_dtype or state[name].dtype not in MOVABLE):
                    state[name] = state[name].to(dtype)
            update = Update(
                rule=self.rule,
                step=int(state["step"]),
                seed=(self.seed + own_classes(weight).start + WEIGHT_SEEDS * ownership.number) % 2**63,
                gradient_factor=float(group["gradient_factor"]) * (-1 if group["maximize"] else 1) / loss_scale,
                max_row_norm=float(group["max_row_norm"]),
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                **numbers,
            )
            ownership.phase = MOVING
            yield update, [own_rows(state[name]) for name in self.state_names_of(group)]
        except (TypeError, ValueError):
            self.state[weight], ownership.phase = before, phase
            raise
        ownership.phase = MOVED

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _move(self, weight: Tensor, tensors: tuple[Tensor, ...], need_dx: bool, backend: str | None,
              options: Options) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dx and dscale of lmcl_backward's arguments, having moved the rows."""
        x, w, *_, log_sum, g_lse, g_cos, _ = tensors
        if own_rows(weight).data_ptr() != w.data_ptr():
            raise RuntimeError(
                f"The memory of a weight of shape {tuple(weight.shape)} was replaced between forward and "
                "backward, so that backward would move the old one."
            )
        self._check_movable(weight)
        loss_scale, ownership = self._loss_scale(), self._ownership(weight)
        finite = _finite_rows(x, log_sum, g_lse, g_cos)  # (N,)
        all_finite = None
        if self._scaler() is not None or x.device.type == "cpu":
            if not agreed(weight, bool(finite.all())):
                return self._skip(weight, tensors, finite, loss_scale, need_dx, backend, options)
        else:
            all_finite = finite.all()
        with self._next_update(weight, self._group_of(weight), loss_scale) as (update, state):
            dx, dscale = ops.lmcl_backward_update_(
                *tensors, state, all_finite, *update.flat(), need_dx, backend, *options.flat()
            )
        weight.grad = ConsumedGradient(weight, ownership.finite is not _no, loss_scale)
        if all_finite is not None:
            self._count_skipped(~all_finite)
            ownership.finite = _both(ownership.finite, _answer(all_finite))
        return dx, dscale

    def _loss_scale(self) -> float:
        """What backward divides by."""
        scaler = self._scaler()
        if scaler is None:
            return 1.0
        if getattr(scaler, "_scale", 1) is None:
            raise RuntimeError(
                "The optimizer's grad_scaler has scaled no loss yet, so that backward would divide by a scale of "
                f"{scaler.get_scale():g} that is not there: call scaler.scale(loss).backward()."
            )
        return scaler.get_scale()

    def _scaler(self) -> torch.amp.GradScaler | None:
        """One that is disabled scales nothing and leaves no step out."""
        scaler = self.grad_scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _skip(self, weight: Tensor, tensors: tuple[Tensor, ...], finite: Tensor, loss_scale: float,
              need_dx: bool, backend: str | None, options: Options) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self._scaler() is None and self.nonfinite == "raise":
            wrong = (~finite).nonzero()
            where = f"that of sample {int(wrong[0])} is the first" if len(wrong) else "on another rank"
            if isinstance(weight, DTensor) and len(wrong):
                where += ", counted over all ranks"
            raise RuntimeError(
                f"The gradient of this batch is not finite ({where}), so that no row of a weight of shape "
                f"{tuple(weight.shape)} was moved. Look for nan or inf in the embeddings and the loss; "
                'nonfinite="skip" leaves such batches out.'
            )
        if self._scaler() is None:
            self._count_skipped(finite.new_ones(()))
        ownership = self._ownership(weight)
        weight.grad = ConsumedGradient(weight, False, loss_scale)
        ownership.phase, ownership.finite = SKIPPED, _no
        dx, _, dscale = ops.lmcl_backward(*tensors, need_dx, False, backend, *options.flat())
        return dx, dscale

    def _count_skipped(self, skipped: Tensor) -> None:
        self._skipped[skipped.device] = self._skipped.get(skipped.device, 0) + skipped.long()

    def _apply(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        rows = own_rows(weight)
        select(None, rows, rows, Options(updates=True))
        with self._next_update(weight, group) as (update, state), torch.no_grad():
            ops.apply_update_(rows, own_rows(weight.grad), state, *update.flat(), None)

    def _move_others(self, others: set[Tensor]) -> None:
        """By torch.optim's optimizer of this rule, with this one's options and state."""
        for weight in others:
            state = self.state[weight]
            for name in state.keys() & set(self.state_names):  # torch.optim casts them when it loads them
                state[name] = state[name].to(weight.dtype)
        groups = [
            {**group, "params": [weight for weight in group["params"] if weight in others]}
            for group in self.param_groups
        ]
        optimizer = self.of_torch([group for group in groups if group["params"]])
        optimizer.state = self.state
        optimizer.step()


class FusedSGD(RowOptimizer):
    """torch.optim.SGD whose rows move inside backward; equal to it to rounding.

    Args:
        params: parameters, heads' weights among them, or param groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        gradient_factor, max_row_norm, accumulate, state_dtype, grad_scaler, nonfinite, seed: see `RowOptimizer`.

    >>> from cosface_kernels import FusedCosFaceLoss
    >>> head = FusedCosFaceLoss(num_classes=1000, embedding_size=16)
    >>> optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    >>> before = head.weight.detach().clone()
    >>> head(torch.randn(4, 16), torch.tensor([1, 17, 17, 999])).backward()
    >>> bool((head.weight != before).any())
    True
    >>> optimizer.step()
    """

    rule, of_torch, of_this_rule = "sgd", torch.optim.SGD, "momentum"
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
        nonfinite: str = "raise",
        seed: int = 0,
    ) -> None:
        _check_not_negative(momentum=momentum)
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
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        gradient_factor, max_row_norm, accumulate, state_dtype, grad_scaler, nonfinite, seed: see `RowOptimizer`.
    """

    rule, of_torch, of_this_rule = "adamw", torch.optim.AdamW, "betas"
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
        nonfinite: str = "raise",
        seed: int = 0,
    ) -> None:
        _check_not_negative(eps=eps)
        _check_betas(betas)
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
            nonfinite=nonfinite,
            seed=seed,
        )

    def own_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = _check_betas(group["betas"])
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]


class ConsumedGradient(Tensor):
    """weight.grad between backward and `step()`: the gradient's shape and no numbers.

    GradScaler.unscale_ finds in it whether the gradient was finite. Anything else, such as the norm that clipping
    needs, raises and says what to do instead.
    """

    _finite: bool
    _loss_scale: float
    _ownership: Ownership

    @staticmethod
    def __new__(cls, weight: Tensor, finite: bool, loss_scale: float) -> "ConsumedGradient":
        gradient = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        gradient._finite, gradient._loss_scale = finite, loss_scale
        ownership = ownership_of(weight)
        assert ownership is not None
        gradient._ownership = ownership
        return gradient

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ConsumedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        of_optimizer = any(isinstance(argument, torch.nn.Parameter) for argument in args[:2])
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor) and not of_optimizer:
            args[0]._ownership.phase = REFUSED
            raise RuntimeError(
                f"A weight of shape {tuple(args[0].shape)} has moved by the gradient of a head's loss, and one "
                "of another loss came after it. Run that backward before the head's, which then gives an ordinary "
                "gradient too and leaves their sum to step(), or construct the optimizer with accumulate=True."
            )
        if func is torch.ops.aten.mul.out:
            raise RuntimeError(
                "DistributedDataParallel averages gradients, and backward has moved the rows of one of its weights"
                " already: leave the head outside of it, with a process_group, or construct the optimizer with "
                "accumulate=True."
            )
        if func is torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default:
            gradients, found_inf, inverse_scale = args
            if ordinary := [gradient for gradient in gradients if not isinstance(gradient, ConsumedGradient)]:
                func(ordinary, found_inf, inverse_scale)
            inverse = float(inverse_scale)
            for gradient in (gradient for gradient in gradients if isinstance(gradient, ConsumedGradient)):
                if not math.isclose(inverse * gradient._loss_scale, 1, rel_tol=1e-5):
                    raise RuntimeError(
                        f"The loss was scaled by {1 / inverse:g}, but backward has moved the weight already, by "
                        f"its gradient over {gradient._loss_scale:g}: construct the optimizer with "
                        "grad_scaler=scaler, or set optimizer.grad_scaler to it, and restore the weight."
                    )
                if not gradient._finite:
                    found_inf.fill_(1)
            return None
        raise RuntimeError(
            f"{func} needs the gradient of a weight of which backward has moved the rows already, so that it no "
            "longer exists. To clip, set gradient_factor (from a norm known before backward) or max_row_norm in "
            "the optimizer's param group; to work on the gradient, construct the optimizer with accumulate=True. "
            "If another optimizer has the weight too, leave it out of one of them."
        )


class _MovesRows(torch.autograd.Function):
    """ops.lmcl whose backward moves the weight, unless its gradient is needed as a whole."""

    @staticmethod
    def forward(ctx, x, w, targets, scale, margin, backend, options, owner, weight):  # type: ignore[no-untyped-def]
        ctx.margin, ctx.backend, ctx.options, ctx.owner, ctx.weight = margin, backend, options, owner, weight
        ctx.whole_gradient = False
        owner._ownership(weight).nodes.add(ctx)
        outputs = ops.lmcl(x, w, targets, scale, margin, backend, *options.flat())
        _, top, log_sum, target_cos, max_neg, cache = outputs
        ctx.set_materialize_grads(False)  # that of a cache would be as large
        ctx.mark_non_differentiable(top, max_neg, cache)
        ctx.save_for_backward(x, w, targets, scale, top, log_sum, target_cos, cache)
        return outputs

    @staticmethod
    def backward(ctx, g_loss, _, g_log_sum, g_cos, *__):  # type: ignore[no-untyped-def]
        weight, backend, options = ctx.weight, ctx.backend, ctx.options
        adds, whole = _wanted(ctx)
        if adds and not whole:
            ctx.owner._check_ready(weight)
        x, w, targets, scale, top, log_sum, target_cos, cache = ctx.saved_tensors
        need_dx, _, _, need_dscale, *_ = ctx.needs_input_grad
        g_lse, g_cos, dscale_of_psi = ops.fold_loss(
            targets, scale, top, log_sum, target_cos - ctx.margin, g_loss, g_log_sum, g_cos
        )  # (N,) each
        tensors = (x, w, targets, scale, top, log_sum, g_lse, g_cos, cache)
        dw = None
        if adds and not whole:
            dx, dscale = ctx.owner._move(weight, tensors, need_dx, backend, options)
        else:
            dx, dw, dscale = ops.lmcl_backward(*tensors, need_dx, whole, backend, *options.flat())
            dw = ops.of_all_classes(dw, options.classes, w) if whole else None
            if dw is not None and isinstance(weight, DTensor):
                dw = shard_like(weight, dw.to_dense() if dw.is_sparse else dw)
        dscale = dscale + dscale_of_psi if need_dscale else None
        return dx if need_dx else None, None, None, dscale, None, None, None, None, dw


def _wanted(node: Any) -> tuple[bool, bool]:
    """Whether this backward is to add to the weight's gradient, and whether a whole one is needed."""
    weight, ownership = node.weight, node.owner._ownership(node.weight)
    ownership.nodes.discard(node)
    if ownership.phase == SKIPPED and node.owner._scaler() is None:
        weight.grad = None  # what moved nothing is nothing to add to
    try:
        adds = torch._C._will_engine_execute_node(get_gradient_edge(weight).node)
    except RuntimeError as error:
        if "autograd.grad()" not in str(error):
            raise
        return False, True  # torch.autograd.grad is asked for the gradient of this leaf
    if adds and ownership.phase in (IDLE, SKIPPED):
        for other in ownership.nodes:  # that run in this backward too
            if torch._C._will_engine_execute_node(other):
                node.whole_gradient = other.whole_gradient = True
        earlier = weight.grad is not None and not isinstance(weight.grad, ConsumedGradient)
        node.whole_gradient |= earlier
    return adds, adds and node.whole_gradient


def _finite_rows(x: Tensor, log_sum: Tensor, g_lse: Tensor, g_cos: Tensor) -> Tensor:
    """(N,) bool: a sample without a gradient, or with a finite one; log_sum is -inf without negatives."""
    finite = x.isfinite().all(1) & (log_sum < math.inf) & g_lse.isfinite() & g_cos.isfinite()  # (N,)
    return finite | ((g_lse == 0) & (g_cos == 0))


def owner_of(weight: Tensor) -> RowOptimizer | None:
    """The optimizer that moves this weight's rows inside backward, if there is one."""
    ownership = ownership_of(weight)
    owner = None if ownership is None else ownership.owner()
    return None if owner is None or owner.accumulate or not owner._holds(weight) else owner


# torch.compiler.disable, which imports the compiler at its first call, not here
@torch._disable_dynamo  # type: ignore[attr-defined]
def note_use(weight: Tensor) -> None:
    """Notes that a head uses the weight; raises RuntimeError if a step that was interrupted left it half moved."""
    ownership = ownership_of(weight)
    if ownership is not None:
        ownership.is_head = True
        ownership.check_whole(weight)


def note_loaded(weight: Tensor) -> None:
    """Notes that the weight was restored: whole again where no optimizer is there to be restored too."""
    ownership = ownership_of(weight)
    if ownership is not None and ownership.owner() is None:
        ownership.end_step()


@torch._disable_dynamo  # type: ignore[attr-defined]
def progress(weight: Tensor) -> str:
    """Where the weight's owner is, for ranks to compare."""
    owner = owner_of(weight)
    if owner is None:
        return "one that moves no rows in backward"
    return f"step {int(owner.state.get(weight, {}).get('step', 0))}, {owner._ownership(weight).phase}"


@torch._disable_dynamo  # type: ignore[attr-defined]
def options_of(weight: Tensor) -> str:
    """Those of the weight's owner, likewise."""
    owner = owner_of(weight)
    if owner is None:
        return "none"
    options = {name: value for name, value in owner._group_of(weight).items() if name != "params"}
    return f"{type(owner).__name__} with {options | {'nonfinite': owner.nonfinite}}"


@torch._disable_dynamo  # type: ignore[attr-defined]
def lmcl(
    weight: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    margin: float,
    backend: str | None,
    *,
    whole_gradient: bool = False,
    **fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.lmcl`, whose backward moves w, the weight's rows that are here, if an optimizer of this module owns it.

    whole_gradient: the loss has another use of the weight, so that `step()` must move it by an ordinary gradient.

    Raises:
        RuntimeError: the backend cannot move rows, or something needs the gradient that would not exist.
        ValueError: the weight is not one that can be moved, or no longer fits the optimizer's state.
    """
    owner, options = owner_of(weight), Options(**fields)
    if owner is not None and torch.is_grad_enabled() and weight.requires_grad and not whole_gradient:
        owner._check_movable(weight)
        select(backend, x, w, replace(options, updates=True))
        return _MovesRows.apply(x, w.detach(), targets, scale, margin, backend, options, owner, weight)  # type: ignore[no-untyped-call]
    return ops.lmcl(x, w, targets, scale, margin, backend, *options.flat())


def _check_weight(weight: Tensor) -> None:
    rows = placement(weight).weight
    if weight.dim() != 2 or weight.dtype not in MOVABLE:
        raise ValueError(
            "A head's weight must have shape (C, D) and dtype float64, float32 or bfloat16 for its rows to move "
            f"inside backward, got shape {tuple(weight.shape)} and {weight.dtype}."
        )
    if not rows.is_contiguous():
        raise ValueError(f"A weight must be contiguous to be moved in place, got strides {rows.stride()}.")


def _check_group(group: dict[str, Any]) -> None:
    """The options that both rules have."""
    _check_not_negative(**{name: group[name] for name in ("lr", "weight_decay", "max_row_norm")})
    _check_number("gradient_factor", group["gradient_factor"])
    if not math.isfinite(group["gradient_factor"]):
        raise ValueError(f"gradient_factor must be finite, got {group['gradient_factor']}.")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        _check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}.")
    return betas


def _has_ordinary_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and not isinstance(weight.grad, ConsumedGradient)


def _no() -> bool:
    return False


def _both(earlier: Callable[[], bool] | None, answer: Callable[[], bool]) -> Callable[[], bool]:
    return answer if earlier is None else lambda: earlier() and answer()


def _answer(flag: Tensor) -> Callable[[], bool]:
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
