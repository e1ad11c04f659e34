"""The plan of a whole run, before it begins: which examples stand in which row of which step.

Pure numpy. Every epoch's draws (curriculum.py) and rows (packing.py) are a function of their arguments alone, so the
number of steps is known to the schedule, and the step number is the position in the data, on any number of hosts.
"""

import dataclasses
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64, Integer

from wmss_jax import curriculum, packing

_ROW_ORDER = 2  # random stream of (seed, epoch), beside the two of curriculum.py


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which examples stand in which row of which step, for a whole run. Step numbers begin at 0.

    Attributes:
        draws: the examples of each epoch in the order drawn, int64 arrays; the last epoch may end before its last.
        items: example indices, row by row; row r of the run holds `items[offsets[r]:offsets[r + 1]]`.
        epoch_starts: the first step of each epoch, and the number of all steps.
        fill: share of the run's positions that hold a token, in (0, 1].
    """

    seq_len: int
    batch_size: int
    draws: tuple[Int64[np.ndarray, " _"], ...]
    items: Int64[np.ndarray, " m"]
    offsets: Int64[np.ndarray, " _"]
    epoch_starts: Int64[np.ndarray, " _"]
    fill: float

    @property
    def total_steps(self) -> int:
        return int(self.epoch_starts[-1])

    def rows_of(self, step: int) -> list[Int64[np.ndarray, " _"]]:
        """Return the example indices in each of the step's `batch_size` rows; rows may be empty."""
        self._check(step)
        cuts = self.offsets[step * self.batch_size : (step + 1) * self.batch_size + 1]
        return [self.items[start:end] for start, end in pairwise(cuts)]

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step belongs to."""
        self._check(step)
        return int(np.searchsorted(self.epoch_starts, step, side="right")) - 1

    def _check(self, step: int) -> None:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside 0 to {self.total_steps - 1}")


def plan(
    lengths: Integer[np.ndarray, " n"],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
    probs: Float64[np.ndarray, " _"] | None = None,
    dedup: bool = False,
    multiplier: float = 1.0,
) -> Plan:
    """Return the rows of every step of a run: a pure function, the same on every host and after every resume.

    Each epoch draws its examples, packs them into rows (`packing.pack`), shuffles the rows, because packing opens them
    in an order that goes with their lengths, and fills its last step up with empty rows, so that no example is lost.

    >>> p = plan(np.array([5, 6, 3, 2, 8, 1]), seq_len=8, batch_size=3, seed=0, epochs=1)
    >>> [row.tolist() for row in p.rows_of(0)], [row.tolist() for row in p.rows_of(1)]
    ([[1], [4], [3, 0, 5]], [[2], [], []])

    Args:
        lengths: tokens of each example.
        seq_len: tokens of a row.
        batch_size: rows of a step, over all hosts.
        epochs: passes over the examples; not looked at if `steps` is given.
        steps: as many epochs as these need; the last is cut off.
        probs: with which each example is drawn, with replacement (`curriculum.draw`). None: every epoch has each
            example once, shuffled, and the next two arguments have no part in it.
        dedup: keep one of the examples that an epoch draws more than once.
        multiplier: draws an epoch as a multiple of the examples.

    Raises:
        ValueError: an argument is out of range, or `probs` are not one for each example.
    """
    _check_plan(len(lengths), batch_size, epochs, steps, probs, multiplier)
    draws, items, counts, starts = [], [], [], [0]
    while starts[-1] < steps if steps is not None else len(draws) < (epochs or 0):
        epoch, n = len(draws), len(lengths)
        if probs is None:
            drawn = curriculum.shuffle(seed, epoch, n)
        else:
            drawn = curriculum.draw(seed, epoch, probs, n=max(1, round(multiplier * n)), dedup=dedup)
        epoch_items, epoch_counts = _shuffled_rows(lengths, drawn, seq_len, seed, epoch)
        n_steps = -(-len(epoch_counts) // batch_size)
        draws.append(drawn)
        items.append(epoch_items)
        counts.append(np.pad(epoch_counts, (0, n_steps * batch_size - len(epoch_counts))))
        starts.append(starts[-1] + n_steps)
    total = starts[-1] if steps is None else steps
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts)[: total * batch_size])])
    kept = np.concatenate(items)[: offsets[-1]]
    fill = float(lengths[kept].sum() / (total * batch_size * seq_len))
    epoch_starts = np.minimum(np.array(starts, np.int64), total)
    return Plan(seq_len, batch_size, tuple(draws), kept, offsets, epoch_starts, fill)


def _shuffled_rows(
    lengths: np.ndarray, drawn: np.ndarray, seq_len: int, seed: int, epoch: int
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " R"]]:
    """Return the examples of an epoch row by row, and how many stand in each row."""
    rows = packing.pack(lengths[drawn], seq_len)
    sequence = np.random.SeedSequence(seed, spawn_key=(_ROW_ORDER, epoch))
    order_R = np.random.Generator(np.random.Philox(sequence)).permutation(len(rows.offsets) - 1)
    counts_R = np.diff(rows.offsets)[order_R]
    # Position k of the new order takes what stood where its row began, plus its place in that row.
    moved_R = rows.offsets[order_R] - (np.cumsum(counts_R) - counts_R)
    taken_m = np.repeat(moved_R, counts_R) + np.arange(len(drawn))
    return drawn[rows.items[taken_m]], counts_R


def _check_plan(
    n: int, batch_size: int, epochs: int | None, steps: int | None, probs: np.ndarray | None, multiplier: float
) -> None:
    if epochs is None and steps is None:
        raise ValueError("give epochs or steps")
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be >= 1")
    if probs is not None and len(probs) != n:
        raise ValueError(f"{len(probs)} probabilities for {n} examples: score the data set that is trained on")
    if not (np.isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"multiplier = {multiplier} must be > 0")
