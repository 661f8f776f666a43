"""What stands in weight.grad for a gradient that backward has consumed."""

import math

import torch
from torch import Tensor

from cosface_kernels.optim.ownership import REFUSED, Ownership, ownership_of


class ConsumedGradient(Tensor):
    """weight.grad between backward and `step()`: the gradient's shape and no numbers.

    GradScaler.unscale_ finds in it whether the gradient was finite, and Module.to and share_memory take it along.
    Anything else, such as the norm that clipping needs, raises and says what to do instead.
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

    def share_memory_(self) -> "ConsumedGradient":
        return self  # there is none

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ConsumedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten._to_copy.default:  # of Module.to, for the weight's new dtype and device
            dtype, device = (kwargs.get(name) or getattr(args[0], name) for name in ("dtype", "device"))
            gradient = Tensor._make_wrapper_subclass(cls, args[0].shape, dtype=dtype, device=device)
            vars(gradient).update(vars(args[0]))
            return gradient
        in_backward = torch._C._current_graph_task_id() != -1
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor) and in_backward:
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


def has_ordinary_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and not isinstance(weight.grad, ConsumedGradient)
