"""Draws follow the softmax at a temperature, cut to top k and top p, and depend on their request alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmss_jax import sampling
from wmss_jax.sampling import Sampling

V = 24
LOGITS_V = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)


@functools.partial(jax.jit, static_argnames="kind")
def pick(kind, numbers, logits_BV, draws):
    return sampling.pick(kind, numbers, logits_BV, draws)


def draw(how, logits_BV, seeds, samples=None, positions=None):
    B = len(seeds)
    filled = lambda x, dtype: np.zeros(B, dtype) if x is None else np.asarray(x, dtype)
    draws = sampling.Draws(np.asarray(seeds, np.uint32), filled(samples, np.uint32), filled(positions, np.int32))
    return np.asarray(pick(how.kind, how.numbers, jnp.asarray(logits_BV), draws))


def oracle(how, logits_V):
    """The probabilities in float64, by sorting: what the paper of top-p says, word by word."""
    z = np.asarray(logits_V, np.float64) / how.temperature
    order = np.argsort(-z, kind="stable")
    allowed = order[: how.top_k]
    p = np.exp(z[allowed] - z.max())
    p /= p.sum()
    if how.top_p is not None:
        allowed = allowed[: 1 + np.searchsorted(np.cumsum(p), how.top_p - 1e-9)]
    kept = np.zeros(len(z))
    kept[allowed] = np.exp(z[allowed] - z.max())
    return kept / kept.sum()


HOWS = [
    Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=5), Sampling(1.0, top_p=0.7), Sampling(1.3, top_k=8, top_p=0.8),
    Sampling(1.0, top_k=1), Sampling(1.0, top_k=1000, top_p=1.0),
]  # fmt: skip


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_draws_follow_the_distribution(how):
    """Chi-square over 20,000 draws; 99.99 % of right programs stay below the bound."""
    n = 20_000
    tokens = draw(how, np.broadcast_to(LOGITS_V, (n, V)), np.arange(n))
    expected, counts = n * oracle(how, LOGITS_V), np.bincount(tokens, minlength=V)
    assert counts[expected == 0].sum() == 0, "tokens that are cut away"
    few = (expected > 0) & (expected < 5)
    groups = [(counts[i], expected[i]) for i in np.flatnonzero(expected >= 5)]
    if few.any():
        groups.append((counts[few].sum(), expected[few].sum()))
    statistic, freedom = sum((c - e) ** 2 / e for c, e in groups), max(len(groups) - 1, 1)
    # Wilson and Hilferty: (X² / f)^(1/3) is nearly normal.
    deviate = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert deviate < 3.72, (statistic, freedom)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=V, max_size=V),
    st.integers(1, V), st.floats(0.05, 1.0), st.floats(0.2, 3.0),
)  # fmt: skip
def test_what_may_be_drawn_is_what_sorting_says_and_ties_stay(logits, k, p, temperature):
    """With values that repeat: nothing less likely than the oracle's last token is drawn, all as likely may be."""
    how = Sampling(temperature, top_k=k, top_p=p)
    z = np.float32(logits) / np.float32(temperature)
    kth = np.sort(z)[-k]
    kept = np.where(z >= kth, z, -np.inf)
    probs = np.exp(kept - kept.max(), dtype=np.float64)
    probs /= probs.sum()
    values = np.unique(kept[np.isfinite(kept)])[::-1]
    masses = np.array([probs[kept >= value].sum() for value in values])
    if np.any(np.abs(masses - p) < 1e-5):
        return  # which side rounding falls on is nobody's concern
    least = values[np.searchsorted(masses, p)] if p < 1 else values[-1]
    tokens = draw(how, np.broadcast_to(np.float32(logits), (512, V)), np.arange(512))
    assert z[tokens].min() >= least
    sure = np.flatnonzero((kept >= least) & (probs > 0.05))
    assert set(sure) <= set(tokens.tolist())


def test_a_draw_depends_on_seed_sample_and_position_alone():
    how = Sampling(1.0)
    rows = np.random.default_rng(1).normal(0, 1, (64, V)).astype(np.float32)
    key = np.random.default_rng(2).integers(0, 1000, (3, 64))
    whole = draw(how, rows, *key)
    order = np.random.default_rng(3).permutation(64)
    assert draw(how, rows[order], *key[:, order]).tolist() == whole[order].tolist()
    assert draw(how, rows[:5], *key[:, :5]).tolist() == whole[:5].tolist()
    same = np.broadcast_to(rows[:1], (64, V))
    for changed in range(3):
        moving = [np.arange(64) if part == changed else np.full(64, 7) for part in range(3)]
        assert len(set(draw(how, same, *moving).tolist())) > 5, "every one of the three matters"


def test_other_numbers_compile_nothing():
    before = pick._cache_size()
    for t, k, p in [(1.0, 3, 0.9), (0.7, 9, 0.5), (2.0, 1, 1.0)]:
        draw(Sampling(t, top_k=k, top_p=p), LOGITS_V[None], [0])
    assert pick._cache_size() - before <= 1


def test_of_equal_logits_the_lowest_id_is_taken():
    assert sampling.greedy(jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]
    assert 0 <= int(sampling.greedy(jnp.full((1, 3), jnp.nan))[0]) < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number >= 0, got nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be >= 1, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        ({"top_k": 3}, "no effect at temperature 0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**arguments)
