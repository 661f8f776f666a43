"""Margins that are drawn anew for every sample."""

import math

import torch
from torch import Tensor

from cosface_kernels.margins import defaults
from cosface_kernels.margins.angles import cos_of_sum
from cosface_kernels.margins.base import Margin, Rows
from cosface_kernels.validation import check_bool, check_integer, check_interval


class ElasticFaceMargin(Margin):
    """psi = c - m_i, or cos(theta + m_i), with m_i from N(m, std^2), drawn for every label of a training batch.

    With `plus`, the drawn margins of a batch are shared out by its cosines: the smaller c, the larger m_i. The
    authors' code indexes the sorted margins by the order of the cosines where the paper's rule takes the ranks,
    which are the inverse of that order; here it is the ranks.

    Draws follow from `seed` and their count, so that ranks which share a batch draw alike, on any device, and a
    run that resumes goes on. In evaluation every margin is m. There is no guard beyond theta + m = pi.
    State: `draws`, the number of batches.

    Args:
        margin: m, in radians with `arc`.
        std: its standard deviation.
        arc: an angle (ElasticFace-Arc), or a cosine (ElasticFace-Cos).
        plus: ElasticFace+.
        seed: of the draws.

    Source: Boutros et al., ElasticFace, arXiv:2109.09416, Eq. 5-7 and Section 3.3; fdbtrs/ElasticFace
    (utils/losses.py, config/config.py): Cos m = 0.35, std = 0.05, with plus 0.02; Arc m = 0.5, std = 0.05, with
    plus 0.0175.
    """

    draws: Tensor

    def __init__(
        self,
        margin: float = defaults.COSFACE_MARGIN,
        *,
        std: float = defaults.ELASTICFACE_STD,
        arc: bool = False,
        plus: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        check_interval("std", std, "[0, inf)", 0, math.inf)
        check_bool("arc", arc)
        check_bool("plus", plus)
        check_integer("seed", seed)
        self.margin, self.std, self.arc, self.plus, self.seed = margin, std, arc, plus, seed
        self._register_state("draws", 0)

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        m = self.margins_of(cos.detach(), rows) if self.training else torch.full_like(cos, self.margin)  # (N,)
        return cos_of_sum(cos, m) if self.arc else cos - m

    def margins_of(self, cos: Tensor, rows: Rows) -> Tensor:
        """(N,) margins of the next batch; an ignored sample takes none of those of the others."""
        place = rows.valid.cumsum(0) - 1  # (N,) among the valid
        drawn = self.margin + self.std * standard_normal(self.seed, self.draws, place).to(cos.dtype)  # (N,)
        self.draws += 1
        if self.plus:
            order = cos.where(rows.valid, -math.inf).argsort(descending=True, stable=True)
            drawn = torch.empty_like(drawn).scatter(0, order, drawn.where(rows.valid, math.inf).sort().values)
        return drawn.where(rows.valid, self.margin)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, std={self.std}, arc={self.arc}, plus={self.plus}, seed={self.seed}"


def standard_normal(seed: int, draw: Tensor, place: Tensor) -> Tensor:
    """(N,) float64 from N(0, 1), a function of its integers alone: it waits for no device and compiles.

    Source: the mixing of integers is that of SplitMix64, Steele et al., OOPSLA 2014; then Box and Muller.
    """
    stream = _mixed(torch.full_like(place, seed))  # far from that of any other seed
    counter = stream + 2 * (place + draw.long() * 2**32)  # (N,)
    radius, angle = (_uniform(counter + part) for part in (0, 1))
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _uniform(integers: Tensor) -> Tensor:
    """(N,) float64 in [0, 1)."""
    return ((_mixed(integers) >> 11) & 2**53 - 1).double() * 2.0**-53


def _mixed(integers: Tensor) -> Tensor:
    """(N,) int64, which wraps around; what a shift brings in from the sign is cut off."""
    z = integers * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 2**34 - 1)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 2**33 - 1)
