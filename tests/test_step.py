"""The train step's properties on a tiny Qwen3: masks, micro-batches, frozen roles, compilations, schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import step as steps
from wmss_jax.objectives import Linear, LogitMix, Sft

MODEL = tiny.model()
TX = optax.adamw(1e-3)
SGD = optax.sgd(0.1)


@functools.cache
def train(objective, n=3, micro_batches=1, trained=("strong",), model=MODEL, tx=TX):
    roles = {"strong": tiny.params(model, 0), "weak": tiny.params(model, 1)}
    state = wmss.init_state({role: roles[role] for role in trained}, tx)
    frozen = {role: p for role, p in roles.items() if role not in trained and role in objective.roles}
    step = wmss.make_train_step(model, objective, tx, micro_batches=micro_batches, donate=False)
    history = []
    for i in range(n):
        state, metrics = step(state, frozen, tiny.batch(seed=i))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history, step


@functools.partial(jax.jit, static_argnums=0)
def loss(objective, params, batch):
    return wmss.loss(MODEL, objective, {}, params, batch)[0]


def dense_loss(objective, params, batch, model=MODEL):
    """The oracle: whole logits, plain autodiff."""
    z = {role: model.logits(p, batch["tokens"]).reshape(-1, 96) for role, p in params.items()}
    losses_N, _ = objective(z, jnp.asarray(batch["targets"]).reshape(-1), wmss.objectives.Context(jnp.int32(0), None))
    weights_N = batch["loss_weights"].reshape(-1)
    return jnp.sum(losses_N * weights_N) / jnp.sum(weights_N)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("objective", [Sft(), LogitMix(0.3)])
def test_loss_and_gradients_equal_the_dense_oracle(objective, tied):
    model, batch = tiny.model(tied=tied), tiny.batch()
    params = {role: tiny.params(model, seed) for seed, role in enumerate(objective.roles)}
    chunked = lambda p: wmss.loss(model, objective, p, {}, batch, chunk_tokens=50)[0]
    value, grads = jax.jit(jax.value_and_grad(chunked))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: dense_loss(objective, p, batch, model)))(params)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), grads, expected_grads)


def test_lambda_one_trains_like_sft_bit_for_bit():
    mixed, mixed_history, _ = train(LogitMix(1.0))
    plain, plain_history, _ = train(Sft())
    assert mixed_history == plain_history
    jax.tree.map(np.testing.assert_array_equal, mixed.params, plain.params)


def test_lambda_zero_leaves_the_strong_role_without_gradient():
    _, history, _ = train(LogitMix(0.0), n=1)
    assert history[0]["grad_norm"] == 0.0 and history[0]["loss"] > 0


def test_constant_weak_logits_equal_scaled_strong_logits():
    batch = tiny.batch()
    flat = tiny.params(MODEL, 1) | {"unembed": jnp.zeros((32, 96))}
    strong = {"strong": tiny.params(MODEL, 0)}
    value = loss(LogitMix(0.4), {**strong, "weak": flat}, batch)
    scaled = {"strong": strong["strong"] | {"unembed": 0.4 * strong["strong"]["unembed"]}}
    expected = loss(Sft(), scaled, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("objective", [Sft(), LogitMix(0.5)])
@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_do_not_change_the_step(objective, micro_batches):
    """Rows have very unequal token counts, so a mean of means would differ."""
    whole, whole_history, _ = train(objective, n=2, tx=SGD)  # plain gradients: Adam would blow up rounding near zero
    split, split_history, _ = train(objective, n=2, tx=SGD, micro_batches=micro_batches)
    for a, b in zip(whole_history, split_history, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, split.params)


def test_packed_equals_unpacked():
    """Per-token losses of examples packed in one row are those of the examples alone."""
    rng = np.random.default_rng(3)
    examples = [rng.integers(0, 96, n).astype(np.int32) for n in (9, 7, 6)]
    row = wmss.packing.layout(examples, [np.ones(len(x), bool) for x in examples], [0, 1, 2], seq_len=24)
    packed = {key: value[None] for key, value in row.items()}
    params = tiny.params(MODEL)
    score = jax.jit(functools.partial(wmss.score, MODEL))
    scores = score(params, packed)
    for index, tokens in enumerate(examples):
        alone = {"tokens": tokens[None], "targets": np.roll(tokens, -1)[None],
                 "loss_weights": np.ones((1, len(tokens)), np.float32)}  # fmt: skip
        expected = score(params, alone)
        mine = packed["example_index"] == index
        for name in ("nll", "entropy"):
            np.testing.assert_allclose(scores[name][mine][:-1], expected[name][0, :-1], rtol=1e-5, atol=1e-5)


def test_frozen_role_is_bit_identical_after_training_and_the_trained_one_is_not():
    weak = tiny.params(MODEL, 1)
    before = jax.tree.map(np.array, weak)
    state = wmss.init_state({"strong": tiny.params(MODEL, 0)}, TX)
    step = wmss.make_train_step(MODEL, LogitMix(), TX)
    for seed in range(3):
        state, _ = step(state, {"weak": weak}, tiny.batch(seed=seed))
    jax.tree.map(np.testing.assert_array_equal, before, weak)
    both, _, _ = train(LogitMix(), trained=("strong", "weak"))
    assert all(
        (a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(both.params["weak"]), strict=True)
    )


def test_one_compilation_per_shape_also_with_a_schedule_of_lambda():
    _, history, step = train(LogitMix(Linear(1.0, 0.5, 4)), n=5)
    assert step._cache_size() == 1
    assert len({row["loss"] for row in history}) == 5


def test_a_schedule_of_lambda_reaches_the_loss():
    """Same batch, learning rate 0: only λ moves, and the loss follows it."""
    batch, tx = tiny.batch(), optax.sgd(0.0)
    strong, weak = tiny.params(MODEL, 0), tiny.params(MODEL, 1)
    state = wmss.init_state({"strong": strong}, tx)
    step = wmss.make_train_step(MODEL, LogitMix(Linear(1.0, 0.0, 4)), tx, donate=False)
    for lam in (1.0, 0.75, 0.5):
        state, metrics = step(state, {"weak": weak}, batch)
        expected = loss(LogitMix(lam), {"strong": strong, "weak": weak}, batch)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_donation_frees_the_old_state():
    state = wmss.init_state({"strong": tiny.params(MODEL, 0)}, TX)
    old = state.params["strong"]["embed"]
    wmss.make_train_step(MODEL, Sft(), TX)(state, {}, tiny.batch())
    assert old.is_deleted()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_not_results(remat):
    value_and_grad = lambda model: jax.jit(
        jax.value_and_grad(lambda p: wmss.loss(model, Sft(), p, {}, tiny.batch())[0])
    )({"strong": tiny.params(MODEL)})
    plain, again = value_and_grad(MODEL), value_and_grad(dataclasses.replace(MODEL, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)


def test_bfloat16_compute_keeps_float32_parameters_and_stays_close():
    half, history, _ = train(LogitMix(), model=dataclasses.replace(MODEL, compute_dtype="bfloat16"))
    _, expected, _ = train(LogitMix())
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose([r["loss"] for r in history], [r["loss"] for r in expected], rtol=2e-2)
    assert [r["loss"] for r in history] != [r["loss"] for r in expected]


def test_eval_step_is_the_loss_without_a_step():
    params = {"strong": tiny.params(MODEL), "weak": tiny.params(MODEL, 1)}
    metrics = wmss.make_eval_step(MODEL, LogitMix())(params, tiny.batch())
    expected = loss(LogitMix(), params, tiny.batch())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["loss_tokens"] == tiny.batch()["loss_weights"].sum()


def test_left_out_positions_restart_in_every_segment():
    batch = {**tiny.batch(rows=1, T=8), "segments": np.array([[1, 1, 1, 2, 2, 3, 0, 0]], np.int32)}
    np.testing.assert_array_equal(steps.complete(batch)["positions"], [[0, 1, 2, 0, 1, 0, 0, 1]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss_weights": None}, "missing: loss_weights"),
        ({"positions": np.zeros((8, 5), np.int32)}, r"must all be \[B, T\]"),
    ],
)
def test_a_malformed_batch_is_refused(change, message):
    batch = {key: value for key, value in {**tiny.batch(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        wmss.loss(MODEL, Sft(), {"strong": tiny.params(MODEL)}, {}, batch)


def test_missing_role_and_differing_vocabularies_are_refused_before_anything_is_compiled():
    strong = {"strong": tiny.params(MODEL)}
    with pytest.raises(ValueError, match=r"LogitMix needs the roles \['strong', 'weak'\].*\['weak'\]"):
        wmss.loss(MODEL, LogitMix(), strong, {}, tiny.batch())
    other = tiny.model(vocab_size=120)
    with pytest.raises(
        ValueError, match=r"vocabularies of two roles differ: strong has \(96, 96\), weak has \(120, 120\)"
    ):
        wmss.loss({"strong": MODEL, "weak": other}, LogitMix(), strong, {"weak": tiny.params(other)}, tiny.batch())


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        train(Sft(), n=1, micro_batches=3)


def test_roles_of_different_sizes_share_a_step():
    small = tiny.model(num_layers=1, hidden_size=16)
    models = {"strong": MODEL, "weak": small}
    params, frozen = {"strong": tiny.params(MODEL)}, {"weak": tiny.params(small)}
    of = lambda p: wmss.loss(models, LogitMix(), p, frozen, tiny.batch())[0]
    value, grads = jax.jit(jax.value_and_grad(of))(params)
    assert np.isfinite(value) and optax.tree.norm(grads) > 0
