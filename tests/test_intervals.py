"""Statistics against scipy's own tests, closed forms and published examples. Run: pytest tests/test_intervals.py"""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from wmss_jax import intervals

samples = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(samples, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_mean_s_interval_is_scipy_s(values, level):
    found = intervals.mean(values, level)
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(level) if np.ptp(values) else (values[0],) * 2
    np.testing.assert_allclose([found.low, found.high], theirs, rtol=1e-9, atol=1e-9)


@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=2, max_size=12))
def test_a_paired_difference_is_scipy_s(pairs):
    a, b = (np.array(side, float) for side in zip(*pairs, strict=True))
    found = intervals.paired(a, b)
    assert found.above == sum(x > y for x, y in pairs) and found.n == len(pairs)
    if np.ptp(a - b) == 0:  # nothing left to estimate; scipy says NaN
        assert found.p == (1.0 if found.mean == 0 else 0.0) and found.low == found.high == found.mean
        return
    theirs = scipy.stats.ttest_rel(a, b)
    np.testing.assert_allclose(found.p, theirs.pvalue, rtol=1e-9)
    np.testing.assert_allclose([found.low, found.high], theirs.confidence_interval(0.95), rtol=1e-9, atol=1e-9)
    # The interval and the test say the same: 0 is outside exactly where p < 0.05.
    if abs(found.p - 0.05) > 1e-9:
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_student_s_own_example():
    """Student 1908 (sleep, table of section IX): hours gained with two drugs by ten patients; t = 4.06, p = .0028."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = intervals.paired(second, first)
    assert round(found.mean, 2) == 1.58 and round(found.p, 4) == 0.0028 and found.above == 9
    assert (round(found.low, 2), round(found.high, 2)) == (0.70, 2.46)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    drawn = rng.normal(3.0, 2.0, (2000, 5))
    covered = np.mean([found.low <= 3.0 <= found.high for found in map(intervals.mean, drawn)])
    assert abs(covered - 0.95) < 0.015  # 3 standard errors


def test_one_seed_has_a_mean_and_nothing_else():
    found, difference = intervals.mean([0.4]), intervals.paired([0.4], [0.1])
    assert found.mean == 0.4 and math.isnan(found.low) and math.isnan(found.half_width)
    assert round(difference.mean, 9) == 0.3 and math.isnan(difference.p) and difference.above == 1


def test_no_values_and_lone_values_are_refused():
    with pytest.raises(ValueError, match="expected a list of numbers"):
        intervals.mean([])
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        intervals.paired([1, 2, 3], [1, 2])


def test_holm_on_a_known_example():
    """Four p-values, as in the procedure's usual exposition: .01·4, .02·3, .03·2, .04·1, made monotone."""
    assert intervals.holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert intervals.holm([]) == []
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_step_down_rule_rejects(p_values, alpha):
    """Holm's rule in its own words: go up the sorted p-values, stop at the first above α / (those that remain)."""
    order, rejected = np.argsort(p_values, kind="stable"), set()
    for rank, index in enumerate(order):
        if p_values[index] * (len(order) - rank) > alpha:
            break
        rejected.add(int(index))
    corrected = intervals.holm(p_values)
    assert {index for index, p in enumerate(corrected) if p <= alpha} == rejected
    assert all(c >= p for c, p in zip(corrected, p_values, strict=True))


def test_holm_does_not_count_what_was_not_compared():
    assert intervals.holm([math.nan, 0.02])[1] == 0.02
