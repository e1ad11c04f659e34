"""The plan of an epoch and the layout of a row. Run: pytest tests/test_packing.py"""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmss_jax import packing

SEQ_LEN = 16
# Few, short lengths, so that ties and exact fits are common.
plans = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=80).map(np.array)
checked = settings(deadline=None, max_examples=100)


def rows_as_lists(rows):
    return [part.tolist() for part in np.split(rows.items, rows.offsets[1:-1])]


def naive_best_fit(lengths, seq_len):
    """The definition, in O(n · rows)."""
    rows, rooms = [], []
    for item, length in enumerate(lengths):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= length]
        if fitting:
            row = min(fitting)[1]
        else:
            row = len(rows)
            rows.append([])
            rooms.append(seq_len)
        rows[row].append(item)
        rooms[row] -= length
    return rows


def test_docstring_examples():
    results = doctest.testmod(packing)
    assert results.attempted >= 3 and results.failed == 0


@checked
@given(plans)
def test_pack_is_best_fit(lengths_n):
    assert rows_as_lists(packing.pack(lengths_n, SEQ_LEN)) == naive_best_fit(lengths_n, SEQ_LEN)


@checked
@given(plans)
def test_pack_invariants(lengths_n):
    rows = packing.pack(lengths_n, SEQ_LEN)
    assert rows.items.dtype == rows.offsets.dtype == np.int64
    assert sorted(rows.items.tolist()) == list(range(len(lengths_n)))
    assert rows.offsets[0] == 0 and rows.offsets[-1] == len(lengths_n)
    parts = rows_as_lists(rows)
    assert all(lengths_n[part].sum() <= SEQ_LEN for part in parts)
    assert all(part and part == sorted(part) for part in parts)  # by arrival
    firsts = [part[0] for part in parts]
    assert firsts == sorted(firsts)  # by opening
    again = packing.pack(lengths_n.copy(), SEQ_LEN)
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))


@checked
@given(plans)
def test_two_rows_never_fit_into_one(lengths_n):
    sums = [lengths_n[part].sum() for part in rows_as_lists(packing.pack(lengths_n, SEQ_LEN))]
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > SEQ_LEN


@checked
@given(plans)
def test_fill_counts_tokens(lengths_n):
    rows = packing.pack(lengths_n, SEQ_LEN)
    expected = lengths_n.sum() / (len(rows_as_lists(rows)) * SEQ_LEN)
    assert packing.fill(rows, lengths_n, SEQ_LEN) == pytest.approx(expected, rel=1e-12)


def test_ties_go_to_the_row_opened_first():
    # Row 1 has room for 3 first (17 of 20), row 0 only after its second item (9 + 8 of 20).
    rows = packing.pack(np.array([9, 17, 8, 3, 3]), seq_len=20)
    assert rows_as_lists(rows) == [[0, 2, 3], [1, 4]]


def test_fill_at_the_paper_size():
    """111,657 draws of realistic lengths; 0.1 s on one core (the speed itself is not asserted)."""
    rng = np.random.default_rng(0)
    lengths_n = np.clip(rng.lognormal(np.log(1470) - 0.18, 0.6, 111_657), 1, 4096).astype(np.int64)
    rows = packing.pack(lengths_n, 4096)
    assert packing.fill(rows, lengths_n, 4096) > 0.96
    assert np.array_equal(np.sort(rows.items), np.arange(111_657))


def test_rows_without_a_remainder():
    rows = packing.pack(np.array([8, 8, 4, 4]), seq_len=8)
    assert rows_as_lists(rows) == [[0], [1], [2, 3]]
    assert packing.fill(rows, np.array([8, 8, 4, 4]), 8) == 1.0


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "empty"),
        ([3, 0, -1], r"2 of 3 items have no tokens .*\{1: 0, 2: -1\}.*drop"),
        ([3, 17, 16, 99], r"2 of 4 items are longer than seq_len = 16 .*\{1: 17, 3: 99\}.*raise"),
    ],
)
def test_pack_errors(lengths, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(np.array(lengths, np.int64), SEQ_LEN)


@st.composite
def examples(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=0, max_size=5))
    ids = [np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))) for n in sizes]
    masks = [np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]
    index = draw(st.lists(st.integers(0, 99), min_size=len(sizes), max_size=len(sizes)))
    return ids, masks, index, sum(sizes) + draw(st.integers(0 if sizes else 1, 4))


@checked
@given(examples())
def test_layout_by_definition(case):
    ids, masks, index, seq_len = case
    row = packing.layout(ids, masks, index, seq_len)
    assert all(values.shape == (seq_len,) for values in row.values())
    t = 0
    for k, (ids_t, mask_t) in enumerate(zip(ids, masks, strict=True)):
        for position, token in enumerate(ids_t):
            last = position == len(ids_t) - 1
            assert row["tokens"][t] == token
            assert row["segments"][t] == k + 1
            assert row["positions"][t] == position
            assert row["example_index"][t] == index[k]
            assert row["loss_weights"][t] == (0 if last else mask_t[position + 1])
            assert row["targets"][t] == (0 if last else ids_t[position + 1])
            t += 1
    for name, padding in (("segments", 0), ("loss_weights", 0), ("example_index", -1)):
        assert (row[name][t:] == padding).all()


def test_layout_dtypes():
    row = packing.layout([np.array([1, 2])], [np.array([True, True])], np.array([3]), 4)
    dtypes = {name: values.dtype.name for name, values in row.items()}
    assert dtypes == dict.fromkeys(row, "int32") | {"loss_weights": "float32"}


def test_padding_is_not_a_token_id():
    row = packing.layout([np.array([0, 0, 0])], [np.array([0, 1, 1])], [5], 5)
    assert row["segments"].tolist() == [1, 1, 1, 0, 0]
    assert row["loss_weights"].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "mask_sizes", "index", "message"),
    [
        ([3], [3], [1, 2], "1 token arrays, 1 loss masks and 2 example indices"),
        ([3, 0], [3, 0], [1, 2], "example 2 has no tokens"),
        ([3, 2], [3, 3], [1, 2], "example 2 has 2 tokens but a mask of 3"),
        ([3], [3], [-1], "example index -1 is negative"),
        ([5, 5], [5, 5], [1, 2], r"examples \[1, 2\] of \[5, 5\] tokens make 10, more than .* 8"),
    ],
)
def test_layout_errors(sizes, mask_sizes, index, message):
    ids, masks = [np.ones(n, int) for n in sizes], [np.ones(n, bool) for n in mask_sizes]
    with pytest.raises(ValueError, match=message):
        packing.layout(ids, masks, index, 8)
