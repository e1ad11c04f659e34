"""The plan of a run: every draw once, shuffled rows, what the probabilities say, exact numbers of steps."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmss_jax import epochs, packing

CHI_SQUARE_999 = {9: 27.9, 99: 148.2}  # 99.9 % points of the chi-square distribution


def test_docstring_examples():
    found = doctest.testmod(epochs)
    assert found.attempted >= 2 and found.failed == 0


plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 16), min_size=1, max_size=40).map(np.array),
        "batch_size": st.integers(1, 5),
        "seed": st.integers(0, 2**32),
        "epochs": st.integers(1, 3),
        "dedup": st.booleans(),
        "multiplier": st.sampled_from([0.3, 1.0, 2.5]),
        "weighted": st.booleans(),
    }
)
checked = settings(deadline=None, max_examples=60)


def planned(case):
    case = dict(case)
    lengths = case.pop("lengths")
    weights = np.arange(1.0, len(lengths) + 1)
    probs = weights / weights.sum() if case.pop("weighted") else None
    return lengths, probs, epochs.plan(lengths, seq_len=16, probs=probs, **case)


@checked
@given(plans)
def test_plan_has_every_draw_once(case):
    lengths, probs, plan = planned(case)
    epochs = [[] for _ in range(case["epochs"])]
    for step in range(plan.total_steps):
        rows = plan.rows_of(step)
        assert len(rows) == case["batch_size"]
        assert all(lengths[row].sum() <= 16 for row in rows)
        epochs[plan.epoch_of(step)] += [index for row in rows for index in row.tolist()]
    n = len(lengths) if probs is None else max(1, round(case["multiplier"] * len(lengths)))
    for drawn, seen in zip(plan.draws, epochs, strict=True):
        assert sorted(drawn.tolist()) == sorted(seen)
        if probs is None:
            assert sorted(seen) == list(range(len(lengths)))
        elif case["dedup"]:
            assert len(set(seen)) == len(seen) <= n
        else:
            assert len(seen) == n
    tokens = sum(lengths[index] for seen in epochs for index in seen)
    assert plan.fill == pytest.approx(tokens / (plan.total_steps * case["batch_size"] * 16))


@checked
@given(plans, st.data())
def test_steps_cut_the_same_plan(case, draw):
    """A plan of fewer or more steps agrees with it on every step that both have."""
    _, probs, plan = planned(case)
    steps = draw.draw(st.integers(1, 2 * plan.total_steps))
    arguments = {key: value for key, value in case.items() if key not in ("lengths", "weighted", "epochs")}
    other = epochs.plan(case["lengths"], seq_len=16, probs=probs, steps=steps, epochs=1, **arguments)
    assert other.total_steps == steps
    for step in range(min(steps, plan.total_steps)):
        assert plan.epoch_of(step) == other.epoch_of(step)
        for one, two in zip(plan.rows_of(step), other.rows_of(step), strict=True):
            assert np.array_equal(one, two)
    assert other.epoch_starts[-1] == steps and len(other.draws) == other.epoch_of(steps - 1) + 1


def test_plan_is_a_pure_function():
    lengths = np.random.default_rng(0).integers(1, 64, 500)
    make = lambda **given: epochs.plan(lengths, **({"seq_len": 64, "batch_size": 8, "seed": 3, "epochs": 2} | given))
    one, two = make(), make()
    assert np.array_equal(one.items, two.items) and np.array_equal(one.offsets, two.offsets)
    assert not np.array_equal(one.draws[0], one.draws[1]), "epochs differ"
    assert not np.array_equal(one.items, make(seed=4).items)


def test_rows_are_shuffled():
    """Packing opens rows in the order of arrival and fills early ones best; in the plan, position says nothing."""
    lengths = np.random.default_rng(0).integers(1, 4097, 20_000)
    plan = epochs.plan(lengths, seq_len=4096, batch_size=1, seed=0, epochs=1)
    filled = np.array([lengths[plan.rows_of(step)[0]].sum() for step in range(plan.total_steps)])
    assert abs(np.corrcoef(filled, np.arange(len(filled)))[0, 1]) < 0.03
    packed = packing.pack(lengths[plan.draws[0]], 4096)
    in_order = np.add.reduceat(lengths[plan.draws[0]][packed.items], packed.offsets[:-1])
    assert abs(np.corrcoef(in_order, np.arange(len(in_order)))[0, 1]) > 0.05, "else the shuffle would not be needed"


@pytest.mark.parametrize("n", [10, 100])
def test_the_plan_draws_what_the_probabilities_say(n):
    rng = np.random.default_rng(n)
    probs = rng.random(n) ** 2 + 0.01
    probs /= probs.sum()
    plan = epochs.plan(
        rng.integers(1, 17, n), seq_len=16, batch_size=32, seed=5, epochs=1, probs=probs, multiplier=1e5 / n
    )
    seen = np.bincount(plan.items, minlength=n)
    assert seen.sum() == 100_000
    assert np.sum((seen - 1e5 * probs) ** 2 / (1e5 * probs)) < CHI_SQUARE_999[n - 1]


def test_dedup_keeps_the_expected_share():
    n = 20_000
    plan = epochs.plan(
        np.ones(n, int), seq_len=16, batch_size=32, seed=5, epochs=1, probs=np.full(n, 1 / n), dedup=True
    )
    assert len(plan.items) == len(np.unique(plan.items))
    assert abs(len(plan.items) / n - (1 - 1 / np.e)) < 0.01


def test_the_last_batch_of_an_epoch_is_filled_up():
    plan = epochs.plan(np.full(5, 16), seq_len=16, batch_size=4, seed=0, epochs=2)
    assert [[len(row) for row in plan.rows_of(step)] for step in range(4)] == [[1, 1, 1, 1], [1, 0, 0, 0]] * 2
    assert [plan.epoch_of(step) for step in range(4)] == [0, 0, 1, 1] and plan.fill == 10 / 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": None}, "give epochs or steps"),
        ({"epochs": 0}, "epochs = 0 must be >= 1"),
        ({"steps": 0}, "steps = 0 must be >= 1"),
        ({"batch_size": 0}, "batch_size = 0 must be >= 1"),
        ({"multiplier": 0.0}, "multiplier = 0.0 must be > 0"),
        ({"probs": np.full(4, 0.25)}, "4 probabilities for 5 examples: score the data set that is trained on"),
        ({"seq_len": 8}, "5 of 5 items are longer than seq_len = 8"),
    ],
)
def test_plan_errors(given, message):
    with pytest.raises(ValueError, match=message):
        epochs.plan(np.full(5, 16), **({"seq_len": 16, "batch_size": 4, "seed": 0, "epochs": 1} | given))


@pytest.mark.parametrize("step", [-1, 2])
def test_steps_that_do_not_exist(step):
    plan = epochs.plan(np.full(5, 16), seq_len=16, batch_size=4, seed=0, epochs=1)
    for call in (plan.rows_of, plan.epoch_of):
        with pytest.raises(ValueError, match=f"step {step} is outside 0 to 1"):
            call(step)
