"""Paired comparison of two arms over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from statistics import stdev

from scipy import stats


@dataclass(frozen=True, slots=True)
class Paired:
    """Difference of two arms that share their seeds.

    Attributes:
        mean: Mean difference.
        low: Lower end of its 95 % confidence interval (Student's t).
        high: Upper end.
        num_seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    num_seeds: int


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Returns first minus second.

    Args:
        first: A figure by seed.
        second: The same for the other arm, in the same order; at least 2 seeds.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, number = fmean(differences), len(differences)
    half = float(stats.t.ppf(0.975, number - 1)) * stdev(differences) / math.sqrt(number)
    return Paired(mean, mean - half, mean + half, number)
