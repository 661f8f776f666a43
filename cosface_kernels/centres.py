"""What a head owns: its class centres, and in float8 the exponents of their rows."""

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from typing_extensions import Self

from cosface_kernels import collectives, float8, loading, optim, resizing
from cosface_kernels.distributed import beside, empty_weight, leave_to_its_rank, own_rows, zero_exponents
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.init import normal_
from cosface_kernels.margins.base import in_its_dtype
from cosface_kernels.validation import check_dtype


class ClassCentres(nn.Module):
    """
    Attributes:
        weight: Parameter (rows, D), a DTensor, Shard(0), with a process group.
        weight_exponent: (rows,) int8 buffer, sharded like the weight: a row is 2^e times what a weight in float8
            stores, see `cosface_kernels.float8`; None for any other.
    """

    weight: nn.Parameter
    weight_exponent: Tensor | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _on_every_rank(cls.__init__)  # type: ignore[method-assign]

    def _make_weight(
        self,
        rows: int,
        embedding_size: int,
        process_group: ProcessGroup | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if process_group is None:
            weight = torch.empty(rows, embedding_size, device=device, dtype=dtype)
        else:
            weight = empty_weight(rows, embedding_size, process_group, device, dtype)
        device = weight.device
        for name, state in chain(self.named_parameters(), self.named_buffers()):
            if state.is_meta and not weight.is_meta:
                raise ValueError(
                    f"{name} must have a value on {device}, as the weight does, got a tensor on meta."
                )
        super()._apply(lambda state: state.to(device))  # type: ignore[no-untyped-call]  # what there is already
        self.weight = nn.Parameter(weight)
        self.register_buffer("weight_exponent", zero_exponents(weight) if weight.dtype is FLOAT8 else None)
        self._leave_to_its_rank()

    def _leave_to_its_rank(self) -> None:
        if isinstance(self.weight, DTensor):
            leave_to_its_rank(self, "weight", *([] if self.weight_exponent is None else ["weight_exponent"]))

    @torch.no_grad()
    def _draw_weight(self, std: float) -> None:
        """N(0, std^2); in float8 the same numbers, rounded to the nearest."""
        if self.weight_exponent is None:
            normal_(self.weight, std)
            return
        exponent = float8.initial_exponent(std)
        normal_(self.weight, std / 2.0**exponent)
        own_rows(self.weight_exponent).fill_(exponent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of any module, but rows that come to float8 or leave it are scaled, and nothing else comes to it."""
        own, weight, known = own_rows(self.weight), self.weight, vars(self.weight).copy()
        dtype = fn(own.new_empty(0)).dtype
        check_dtype(dtype)
        if dtype is FLOAT8:
            if own.dtype is not FLOAT8:
                self._replace_weight(*float8.quantized(own))
            fn = _without_rounding(fn)
        elif self.weight_exponent is not None:
            self._replace_weight(float8.values(own, own_rows(self.weight_exponent), dtype), None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight is weight:
            vars(weight).update(known)  # which torch swaps, with all else, for those of a new DTensor
        return self

    def _replace_weight(self, rows: Tensor, exponents: Tensor | None) -> None:
        resizing.check_replaceable(self.weight)
        self.weight_exponent = None if exponents is None else beside(self.weight, exponents)
        resizing.replace_(self.weight, beside(self.weight, rows))
        self._leave_to_its_rank()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers.setdefault("weight_exponent", None)  # of a head that was pickled before it could have some

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        assigns = bool(local_metadata.get("assign_to_params_buffers"))
        restored = loading.fit_(state_dict, self, prefix, assigns, args[-1])  # the last are torch's error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if restored:
            optim.note_loaded(self.weight)

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        if getattr(self.weight, optim.MARK, False):
            optim.note_use(self.weight)
        super()._save_to_state_dict(*arguments, **options)


def _on_every_rank(construct: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a head, of which all ranks raise what one of them refuses, before the weight or after."""

    @functools.wraps(construct)
    def construct_or_tell(head: nn.Module, *arguments: Any, **options: Any) -> None:
        try:
            construct(head, *arguments, **options)
        except Exception as error:
            group, device = options.get("process_group"), options.get("device")
            if isinstance(group, ProcessGroup) and not getattr(error, collectives.TOLD, False):
                device = torch.get_default_device() if device is None else torch.device(device)
                collectives.agree(group, device, {}, refusal=error, about="the weight")
            raise

    return construct_or_tell


def _without_rounding(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda state: in_its_dtype(state, fn(state))
