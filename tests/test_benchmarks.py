"""The harness of the benchmarks: fair rounds, paired ratios, one line of JSON a figure."""

import json

import pytest

from benchmarks import timing


def test_every_step_runs_once_a_round_and_not_always_in_the_same_order():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleaved(steps, 15, warmup=2)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 15)
    rounds = [tuple(calls[start : start + 3]) for start in range(6, len(calls), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(rounds) == 15
    assert len({order[0] for order in rounds}) > 1, "drift within a round must not always hit the same one"


def test_a_ratio_is_taken_within_rounds():
    """A machine that is ten times slower in one round changes nothing."""
    slow = [1.0, 10.0, 1.0, 1.0]
    times = {"a": [3.0 * s for s in slow], "b": [2.0 * s for s in slow]}
    assert timing.ratio(times, "a", "b") == pytest.approx((1.5, 1.5, 1.5))


def test_a_figure_is_one_line_of_json(capsys):
    timing.emit("x.y", 1.23456789, target=1.05, better="lower", unit="ratio")
    timing.emit("x.z", None, target=None, better="higher", unit="s")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"name": "x.y", "value": 1.2346, "target": 1.05, "better": "lower", "unit": "ratio"}
    assert lines[1]["value"] is None


def test_threads_cannot_be_fixed_once_jax_has_made_its_own():
    import jax  # noqa: F401

    with pytest.raises(RuntimeError, match="before jax is imported"):
        timing.pin()
