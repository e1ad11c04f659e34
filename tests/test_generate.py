"""Decoding with a cache equals the full forward pass; greedy generation around it."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmss_jax as wmss
from wmss_jax import generate as generation
from wmss_jax import sharding
from wmss_jax.generate import generate

QWEN3 = Path(__file__).parent / "golden" / "qwen3"
MODEL, PARAMS = wmss.load(QWEN3 / "untied")
VOCAB = 120
LENGTHS = [1, 7, 3, 30, 12, 2, 20, 5, 31, 32, 9]  # of the prompts: one bucket, so one program


def prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


forward = jax.jit(functools.partial(MODEL.logits, PARAMS))


def one_by_one(prompt, max_new_tokens, stop_ids=()):
    """The oracle: the whole sequence again for every token, no cache and no padding."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        # A fixed length, so that it compiles once; what follows a token cannot change its logits.
        padded_BT = jnp.array([tokens + [0] * (64 - len(tokens))], jnp.int32)
        token = int(jnp.argmax(forward(padded_BT)[0, len(tokens) - 1]))
        if token in stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def continued():
    """The continuations of `prompts()` by 16 tokens, made in one batch."""
    return generate(MODEL, PARAMS, prompts(), max_new_tokens=16, stop_ids=())


# -- the cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "chunk"), [("untied", 1), ("tied", 3)])
def test_decoding_in_pieces_equals_the_full_forward_at_every_position(name, chunk):
    """Prompts of 2, 5 and 9 tokens read at once, the rest `chunk` tokens at a time, rows apart."""
    model, params = wmss.load(QWEN3 / name)
    tokens_BT = np.random.default_rng(1).integers(0, 96, (3, 24)).astype(np.int32)
    expected_BTD = np.asarray(jax.jit(model.hidden)(params, tokens_BT))
    starts_B = np.array([2, 5, 9])
    decode = jax.jit(model.decode)

    read_BT = np.where(np.arange(9)[None] < starts_B[:, None], tokens_BT[:, :9], 0)
    positions_BT = np.broadcast_to(np.arange(9, dtype=np.int32), (3, 9))
    cache = model.empty_cache(3, 24, "float32")
    hidden_BTD, cache = decode(params, read_BT, positions_BT, cache)
    for row, start in enumerate(starts_B):
        expected = expected_BTD[row, :start]
        np.testing.assert_allclose(hidden_BTD[row, :start], expected, atol=1e-4)

    rows_B1 = np.arange(3)[:, None]
    for step in range(0, 15, chunk):
        positions_BT = (starts_B[:, None] + step + np.arange(chunk)[None]).astype(np.int32)
        hidden_BTD, cache = decode(params, tokens_BT[rows_B1, positions_BT], positions_BT, cache)
        np.testing.assert_allclose(hidden_BTD, expected_BTD[rows_B1, positions_BT], atol=1e-4)


def test_a_cache_in_another_dtype_keeps_the_activations_dtype():
    cache = MODEL.empty_cache(2, 8, "bfloat16")
    tokens_BT = np.arange(8, dtype=np.int32).reshape(2, 4)
    positions_BT = np.broadcast_to(np.arange(4, dtype=np.int32), (2, 4))
    hidden_BTD, cache = jax.jit(MODEL.decode)(PARAMS, tokens_BT, positions_BT, cache)
    assert hidden_BTD.dtype == jnp.float32 and cache.k_BSKH.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden_BTD, jax.jit(MODEL.hidden)(PARAMS, tokens_BT), atol=0.3)


# -- greedy continuations ----------------------------------------------------------------------


def test_the_continuation_is_that_of_transformers():
    expected = np.load(QWEN3 / "untied" / "golden.npz")
    (tokens,) = generate(MODEL, PARAMS, expected["prompt"].tolist(), max_new_tokens=16, stop_ids=())
    assert tokens == expected["generated"].tolist()


def test_the_continuations_are_those_of_the_full_forward(continued):
    for prompt, tokens in zip(prompts(), continued, strict=True):
        assert tokens == one_by_one(prompt, 16)


def test_batch_composition_and_order_do_not_change_results(continued):
    """Batches of 3, the last of them with a row of filling."""
    order = np.random.default_rng(3).permutation(len(LENGTHS))
    shuffled = [prompts()[index] for index in order]
    results = generate(MODEL, PARAMS, shuffled, max_new_tokens=16, stop_ids=(), batch_size=3)
    assert results == [continued[index] for index in order]


def test_rows_end_before_their_first_stop_token(continued):
    stop_ids = {continued[0][0], continued[3][5], continued[5][15]}
    results = generate(MODEL, PARAMS, prompts(), max_new_tokens=16, stop_ids=stop_ids)
    for whole, result in zip(continued, results, strict=True):
        cut = next((i for i, token in enumerate(whole) if token in stop_ids), 16)
        assert result == whole[:cut]
    assert results[0] == []


