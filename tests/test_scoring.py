"""Scores of examples: packed as alone, on a mesh as on one device, and only for their own data."""

import functools
import json
from types import SimpleNamespace

import chats
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import recipes
import tiny

from wmss_jax import curriculum, data, epochs, scoring, sharding, step

MODEL = tiny.model(vocab_size=400)
LONGEST = 48


pytestmark = pytest.mark.usefixtures("compiled_once")


def prepared(root, tokenizer=None, n=21):
    """Questions with answers of very unequal length."""
    rng = np.random.default_rng(0)
    recipes.rows(
        root / "qa.jsonl",
        [{"question": f"{i} + 1", "answer": "apples " * rng.integers(1, 12) + str(i)} for i in range(n)],
    )
    return data.prepare(
        [SimpleNamespace(path="qa.jsonl")], tokenizer or chats.plain(), root=root, seq_len=LONGEST, cache_dir=root / "c"
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("scoring"))


def score(dataset, mesh=None, params=None, **settings):
    params = tiny.params(MODEL) if params is None else params
    return scoring.score(MODEL, params, dataset, seq_len=LONGEST, batch_size=4, mesh=mesh, **settings)


@pytest.fixture(scope="module")
def scores(dataset):
    return score(dataset)


@functools.cache
def logits_of():
    return jax.jit(functools.partial(MODEL.logits, tiny.params(MODEL)))


def alone(dataset, index):
    """(entropy, nll, margin, tokens) of one example from its whole logits, in a row of its own, in numpy."""
    tokens, mask = dataset.tokens(index), dataset.mask(index)
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(tokens)] = tokens
    logits_TV = np.asarray(logits_of()(jnp.asarray(padded))[0], np.float64)
    predicting = np.flatnonzero(mask) - 1
    z_NV, targets_N = logits_TV[predicting], tokens[predicting + 1]
    p_NV = np.exp(z_NV - z_NV.max(axis=1, keepdims=True))
    p_NV /= p_NV.sum(axis=1, keepdims=True)
    right_N = z_NV[np.arange(len(targets_N)), targets_N]
    others_N = (z_NV.sum(axis=1) - right_N) / (z_NV.shape[1] - 1)
    nll_N = -np.log(p_NV[np.arange(len(targets_N)), targets_N])
    entropy_N = -(p_NV * np.log(p_NV)).sum(axis=1)
    return entropy_N.mean(), nll_N.mean(), (right_N - others_N).mean(), len(targets_N)


def test_packed_examples_score_as_each_alone(dataset, scores):
    rows = epochs.plan(dataset.lengths, seq_len=LONGEST, batch_size=4, seed=0, epochs=1)
    assert max(len(row) for step in range(rows.total_steps) for row in rows.rows_of(step)) >= 2
    for index in range(len(dataset)):
        mine = [column[index] for column in scores]
        np.testing.assert_allclose(mine, alone(dataset, index), rtol=1e-5, atol=1e-5)
    assert scores.n_tokens.sum() == dataset.report.trained_tokens


def test_a_mesh_scores_as_one_device(dataset, scores):
    mesh = sharding.make_mesh(2, 2, 2)
    found = score(dataset, mesh, tiny.sharded(MODEL, 0, mesh))
    for mine, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


def test_unshifted_takes_the_entropy_one_position_late_and_nothing_else(dataset, scores):
    late = score(dataset, shifted=False)
    assert not np.allclose(late.entropy, scores.entropy, rtol=1e-3)
    for name in ("nll", "margin", "n_tokens"):
        np.testing.assert_array_equal(getattr(late, name), getattr(scores, name))


@pytest.mark.parametrize("shifted", [True, False])
def test_what_is_scored_is_all_that_the_means_need(dataset, shifted):
    found = score(dataset, shifted=shifted)
    plan = epochs.plan(dataset.lengths, seq_len=LONGEST, batch_size=4, seed=0, epochs=1)
    for batch in data.batches(dataset, plan):
        values = jax.device_get(step.score(MODEL, tiny.params(MODEL), batch))  # of every position
        for name in values:
            index, means, _ = curriculum.example_means(
                values[name], batch["loss_weights"], batch["example_index"], shifted=shifted or name != "entropy"
            )
            np.testing.assert_allclose(getattr(found, name)[index], means, rtol=1e-6, atol=1e-6)


# -- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path, dataset, scores):
    scoring.write(tmp_path / "new/scores.parquet", scores, dataset, "abc", True)
    return tmp_path / "new/scores.parquet"


def test_parquet_round_trip(file, dataset, scores):
    for got, expected in zip(scoring.read(file, dataset), scores, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert [path.name for path in file.parent.iterdir()] == ["scores.parquet"]
    table = pq.read_table(file)  # for others to read
    assert table.column_names == ["example", "entropy", "nll", "margin", "n_tokens"]
    assert json.loads(table.schema.metadata[b"wmss_jax"])["model"] == "abc"


def test_rows_in_another_order_are_put_back(file, dataset, scores):
    table = pq.read_table(file)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), file)
    np.testing.assert_array_equal(scoring.read(file, dataset).nll, scores.nll)


def test_scores_of_other_data_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"scores\.parquet: scores of another data set \(\w+, here \w+\); score again"):
        scoring.read(file, prepared(tmp_path, n=20))


def test_scores_with_another_tokenizer_are_refused(file, dataset, tmp_path):
    same_tokens = chats.plain()
    same_tokens.chat_template += "{# another template #}"
    other = prepared(tmp_path, same_tokens)
    assert other.fingerprint == dataset.fingerprint
    with pytest.raises(ValueError, match=r"scores\.parquet: scores of another tokenizer .*; score again"):
        scoring.read(file, other)


@pytest.mark.parametrize("damage", ["missing", "twice"])
def test_scores_that_are_not_one_an_example_are_refused(file, dataset, damage):
    table = pq.read_table(file)
    n = len(table)
    rows = {"missing": [*range(3), *range(5, n)], "twice": [*range(n), 4]}[damage]
    pq.write_table(table.take(rows), file)
    expected = {
        "missing": rf"no scores for 2 of {n} examples, e\.g\. \[3, 4\]; score again",
        "twice": rf"more than one score for 1 of {n} examples, e\.g\. \[4\]; score again",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        scoring.read(file, dataset)


@pytest.mark.parametrize("damage", ["empty", "torn", "a flipped bit", "of somebody else"])
def test_what_is_no_intact_file_of_scores_is_refused(file, dataset, damage):
    content = bytearray(file.read_bytes())
    if damage == "of somebody else":
        pq.write_table(pq.read_table(file).select(["nll"]).replace_schema_metadata({}), file)
    elif damage == "a flipped bit":
        # Of a number whose bytes compression left together; the extremes are in the footer, too, which has no checksum.
        places = [content.find(nll.tobytes()) for nll in np.sort(scoring.read(file, dataset).nll)[1:-1]]
        content[max(places)] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: {"empty": 0, "torn": 300}[damage]])
    with pytest.raises(ValueError, match=r"^\S*scores\.parquet: .*; score again$"):
        scoring.read(file, dataset)
