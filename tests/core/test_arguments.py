"""What an argument cannot be, of every head, margin and function: a sentence that shows it."""

import inspect
import math
import types
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cosface_kernels
from cosface_kernels import FusedCosFaceLoss, cosface_loss, margin_softmax_loss, nearest_classes
from cosface_kernels import margins as margins_module
from cosface_kernels.convert import from_pytorch_metric_learning
from cosface_kernels.distributed import clip_grad_norm_
from cosface_kernels.functional import cosine_logits
from cosface_kernels.margins import Margin, SigmoidMargin
from cosface_kernels.sampling import ClassSampler

C, D = 5, 3
HEADS = [
    each for name in cosface_kernels.__all__ if (each := getattr(cosface_kernels, name)) and name[:5] == "Fused"
]
MARGINS = [
    each
    for each in map(vars(margins_module).get, margins_module.__all__)
    if isinstance(each, type) and issubclass(each, Margin) and each not in (Margin, SigmoidMargin)
]
FUNCTIONS = [
    cosface_loss,
    margin_softmax_loss,
    nearest_classes,
    cosine_logits,
    cosface_kernels.min_scale,
    cosface_kernels.max_margin,
    margins_module.ldam_margins,
    margins_module.dynamic_margins,
    ClassSampler,
    from_pytorch_metric_learning,
]
GOOD = {
    "num_classes": C,
    "embedding_size": D,
    "margin": 0.3,
    "margins": [0.3] * C,
    "class_counts": [1, 2, 3, 4, 5],
    "scale": 16.0,
    "bias": 0.0,
    "rate": 0.5,
    "k": 2,
    "embeddings": torch.ones(4, D),
    "weight": torch.ones(C, D),
    "labels": torch.arange(4),
    "state": {"W": torch.ones(D, C)},
}
WRONG = {  # by what an annotation has first of these; and None, unless it has that
    bool: ["False", "no", 0.0, 1, np.bool_(True), torch.tensor(True)],
    int: [True, "5", 1.5, 2**70, [5], {}],
    float: [True, "0.5", "", math.nan, math.inf, -math.inf, 1e308, 2**70, 1j, [0.5, 0.5], {}],
    str: ["none of them", ["cpu"], {}, 3],
    Sequence: ["balanced", {}, object, 0.5, [[0.5]], [1j] * C],
    ClassSampler: [3, "all", nn.Linear(2, 2)],
    Tensor: [FusedCosFaceLoss(C, D), [1.0], 3, "x", torch.tensor(1.0)],
}


def _wrong(annotation):
    of = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    of = [getattr(each, "__origin__", each) for each in of]
    values = next((values for kind, values in WRONG.items() if kind in of), [])
    return values if types.NoneType in of or not values else [*values, None]


def _shown(value):
    """What a message may have for it; of numbers that become a tensor, the shape."""
    shape = str(tuple(value.shape) if isinstance(value, Tensor) else np.shape(value))
    return repr(value), str(value), f"got {type(value).__name__}", f"got shape {shape}", f"of shape {shape}"


def _good(called):
    """Arguments without which it cannot be called."""
    parameters = inspect.signature(called).parameters.values()
    return {
        each.name: GOOD[each.name]
        for each in parameters
        if each.name == "class_counts" or (each.default is each.empty and each.name in GOOD)
    }


@pytest.mark.parametrize("called", [*HEADS, *MARGINS, *FUNCTIONS], ids=lambda called: called.__name__)
def test_no_argument_is_taken_for_what_it_is_not(called):
    good = _good(called)
    called(**good)
    for name, parameter in inspect.signature(called).parameters.items():
        if name == "device":
            continue  # which torch looks at
        for value in _wrong(parameter.annotation):
            if name == "return_stats" and isinstance(value, int) and value <= C:
                continue  # of the nearest classes
            with pytest.raises((ValueError, TypeError)) as raised:
                called(**{**good, name: value})
            text = str(raised.value)
            assert any(shown in text for shown in _shown(value)), f"{name}={value!r}: {text}"
            assert text.endswith("."), f"{name}={value!r}: {text}"


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_scale_without_a_value(head, learns):
    scale = torch.tensor(16.0, device="meta")
    options = {**_good(head), "scale": nn.Parameter(scale) if learns else scale}
    with pytest.raises(ValueError, match=r"scale must have a value.*meta"):
        head(**options)(GOOD["embeddings"], GOOD["labels"])


@pytest.mark.parametrize("name", ["class_weight", "class_counts"])
def test_numbers_of_each_class_without_a_value(name):
    head = FusedCosFaceLoss if name == "class_weight" else cosface_kernels.FusedKappaFaceLoss
    with pytest.raises(ValueError, match=f"{name} must .*meta"):
        head(C, D, **{name: torch.ones(C, device="meta")})


@pytest.mark.parametrize("given", [3, None, "x", FusedCosFaceLoss(C, D), [3]], ids=str)
def test_no_parameters_to_clip(given):
    with pytest.raises(
        TypeError, match=r"clip_grad_norm_ takes parameters, got (int 3|NoneType None|str 'x'|Fused)"
    ):
        clip_grad_norm_(given, 1.0)


def test_a_loss_in_place_of_its_state():
    with pytest.raises(TypeError, match="state must be a state_dict, got FusedCosFaceLoss"):
        from_pytorch_metric_learning(FusedCosFaceLoss(C, D))
