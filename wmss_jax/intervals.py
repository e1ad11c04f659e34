"""Means over seeds with their intervals, paired differences, and p-values of many comparisons. Pure functions.

Seeds are the sample: two arms of a seed share data, base and M1, so their difference is taken within the seed, and
Student's t says how far it is known. Intervals are two-sided. scipy (the extra `lab`) has the distribution.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95


class Mean(NamedTuple):
    """The mean of a sample of `n`, and the interval that holds the true one; of one number alone, NaN to NaN."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


class Difference(NamedTuple):
    """The mean of `n` paired differences, its interval, the p-value of "no difference", and how many are above 0."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    above: int


def mean(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Mean:
    """Return the mean and its t interval, mean ± t(n-1)·s/√n (Student 1908).

    >>> [round(x, 3) for x in mean([1.0, 2.0, 3.0])]
    [3, 2.0, -0.484, 4.484]

    Raises:
        ValueError: there are no values.
    """
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a list of numbers, got shape {x.shape}")
    middle = float(np.mean(x))
    if len(x) == 1:
        return Mean(1, middle, math.nan, math.nan)
    reach = float(_student().ppf((1 + level) / 2, len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x)))
    return Mean(len(x), middle, middle - reach, middle + reach)


def paired(values: Sequence[float], reference: Sequence[float], level: float = LEVEL) -> Difference:
    """Return the paired t test of values - reference, pair by pair: two-sided, against a mean difference of 0.

    Where all pairs differ by the same amount there is nothing to estimate: p is 1 for no difference at all, else 0.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} values cannot be paired with {len(reference)}")
    d = np.asarray(values, float) - np.asarray(reference, float)
    n, middle, low, high = mean(d, level)
    spread = float(np.std(d, ddof=1)) if n > 1 else math.nan
    if n == 1:
        p = math.nan
    elif spread == 0:
        p = 1.0 if middle == 0 else 0.0
    else:
        p = float(2 * _student().sf(abs(middle) / (spread / math.sqrt(n)), n - 1))
    return Difference(n, middle, low, high, p, int(np.sum(d > 0)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): rejecting those below α keeps the chance of any false one
    below α, whatever they have to do with each other. NaN, a comparison that was none, stays and is not counted.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, running = [math.nan] * len(p_values), 0.0
    real = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, index) in enumerate(real):
        running = max(running, min(1.0, (len(real) - rank) * p))
        corrected[index] = running
    return corrected


def _student() -> Any:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ValueError("intervals need scipy: pip install 'wmss-jax[lab]'") from error
    return t
