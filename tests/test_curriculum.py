"""Entropies -> probabilities -> draws, and example means. Run: pytest tests/test_curriculum.py"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from wmss_jax import curriculum

GOLDEN = Path(__file__).parent / "golden" / "released_code" / "golden.json"
checked = settings(deadline=None, max_examples=100)
# 0 or at least 1e-6: sums and ratios of anything smaller say nothing about the formula.
entropy = st.one_of(st.just(0.0), st.floats(1e-6, 12.0))
pairs = st.lists(st.tuples(entropy, entropy), min_size=1, max_size=40).map(lambda rows: tuple(np.array(rows).T.copy()))
coefficients = st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-3, 10.0))] * 3).filter(any)
variants = st.sampled_from(["v1", "v2"])


def random_entropies(n=50, seed=0):
    rng = np.random.default_rng(seed)
    h_weak_n = rng.gamma(2.0, 0.3, n)
    return h_weak_n, h_weak_n * rng.uniform(0.5, 1.2, n)


# ---- sampling_probs -------------------------------------------------------------------------


def test_probs_of_the_released_code():
    golden = json.loads(GOLDEN.read_text())["curriculum"]
    probs_n = curriculum.sampling_probs(
        np.array(golden["h_weak"]),
        np.array(golden["h_strong"]),
        golden["alpha"],
        golden["beta"],
        golden["gamma"],
        variant="v1",
        normalize_terms=True,
    )
    np.testing.assert_allclose(probs_n, golden["p"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "normalize_terms", "expected"),
    [
        # h_weak = 1, 2, 1; h_strong = 2, 1, 1; so the drops are 0, 1, 0 and the rises 1, 0, 0.
        ("v1", False, [0.1 * 1 + 0.1, 0.1 * 2 + 0.8, 0.1 * 1]),
        ("v2", False, [0.8 * 2 + 0.1, 0.8 * 1 + 0.1, 0.8 * 1]),
        ("v1", True, [0.1 / 4 + 0.1, 0.2 / 4 + 0.8, 0.1 / 4]),
        ("v2", True, [1.6 / 4 + 0.1, 0.8 / 4 + 0.1, 0.8 / 4]),
    ],
)
def test_formulas_by_hand(variant, normalize_terms, expected):
    h_weak_n, h_strong_n = np.array([1.0, 2.0, 1.0]), np.array([2.0, 1.0, 1.0])
    probs_n = curriculum.sampling_probs(h_weak_n, h_strong_n, variant=variant, normalize_terms=normalize_terms)
    np.testing.assert_allclose(probs_n, np.array(expected) / sum(expected), rtol=1e-14)


@checked
@given(pairs, coefficients, variants, st.booleans(), st.floats(0.0, 1.0))
def test_probs_are_probabilities(pair, abc, variant, normalize_terms, uniform_share):
    probs_n = curriculum.sampling_probs(*pair, *abc, variant, normalize_terms, uniform_share)
    assert probs_n.dtype == np.float64 and probs_n.shape == pair[0].shape
    assert (probs_n >= 0).all()
    assert probs_n.sum() == pytest.approx(1, abs=1e-12)


@checked
@given(pairs, coefficients, variants, st.booleans(), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scale_invariance(pair, abc, variant, normalize_terms, unit, scale):
    """Nats or bits, and coefficients in any unit: the same sampler."""
    probs_n = curriculum.sampling_probs(*pair, *abc, variant, normalize_terms)
    scaled_n = curriculum.sampling_probs(
        *(h_n * unit for h_n in pair), *(c * scale for c in abc), variant, normalize_terms
    )
    np.testing.assert_allclose(scaled_n, probs_n, rtol=1e-7, atol=1e-12)


@checked
@given(pairs, coefficients, variants, st.booleans(), st.randoms())
def test_order_of_examples_does_not_matter(pair, abc, variant, normalize_terms, random):
    order_n = np.array(random.sample(range(len(pair[0])), len(pair[0])))
    probs_n = curriculum.sampling_probs(*pair, *abc, variant, normalize_terms)
    moved_n = curriculum.sampling_probs(*(h[order_n] for h in pair), *abc, variant, normalize_terms)
    np.testing.assert_allclose(moved_n, probs_n[order_n], rtol=1e-12)


@checked
@given(pairs, coefficients, variants)
def test_normalized_terms_get_exactly_their_coefficients(pair, abc, variant):
    delta_n = pair[1] - pair[0]
    assume(delta_n.min() < 0 < delta_n.max())
    shares = curriculum.term_shares(curriculum.terms(*pair, *abc, variant))
    alpha, beta, gamma = np.array(abc) / sum(abc)
    expected = {
        "v1": {"difficulty": alpha, "consolidation": beta},
        "v2": {"difficulty": beta, "consolidation": alpha},
    }[variant] | {"regression": gamma, "uniform": 0.0}
    assert shares == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_drops_or_no_rises(variant, sign):
    """The missing term's coefficient is shared out among the others, in their ratio."""
    h_n = random_entropies()[0]
    pair = (h_n, 1.5 * h_n) if sign > 0 else (1.5 * h_n, h_n)
    shares = curriculum.term_shares(curriculum.terms(*pair, variant=variant))
    difficulty, consolidation = (0.1, 0.8) if variant == "v1" else (0.8, 0.1)
    present = {"difficulty": difficulty}
    present |= {"regression": 0.1} if sign > 0 else {"consolidation": consolidation}
    expected = {name: c / sum(present.values()) for name, c in present.items()}
    absent = "consolidation" if sign > 0 else "regression"
    assert shares == pytest.approx(expected | {absent: 0.0, "uniform": 0.0}, abs=1e-12)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_equal_agents_sample_by_difficulty(variant):
    h_n = random_entropies()[0]
    probs_n = curriculum.sampling_probs(h_n, h_n, variant=variant)
    np.testing.assert_allclose(probs_n, h_n / h_n.sum(), rtol=1e-12)


