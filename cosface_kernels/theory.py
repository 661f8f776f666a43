"""What CosFace's theory says about its two numbers, s and m."""

import math

from cosface_kernels.validation import check_interval, check_positive, warn

PROBABILITY = 0.9  # of the target at its class centre, below which a scale is worth a warning


def min_scale(num_classes: int, probability: float = PROBABILITY) -> float:
    """The smallest scale s with which samples at their class centres can have this probability of their class.

        s >= (C - 1)/C ln( (C - 1) P / (1 - P) )

    Args:
        num_classes: C >= 2.
        probability: P in (0, 1), expected for embeddings that sit on their class centres, without a margin. The
            bound can be reached only where the centres can be equally far from each other, C <= D + 1.

    Raises:
        ValueError: an argument is out of its range.

    Source: Wang et al., CosFace, arXiv:1801.09414, Eq. 6.

    >>> [round(min_scale(10_575, p), 1) for p in (0.9, 0.99, 0.999)]
    [11.5, 13.9, 16.2]
    """
    check_positive("num_classes", num_classes)
    check_interval("num_classes", num_classes, "[2, inf)", 2, math.inf)
    check_interval("probability", probability, "(0, 1)", math.ulp(0.0), 1)
    others = num_classes - 1
    return others / num_classes * math.log(others * probability / (1 - probability))


def max_margin(num_classes: int, embedding_size: int) -> float:
    """The largest margin m that some placement of the class centres can satisfy with every sample at its centre.

    1 - cos(2 pi / C) in two dimensions, C/(C - 1) where the centres can be equally far from each other
    (C <= D + 1). With more classes than that C/(C - 1) is still a bound, from which m should stay far away.

    Args:
        num_classes: C >= 2.
        embedding_size: D.

    Raises:
        ValueError: an argument is out of its range.

    Source: Wang et al., CosFace, arXiv:1801.09414, Eq. 7.

    >>> round(max_margin(8, 2), 2)  # the paper's toy of 8 identities
    0.29
    """
    check_positive("num_classes", num_classes)
    check_interval("num_classes", num_classes, "[2, inf)", 2, math.inf)
    check_positive("embedding_size", embedding_size)
    if embedding_size == 2:
        return 1 - math.cos(2 * math.pi / num_classes)
    if embedding_size == 1 and num_classes > 2:
        return 0.0  # two of three centres on a line coincide
    return num_classes / (num_classes - 1)


def warn_of_scale(scale: float, num_classes: int) -> None:
    if num_classes > 1 and scale < (least := min_scale(num_classes)):
        warn(
            f"scale {scale} is below {least:.3g}, and so no embedding can have a probability of {PROBABILITY} "
            f"of its class among {num_classes} (CosFace, Eq. 6)."
        )


def warn_of_margin(margin: float, num_classes: int, embedding_size: int) -> None:
    if num_classes > 1 and margin > (most := max_margin(num_classes, embedding_size)):
        warn(
            f"margin {margin} is above {most:.3g}, and so {num_classes} class centres of size {embedding_size} "
            "cannot all be that far from each other (CosFace, Eq. 7)."
        )
