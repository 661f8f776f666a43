"""The head of a training: a loss of the family by its name, with its own settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from cosface_kernels import FusedCosFaceLoss, FusedMarginLoss, family

LOSSES: Mapping[str, type[FusedMarginLoss]] = {
    "cosface": FusedCosFaceLoss,
    "arcface": family.FusedArcFaceLoss,
    "subcenter-arcface": family.FusedSubCenterArcFaceLoss,
    "adaface": family.FusedAdaFaceLoss,
    "magface": family.FusedMagFaceLoss,
    "curricularface": family.FusedCurricularFaceLoss,
    "mv-softmax": family.FusedMVSoftmaxLoss,
    "circle-loss": family.FusedCircleLoss,
    "npcface": family.FusedNPCFaceLoss,
    "sphereface2": family.FusedSphereFace2Loss,
    "uniface": family.FusedUniFaceLoss,
    "sface": family.FusedSFaceLoss,
    "elasticface": family.FusedElasticFaceLoss,
    "adam-softmax": family.FusedAdaMSoftmaxLoss,
    "kappaface": family.FusedKappaFaceLoss,
    "gb-cosface": family.FusedGBCosFaceLoss,
    "x2-softmax": family.FusedX2SoftmaxLoss,
    "combined": family.FusedCombinedMarginLoss,
    "sphereface": family.FusedSphereFaceLoss,
    "a-softmax": family.FusedASoftmaxLoss,
    "l-softmax": family.FusedLSoftmaxLoss,
    "adacos": family.FusedAdaCosLoss,
    "normalized-softmax": family.FusedNormalizedSoftmaxLoss,
    "softmax": family.FusedSoftmaxLoss,
}
OF_THE_DATA = "class_counts"


def own_settings(loss: str) -> list[str]:
    """The names of what a loss takes beside margin and scale."""
    parameters = inspect.signature(LOSSES[loss]).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [name for name in names if name not in ("margin", "scale", OF_THE_DATA)]


def parse_options(loss: str, options: tuple[str, ...]) -> dict[str, object]:
    """Settings written NAME=VALUE, the value as in YAML.

    Raises:
        ValueError: it is written otherwise, or the loss has no such setting.

    >>> parse_options("mv-softmax", ("t=0.3", "arc=true"))
    {'t': 0.3, 'arc': True}
    """
    settings = {}
    known = own_settings(loss)
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"loss_options must be written NAME=VALUE, got {option!r}.")
        if name not in known:
            raise ValueError(
                f"The loss {loss} has no setting {name!r} beside margin and scale; "
                f"{'it has ' + ', '.join(known) if known else 'it has none'}."
            )
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"The value of {name} in loss_options is not YAML, got {value!r}.") from error
    return settings


def make_head(
    loss: str,
    labels: Tensor,
    num_classes: int,
    embedding_size: int,
    *,
    margin: tuple[float, ...] = (),
    scale: float | None = None,
    options: tuple[str, ...] = (),
    **of_the_head: object,
) -> FusedMarginLoss:
    """(embeddings, labels) -> the loss of the batch of all processes, which share out the classes.

    Args:
        loss: a key of LOSSES.
        labels: (n,) int64, of the training samples.
        margin: one number, or as many as the loss takes; its default if empty.
        scale: s; None for the loss's default.
        options: further settings of the loss, as NAME=VALUE.
        of_the_head: keyword arguments of every head, such as sample_rate.

    Raises:
        ValueError: the loss does not take a setting, or not its value.
    """
    settings = parse_options(loss, options)
    if margin:
        settings["margin"] = margin[0] if len(margin) == 1 else margin
    if scale is not None:
        settings["scale"] = scale
    group = dist.group.WORLD if dist.is_initialized() else None
    if loss == "kappaface":
        if group is not None:
            raise ValueError("The loss kappaface trains on one process: start it without torchrun.")
        settings[OF_THE_DATA] = labels.bincount(minlength=num_classes)
    try:
        return LOSSES[loss](num_classes, embedding_size, process_group=group, **settings, **of_the_head)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The loss {loss} does not take its settings: {error}") from error


class ClassSums(nn.Module):
    """For KappaFace: the sum of each class's unit embeddings in the epoch, from which its margins are set anew."""

    def __init__(self, num_classes: int, embedding_size: int, device: torch.device):
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, embedding_size, device=device))

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, F.normalize(embeddings.detach()))

    def end_epoch(self, head: FusedMarginLoss) -> None:
        head.margin.update(self.sums)
        self.sums.zero_()