@pytest.mark.parametrize("normalize_terms", [True, False])
@pytest.mark.parametrize(("variant", "expected"), [("v1", "alpha"), ("v2", "beta")])
def test_difficulty_is_the_weak_entropy_in_v1_and_the_strong_one_in_v2(variant, expected, normalize_terms):
    h_weak_n, h_strong_n = random_entropies()
    only = dict.fromkeys(["alpha", "beta", "gamma"], 0.0) | {expected: 3.0}
    probs_n = curriculum.sampling_probs(h_weak_n, h_strong_n, **only, variant=variant, normalize_terms=normalize_terms)
    difficulty_n = h_weak_n if variant == "v1" else h_strong_n
    np.testing.assert_allclose(probs_n, difficulty_n / difficulty_n.sum(), rtol=1e-12)


@pytest.mark.parametrize("normalize_terms", [True, False])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_all_zero_terms_are_uniform(variant, normalize_terms):
    zero_n = np.zeros(4)
    parts = curriculum.terms(zero_n, zero_n, variant=variant, normalize_terms=normalize_terms)
    assert curriculum.term_shares(parts)["uniform"] == 1.0
    probs_n = curriculum.sampling_probs(zero_n, zero_n, variant=variant, normalize_terms=normalize_terms)
    assert probs_n.tolist() == [0.25] * 4
    h_n = np.array([1.0, 2.0])  # only the rises count, and there are none
    assert curriculum.sampling_probs(h_n, h_n, 0.0, 0.0, 1.0).tolist() == [0.5, 0.5]


def test_uniform_share_mixes():
    pair = random_entropies()
    plain_n = curriculum.sampling_probs(*pair)
    for u in (0.0, 0.3, 1.0):
        mixed_n = curriculum.sampling_probs(*pair, uniform_share=u)
        np.testing.assert_allclose(mixed_n, (1 - u) * plain_n + u / 50, rtol=1e-12)
        parts = curriculum.terms(*pair, uniform_share=u)
        assert curriculum.term_shares(parts)["uniform"] == pytest.approx(u, abs=1e-12)


