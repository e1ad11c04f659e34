"""Packing: example lengths -> the whole epoch's rows, and the arrays of one row. Pure numpy.

Here `n` is examples to pack, `R` rows, `T` = seq_len the positions of one row.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, Shaped


class Rows(NamedTuple):
    """A plan in CSR form: row r holds `items[offsets[r]:offsets[r + 1]]`.

    `items` int64[n] are positions in the `lengths` given to `pack`, each once, row by row;
    `offsets` is int64[R + 1].
    """

    items: Int64[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " _"]


def pack(lengths: Integer[np.ndarray, " n"], seq_len: int) -> Rows:
    """Returns the rows of an epoch by best fit in the given order.

    Each item goes into the open row with the least room that still fits it (of equals, the one
    opened first), or else opens a row. Rows are ordered by when they were opened, the items in a
    row by arrival. Deterministic, so that every host makes the same plan. No row is ever closed:
    the plan covers the whole epoch, so an early row may wait for a short item to the very end. The
    order should be random already (`curriculum.draw` or `shuffle`); it is not sorted by length.

    >>> pack(np.array([5, 6, 3, 2, 8, 1]), seq_len=8)
    Rows(items=array([0, 2, 1, 3, 4, 5]), offsets=array([0, 2, 4, 5, 6]))

    Args:
      lengths: tokens of each item, 1 to seq_len.
      seq_len: tokens of a row.

    Raises:
      ValueError: no items, or a length outside 1 to seq_len.
    """
    _check_lengths(lengths, seq_len)
    row_of = np.empty(len(lengths), np.int64)
    n_rows = 0
    rooms: list[int] = []  # the distinct rooms of the open rows, ascending
    rows_with: dict[int, list[int]] = {}  # room -> heap of its rows
    for item, length in enumerate(lengths.tolist()):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = n_rows, seq_len
            n_rows += 1
        else:
            room = rooms[place]
            row = heapq.heappop(rows_with[room])
            if not rows_with[room]:
                del rooms[place], rows_with[room]
        row_of[item] = row
        if room > length:
            _open(rooms, rows_with, room - length, row)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Rows(np.argsort(row_of, kind="stable"), offsets)


def fill(rows: Rows, lengths: Integer[np.ndarray, " n"], seq_len: int) -> float:
    """Returns the share of the rows' positions that hold a token, in (0, 1]."""
    return float(lengths[rows.items].sum() / ((len(rows.offsets) - 1) * seq_len))


def layout(
    tokens: Sequence[Integer[np.ndarray, " _"]],
    loss_masks: Sequence[Shaped[np.ndarray, " _"]],
    example_index: Sequence[int] | Integer[np.ndarray, " _"],
    seq_len: int,
) -> dict[str, Shaped[np.ndarray, " T"]]:
    """Returns the arrays of one row, each of shape [seq_len].

    >>> row = layout(
    ...     tokens=[np.array([11, 12, 13, 14]), np.array([21, 22, 23])],
    ...     loss_masks=[np.array([0, 0, 1, 1]), np.array([0, 1, 1])],
    ...     example_index=[7, 4],
    ...     seq_len=9,
    ... )
    >>> for name, values in row.items():
    ...     print(f"{name:13}", values)
    tokens        [11 12 13 14 21 22 23  0  0]
    targets       [12 13 14  0 22 23  0  0  0]
    loss_weights  [0. 1. 1. 0. 1. 1. 0. 0. 0.]
    segments      [1 1 1 1 2 2 2 0 0]
    positions     [0 1 2 3 0 1 2 0 0]
    example_index [ 7  7  7  7  4  4  4 -1 -1]

    Padding is where `segments` is 0, never where a token has some id. The target of a segment's
    last position is a 0 of weight 0: nothing follows there. For the same reason the mask of an
    example's first token has no effect: nothing predicts it.

    Args:
      tokens: the token ids of each example in the row; none at all gives a row of padding.
      loss_masks: for each example, how much each of its *tokens* counts as a target: booleans or
        numbers >= 0. `loss_weights` is the mask moved to the position that predicts the token.
      example_index: the data set's index of each example.
      seq_len: T, positions of the row.

    Raises:
      ValueError: lists or masks that differ in length, an empty example, a negative example
        index, or more than seq_len tokens.
    """
    lengths = _checked_row(tokens, loss_masks, example_index, seq_len)
    row = {
        "tokens": np.zeros(seq_len, np.int32),
        "targets": np.zeros(seq_len, np.int32),
        "loss_weights": np.zeros(seq_len, np.float32),
        "segments": np.zeros(seq_len, np.int32),
        "positions": np.zeros(seq_len, np.int32),
        "example_index": np.full(seq_len, -1, np.int32),
    }
    start = 0
    for segment, length in enumerate(lengths):
        here, last = slice(start, start + length), start + length - 1
        row["tokens"][here] = tokens[segment]
        row["targets"][start:last] = tokens[segment][1:]
        row["loss_weights"][start:last] = loss_masks[segment][1:]
        row["segments"][here] = segment + 1
        row["positions"][here] = np.arange(length)
        row["example_index"][here] = example_index[segment]
        start += length
    return row


def _open(rooms, rows_with, room, row):
    if room not in rows_with:
        insort(rooms, room)
        rows_with[room] = []
    heapq.heappush(rows_with[room], row)


def _check_lengths(lengths_n, seq_len):
    if len(lengths_n) == 0:
        raise ValueError("lengths is empty: there are no examples to pack")
    for bad_n, problem, fix in (
        (lengths_n < 1, "have no tokens", "drop them"),
        (
            lengths_n > seq_len,
            f"are longer than seq_len = {seq_len} tokens",
            "raise seq_len, or truncate or drop them when encoding",
        ),
    ):
        if bad_n.any():
            first = {int(i): int(lengths_n[i]) for i in np.flatnonzero(bad_n)[:5]}
            raise ValueError(
                f"{np.count_nonzero(bad_n)} of {len(lengths_n)} items {problem} "
                f"(first, as position: length, {first}): {fix}"
            )


def _checked_row(tokens, loss_masks, example_index, seq_len):
    if not len(tokens) == len(loss_masks) == len(example_index):
        raise ValueError(
            f"{len(tokens)} token arrays, {len(loss_masks)} loss masks and {len(example_index)} "
            "example indices: a row needs one of each per example"
        )
    lengths = [len(ids) for ids in tokens]
    for example, length, mask in zip(example_index, lengths, loss_masks, strict=True):
        if example < 0:
            raise ValueError(f"example index {example} is negative: -1 marks padding")
        if length == 0:
            raise ValueError(f"example {example} has no tokens: drop it")
        if len(mask) != length:
            raise ValueError(f"example {example} has {length} tokens but a mask of {len(mask)}")
    if sum(lengths) > seq_len:
        raise ValueError(
            f"examples {list(example_index)} of {lengths} tokens make {sum(lengths)}, more than "
            f"seq_len = {seq_len}: plan the rows with packing.pack at this seq_len"
        )
    return lengths
