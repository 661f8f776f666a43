"""The learning rate, as torch.optim's LambdaLR of the share of the training that is done."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Shares of the training after which the rate is divided by 10, from the CosFace paper, Sec. 4.1: 16, 24 and 28 of
# 30 thousand steps on a small data set, 80, 140 and 200 of 240 thousand on a large one.
PRESETS = {"cosface-small": (16 / 30, 24 / 30, 28 / 30), "cosface-large": (80 / 240, 140 / 240, 200 / 240)}
SCHEDULES = ("polynomial", "cosine", "step", "constant", *PRESETS)


def make_schedule(optimizer: Optimizer, steps: int, schedule: str, **options: object) -> LambdaLR:
    """The schedule of a training of `steps` steps; options as for `learning_rate_factor`.

    torch's own PolynomialLR, CosineAnnealingLR and SequentialLR keep their length in their state, and compute a
    rate from the one before. This one is a function of the step: a run that resumes with more steps has the rate
    that the longer training has there.
    """
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, schedule, **options))


def stretch(schedule: LambdaLR) -> None:
    """Sets the rate at the step that was loaded, which is another one if the training has become longer."""
    optimizer, factors = schedule.optimizer, schedule.lr_lambdas
    for group, peak, factor in zip(optimizer.param_groups, schedule.base_lrs, factors, strict=True):
        group["lr"] = peak * factor(schedule.last_epoch)


def learning_rate_factor(
    step: int,
    steps: int,
    schedule: str,
    *,
    warm_up: float = 0.0,
    power: float = 2.0,
    milestones: tuple[float, ...] = (),
) -> float:
    """Factor of the learning rate at a step, in [0, 1].

    Args:
        step: from 0 on.
        steps: of the whole training.
        schedule: "polynomial", (1 - share)^power of the share of the training after the warm-up; "cosine", half a
            cosine of it, from 1 to 0; "constant"; "step", a tenth at each milestone; "cosface-small" or
            "cosface-large", a tenth at the CosFace paper's milestones.
        warm_up: share of the steps in which the rate rises linearly to its peak.
        milestones: of "step", as shares of the steps.

    >>> [learning_rate_factor(step, 30_000, "cosface-small") for step in (15_999, 16_000, 24_000)]
    [1.0, 0.1, 0.01]
    """
    rising = math.ceil(warm_up * steps)
    if step < rising:
        return (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    if schedule == "polynomial":
        return (1 - share) ** power
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * share)
    falls = () if schedule == "constant" else PRESETS.get(schedule, milestones)
    passed = sum(step >= round(fall * steps) for fall in falls)
    return round(0.1**passed, passed)