@checked
@given(pairs, coefficients, variants, st.booleans(), st.floats(0.0, 1.0))
def test_terms_add_up_to_the_probabilities(pair, abc, variant, normalize_terms, uniform_share):
    arguments = (*pair, *abc, variant, normalize_terms, uniform_share)
    parts = curriculum.terms(*arguments)
    assert list(parts) == ["difficulty", "consolidation", "regression", "uniform"]
    assert all((mass_n >= 0).all() for mass_n in parts.values())
    np.testing.assert_allclose(sum(parts.values()), curriculum.sampling_probs(*arguments), rtol=1e-12)
    assert sum(curriculum.term_shares(parts).values()) == pytest.approx(1, abs=1e-12)


def test_unnormalised_v2_is_nearly_all_difficulty():
    """PAPER.md §2.5: at the paper's mean entropies 0.352 : 0.008, where v1 has 0.052 : 0.064."""
    pair = np.full(5, 0.52), np.full(5, 0.44)
    v2 = curriculum.term_shares(curriculum.terms(*pair, variant="v2", normalize_terms=False))
    v1 = curriculum.term_shares(curriculum.terms(*pair, variant="v1", normalize_terms=False))
    assert v2["difficulty"] == pytest.approx(0.352 / 0.360)
    assert v1["difficulty"] == pytest.approx(0.052 / 0.116)


def test_float32_scores_are_taken_in_float64():
    pair = [h_n.astype(np.float32) for h_n in random_entropies()]
    expected_n = curriculum.sampling_probs(*(h_n.astype(np.float64) for h_n in pair))
    assert np.array_equal(curriculum.sampling_probs(*pair), expected_n)


def test_arguments_are_not_changed():
    pair = random_entropies()
    before = [h_n.copy() for h_n in pair]
    curriculum.sampling_probs(*pair, uniform_share=0.5)
    assert all(np.array_equal(a, b) for a, b in zip(pair, before, strict=True))


@pytest.mark.parametrize(
    ("h_weak", "h_strong", "message"),
    [
        ([1.0, 2.0], [1.0], r"shape \(2,\) and h_strong \(1,\)"),
        ([[1.0]], [[1.0]], r"must be \[n\]"),
        ([], [], "empty"),
        ([1.0, math.nan, math.inf], [1.0] * 3, r"h_weak is NaN .* 2 of 3 .*\[1, 2\]"),
        ([1.0] * 3, [math.nan, 1.0, 1.0], r"h_strong is NaN .* 1 of 3 .*\[0\].*score them"),
        ([1.0] * 3, [1.0, 1.0, -0.5], r"h_strong is negative for 1 of 3 .*\[2\].*lowest -0.5"),
        ([-1.0] * 9, [1.0] * 9, r"9 of 9 \(first indices: \[0, 1, 2, 3, 4\]\)"),
    ],
)
def test_entropy_errors(h_weak, h_strong, message):
    with pytest.raises(ValueError, match=message):
        curriculum.sampling_probs(np.array(h_weak), np.array(h_strong))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"alpha": -0.1, "gamma": math.nan}, r"'alpha': -0.1, 'gamma': nan"),
        ({"beta": math.inf}, "finite and >= 0"),
        ({"alpha": 0.0, "beta": 0.0, "gamma": 0.0}, "all 0"),
        ({"variant": "v3"}, "'v3' is unknown; choose 'v1' or 'v2'"),
        ({"uniform_share": 1.1}, r"uniform_share = 1.1 is outside \[0, 1\]"),
        ({"uniform_share": math.nan}, "outside"),
    ],
)
def test_knob_errors(knobs, message):
    with pytest.raises(ValueError, match=message):
        curriculum.sampling_probs(*random_entropies(), **knobs)


def test_effective_share():
    assert curriculum.effective_share(np.full(8, 1 / 8)) == pytest.approx(1.0)
    assert curriculum.effective_share(np.eye(8)[3]) == pytest.approx(1 / 8)
    assert curriculum.effective_share(np.array([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)


# ---- draw and shuffle -----------------------------------------------------------------------


@checked
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1.0)), min_size=1, max_size=30).filter(any),
    st.integers(0, 2**40),
    st.integers(0, 9),
)
def test_draw_never_takes_probability_zero(weights, seed, epoch):
    probs_n = np.array(weights) / sum(weights)
    drawn_m = curriculum.draw(seed, epoch, probs_n, n=500)
    assert drawn_m.dtype == np.int64 and drawn_m.shape == (500,)
    assert (probs_n[drawn_m] > 0).all()


