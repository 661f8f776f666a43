"""Functions of an angle that is given by its cosine, with gradients that stay finite."""

import math

import torch
from torch import Tensor


def sine(cos: Tensor) -> Tensor:
    """sin(acos(c)) >= 0, with gradient 0 where it is infinite; 0 where c is beyond 1, as by rounding."""
    square = (1 - cos) * (1 + cos)
    inside = square > 0
    return square.where(inside, 1).sqrt().where(inside, 0)


def angle_of(cos: Tensor) -> Tensor:
    """acos(c) in [0, pi], with the guard of `sine`."""
    return torch.atan2(sine(cos), cos)


def falling_cos(angle: Tensor) -> Tensor:
    """(-1)^k cos(a) - 2k with k = floor(a / pi), which falls for any a >= 0."""
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * torch.cos(angle) - 2 * k


def cos_of_sum(cos: Tensor, angle: float | Tensor) -> Tensor:
    """cos(theta + m) of cos(theta), with one m or (N,)."""
    if isinstance(angle, Tensor):
        return cos * angle.cos() - sine(cos) * angle.sin()
    return cos * math.cos(angle) - sine(cos) * math.sin(angle)
