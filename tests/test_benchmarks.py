"""The harness of the benchmarks: fair rounds, paired ratios, one line of JSON a figure."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling, timing
from wmss_jax import hlo, sharding


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


@pytest.mark.parametrize(
    ("members", "axes"),
    [
        ((0, 1), ("tensor",)),
        ((0, 2), ("fsdp",)),
        ((1, 5), ("data",)),
        ((0, 2, 4, 6), ("data", "fsdp")),
        ((), ("data", "fsdp", "tensor")),
    ],
)
def test_a_collective_spans_the_axes_its_devices_differ_in(members, axes):
    one = hlo.Collective("all-reduce", bytes=4, times=1, depth=0, shapes=((1,),), members=members, source="")
    assert scaling.axes(one, sharding.make_mesh(2, 2, 2)) == axes


def test_a_vocabulary_is_known_by_its_shards_too():
    assert scaling.vocabulary_sizes(1324, sharding.make_mesh(2, 1, 4)) == {1324, 662, 331}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu")
def test_scaling_reads_its_figures_off_compiled_steps():
    command = [sys.executable, "-m", "benchmarks.scaling", "--quick"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    figures = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    value = lambda name: figures[f"scaling.{name}"]["value"]
    assert value("total.4_chips.T_256") > value("arguments.4_chips.T_256") > 0
    assert value("sent_per_token.in_loops.16_chips.T_256") > 0
    assert 0.5 < value("memory_16_over_4") <= 1.02
    assert 1 <= value("gradient_sums_per_step") <= 1.01, "every gradient is summed over data, and once"
    assert value("vocabulary_in_loops") == 0