@checked
@given(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=30), st.integers(0, 3))
def test_extreme_points_of_the_inverse_cdf(weights, zeros):
    """The smallest and the largest uniform number, whatever the cumulative sum rounds to."""
    weights_n = np.concatenate([np.zeros(zeros), weights, np.zeros(zeros)])
    cumulative_n = np.cumsum(weights_n / weights_n.sum())
    located_m = curriculum._locate(cumulative_n, np.array([0.0, 1 - 2.0**-53]))
    assert zeros == located_m[0] <= located_m[1] < zeros + len(weights)


def test_inverse_cdf_steps_over_zeros():
    cumulative_n = np.cumsum([0.0, 0.25, 0.0, 0.0, 0.5, 0.0, 0.25, 0.0])
    points_m = np.array([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999])
    assert curriculum._locate(cumulative_n, points_m).tolist() == [1, 1, 4, 4, 4, 6, 6]


def test_draw_follows_the_probabilities():
    probs_n = curriculum.sampling_probs(*random_entropies(200))
    counts_n = np.bincount(curriculum.draw(0, 0, probs_n, n=100_000), minlength=200)
    assert stats.chisquare(counts_n, 100_000 * probs_n).pvalue > 0.01


def test_draw_is_a_pure_function_of_its_arguments():
    """Hence a resume, or another number of hosts, sees the same epoch."""
    probs_n = curriculum.sampling_probs(*random_entropies())
    first_m = curriculum.draw(1, 2, probs_n)
    np.random.default_rng(0).random(7)
    assert np.array_equal(first_m, curriculum.draw(1, 2, probs_n.copy()))
    assert len(first_m) == 50
    # (2**32, 0) and (0, 1) are one and the same to SeedSequence([seed, epoch]).
    keys = [(1, 2), (2, 1), (1, 3), (0, 1), (2**32, 0), (0, 0)]
    assert len({tuple(curriculum.draw(*key, probs_n)) for key in keys}) == len(keys)
    assert np.array_equal(curriculum.draw(1, 2, probs_n, n=20), first_m[:20])


def test_streams_are_pinned():
    """A numpy that changed these numbers would make a resumed run see other data: notice it."""
    assert curriculum.draw(42, 1, np.full(1000, 1e-3), n=6).tolist() == [
        10,
        365,
        212,
        249,
        355,
        235,
    ]
    assert curriculum.shuffle(42, 1, 8).tolist() == [7, 6, 3, 2, 4, 0, 1, 5]


@checked
@given(pairs, st.integers(0, 99))
def test_dedup_keeps_first_occurrences(pair, seed):
    probs_n = curriculum.sampling_probs(*pair)
    all_m = curriculum.draw(seed, 0, probs_n)
    once_m = curriculum.draw(seed, 0, probs_n, dedup=True)
    assert once_m.tolist() == list(dict.fromkeys(all_m.tolist()))


def test_unique_fraction_of_uniform_draws():
    n = 100_000
    unique = len(curriculum.draw(0, 0, np.full(n, 1 / n), dedup=True))
    sigma = math.sqrt(n * (math.exp(-1) - 2 * math.exp(-2)))  # of the number of occupied cells
    assert abs(unique - n * (1 - math.exp(-1))) < 3 * sigma


def test_shuffle_is_a_pure_permutation():
    order_n = curriculum.shuffle(3, 1, 1000)
    assert order_n.dtype == np.int64
    assert np.array_equal(np.sort(order_n), np.arange(1000))
    assert np.array_equal(order_n, curriculum.shuffle(3, 1, 1000))
    assert not np.array_equal(order_n, curriculum.shuffle(3, 2, 1000))
    assert not np.array_equal(order_n, curriculum.shuffle(4, 1, 1000))


