"""The chunked head against dense oracles: padding, tying, dtypes, noise keys, scores."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmss_jax import diagnostics, head, sharding
from wmss_jax.objectives import Context, LogitMix, entropy, nll

D, V, ROWS, T = 8, 20, 4, 6
TRAINED = frozenset({"strong", "weak"})


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)
    hiddens = {"strong": draw(ROWS, T, D), "weak": draw(ROWS, T, D)}
    unembeds = {"strong": draw(D, V), "weak": draw(D, V)}
    targets = jnp.asarray(rng.integers(0, 15, (ROWS, T)), jnp.int32)
    weights = jnp.asarray(rng.random((ROWS, T)) * (rng.random((ROWS, T)) < 0.6), jnp.float32)
    index = jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.int32)[:, None], (ROWS, T))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (ROWS, T))
    return hiddens, unembeds, head.Tokens(targets, weights, index, positions)


def run(objective, hiddens, unembeds, tokens, **settings):
    def value(unembeds, hiddens):
        return head.loss(objective, unembeds, hiddens, tokens, trainable=TRAINED, step=jnp.int32(0),
                         settings=head.Settings(**settings))  # fmt: skip

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(unembeds, hiddens)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk_tokens", [3, 7, 24])
def test_padded_vocabulary_is_a_smaller_vocabulary(lam, chunk_tokens):
    """Rows beyond vocab_size change neither value nor gradients, and get none themselves."""
    hiddens, unembeds, tokens = inputs()
    real = {role: W[:, :15] for role, W in unembeds.items()}
    huge = {role: W.at[:, 15:].set(1e3) for role, W in unembeds.items()}
    (value, metrics), (dW, dh) = run(LogitMix(lam), hiddens, huge, tokens, vocab_size=15, chunk_tokens=chunk_tokens)
    (expected, expected_metrics), (dW_real, dh_real) = run(LogitMix(lam), hiddens, real, tokens)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert metrics == expected_metrics
    for role in TRAINED:
        np.testing.assert_allclose(dW[role][:, :15], dW_real[role], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(dW[role][:, 15:], 0.0)
        np.testing.assert_allclose(dh[role], dh_real[role], rtol=1e-5, atol=1e-6)


def test_bfloat16_hidden_states_accumulate_head_gradients_in_float32():
    """dW of many tiny chunks equals dW of one chunk: were it rounded to bfloat16 in between, it would not."""
    hiddens, unembeds, tokens = inputs(jnp.bfloat16)
    unembeds = jax.tree.map(lambda W: W.astype(jnp.float32), unembeds)
    (_, (dW_one, _)), (_, (dW_many, _)) = (
        run(LogitMix(), hiddens, unembeds, tokens, chunk_tokens=chunk) for chunk in (24, 1)
    )
    assert dW_one["strong"].dtype == jnp.float32
    rounded = dW_one["strong"].astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != dW_one["strong"]).mean() > 0.9, "nor at the end: the parameters are float32"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), dW_one, dW_many)


@dataclasses.dataclass(frozen=True)
class Noisy:
    """nll of noisy logits: the noise must follow the token, not its place in a chunk."""

    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __call__(self, logits, targets_N, ctx):
        noise_NV = jax.vmap(lambda key: jax.random.normal(key, (V,)))(ctx.key_N)
        return nll(logits["strong"] + noise_NV, targets_N), {"noise": noise_NV[:, 0]}


def test_noise_depends_on_example_and_position_alone():
    hiddens, unembeds, tokens = inputs()
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], (hiddens, tokens))
    (value, _), _ = run(Noisy(), hiddens, unembeds, tokens, chunk_tokens=5)
    (moved, _), _ = run(Noisy(), shuffled[0], unembeds, shuffled[1], chunk_tokens=7)
    np.testing.assert_allclose(value, moved, rtol=1e-6)
    other_rows = tokens._replace(example_index=tokens.example_index + 10)
    assert abs(run(Noisy(), hiddens, unembeds, other_rows)[0][0] - value) > 1e-3


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_score_equals_dense(chunk_tokens):
    hiddens, unembeds, tokens = inputs()
    settings = head.Settings(vocab_size=15, chunk_tokens=chunk_tokens)
    scores = head.score(unembeds["weak"], hiddens["weak"], tokens.targets, settings)
    z = (hiddens["weak"] @ unembeds["weak"])[..., :15].reshape(-1, 15)
    np.testing.assert_allclose(scores["entropy"].reshape(-1), entropy(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores["nll"].reshape(-1), nll(z, tokens.targets.reshape(-1)), rtol=1e-5, atol=1e-6)
    is_target = np.arange(15)[None] == np.asarray(tokens.targets).reshape(-1, 1)
    others = np.where(is_target, np.nan, z)
    margin = np.asarray(z)[is_target] - np.nanmean(others, axis=1)
    np.testing.assert_allclose(scores["margin"].reshape(-1), margin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V, vocab_size", [(1, None), (13, None), (34, 31), (96, 91), (272, 272)])
@pytest.mark.parametrize("scale", [0.1, 5.0, 1e4])
def test_the_summary_equals_each_figure_by_itself(V, vocab_size, scale):
    """Also where a softmax is one-hot, and where V has no divisor to fold it by."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(3, scale, (7, V)), jnp.float32)
    z = head.Settings(vocab_size=vocab_size).finish(z, "strong")
    targets = jnp.asarray(rng.integers(0, vocab_size or V, 7), jnp.int32)
    found = jax.jit(diagnostics.summary, static_argnums=2)(z, targets, vocab_size)
    expected = {
        "entropy": entropy(z), "nll": nll(z, targets), "margin": diagnostics.margin(z, targets, vocab_size),
    }  # fmt: skip
    assert found["entropy"].min() >= 0, "what no entropy is, the curriculum refuses"
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=3e-6, err_msg=name)


