"""What the optimizers share: whose rows move in backward, and whose in `step()`."""

import inspect
import itertools
import numbers
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from cosface_kernels import ops
from cosface_kernels.backends import select
from cosface_kernels.distributed import agreement_on_rows, own_classes, own_rows
from cosface_kernels.float8 import FLOAT8, OF_STATE
from cosface_kernels.optim import finiteness
from cosface_kernels.optim.checks import MOVABLE, check_group, check_rule, check_weight
from cosface_kernels.optim.consumed_gradient import ConsumedGradient, has_ordinary_gradient
from cosface_kernels.optim.ownership import (
    MARK,
    MOVED,
    MOVING,
    OWNERSHIP,
    REFUSED,
    SKIPPED,
    Ownership,
    ownership_of,
    restorations,
)
from cosface_kernels.optim.state import check_state, convert_, loaded_states, saved_state, step_count, zero_state
from cosface_kernels.options import Options, Update
from cosface_kernels.validation import check_bool, is_capturing

NONFINITE = ("raise", "skip")
OF_THE_OPTIMIZER = ("accumulate", "state_dtype", "grad_scaler", "nonfinite", "seed")  # and of no group
WEIGHT_SEEDS = 2**40  # between those of an optimizer's weights: more than there are classes


class RowOptimizer(Optimizer):
    """What FusedSGD and FusedAdamW share.

    A head's weight is a contiguous (C, D) float64, float32, bfloat16 or float8_e4m3fn parameter, or a DTensor that
    is sharded by classes. Any other parameter is moved by `step()`, as torch.optim does it.

    Args:
        params: parameters, heads' weights among them, or param groups.
        accumulate: keep an ordinary gradient in weight.grad, summed over backward passes, and move the rows in
            `step()`: the exact mean over micro-batches, for C x D more memory. Concatenating their embeddings and
            labels gives the same mean without that memory.
        state_dtype: of a head's state; None: the weight's, but bfloat16 of one in float8. bfloat16 and
            float8_e4m3fn are rounded stochastically; a row of float8 has an exponent of its own, and of AdamW's
            squares it has the roots.
        grad_scaler: the `torch.amp.GradScaler` by which the loss is scaled; backward divides by its scale, and a
            gradient that is not finite, on any rank, moves nothing. A copy of the optimizer has a copy of it.
        nonfinite: what a backward does whose gradient is not finite, besides moving nothing, where there is no
            grad_scaler. "raise": tell the first such sample. "skip", and on a GPU, which is not waited for, both:
            count it in `skipped`, and leave all other parameters out of the next `step()`. With accumulate there
            is nothing before `step()` to look at, which moves by what it finds, as torch.optim's does.
        seed: of the stochastic rounding of bfloat16 and float8; a shard adds the number of its first class.

    Options of each group, which may change between steps, for heads alone:
        gradient_factor: multiplies the gradient before anything else: clipping by a norm known beforehand.
        max_row_norm: a row of the gradient that is longer is scaled down to this length.
        weight_norm: the length that a row of the weight is given as it moves. A gradient is at right angles to its
            row, so that rows grow longer from step to step, and a step of the same learning rate turns them less
            and less; with a constant length it turns them as far at the end as at the beginning. None: rows have
            the lengths that the rule gives them.

    Raises:
        TypeError, ValueError: an option is out of its range, or a head's weight is not one; the message shows the
            value.
        RuntimeError: in whatever reads a weight after a step that was interrupted; in a second backward before
            `step()`, and in a `step()` after that, after a gradient that came too late or after a backward that
            raised when rows had moved; in backward, for a gradient that is not finite.
    """

    rule: str
    of_torch: type[torch.optim.SGD] | type[torch.optim.AdamW]
    of_this_rule: tuple[str, ...]  # options that the groups of no other rule have together
    state_names: tuple[str, ...]
    squares: tuple[str, ...] = ()  # those of them that are means of squares

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
            raise ValueError(
                f"state_dtype must be None, float64, float32, bfloat16 or float8_e4m3fn, got {state_dtype}."
            )
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}.")
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {grad_scaler!r}.")
        if not isinstance(seed, numbers.Integral):
            raise ValueError(f"seed must be an integer, got {seed!r}.")
        check_bool("accumulate", accumulate)
        check_group(defaults)
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

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves what has an ordinary gradient and ends the step; heads' rows have moved already.

        Nothing moves where the gradient of a head in this step was not finite.

        Raises:
            RuntimeError: nothing has been moved by this call, since a weight is half-way through a step that was
                interrupted, is another optimizer's by now, or had moved when backward raised.
        """
        if not (closure is None or callable(closure)):
            raise TypeError(f"closure must be a function or None, got {closure!r}.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, weight, ownership in self._members():
            self._check_own(weight, ownership)
        ordinary = [member for member in self._members() if has_ordinary_gradient(member[1])]
        if ordinary and all(ownership.finite() for *_, ownership in self._members() if ownership.finite):
            if others := [weight for _, weight, ownership in ordinary if not ownership.is_head]:
                self._move_others(others)  # first: torch may refuse one, such as of a sparse embedding
            for group, weight, ownership in ordinary:
                if ownership.is_head:
                    self._apply(weight, group)
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
                f"A weight of shape {tuple(weight.shape)} has moved by one gradient, and backward then raised: "
                "step() would end half an update. Call zero_grad(), which ends the step: rows that moved stay so."
            )
        if not ownership.is_head or not has_ordinary_gradient(weight):
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

        Except a step that `step()` refuses, which ends here for all weights, and with a grad_scaler, which leaves
        out `step()` where the gradient of another parameter overflowed.
        """
        consumed = {}
        ends = self._scaler() is not None or any(each.phase == REFUSED for *_, each in self._members())
        for _, weight, ownership in self._members():
            if isinstance(weight.grad, ConsumedGradient):
                consumed[weight], weight.grad = weight.grad, None
            if ownership.phase == SKIPPED or (ownership.phase != MOVING and ends):
                ownership.end_step()
        super().zero_grad(set_to_none)
        for weight, gradient in consumed.items():
            if self._ownership(weight).phase in (MOVED, MOVING):
                weight.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        for _, weight, ownership in self._members():
            ownership.check_whole(weight)
            # a scaler leaves step() out, and then nothing but the next zero_grad() tells that the step is over
            if ownership.phase in (MOVED, REFUSED) and self._scaler() is None and not restorations:
                raise RuntimeError(
                    f"backward has moved a weight of shape {tuple(weight.shape)}, and its step is not over: a run "
                    "that resumed from here would move it by the same batch again. Save after step()."
                )
        saved = super().state_dict()
        return {**saved, "state": {index: saved_state(state) for index, state in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or torch.optim's optimizer of the same rule; ends an interrupted step.

        The weights must be restored as well, from the same checkpoint.

        Raises:
            ValueError: it is the state of another rule, as that of torch.optim.Adam with weight decay is, or does
                not fit the weights.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def take_state(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            """What is here after all other hooks; torch would cast it to the weights' dtype."""
            loaded.update(self._loaded(state_dict))
            return {**state_dict, "state": {}}

        def give_state(_: Optimizer) -> None:
            self.state.update(loaded)
            for group, _weight, ownership in self._members():
                for name, value in self.defaults.items():
                    group.setdefault(name, value)
                group.pop("decoupled_weight_decay", None)
                ownership.end_step()

        last = self.register_load_state_dict_pre_hook(take_state)
        first = self.register_load_state_dict_post_hook(give_state, prepend=True)
        try:
            super().load_state_dict(state_dict)  # which also says if there are more or fewer of them
        finally:
            last.remove()
            first.remove()

    def _loaded(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        for group in state_dict["param_groups"]:
            check_rule(group, type(self).__name__, self.of_torch.__name__, self.of_this_rule)
        return loaded_states([weight for _, weight, _ in self._members()], state_dict, self.state_names)

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
            ownership.finite = finiteness.never if ownership.phase == SKIPPED else None

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
        check_group(self._group_of(weight))
        check_weight(weight)
        check_state(weight, self.state.get(weight, {}), self.state_names)

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

    def _group_of(self, weight: Tensor) -> dict[str, Any]:
        return next(group for group, member, _ in self._members() if member is weight)

    def _holds(self, weight: Tensor) -> bool:
        return any(member is weight for group in self.param_groups for member in group["params"])

    def _ownership(self, weight: Tensor) -> Ownership:
        return ownership_of(weight) or self._own(weight, 0)

    @contextmanager
    def _next_update(
        self, weight: Tensor, group: dict[str, Any], loss_scale: float = 1.0, exponents: Tensor | None = None
    ) -> Iterator[tuple[Update, list[Tensor]]]:
        """The update of the step that begins now, and the state of `reference.move_rows` that its body moves.

        exponents: (C_r,) of a weight in float8.

        TypeError and ValueError are refusals: what raises them does so before any row has moved, and it is as if
        this step had not begun. Anything else leaves the weight half moved.
        """
        ownership, before = self._ownership(weight), self.state[weight]
        phase = ownership.phase
        dtype = self.state_dtype or (torch.bfloat16 if weight.dtype is FLOAT8 else weight.dtype)
        try:
            self.state[weight] = state = {**before, "step": before.get("step", step_count(0.0)) + 1}
            numbers = self.own_numbers(group)
            for name in self.state_names_of(group):
                if name not in state:
                    state |= zero_state(weight, name, dtype)
                    numbers |= {"dampening": 0.0} if self.rule == "sgd" else {}  # as in torch: its first gradient
                elif state[name].dtype != dtype and (self.state_dtype or state[name].dtype not in MOVABLE):
                    convert_(state, name, dtype, is_square=name in self.squares)
            update = Update(
                rule=self.rule,
                step=int(state["step"]),
                seed=(self.seed + own_classes(weight).start + WEIGHT_SEEDS * ownership.number) % 2**63,
                gradient_factor=float(group["gradient_factor"]) * (-1 if group["maximize"] else 1) / loss_scale,
                max_row_norm=float(group["max_row_norm"]),
                weight_norm=float(group.get("weight_norm") or 0.0),
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                **numbers,
            )
            ownership.phase = MOVING
            names = self.state_names_of(group)
            of_float8 = [name + OF_STATE for name in names if state[name].dtype is FLOAT8]
            moved = [own_rows(state[name]) for name in (*names, *of_float8)]
            if exponents is not None:
                moved.insert(len(names), exponents)
            yield update, moved
        except (TypeError, ValueError):
            self.state[weight], ownership.phase = before, phase
            raise
        ownership.phase = MOVED

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _move(self, weight: Tensor, tensors: tuple[Tensor, ...], sums: Tensor, need_dx: bool, backend: str | None,
              options: Options) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dx and dscale of lmcl_backward's arguments, having moved the rows."""
        x, w, *_, g_lse, g_cos, _ = tensors
        finite = finiteness.finite_rows(x, sums, g_lse, g_cos, options.g_moments)  # (N,)
        ownership, all_finite = self._ownership(weight), None
        if self._scaler() is not None or x.device.type == "cpu":
            with agreement_on_rows(weight, "an overflow") as own:
                loss_scale = self._scale_of_move(weight, w)
                own.facts, own.count = {"loss scale": loss_scale}, int(finite.all())
            if not all(own.counts):
                return self._skip(weight, tensors, finite, loss_scale, need_dx, backend, options)
        else:
            loss_scale, all_finite = self._scale_of_move(weight, w), finite.all()
        group, exponents = self._group_of(weight), options.exponents
        with self._next_update(weight, group, loss_scale, exponents) as (update, state):
            dx, dscale = ops.lmcl_backward_update_(
                *tensors, state, all_finite, *update.flat(), need_dx, backend, *options.flat()
            )
        ownership.phase = REFUSED  # unless this backward ends: whatever raises in it leaves half an update
        torch.autograd.Variable._execution_engine.queue_callback(ownership.end_backward)
        weight.grad = ConsumedGradient(weight, ownership.finite is not finiteness.never, loss_scale)
        if all_finite is not None:
            self._count_skipped(~all_finite)
            ownership.finite = finiteness.both(ownership.finite, finiteness.answer(all_finite))
        return dx, dscale

    def _scale_of_move(self, weight: Tensor, w: Tensor) -> float:
        """The loss scale, of rows w that can move."""
        if own_rows(weight).data_ptr() != w.data_ptr():
            raise RuntimeError(
                f"The memory of a weight of shape {tuple(weight.shape)} was replaced between forward and "
                "backward, so that backward would move the old one."
            )
        self._check_movable(weight)
        return self._loss_scale()

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
                f"{tuple(weight.shape)} was moved. Look for nan or inf in embeddings, weight and loss; "
                'nonfinite="skip" leaves such batches out.'
            )
        if self._scaler() is None:
            self._count_skipped(finite.new_ones(()))
        ownership = self._ownership(weight)
        weight.grad = ConsumedGradient(weight, False, loss_scale)
        ownership.phase, ownership.finite = SKIPPED, finiteness.never
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

    def _move_others(self, others: list[Tensor]) -> None:
        """By torch.optim's optimizer of this rule, with this one's options and state."""
        for weight in others:
            state = self.state[weight]
            for name in state.keys() & set(self.state_names):  # torch.optim casts them when it loads them
                if state[name].dtype != weight.dtype:
                    convert_(state, name, weight.dtype, is_square=name in self.squares)
        moved = set(others)
        groups = [
            {**group, "params": [weight for weight in group["params"] if weight in moved]}
            for group in self.param_groups
        ]
        optimizer = self.of_torch([group for group in groups if group["params"]])
        optimizer.state = self.state
        with torch.no_grad():
            inspect.unwrap(self.of_torch.step)(optimizer)  # without all optimizers' hooks, which run for this one
