"""Which optimizer a weight belongs to, and where its step is."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cosface_kernels.optim.row_optimizer import RowOptimizer

MARK = "_moves_in_backward"  # attribute of a weight that has or had an owner, which torch.compile can look at
OWNERSHIP = "_ownership"  # the attribute that is its Ownership

IDLE, MOVING, MOVED, SKIPPED, REFUSED = "idle", "moving", "moved", "skipped", "refused"


@dataclass
class Ownership:
    """What is known of a parameter that an optimizer of this module holds.

    Attributes:
        optimizer: a reference to the one that was made last.
        number: of the parameter among that optimizer's.
        phase: where its step is.
        finite: whether its gradient in this step was; on a GPU an answer to wait for. None: it had none.
        is_head: a loss function has been given it.
        nodes: autograd nodes that have not moved it; one may run backward more than once.
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
        if self.phase == MOVING and not restorations:
            raise RuntimeError(
                f"The last step on a weight of shape {tuple(weight.shape)} was interrupted, with some of its rows "
                "moved and others not. Restore the weight and the optimizer from a checkpoint: "
                "head.load_state_dict(...), then optimizer.load_state_dict(...)."
            )

    def end_backward(self) -> None:
        if self.phase == REFUSED:
            self.phase = MOVED

    def end_step(self) -> None:
        self.phase, self.finite = IDLE, None


restorations: list[None] = []  # something, while interrupted steps are mended


@contextmanager
def restoring() -> Iterator[None]:
    """In it what is half moved can be read, to be overwritten."""
    restorations.append(None)
    try:
        yield
    finally:
        restorations.pop()


def ownership_of(weight: Tensor) -> Ownership | None:
    """Kept as an attribute: a dict of weights would hold weak references, and torch.utils.swap_tensors, by which
    Module.to casts a sharded weight, refuses a tensor that has some.
    """
    return getattr(weight, OWNERSHIP, None)


def owner_of(weight: Tensor) -> "RowOptimizer | None":
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


def check_between_steps(weight: Tensor, optimizer: object) -> None:
    """Raises where the weight cannot get other rows: in the middle of a step, or without its optimizer's state."""
    ownership = ownership_of(weight)
    if ownership is None:
        return
    ownership.check_whole(weight)
    if ownership.phase in (MOVED, REFUSED):
        raise RuntimeError(
            f"backward has moved a weight of shape {tuple(weight.shape)}, and its step is not over: call the "
            "optimizer's step() first."
        )
    owner = ownership.owner()
    if owner is not None and owner is not optimizer:
        got = "None" if optimizer is None else f"another {type(optimizer).__name__}"
        raise ValueError(
            f"optimizer must be the {type(owner).__name__} that holds the weight and its state of each class, got "
            f"{got}."
        )


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
    group = owner._group_of(weight)
    options = {name: _plain(group.get(name)) for name in owner.defaults}
    of_all = {"nonfinite": owner.nonfinite, "state_dtype": owner.state_dtype}
    return f"{type(owner).__name__} with {options | of_all}"


def _plain(value: Any) -> Any:
    """Numbers of PyTorch and NumPy as Python's, which are exact as text and on no device."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value
