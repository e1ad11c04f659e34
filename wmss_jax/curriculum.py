"""The curriculum: per-example entropies -> sampling probabilities -> the epoch's draw. Pure numpy.

Difficulty, entropy drop and entropy rise between the weak and the strong agent become the sampling
probabilities (PAPER.md §2.5; eq. 7-9 of arXiv 2602.08222v2). Entropies are in nats. Here `n` is
examples in the data set, `m` examples drawn or present, `B T` rows and positions of a packed batch.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Integer

# Separate random streams of one (seed, epoch), so that a draw never mirrors a shuffle.
_DRAW, _SHUFFLE, _DEAL = 0, 1, 3  # 2 is epochs.py's


def terms(
    h_weak: Float[np.ndarray, "..."],
    h_strong: Float[np.ndarray, "..."],
    alpha: float = 0.1,
    beta: float = 0.8,
    gamma: float = 0.1,
    variant: str = "v1",
    normalize_terms: bool = True,
    uniform_share: float = 0.0,
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Returns `sampling_probs` taken apart: the probability that each term gives to each example.

    The arguments and errors are those of `sampling_probs`. The keys are always `difficulty`,
    `consolidation`, `regression` and `uniform`; the four arrays add up to the probabilities.
    `uniform` holds what no term gave: `uniform_share`, or everything when all terms are zero.
    """
    h_weak_n, h_strong_n = _checked_entropies(h_weak, h_strong)
    _check_knobs(alpha, beta, gamma, variant, uniform_share)
    delta_n = h_strong_n - h_weak_n
    drop_n, rise_n = np.maximum(-delta_n, 0.0), np.maximum(delta_n, 0.0)
    if variant == "v1":
        parts = {"difficulty": (alpha, h_weak_n), "consolidation": (beta, drop_n)}
    else:  # v2 moves the coefficients: the same (0.1, 0.8, 0.1) is another sampler (PAPER.md §14.1)
        parts = {"difficulty": (beta, h_strong_n), "consolidation": (alpha, drop_n)}
    parts["regression"] = (gamma, rise_n)
    scale = _divided_by_sum if normalize_terms else np.asarray
    masses = {name: coefficient * scale(term_n) for name, (coefficient, term_n) in parts.items()}

    total = sum(mass_n.sum() for mass_n in masses.values())
    uniform = uniform_share if total > 0 else 1.0
    shares = {name: mass_n / total * (1.0 - uniform) if total > 0 else mass_n for name, mass_n in masses.items()}
    return shares | {"uniform": np.full(len(delta_n), uniform / len(delta_n))}