def test_shuffle_and_draw_use_separate_streams():
    # From one stream, random() of the draw would be what the permutation consumes.
    one = curriculum._generator(5, 5, curriculum._DRAW).random(4)
    other = curriculum._generator(5, 5, curriculum._SHUFFLE).random(4)
    assert not np.intersect1d(one, other).size


@pytest.mark.parametrize(
    ("probs", "n", "message"),
    [
        ([], None, "empty"),
        ([0.5, -0.5, 1.0], None, r"negative or not finite for 1 of 3 .*\[1\]"),
        ([0.5, math.nan], None, r"\[1\]"),
        ([0.5, 0.6], None, "add up to 1.1, not to 1"),
        ([0.5, 0.5], 0, "n = 0"),
    ],
)
def test_draw_errors(probs, n, message):
    with pytest.raises(ValueError, match=message):
        curriculum.draw(0, 0, np.array(probs), n)


def test_seed_errors():
    with pytest.raises(ValueError, match="seed = -1 and epoch = 0 must be"):
        curriculum.shuffle(-1, 0, 3)
    with pytest.raises(ValueError, match="epoch = -2"):
        curriculum.draw(0, -2, np.ones(1))
    with pytest.raises(ValueError, match="n = 0"):
        curriculum.shuffle(0, 0, 0)


# ---- example_means --------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(("shifted", "mean_7", "mean_4"), [(True, 2.5, 20.0), (False, 3.5, 30.0)])
def test_example_means_by_hand(shifted, mean_7, mean_4):
    # Example 7 is p p a a, example 4 is p a; the masks are on the predicting positions.
    values_BT = np.array([[NAN, 2.0, 3.0, 4.0, 20.0, 30.0, NAN], [5.0, 7.0, NAN, NAN, NAN, NAN, 1]])
    weights_BT = np.array([[0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]], float)
    index_BT = np.array([[7, 7, 7, 7, 4, 4, -1], [0, 0, -1, -1, -1, -1, -1]])
    example_m, mean_m, n_tokens_m = curriculum.example_means(values_BT, weights_BT, index_BT, shifted)
    assert example_m.tolist() == [0, 4, 7]
    assert mean_m.tolist() == [5.0 if shifted else 7.0, mean_4, mean_7]
    assert n_tokens_m.tolist() == [1, 1, 2]
    assert (example_m.dtype, mean_m.dtype, n_tokens_m.dtype) == (np.int64, np.float64, np.int64)


@checked
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_example_means_against_a_loop(seed, shifted):
    rng = np.random.default_rng(seed)
    B, T = 3, 24
    values_BT = rng.normal(size=(B, T)).astype(np.float32)
    weights_BT, index_BT = np.zeros((B, T), np.float32), np.full((B, T), -1, np.int32)
    names, expected = iter(rng.permutation(50).tolist()), {}
    for b in range(B):
        t = 0
        while (n := int(rng.integers(2, 8))) + t <= T:
            prompt, example = int(rng.integers(1, n)), next(names)
            index_BT[b, t : t + n] = example
            weights_BT[b, t + prompt - 1 : t + n - 1] = rng.uniform(0.1, 2)
            start = t + prompt - shifted  # the first answer token is at t + prompt
            span_t = values_BT[b, start : start + n - prompt].astype(np.float64)
            expected[example] = (span_t.mean(), n - prompt)
            t += n
    values_BT[index_BT < 0] = np.nan
    example_m, mean_m, n_tokens_m = curriculum.example_means(values_BT, weights_BT, index_BT, shifted)
    assert example_m.tolist() == sorted(expected)
    np.testing.assert_allclose(mean_m, [expected[e][0] for e in example_m.tolist()], rtol=1e-12)
    assert n_tokens_m.tolist() == [expected[e][1] for e in example_m.tolist()]