WANTED = {
    "none": np.zeros((ROWS, T), bool),
    "all": np.ones((ROWS, T), bool),
    "some": np.random.default_rng(2).random((ROWS, T)) < 0.4,
    "none of a shard": np.arange(ROWS)[:, None] % 2 == np.ones((1, T)),
    "the last": np.arange(ROWS * T).reshape(ROWS, T) == ROWS * T - 1,
}
each_wanted = pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)


@each_wanted
@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_positions_not_wanted_get_0_and_change_no_other(wanted, chunk_tokens):
    hiddens, unembeds, tokens = inputs()
    settings = head.Settings(vocab_size=15, chunk_tokens=chunk_tokens, softcaps=(("strong", 2.0),))
    score = lambda hidden, wanted: head.score(
        unembeds["strong"], hidden, tokens.targets, settings, wanted_BT=jnp.asarray(wanted)
    )
    every = score(hiddens["strong"], np.ones_like(wanted))
    found = score(jnp.where(wanted[..., None], hiddens["strong"], jnp.nan), wanted)
    for name, x_BT in found.items():
        np.testing.assert_allclose(x_BT, np.where(wanted, every[name], 0.0), rtol=1e-6, atol=1e-6)


@each_wanted
def test_a_mesh_scores_the_wanted_as_one_device(wanted):
    """Shards that want less than others take as many turns; the vocabulary is split over two devices, and padded."""
    hiddens, unembeds, tokens = inputs()
    mesh = sharding.make_mesh(2, 2, 2)

    def score(mesh):
        with sharding.use(mesh):
            settings = head.Settings(mesh, vocab_size=15, chunk_tokens=4)
            return head.score(
                unembeds["weak"], hiddens["weak"], tokens.targets, settings, wanted_BT=jnp.asarray(wanted)
            )

    found, expected = jax.jit(lambda: score(mesh))(), score(None)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_scores_see_the_soft_cap():
    hiddens, unembeds, tokens = inputs()
    settings = head.Settings(vocab_size=15, softcaps=(("strong", 1.5),), chunk_tokens=7)
    scores = head.score(unembeds["strong"], hiddens["strong"], tokens.targets, settings)
    z = head.logits(hiddens["strong"], unembeds["strong"], softcap=1.5)[..., :15].reshape(-1, 15)
    np.testing.assert_allclose(scores["entropy"].reshape(-1), entropy(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores["nll"].reshape(-1), nll(z, tokens.targets.reshape(-1)), rtol=1e-5, atol=1e-6)


def test_metrics_carry_no_gradient_and_evaluation_takes_none():
    hiddens, unembeds, tokens = inputs()
    metric = lambda W: head.loss(LogitMix(), W, hiddens, tokens, trainable=TRAINED, step=jnp.int32(0))[1]["accuracy"]
    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.grad(metric)(unembeds)))
    forward = jax.jit(lambda W: head.loss(LogitMix(), W, hiddens, tokens, trainable=TRAINED, step=jnp.int32(0)))
    dots = forward.lower(unembeds).as_text().count("dot_general")
    assert dots == 2, "a forward pass is one matmul a role"


def dense(objective, hiddens, unembeds, tokens, vocab_size=V, softcaps=(), z_loss=0.0):
    """The oracle: whole logits, plain autodiff."""
    z = {role: (hiddens[role] @ unembeds[role])[..., :vocab_size].reshape(ROWS * T, -1) for role in hiddens}
    z = {role: softcaps[role] * jnp.tanh(z[role] / softcaps[role]) if role in softcaps else z[role] for role in z}
    losses_N, _ = objective({r: z[r] for r in objective.roles}, tokens.targets.reshape(-1), Context(jnp.int32(0), None))
    losses_N += z_loss * sum(jax.nn.logsumexp(z[role], axis=-1) ** 2 for role in objective.roles)
    return jnp.sum(losses_N * tokens.weights.reshape(-1))