def test_the_loop_ends_when_all_rows_have_stopped(continued):
    """Columns after the last row's stop token are never written."""
    lengths_B = np.array([len(prompts()[3]), 0], np.int32)  # the second row is filling
    tokens_BT = np.zeros((2, 32), np.int32)
    tokens_BT[0, : lengths_B[0]] = prompts()[3]
    first = continued[3].index(continued[3][2])
    stop = np.array([continued[3][first]], np.int32)
    out_BT = generation._continue(
        PARAMS,
        tokens_BT,
        lengths_B,
        stop,
        model=MODEL,
        max_new_tokens=16,
        mesh=None,
        pick=generation.greedy,
    )
    assert out_BT[0, : first + 1].tolist() == continued[3][: first + 1]
    assert not np.any(out_BT[:, first + 1 :])


def test_one_new_token_is_the_shortest_continuation(continued):
    results = generate(MODEL, PARAMS, prompts(), max_new_tokens=1, stop_ids=())
    assert results == [tokens[:1] for tokens in continued]


def test_padded_vocabulary_rows_are_never_generated():
    padded = dataclasses.replace(MODEL, vocab_size=9)
    few = [[token % 9 for token in prompt] for prompt in prompts()]
    assert max(map(max, generate(MODEL, PARAMS, few, max_new_tokens=16, stop_ids=()))) >= 9
    assert max(map(max, generate(padded, PARAMS, few, max_new_tokens=16, stop_ids=()))) < 9


def test_of_equal_logits_the_lowest_id_is_taken():
    assert generation.greedy(jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


def test_bfloat16_runs_in_its_own_dtype():
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    results = generate(model, PARAMS, prompts([3, 4]), max_new_tokens=4, stop_ids=())
    assert [len(tokens) for tokens in results] == [4, 4]


def test_no_prompts_no_results():
    assert generate(MODEL, PARAMS, [], max_new_tokens=4, stop_ids=()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 120]]}, "prompt 0 holds token ids from 1 to 120; the model has 0 to 119"),
        ({"prompts": [[-1]]}, "prompt 0 holds token ids from -1 to -1"),
        ({"max_new_tokens": 0}, "must be >= 1, got 0 and 64"),
        ({"batch_size": 0}, "must be >= 1, got 4 and 0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 4, "stop_ids": (), **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(MODEL, PARAMS, **arguments)


# -- compilations and sharding -----------------------------------------------------------------


def test_compilations_are_bounded_by_buckets():
    """47 prompts of 1 to 47 tokens and again in another order: buckets 32 and 64, two programs."""
    many = prompts(range(1, 48))
    before = generation._continue._cache_size()
    results = generate(MODEL, PARAMS, many, max_new_tokens=3, stop_ids={1}, batch_size=8)
    generate(MODEL, PARAMS, many[::-1], max_new_tokens=3, stop_ids={2}, batch_size=8)
    assert generation._continue._cache_size() - before == 2
    assert results == [one_by_one(prompt, 3, {1}) for prompt in many]


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)])
def test_sharded_equals_unsharded(continued, axes):
    """Batches of 3 become as many rows as the mesh has batch shards, 8 or 4."""
    mesh = wmss.make_mesh(*axes)
    sharded = jax.device_put(PARAMS, MODEL.shardings(mesh))
    results = generate(MODEL, sharded, prompts(), max_new_tokens=16, stop_ids=(), mesh=mesh, batch_size=3)
    assert results == continued


def test_no_device_gathers_the_cache_or_the_logits():
    """Told by sizes: batch 16, cache 32 + 9 = 41, 2 kv heads of 12, vocabulary 120."""
    mesh = wmss.make_mesh(2, 2, 2)
    params = jax.device_put(PARAMS, MODEL.shardings(mesh))
    (batch,) = generation._batches(prompts([5] * 16), 16, sharding.batch_shards(mesh))
    lowered = generation._continue.lower(
        params,
        generation._placed(batch.tokens_BT, mesh),
        generation._placed(batch.lengths_B, mesh),
        np.array([1], np.int32),
        model=MODEL,
        max_new_tokens=9,
        mesh=mesh,
        pick=generation.greedy,
    )
    hlo = lowered.compile().as_text()
    assert re.search(r"f32\[3,4,41,1,12\]", hlo), "the cache is split over batch and kv heads"
    moved = re.findall(r"= \(?f32\[([\d,]*)\][^=]*(?:all-gather|all-reduce|all-to-all|permute)\(", hlo)
    assert moved
    shapes = [tuple(map(int, shape.split(","))) for shape in moved if shape]
    assert not [shape for shape in shapes if 41 in shape or shape == (16, 120)], shapes