def test_the_off_by_one_stays_inside_the_example():
    weights_BT = np.array([[1.0, 1.0, 1.0, 0.0]])  # breaks the contract: 0 at a segment's last one
    values_BT = np.array([[1.0, 2.0, 3.0, 4.0]])
    index_BT = np.array([[8, 8, 9, 9]])
    _, mean_m, n_tokens_m = curriculum.example_means(values_BT, weights_BT, index_BT, False)
    assert mean_m.tolist() == [2.0, 4.0] and n_tokens_m.tolist() == [1, 1]


def test_rows_of_padding_have_no_examples():
    empty = np.zeros((2, 4))
    example_m, mean_m, n_tokens_m = curriculum.example_means(empty, empty, np.full((2, 4), -1))
    assert len(example_m) == len(mean_m) == len(n_tokens_m) == 0


def test_a_nan_among_the_targets_is_not_hidden():
    index_BT = np.zeros((1, 3), int)
    weights_BT = np.array([[1.0, 1.0, 0.0]])
    _, mean_m, _ = curriculum.example_means(np.array([[1.0, NAN, 1.0]]), weights_BT, index_BT)
    with pytest.raises(ValueError, match="NaN"):
        curriculum.sampling_probs(mean_m, mean_m)


def test_example_means_errors():
    index_BT = np.array([[3, 3, 5, 5], [6, 6, 3, 3]])
    ones_BT = np.ones((2, 4))
    with pytest.raises(ValueError, match=r"1 examples are in more than one row \(first: \[3\]\)"):
        curriculum.example_means(ones_BT, ones_BT, index_BT)
    weights_BT = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"2 of 3 examples have no target .*\[5, 6\]"):
        curriculum.example_means(ones_BT, weights_BT, np.array([[3, 3, 5, 5], [6, 6, -1, -1]]))


# -- controls ---------------------------------------------------------------------------------------------------------

WEAK, STRONG = np.array([1.0, 2.0, 0.5, 0.0, 3.0]), np.array([0.4, 2.5, 0.5, 1.0, 1.0])


def controlled(control, **knobs):
    parts = curriculum.controlled_terms(control, WEAK, STRONG, **knobs)
    return np.sum(list(parts.values()), axis=0)


def test_controls_take_one_kind_of_information_out():
    np.testing.assert_allclose(controlled("none"), curriculum.sampling_probs(WEAK, STRONG))
    np.testing.assert_allclose(controlled("uniform"), 0.2)
    np.testing.assert_allclose(controlled("strong_entropy"), STRONG / STRONG.sum())
    drop, rise = np.array([0.6, 0, 0, 0, 2.0]), np.array([0, 0.5, 0, 1.0, 0])
    for variant, weights in (("v1", (0.8, 0.1)), ("v2", (0.1, 0.1))):
        for normalize, scale in ((True, lambda x: x / x.sum()), (False, lambda x: x)):
            expected = weights[0] * scale(drop) + weights[1] * scale(rise)
            found = controlled("entropy_change", variant=variant, normalize_terms=normalize)
            np.testing.assert_allclose(found, expected / expected.sum())


@pytest.mark.parametrize("control", ["none", "uniform", "strong_entropy", "entropy_change", "random"])
def test_controls_are_probabilities_and_take_a_uniform_share(control):
    plain, mixed = controlled(control), controlled(control, uniform_share=0.25)
    np.testing.assert_allclose(plain.sum(), 1)
    np.testing.assert_allclose(mixed, 0.75 * plain + 0.05)


def test_random_weights_are_the_curriculums_own_dealt_anew():
    rng = np.random.default_rng(0)
    weak, strong = rng.random(500), rng.random(500)
    own = curriculum.sampling_probs(weak, strong)
    deal = lambda seed: np.sum(list(curriculum.controlled_terms("random", weak, strong, seed=seed).values()), axis=0)
    np.testing.assert_allclose(np.sort(deal(1)), np.sort(own))
    assert curriculum.effective_share(deal(1)) == pytest.approx(curriculum.effective_share(own))
    assert abs(np.corrcoef(deal(1), own)[0, 1]) < 0.15
    np.testing.assert_array_equal(deal(1), deal(1))
    assert not np.array_equal(deal(1), deal(2))


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match="control 'easy' is none of"):
        controlled("easy")
