"""One update of rows by each rule, on tensors of any backend."""

import pytest
import torch
from torch import Tensor

from cosface_kernels import ops, reference
from cosface_kernels.options import Update

C, D, N = 301, 20, 9  # a ragged tile, a width that fills no panel


UPDATES = {
    "sgd": Update("sgd", 7, 1, -0.5, 0.1, 0.1, 0.2, momentum=0.9, dampening=0.1),
    "adamw": Update("adamw", 7, 1, -0.5, 0.1, 0.1, 0.2, beta1=0.9, beta2=0.99, eps=1e-3),
}


STATES = {"sgd": 1, "adamw": 3}


updates = pytest.mark.option("updates")


def draw_inputs(rule: str, dtype: torch.dtype, num_classes: int, device: str, seed: int = 3):
    """A weight and its state in the middle of training."""
    on_device = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    w = torch.randn(num_classes, D, **on_device, dtype=torch.float64).to(dtype)
    return w, [torch.rand(num_classes, D, **on_device).to(dtype) for _ in range(STATES[rule])]


def draw_upstream(w: Tensor, targets: int, samples: int = N):
    """x, targets, scale, top, log_sum, g_lse and g_cos."""
    on_device = {"generator": torch.Generator(w.device).manual_seed(4), "device": w.device}
    compute = reference.compute_dtype(w, w)
    x = torch.randn(samples, D, **on_device).to(compute)
    y = torch.randint(-1, targets, (samples,), **on_device)
    scale, top, *others = (torch.rand(samples, **on_device).to(compute) for _ in range(5))
    return [x, y, scale, 1 + top, *others]  # no cosine is larger than top


def moved_rows(
    name: str,
    w: Tensor,
    state: list[Tensor],
    update: Update,
    upstream: list[Tensor],
    classes=None,
    need_dx=True,
    finite=None,
):
    """dx, dscale, and copies of the weight and its state that have moved."""
    w, state = w.clone(), [values.clone() for values in state]
    x, *rows = upstream
    cache = ops.lmcl(x, w, *rows[:2], 0.0, name, classes)[5]
    outputs = ops.lmcl_backward_update_(x, w, *rows, cache, state, finite, *update.flat(), need_dx, name, classes)
    return *outputs, w, *state