def controlled_terms(
    control: str,
    h_weak: Float[np.ndarray, "..."],
    h_strong: Float[np.ndarray, "..."],
    alpha: float = 0.1,
    beta: float = 0.8,
    gamma: float = 0.1,
    variant: str = "v1",
    normalize_terms: bool = True,
    uniform_share: float = 0.0,
    seed: int = 0,
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Returns the `terms` of a control of the curriculum, each without one kind of information.

    Args:
      control: "none" is `terms` itself. "uniform": all examples alike. "strong_entropy": p in proportion
        to h_strong, which never looks at the weak agent. "entropy_change": the drop and the rise with
        their own coefficients, without the term of difficulty. "random": the probabilities of `terms`
        dealt to the examples at random, so that each is as large as before, and with them the
        effective sample size, but says nothing.
      seed: of "random".
    """
    knobs = (alpha, beta, gamma, variant, normalize_terms, uniform_share)
    if control == "uniform":
        knobs = (alpha, beta, gamma, variant, normalize_terms, 1.0)
    elif control == "strong_entropy":
        knobs = (0.0, 1.0, 0.0, "v2", normalize_terms, uniform_share)
    elif control == "entropy_change":
        rest = (0.0, beta) if variant == "v1" else (alpha, 0.0)
        knobs = (*rest, gamma, variant, normalize_terms, uniform_share)
    elif control not in ("none", "random"):
        raise ValueError(f"control {control!r} is none of: none, uniform, strong_entropy, entropy_change, random")
    parts = terms(h_weak, h_strong, *knobs)
    if control != "random":
        return parts
    order_n = _generator(seed, 0, _DEAL).permutation(len(h_weak))
    return {name: mass_n[order_n] for name, mass_n in parts.items()}


def sampling_probs(
    h_weak: Float[np.ndarray, "..."],
    h_strong: Float[np.ndarray, "..."],
    alpha: float = 0.1,
    beta: float = 0.8,
    gamma: float = 0.1,
    variant: str = "v1",
    normalize_terms: bool = True,
    uniform_share: float = 0.0,
) -> Float64[np.ndarray, " n"]:
    """Returns the probability with which each example is drawn; they add up to 1.

    With ΔH = h_strong - h_weak (eq. 8) and [x]+ = max(x, 0), p is proportional to

        v1:  alpha * h_weak   + beta * [-ΔH]+     + gamma * [ΔH]+      (v1 paper, released code)
        v2:  alpha * [-ΔH]+   + beta * h_strong   + gamma * [ΔH]+      (v2 paper, eq. 9)

    The released code is `utils/weight_datasets.py:4-39 compute_adaboost_sampling_weights`
    (25ac32f): v1 with `normalize_terms`. Its clip at 0 cannot act on what passes the checks here.

    Args:
      h_weak: mean entropy of each example under the weak agent, nats, shape [n].
      h_strong: the same under the strong agent, in the same order.
      alpha, beta, gamma: coefficients >= 0, not all zero; only their ratios matter.
      variant: "v1" or "v2".
      normalize_terms: divide each term by its own sum over the data set first, so that the terms
        get exactly alpha : beta : gamma of the mass (a term that is zero everywhere gets none).
        False is the formula as either paper prints it; v2's then spends ~98 % on difficulty.
      uniform_share: u in [0, 1] gives (1 - u) * p + u / n.

    If every term is zero, the probabilities are uniform.

    Raises:
      ValueError: shapes that differ or are not [n], no examples, entropies that are NaN, infinite
        or negative (an unscored example is an error here, never a weight of 0), or bad knobs.
    """
    parts = terms(h_weak, h_strong, alpha, beta, gamma, variant, normalize_terms, uniform_share)
    return np.sum(list(parts.values()), axis=0)


def term_shares(parts: Mapping[str, Float64[np.ndarray, " n"]]) -> dict[str, float]:
    """Returns the share of the sampling mass that each of the `terms` holds; they add up to 1."""
    return {name: float(mass_n.sum()) for name, mass_n in parts.items()}


def effective_share(probs: Float64[np.ndarray, " n"]) -> float:
    """Returns (1 / Σp²) / n: 1 for uniform probabilities, 1/n when one example takes everything."""
    _check_probs(probs)
    return float(1.0 / np.square(probs).sum() / len(probs))


def draw(
    seed: int,
    epoch: int,
    probs: Float64[np.ndarray, " n"],
    n: int | None = None,
    dedup: bool = False,
) -> Int64[np.ndarray, " m"]:
    """Returns the epoch's examples in the order drawn: `n` (else len(probs)), with replacement.

    A pure function of its arguments, hence the same on every host and after every resume. An
    example of probability 0 is never drawn. Replaces `np.random.default_rng(42).choice` of the
    released code (other numbers, the same law).

    Args:
      seed, epoch: integers >= 0.
      dedup: keep the first occurrence of each example only (v2's D_active is a set): m <= n, about
        (1 - 1/e) * n when the probabilities are uniform.

    Raises:
      ValueError: probabilities that are negative, not finite or do not add up to 1; n < 1.
    """
    _check_probs(probs)
    n = len(probs) if n is None else n
    if n < 1:
        raise ValueError(f"n = {n} examples to draw; give at least 1, or None for len(probs)")
    drawn_m = _locate(np.cumsum(probs), _generator(seed, epoch, _DRAW).random(n))
    if dedup:
        _, first_m = np.unique(drawn_m, return_index=True)
        drawn_m = drawn_m[np.sort(first_m)]
    return drawn_m


def shuffle(seed: int, epoch: int, n: int) -> Int64[np.ndarray, " n"]:
    """Returns a permutation of range(n), the epoch's order when there are no probabilities.

    A pure function of its arguments, on another random stream than `draw`'s.
    """
    if n < 1:
        raise ValueError(f"n = {n} examples to shuffle; the data set is empty")
    return _generator(seed, epoch, _SHUFFLE).permutation(n)


def picked(
    loss_weights_BT: Float[np.ndarray, "B T"], example_index_BT: Integer[np.ndarray, "B T"], shifted: bool = True
) -> Bool[np.ndarray, "B T"]:
    """Returns the positions whose values `example_means` takes the mean of."""
    trained_BT = loss_weights_BT > 0
    return trained_BT if shifted else _moved_right(trained_BT, example_index_BT)


def example_means(
    values_BT: Float[np.ndarray, "B T"],
    loss_weights_BT: Float[np.ndarray, "B T"],
    example_index_BT: Integer[np.ndarray, "B T"],
    shifted: bool = True,
) -> tuple[Int64[np.ndarray, " m"], Float64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Returns (example index, mean value, number of target tokens) of every example in the rows.

    Sorted by example index; the mean over an example's target positions is eq. 7. Values outside
    those positions may be anything, NaN included; a NaN inside them gives a NaN mean.

        example_index   7    7    7    7   -1
        tokens          p0   p1   a0   a1   -
        loss_weights    0    1    1    0    0     position t predicts the token at t + 1
        shifted=True         x    x               the positions that predict a0 and a1
        shifted=False             x    x          the positions of a0 and a1 themselves

    Args:
      values_BT: one value per position, such as the entropy of its prediction of the next token.
      loss_weights_BT: > 0 where the position predicts a trained target (0 at a segment's last one).
      example_index_BT: the example of each token, -1 at padding.
      shifted: False reproduces the released code's off-by-one (`utils/compute_entropy.py:310-316`,
        25ac32f; PAPER.md §14.12), which leaves out the prediction of the first answer token and
        counts the one after the last. It needs values at a segment's last position, too.

    Raises:
      ValueError: an example without a target token, or in more than one row.
    """
    picked_BT = picked(loss_weights_BT, example_index_BT, shifted)
    # One code per (example, row), ascending by example; n are the positions that are not padding.
    B, inside_BT = len(values_BT), example_index_BT >= 0
    row_n = np.nonzero(inside_BT)[0]
    codes_m, slot_n = np.unique(example_index_BT[inside_BT].astype(np.int64) * B + row_n, return_inverse=True)
    example_m = codes_m // B
    slot_n, value_n = slot_n[picked_BT[inside_BT]], values_BT[inside_BT & picked_BT]
    n_tokens_m = np.bincount(slot_n, minlength=len(codes_m))
    _check_examples(example_m, n_tokens_m)
    sum_m = np.bincount(slot_n, weights=value_n, minlength=len(codes_m))
    return example_m, sum_m / n_tokens_m, n_tokens_m


def _divided_by_sum(term_n):
    total = term_n.sum()  # 0 only if every entry is: then x / 1e-12 of the released code is 0, too
    return term_n / total if total > 0 else term_n


def _generator(seed, epoch, stream):
    # spawn_key, because SeedSequence([seed, epoch]) confuses (2**32, 0) with (0, 1).
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed = {seed} and epoch = {epoch} must be integers >= 0")
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, epoch))
    return np.random.Generator(np.random.Philox(sequence))


