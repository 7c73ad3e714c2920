"""Differences between variants, paired by seed, with Student's t interval."""

import math
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

CONFIDENCE = 0.95
"""Probability with which an interval is to cover the true mean difference."""


class Difference(NamedTuple):
    """Mean over seeds of what a variant has more than the baseline under the same seed."""

    pairs: int
    """Seeds under which both have a value."""
    mean: float
    standard_error: float | None
    """Standard error of the mean; None for a single pair."""
    low: float | None
    """Lower end of the interval; None for a single pair."""
    high: float | None
    """Upper end of the interval; None for a single pair."""


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare two variants over the seeds they share; None where they share none.

    The standard error of the mean of n differences d is s / sqrt(n) with the unbiased s^2 = sum (d - mean)^2 / (n - 1),
    and the interval is mean +- t(n - 1) standard errors. It supposes that differences are normal over seeds.

    Args:
        values: The variant's value by seed; nan is none.
        baseline: The baseline's.
    """
    shared = [seed for seed in values if seed in baseline and not math.isnan(values[seed] - baseline[seed])]
    if not shared:
        return None
    differences = [values[seed] - baseline[seed] for seed in shared]
    pairs, mean = len(shared), math.fsum(differences) / len(shared)
    if pairs == 1:
        return Difference(1, mean, None, None, None)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (pairs - 1)
    error = math.sqrt(variance / pairs)
    reach = t_quantile(pairs - 1) * error
    return Difference(pairs, mean, error, mean - reach, mean + reach)


@cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t beyond which, to both sides, Student's distribution has 1 - confidence of its mass.

    Bisects the closed form of the mass in between for whole degrees of freedom, in theta = atan(t / sqrt(degrees))
    (Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4).

    Args:
        degrees: Degrees of freedom, 1 or more.
        confidence: Mass between -t and t, in 0..1.
    """
    low, high = 0.0, math.pi / 2
    while low < (theta := (low + high) / 2) < high:
        low, high = (theta, high) if _mass_within(theta, degrees) < confidence else (low, theta)
    return math.tan(low) * math.sqrt(degrees)


def _mass_within(theta: float, degrees: int) -> float:
    """Mass of Student's distribution between -t and t."""
    cosine, odd = math.cos(theta), degrees % 2
    # Odd degrees: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term = total = cosine if odd else 1.0
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return math.sin(theta) * total
    return 2 / math.pi * (theta + (math.sin(theta) * total if degrees > 1 else 0.0))
