"""What graded samples say of a model, and of the difference between two models on the same questions."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # 97.5 % of a normal distribution lies below it
_DRAWS = 10_000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that of k samples, drawn from n of which c are right, one at least is.

    1 − C(n−c, k) / C(n, k), the unbiased estimate of pass@k (arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(extractions: Sequence[str], verdicts: Sequence[bool]) -> bool:
    """Return the verdict of the most frequent answer; of equally frequent ones the first; samples that say nothing
    do not vote.

    >>> majority(["7", "", "8", "8"], [True, False, False, False])
    False
    """
    votes = Counter(text for text in extractions if text)
    if not votes:
        return False
    winner, _ = votes.most_common(1)[0]
    return verdicts[list(extractions).index(winner)]


def wilson(right: int, n: int) -> Interval:
    """Return Wilson's score interval of a share (JASA 22, 1927): sensible at 0, at n, and for few items."""
    share, z2 = right / n, _Z**2
    center, half = share + z2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(max(0.0, (center - half) / (1 + z2 / n)), min(1.0, (center + half) / (1 + z2 / n)))


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of a mean over items (10,000 resamples, always the same)."""
    rng, x = np.random.default_rng(seed), np.asarray(values, np.float64)
    means = [x[rng.integers(0, len(x), (100, len(x)))].mean(axis=1) for _ in range(_DRAWS // 100)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value that two models are equally good (McNemar, Psychometrika 12, 1947).

    Args:
        only_a, only_b: items that one of them alone answers right; the others say nothing of a difference.

    >>> mcnemar(5, 5), mcnemar(0, 6)
    (1.0, 0.03125)
    """
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def figures(verdicts: Sequence[Sequence[bool]], extractions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return a task's figures from the verdicts of each question's samples.

    `accuracy` is pass@1 and, with several samples, mean@n; its interval is Wilson's with one sample a question, and
    else a bootstrap over questions.
    """
    counts, n = [sum(row) for row in verdicts], len(verdicts[0])
    means = np.array(counts) / n
    items = len(means)
    accuracy = float(means.mean())
    spread = accuracy * (1 - accuracy) if n == 1 else float(means.var())
    interval = wilson(sum(counts), items) if n == 1 else bootstrap(means.tolist())
    out = {"accuracy": accuracy, "standard_error": math.sqrt(spread / items), "low": interval.low,
           "high": interval.high, "n": items}  # fmt: skip
    if n > 1:
        out |= {f"pass@{k}": float(np.mean([pass_at_k(n, c, k) for c in counts])) for k in _powers(n)}
        voted = [majority(texts, row) for texts, row in zip(extractions, verdicts, strict=True)]
        out |= {f"majority@{n}": float(np.mean(voted)), "samples": n}
    return out


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Return how much better b is than a on the same items, each a share of right samples.

    The interval is a bootstrap over items, in pairs; the p-value McNemar's, over items that one answers right in most
    samples and the other does not.
    """
    x, y = np.asarray(a), np.asarray(b)
    interval = bootstrap((y - x).tolist())
    only_a, only_b = int(np.sum((x > 0.5) & (y <= 0.5))), int(np.sum((x <= 0.5) & (y > 0.5)))
    return {
        "a": float(x.mean()), "b": float(y.mean()), "difference": float((y - x).mean()), "low": interval.low,
        "high": interval.high, "only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b), "n": len(x),
    }  # fmt: skip


def _powers(n: int) -> list[int]:
    return [k for k in (2**i for i in range(n.bit_length())) if k <= n]
