"""Backend `reference`: the specification itself, on any device and dtype, with all logits in memory."""

import torch
from torch import Tensor

from cosface_kernels import float8, reference
from cosface_kernels.backends import contract
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Options, Update, empty_cache

OPTIONS = {"classes", "updates", "normalize_weight", "thresholds", "negatives", "moments", "g_moments"}
OPTIONS |= {"subcenters", "sigmoid", "polynomials", "exponents"}


def unavailable() -> str | None:
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    return options.refusal(OPTIONS)


def describe() -> str:
    return "plain PyTorch, all logits in memory"


def cache_size(x: Tensor, w: Tensor, options: Options) -> int:
    return 0


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    contract.check(x, w, options, targets, scale)
    with torch.autocast(x.device.type, enabled=False):  # the specification's matrix products are never rounded
        rows = _rows(w, options)
        results = reference.forward(x, rows, targets, scale, margin, options)
        _, top, log_sum, *_ = results
        moments = top.new_empty(0, len(x))
        if options.moments:
            moments = reference.moments(x, rows, targets, scale, top, log_sum, options)
        return *results, empty_cache(x), moments


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of w in float8, dw is the gradient of what is stored."""
    x, w, *per_row, _ = tensors
    contract.check(x, w, options, *per_row)
    with torch.autocast(x.device.type, enabled=False):
        dx, dw, dscale = reference.backward(x, _rows(w, options), *per_row, options=options)
        if _are_scaled(w, options):
            dw = dw * _units(w, options)
    return dx if need_dx else dx.new_empty(0), dw if need_dw else dw.new_empty(0), dscale


def sigmoid(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, targets, scale, bias, g, g_cos = tensors
    contract.check_sums(x, w, options, *tensors[2:])
    per_row = targets, scale, torch.zeros_like(bias), -bias, g, g_cos
    gradients = backward(x, w, *per_row, empty_cache(x), options=options, need_dx=need_dx, need_dw=need_dw)
    with torch.autocast(x.device.type, enabled=False):
        sums = reference.sigmoid_sums(x, _rows(w, options), targets, scale, bias, options)
    return torch.stack(sums).where((g != 0) | (g_cos != 0), 0), *gradients


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    contract.check_state(tensors[1], state, update, finite=finite)
    if finite is not None and not finite:
        return backward(*tensors, options=options, need_dx=need_dx, need_dw=False)[::2]
    dx, dw, dscale = backward(*tensors, options=options, need_dx=need_dx, need_dw=True)
    w, classes = tensors[1], options.classes
    if classes is None:
        reference.move_rows(w, dw, state, update)
    else:
        rows, row_state = w[classes], [values[classes] for values in state]
        reference.move_rows(rows, dw, row_state, update)
        for values, moved in zip((w, *state), (rows, *row_state), strict=True):
            values[classes] = moved
    return dx, dscale


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    contract.check_state(w, state, update, dw)
    reference.move_rows(w, dw, state, update)


def nearest(x: Tensor, w: Tensor, k: int, options: Options) -> tuple[Tensor, Tensor]:
    contract.check_nearest(x, w, k, options)
    with torch.autocast(x.device.type, enabled=False):
        return reference.nearest(x, _rows(w, options), k, options.normalize_weight)


def _rows(w: Tensor, options: Options) -> Tensor:
    """Those that take part; of float8 what they stand for, where their length counts."""
    rows = w if options.classes is None else w[options.classes]
    return rows.float() * _units(w, options) if _are_scaled(w, options) else rows


def _are_scaled(w: Tensor, options: Options) -> bool:
    return w.dtype is FLOAT8 and not options.normalize_weight and options.exponents is not None


def _units(w: Tensor, options: Options) -> Tensor:
    assert options.exponents is not None
    exponents = options.exponents if options.classes is None else options.exponents[options.classes]
    return float8.units(exponents, torch.float32)  # (S, 1)
