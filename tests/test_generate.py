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
from wmss_jax import decoding, sampling
from wmss_jax import generate as generation
from wmss_jax.generate import generate
from wmss_jax.models import ARCHS

QWEN3 = Path(__file__).parent / "golden" / "qwen3"
MODEL, PARAMS = wmss.load(QWEN3 / "untied")
VOCAB = 120
STOP_IDS = {3, 17, 40, 41, 77, 90}
LIMITS = decoding.Limits(np.array([1], np.int32), np.int32(9))
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
    assert hidden_BTD.dtype == jnp.float32 and cache[0].k_BKHS.dtype == jnp.bfloat16
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


def test_the_program_ends_when_enough_rows_have_stopped(continued, monkeypatch):
    """Two rows that stop at their third token and one that does not: no row is given more than they are."""
    seen = []
    advance = decoding.advance
    monkeypatch.setattr(decoding, "advance", lambda *a, **k: seen.append(advance(*a, **k)) or seen[-1])
    stop = continued[3][2]
    first = continued[3].index(stop)
    assert generate(MODEL, PARAMS, [prompts()[3]] * 2, max_new_tokens=16, stop_ids={stop}) == [continued[3][:first]] * 2
    assert len(seen) == 1 and seen[0].made_B.tolist() == [first + 1] * 2
    assert not np.any(seen[0].out_BM[:, first + 1 :])


def test_one_new_token_is_the_shortest_continuation(continued):
    results = generate(MODEL, PARAMS, prompts(), max_new_tokens=1, stop_ids=())
    assert results == [tokens[:1] for tokens in continued]


def test_padded_vocabulary_rows_are_never_generated():
    padded = dataclasses.replace(MODEL, vocab_size=9)
    few = [[token % 9 for token in prompt] for prompt in prompts()]
    assert max(map(max, generate(MODEL, PARAMS, few, max_new_tokens=16, stop_ids=()))) >= 9
    assert max(map(max, generate(padded, PARAMS, few, max_new_tokens=16, stop_ids=()))) < 9


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
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": [-1]}, "seeds must be 0 to 2**32 - 1, got -1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 4, "stop_ids": (), **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(MODEL, PARAMS, **arguments)


FAMILIES = sorted((QWEN3.parent).glob("*/*/golden.npz"))
FAMILIES = list(
    {file.parent.parent.name: file.parent for file in FAMILIES if file.parent.parent.name in ARCHS}.values()
)


@pytest.mark.slow
@pytest.mark.parametrize("directory", FAMILIES, ids=lambda directory: directory.parent.name)
def test_every_family_continues_as_its_full_forward_does(directory):
    """Through two slots, so that prompts of different lengths stand side by side and rows are filled again."""
    model, params = wmss.load(directory, dtype="float32")
    rng, vocab = np.random.default_rng(0), model.vocabulary[0]
    some = [rng.integers(0, vocab, length).tolist() for length in (3, 40, 17, 9)]
    results = generate(model, params, some, max_new_tokens=20, stop_ids=(), batch_size=2)
    whole = jax.jit(model.logits)
    for prompt, tokens in zip(some, results, strict=True):
        row = prompt + tokens
        z_TV = np.asarray(whole(params, np.array([row + [0] * (64 - len(row))], np.int32)))[0, len(prompt) - 1 :]
        for token, z_V in zip(tokens, z_TV, strict=False):
            assert z_V[token] >= z_V.max() - 1e-4


# -- compilations and sharding -----------------------------------------------------------------


def test_compilations_are_bounded_by_buckets():
    """47 prompts of 1 to 47 tokens and again in another order: read in buckets 32 and 48, continued by one program."""
    many = prompts(range(1, 48))
    before = decoding.read._cache_size(), decoding.advance._cache_size()
    results = generate(MODEL, PARAMS, many, max_new_tokens=3, stop_ids={1}, batch_size=8)
    generate(MODEL, PARAMS, many[::-1], max_new_tokens=4, stop_ids={2, 3}, batch_size=8)
    assert (decoding.read._cache_size() - before[0], decoding.advance._cache_size() - before[1]) == (2, 1)
    assert results == [one_by_one(prompt, 3, {1}) for prompt in many]


@pytest.mark.parametrize(
    ("n", "padded"), [(1, 32), (32, 32), (33, 48), (48, 48), (49, 64), (65, 96), (97, 128), (129, 192), (1500, 1536)]
)
def test_buckets_are_at_most_half_too_long(n, padded):
    assert generation.bucket(n) == padded


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)])
def test_sharded_equals_unsharded(continued, axes):
    """Batches of 3 become as many rows as the mesh has batch shards, 8 or 4."""
    mesh = wmss.make_mesh(*axes)
    sharded = jax.device_put(PARAMS, MODEL.shardings(mesh))
    results = generate(MODEL, sharded, prompts(), max_new_tokens=16, stop_ids=(), mesh=mesh, batch_size=3)
    assert results == continued


