"""The learning rate as a function of the step alone, so that a resumed run needs no state of it."""

from __future__ import annotations

import math

# Shares of the training after which the rate is divided by 10, from the CosFace paper, Sec. 4.1: 16, 24 and 28 of
# 30 thousand steps on a small data set, 80, 140 and 200 of 240 thousand on a large one.
PRESETS = {"cosface-small": (16 / 30, 24 / 30, 28 / 30), "cosface-large": (80 / 240, 140 / 240, 200 / 240)}
SCHEDULES = ("polynomial", "step", *PRESETS)


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
        schedule: "polynomial", (1 - share)^power of the share of the training after the warm-up; "step", a tenth
            at each milestone; "cosface-small" or "cosface-large", a tenth at the CosFace paper's milestones.
        warm_up: share of the steps in which the rate rises linearly to its peak.
        milestones: of "step", as shares of the steps.

    >>> [learning_rate_factor(step, 30_000, "cosface-small") for step in (15_999, 16_000, 24_000)]
    [1.0, 0.1, 0.01]
    """
    rising = math.ceil(warm_up * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "polynomial":
        return (1 - (step - rising) / (steps - rising)) ** power
    passed = sum(step >= round(share * steps) for share in PRESETS.get(schedule, milestones))
    return round(0.1**passed, passed)