def _locate(cumulative_n, uniform_m):
    # Inverse CDF. side="right" finds the first entry above the point, and an entry of probability 0
    # is never above its predecessor. Scaling by the last entry instead of 1 takes care of the
    # rounding of the sum: u <= 1 - 2**-53 keeps u * last strictly below last in float64.
    return np.searchsorted(cumulative_n, uniform_m * cumulative_n[-1], side="right")


def _moved_right(mask_BT, example_index_BT):
    moved_BT = np.zeros_like(mask_BT)
    moved_BT[:, 1:] = mask_BT[:, :-1] & (example_index_BT[:, 1:] == example_index_BT[:, :-1])
    return moved_BT


def _where(mask_n: Bool[np.ndarray, " n"]) -> str:
    first = np.flatnonzero(mask_n)[:5].tolist()
    return f"{np.count_nonzero(mask_n)} of {len(mask_n)} (first indices: {first})"


def _checked_entropies(h_weak, h_strong):
    h_weak, h_strong = np.asarray(h_weak, np.float64), np.asarray(h_strong, np.float64)
    if h_weak.shape != h_strong.shape or h_weak.ndim != 1:
        raise ValueError(
            f"h_weak has shape {h_weak.shape} and h_strong {h_strong.shape}; both must be [n], "
            "one entropy per example in the same order: score both agents on the same data set"
        )
    if len(h_weak) == 0:
        raise ValueError("h_weak and h_strong are empty: there are no examples to sample from")
    for name, h_n in (("h_weak", h_weak), ("h_strong", h_strong)):
        unscored_n, negative_n = ~np.isfinite(h_n), h_n < 0
        if unscored_n.any():
            raise ValueError(
                f"{name} is NaN or infinite for {_where(unscored_n)} examples: "
                "score them, or drop them from the data set"
            )
        if negative_n.any():
            raise ValueError(
                f"{name} is negative for {_where(negative_n)} examples, lowest {h_n.min()}: an entropy is >= 0 nats"
            )
    return h_weak, h_strong


def _check_knobs(alpha, beta, gamma, variant, uniform_share):
    coefficients = {"alpha": alpha, "beta": beta, "gamma": gamma}
    bad = {k: v for k, v in coefficients.items() if not (np.isfinite(v) and v >= 0)}
    if bad:
        raise ValueError(f"{bad}: coefficients must be finite and >= 0")
    if alpha == beta == gamma == 0:
        raise ValueError("alpha, beta and gamma are all 0: one must be > 0 (or draw uniformly)")
    if variant not in ("v1", "v2"):
        raise ValueError(f"variant {variant!r} is unknown; choose 'v1' or 'v2'")
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share = {uniform_share} is outside [0, 1]")


def _check_probs(probs_n):
    if len(probs_n) == 0:
        raise ValueError("probs is empty: there are no examples to draw from")
    bad_n = ~(np.isfinite(probs_n) & (probs_n >= 0))
    if bad_n.any():
        raise ValueError(f"probs is negative or not finite for {_where(bad_n)} examples")
    if abs(probs_n.sum() - 1) > 1e-6:
        raise ValueError(f"probs add up to {probs_n.sum()}, not to 1: divide them by their sum")


def _check_examples(example_m, n_tokens_m):
    twice_m = example_m[1:] == example_m[:-1]
    if twice_m.any():
        rows = np.unique(example_m[1:][twice_m])
        raise ValueError(
            f"{len(rows)} examples are in more than one row (first: {rows[:5].tolist()}); "
            "a mean needs the whole example in one row and once per call"
        )
    untrained_m = example_m[n_tokens_m == 0]
    if len(untrained_m):
        raise ValueError(
            f"{len(untrained_m)} of {len(example_m)} examples have no target token to average over "
            f"(first: {untrained_m[:5].tolist()}): drop them, or fix their loss mask"
        )
