"""What a rank states of a batch before its collectives, for all ranks to compare; see `collectives.agreement`.

That is what decides which collectives come, or changes the loss. What a rank could not do later, and would raise
alone, it tries here.
"""

import enum
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosface_kernels import optim
from cosface_kernels.backends import select
from cosface_kernels.distributed import Exchange, Local
from cosface_kernels.margins import Margin, SigmoidMargin
from cosface_kernels.options import Options
from cosface_kernels.stages import Settings


def of_batch(
    settings: Settings,
    options: dict[str, Any],
    ranks: Local | Exchange,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    weights: tuple[object, ...],
    return_stats: bool | int,
) -> dict[str, object]:
    """By its name in a message.

    Raises:
        RuntimeError: the backend cannot run on these tensors, or the weight's rows cannot move.
    """
    margin = settings.margin
    _try_backend(settings, options, ranks, embeddings, weight)
    known = {
        "reduction": settings.reduction,
        "sample_rate": settings.sampler.rate if settings.sampler else 1,
        "margin": _described(margin),
        **_tensors_of(margin),
        "scale": "one per sample" if isinstance(scale, Tensor) and scale.dim() else scale,
        "ignore_index": settings.ignore_index,
        "validate_labels": settings.validate_labels,
        "dtype of sample_weight": getattr(weights[0], "dtype", None),
        "presence of class_weight and indices_tuple": [each is not None for each in weights[1:]],
        "class_weight": weights[1],
        "normalization of embeddings and weight": (settings.normalize_embeddings, settings.normalize_weight),
        "gradient_tolerance": settings.gradient_tolerance,
        "label_smoothing": settings.label_smoothing,
        "entropy": settings.entropy,
        "subcenters": settings.subcenters,
        "number of labels per sample": labels.dim(),
        "presence of return_stats": isinstance(margin, SigmoidMargin) and bool(return_stats),
        "k of return_stats": None if isinstance(return_stats, bool) else return_stats,
    }
    if settings.sampler:  # which differ where torch.utils.checkpoint has taken another pass for the first run
        known["number of draws of the sampler"] = settings.sampler.draws
    if getattr(weight, optim.MARK, False):
        known["optimizer"] = optim.progress(weight)
        known["options of the optimizer"] = optim.options_of(weight)
    return known


def _try_backend(
    settings: Settings, options: dict[str, Any], ranks: Local | Exchange, embeddings: Tensor, weight: Tensor
) -> None:
    """Chooses a backend, as the op does when the batch has been gathered."""
    margin, some = settings.margin, embeddings.new_empty(0)
    fields = {**options, "classes": some if settings.sampler else None}
    if isinstance(margin, Margin) and margin.reshapes_negatives:
        fields |= {"thresholds": some, "negatives": some}
    if isinstance(margin, SigmoidMargin):
        fields |= {"sigmoid": margin.form, "polynomials": None if margin.form == "angle" else some}
    if not getattr(weight, optim.MARK, False) or not optim.moves(
        weight, embeddings, ranks.weight, settings.backend, Options(**fields), _whole_gradient(margin)
    ):
        select(settings.backend, embeddings, ranks.weight, Options(**fields))


def _whole_gradient(margin: object) -> bool:
    return isinstance(margin, Margin) and margin.reads_weight


def _described(value: object) -> object:
    """Of a setting what is the same in every process: a number and a name, and no address."""
    if isinstance(value, nn.Module):
        return tuple(each for part in value.modules() for each in (type(part).__qualname__, _settings(part)))
    if isinstance(value, Mapping):
        return {str(name): _described(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_described(each) for each in value]
    if value is None or isinstance(value, numbers.Number | str | enum.Enum | torch.dtype):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _settings(module: nn.Module) -> object:
    return _described({name: value for name, value in vars(module).items() if not name.startswith("_")})


def _tensors_of(margin: object) -> dict[str, Tensor]:
    """The parameters and the state of a margin, and tensors that it has besides."""
    if not isinstance(margin, nn.Module):
        return {}
    own = {name: value for name, value in vars(margin).items() if isinstance(value, Tensor)}
    own |= dict(margin.named_parameters()) | dict(margin.named_buffers())
    return {f"margin.{name}": tensor for name, tensor in own.items()}