def test_no_device_gathers_the_cache_or_the_logits():
    """Told by sizes: batch 16, cache 40, 2 kv heads of 12, vocabulary 120."""
    mesh = wmss.make_mesh(2, 2, 2)
    params = jax.device_put(PARAMS, MODEL.shardings(mesh))
    for kind in (sampling.Kind(), sampling.Kind(True, True, True)):
        program = decoding.Program(MODEL, kind, mesh)
        slots = decoding.empty(params, program=program, B=16, S=40, M=32)
        rest = (np.zeros(16, bool), np.int32(9), np.int32(0), LIMITS, sampling.GREEDY.numbers)
        hlo = decoding.advance.lower(params, slots, *rest, program=program).compile().as_text()
        moved = re.findall(r"= \(?f32\[([\d,]*)\][^=]*(?:all-gather|all-reduce|all-to-all|permute)\(", hlo)
        assert moved
        shapes = [tuple(map(int, shape.split(","))) for shape in moved if shape]
        assert not [shape for shape in shapes if (40 in shape and 12 in shape) or shape == (16, 120)], shapes
        cache = slots.caches[0].k_BKHS
        assert cache.addressable_shards[0].data.size == cache.size / 8, "the cache is split over batch and kv heads"


# -- refilling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [sampling.GREEDY, sampling.Sampling(temperature=1.0, top_k=30, samples=2)])
def test_rows_that_are_filled_again_continue_as_if_alone(settings):
    """22 or 44 continuations of very different lengths through 4 slots, and the same through one slot for each."""
    arguments = {"max_new_tokens": 24, "stop_ids": STOP_IDS, "sampling": settings}
    many = prompts(LENGTHS * 2, seed=5)
    refilled = list(generation.stream(MODEL, PARAMS, many, batch_size=4, **arguments))
    together = generate(MODEL, PARAMS, many, batch_size=64, **arguments)
    assert sorted(refilled) != refilled, "what finishes first comes first"
    assert [c.tokens for c in sorted(refilled)] == together
    lengths = [len(tokens) for tokens in together]
    assert min(lengths) < 5 and max(lengths) == 24, "some rows are filled again while others go on"
    assert {c.finish for c in refilled} == {"stop", "length"}


def test_at_one_batch_shape_logits_do_not_depend_on_slot_or_neighbours(monkeypatch):
    """Bitwise: the logits that a row's tokens are taken from, whatever else is in the batch and wherever it is."""
    seen = {}
    pick = sampling.pick

    def record(kind, numbers, logits_BV, draws):
        note = lambda z, seeds, at: [seen.setdefault((s, p), set()).add(row.tobytes()) for s, p, row in zip(
            seeds.tolist(), at.tolist(), np.asarray(z), strict=True)]  # fmt: skip
        jax.debug.callback(note, logits_BV, draws.seeds_B, draws.positions_B)
        return pick(kind, numbers, logits_BV, draws)

    monkeypatch.setattr(sampling, "pick", record)
    model = dataclasses.replace(MODEL, vocab_size=119)  # a program of its own, which records
    many = [[token % 119 for token in prompt] for prompt in prompts(LENGTHS)]
    seeds = np.arange(1, 12)
    for order in (np.arange(11), np.random.default_rng(0).permutation(11)):
        generate(
            model, PARAMS, [many[i] for i in order], max_new_tokens=6, stop_ids=(), batch_size=4,
            seeds=seeds[order].tolist(),
        )  # fmt: skip
    jax.effects_barrier()
    wanted = [(seed, length + n) for seed, length in zip(seeds.tolist(), LENGTHS, strict=True) for n in range(6)]
    assert [len(seen[key]) for key in wanted] == [1] * len(wanted)


def test_other_batch_sizes_change_tokens_only_where_two_are_as_likely():
    """Of 200 continuations at batch sizes 2, 8 and 64 at least 99 % agree; else the best two logits are within 1e-4."""
    many = prompts(np.random.default_rng(2).integers(1, 32, 100), seed=7)
    results = [generate(MODEL, PARAMS, many, max_new_tokens=8, stop_ids=(), batch_size=size) for size in (64, 8, 2)]
    different = [(i, other) for other in results[1:] for i in range(100) if other[i] != results[0][i]]
    assert len(different) <= 0.01 * 200
    for i, other in different:
        at = next(n for n in range(8) if other[i][n] != results[0][i][n])
        tokens = many[i] + results[0][i][:at]
        z = np.sort(np.asarray(forward(jnp.array([tokens + [0] * (64 - len(tokens))], jnp.int32))[0, len(tokens) - 1]))
        assert z[-1] - z[-2] < 1e-4


# -- streaming and ends ----------------------------------------------------------------------------


def test_pieces_come_while_it_is_made(continued):
    pieces = list(generation.stream(MODEL, PARAMS, prompts()[:1], max_new_tokens=16, stop_ids=(), every=3))
    assert [len(piece.tokens) for piece in pieces] == [4, 7, 10, 13, 16]
    assert [piece.finish for piece in pieces] == [None] * 4 + ["length"]
    assert all(piece.tokens == continued[0][: len(piece.tokens)] for piece in pieces)


def test_a_continuation_ends_with_the_first_token_that_completes_it(continued):
    """Asked of every token although the host looks only now and then; freed rows are filled again."""
    pair = continued[3][4:6]
    found = generation.stream(
        MODEL, PARAMS, prompts(), max_new_tokens=16, stop_ids=(), batch_size=4, ends=lambda tokens: tokens[-2:] == pair
    )
    for completion in found:
        whole = continued[completion.prompt]
        cut = next((n for n in range(2, 17) if whole[n - 2 : n] == pair), 16)
        assert completion.tokens == whole[:cut]
        assert completion.finish == ("text" if whole[cut - 2 : cut] == pair else "length")