@pytest.mark.parametrize("softcaps", [{}, {"strong": 1.5}, {"strong": 2.0, "weak": 0.7}])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("vocab_size", [15, V])
def test_soft_caps_and_z_loss_equal_the_dense_oracle(softcaps, z_loss, vocab_size):
    hiddens, unembeds, tokens = inputs()
    options = {"softcaps": tuple(softcaps.items()), "z_loss": z_loss, "vocab_size": vocab_size}
    (value, metrics), grads = run(LogitMix(0.3), hiddens, unembeds, tokens, chunk_tokens=5, **options)
    oracle = lambda W, h: dense(LogitMix(0.3), h, W, tokens, vocab_size, softcaps, z_loss)
    expected, expected_grads = jax.jit(jax.value_and_grad(oracle, argnums=(0, 1)))(unembeds, hiddens)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)
    assert ("z_loss" in metrics) == (z_loss > 0)


def test_z_loss_is_no_part_of_evaluation():
    hiddens, unembeds, tokens = inputs()
    settings = head.Settings(z_loss=0.1)
    plain, capped = (
        head.loss(LogitMix(), unembeds, hiddens, tokens, trainable=frozenset(), step=jnp.int32(0), settings=s)[0]
        for s in (head.Settings(), settings)
    )
    assert plain == capped


def test_a_frozen_head_of_a_trained_role_gets_no_gradient_and_costs_no_product():
    hiddens, unembeds, tokens = inputs()

    def value(unembeds, hiddens, frozen_heads):
        return head.loss(LogitMix(), unembeds, hiddens, tokens, trainable=TRAINED, frozen_heads=frozen_heads,
                         step=jnp.int32(0), settings=head.Settings(chunk_tokens=5))[0]  # fmt: skip

    grad = jax.jit(jax.grad(value, argnums=(0, 1)), static_argnums=2)
    (dW, dh), (dW_all, dh_all) = (grad(unembeds, hiddens, frozen) for frozen in (frozenset({"strong"}), frozenset()))
    np.testing.assert_array_equal(dW["strong"], 0.0)
    np.testing.assert_array_equal(dW["weak"], dW_all["weak"])
    jax.tree.map(np.testing.assert_array_equal, dh, dh_all)
    products = lambda frozen: grad.lower(unembeds, hiddens, frozen).as_text().count("dot_general")
    assert products(frozenset()) == 6 and products(frozenset({"strong"})) == 5 and products(TRAINED) == 4


def test_the_chunk_follows_from_the_memory_of_all_tiles():
    tile = lambda chunk, V, tiles: chunk * V * tiles * 4
    for V, tiles in ((65_000, 1), (32_000, 1), (32_000, 2)):
        chunk = head.Settings().chunk(10**6, V, tiles)
        assert 0.5 * head.CPU_CHUNK_BYTES < tile(chunk, V, tiles) <= head.CPU_CHUNK_BYTES and chunk % 128 == 0
    assert head.Settings().chunk(50, 32_000) == 50, "never longer than the tokens"
    assert head.Settings().chunk(10**6, 1_000_000) == 128, "a product of fewer rows wastes what multiplies"
    assert head.Settings(chunk_tokens=7).chunk(50, 32_000, 2) == 7
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "fsdp", "tensor"))
    assert head.Settings(mesh).chunk(10**6, 4 * 32_000) == head.Settings().chunk(10**6, 32_000), "it has V/tensor"


@pytest.mark.parametrize("tokens", [1, 100, 512, 513, 1100, 4096, 10_000])
def test_chunks_are_of_one_length_so_that_little_is_computed_in_vain(tokens):
    chunk = head.Settings().chunk(tokens, 32_000)
    assert -tokens % chunk < 128 * -(-tokens // chunk)


def test_all_weights_zero_is_a_zero_loss():
    hiddens, unembeds, tokens = inputs()
    (value, _), grads = run(LogitMix(), hiddens, unembeds, tokens._replace(weights=jnp.zeros((ROWS, T))))
    assert value == 0 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_traced_seed_draws_what_the_number_does_and_compiles_once():
    hiddens, unembeds, tokens = inputs()
    traces = []

    @jax.jit
    def traced(seed):
        traces.append(None)
        return head.loss(Noisy(), unembeds, hiddens, tokens, trainable=TRAINED, step=jnp.int32(0), seed=seed)[0]

    given = [
        head.loss(Noisy(), unembeds, hiddens, tokens, trainable=TRAINED, step=jnp.int32(0), seed=seed)[0]
        for seed in (0, 7)
    ]
    np.testing.assert_allclose([traced(jnp.uint32(0)), traced(jnp.uint32(7))], given, rtol=1e-6)
    assert given[0] != given[1] and len(traces) == 1
