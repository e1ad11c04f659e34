"""Every row of OBJECTIVES keeps the contract; LogitMix obeys the paper's identities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmss_jax import head
from wmss_jax.objectives import (
    CONTROLS,
    OBJECTIVES,
    Context,
    ControlledMix,
    Linear,
    LogitMix,
    Sft,
    Temperature,
    entropy,
    nll,
)

N, V, D = 12, 17, 8
CTX = Context(jnp.int32(3), jax.random.split(jax.random.key(0), N))


def logits_of(objective, seed=0):
    rng = np.random.default_rng(seed)
    return {role: jnp.asarray(rng.normal(0, 2, (N, V)), jnp.float32) for role in objective.roles}


TARGETS = jnp.asarray(np.random.default_rng(9).integers(0, V, N), jnp.int32)
CONTROLLED = {name: functools.partial(ControlledMix, LogitMix(), name) for name in CONTROLS}
MAKE = OBJECTIVES | CONTROLLED
contract = pytest.mark.parametrize("name", MAKE)


def head_inputs(objective, seed=0):
    rng = np.random.default_rng(seed)
    hiddens = {r: jnp.asarray(rng.normal(0, 1, (3, 4, D)), jnp.float32) for r in objective.roles}
    unembeds = {r: jnp.asarray(rng.normal(0, 1, (D, V)), jnp.float32) for r in objective.roles}
    weights = jnp.asarray([[1, 0, 2, 1], [0, 0.5, 1, 0], [1, 1, 0, 1]], jnp.float32)
    index = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[:, None], (3, 4))
    positions = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[None], (3, 4))
    return hiddens, unembeds, head.Tokens(TARGETS.reshape(3, 4), weights, index, positions)


def dense_loss(objective, unembeds, hiddens, tokens):
    """The oracle: whole logits, autodiff through everything."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    z = {r: flat(hiddens[r]) @ unembeds[r] for r in objective.roles}
    keys = jax.vmap(lambda i, p: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), p))(
        flat(tokens.example_index), flat(tokens.positions)
    )
    losses_N, _ = objective(z, flat(tokens.targets), Context(jnp.int32(0), keys))
    return jnp.sum(losses_N * flat(tokens.weights))


@contract
def test_shapes_dtypes_and_finite(name):
    objective = MAKE[name]()
    with jax.numpy_dtype_promotion("strict"):
        losses_N, metrics = objective(logits_of(objective), TARGETS, CTX)
    for values_N in (losses_N, *metrics.values()):
        assert values_N.shape == (N,) and values_N.dtype == jnp.float32
        assert np.isfinite(values_N).all()


@contract
def test_per_token(name):
    """A token's loss depends on its own logits alone."""
    objective = MAKE[name]()
    z = logits_of(objective)
    changed = {role: x.at[5].add(1.0 + jnp.arange(V, dtype=jnp.float32)) for role, x in z.items()}
    before, after = (objective(x, TARGETS, CTX)[0] for x in (z, changed))
    np.testing.assert_array_equal(np.delete(before, 5), np.delete(after, 5))


@contract
@pytest.mark.parametrize("chunk_tokens", [5, 100])
def test_chunked_equals_dense(name, chunk_tokens):
    objective = MAKE[name]()
    hiddens, unembeds, tokens = head_inputs(objective)
    chunked = lambda W, h: head.loss(objective, W, h, tokens, trainable=frozenset(objective.roles), step=jnp.int32(0),
                                     settings=head.Settings(chunk_tokens=chunk_tokens))[0]  # fmt: skip
    value, grads = jax.value_and_grad(chunked, argnums=(0, 1))(unembeds, hiddens)
    dense, dense_grads = jax.value_and_grad(lambda W, h: dense_loss(objective, W, h, tokens), argnums=(0, 1))(
        unembeds, hiddens
    )
    np.testing.assert_allclose(value, dense, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), grads, dense_grads)


@contract
def test_nan_at_zero_weight_changes_nothing(name):
    objective = MAKE[name]()
    hiddens, unembeds, tokens = head_inputs(objective)
    poisoned = {r: jnp.where(tokens.weights[..., None] > 0, h, jnp.nan) for r, h in hiddens.items()}
    run = lambda h: jax.value_and_grad(
        lambda W, h: head.loss(objective, W, h, tokens, trainable=frozenset(objective.roles), step=jnp.int32(0)),
        argnums=(0, 1), has_aux=True,
    )(unembeds, h)  # fmt: skip
    clean, dirty = run(hiddens), run(poisoned)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty))


@contract
def test_frozen_roles_get_no_gradient(name):
    objective = MAKE[name]()
    hiddens, unembeds, tokens = head_inputs(objective)
    loss = lambda W, h: head.loss(objective, W, h, tokens, trainable=frozenset({"strong"}), step=jnp.int32(0))[0]
    grads_W, grads_h = jax.grad(loss, argnums=(0, 1))(unembeds, hiddens)
    for role in objective.roles:
        assert bool(jnp.any(grads_W[role] != 0)) == (role == "strong")
        assert bool(jnp.any(grads_h[role] != 0)) == (role == "strong")


@contract
def test_compiles_once_with_fresh_equal_objects(name):
    run = jax.jit(lambda objective, z: objective(z, TARGETS, CTX)[0], static_argnums=0)
    for seed in range(3):
        run(MAKE[name](), logits_of(MAKE[name](), seed))
    assert run._cache_size() == 1
    assert MAKE[name]() == MAKE[name]() and dataclasses.is_dataclass(MAKE[name]())


@contract
def test_large_logits_stay_finite(name):
    objective = MAKE[name]()
    z = jax.tree.map(lambda x: x * 1e4, logits_of(objective))
    grads = jax.grad(lambda z: jnp.sum(objective(z, TARGETS, CTX)[0]))(z)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# -- LogitMix, PAPER §2.3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_gradient_factors(lam):
    """∂loss/∂z_strong = λ(P_mix - e_y), ∂loss/∂z_weak = (1-λ)(P_mix - e_y)."""
    objective = LogitMix(lam)
    z = logits_of(objective)
    grads = jax.grad(lambda z: jnp.sum(objective(z, TARGETS, CTX)[0]))(z)
    residual = jax.nn.softmax(lam * z["strong"] + (1 - lam) * z["weak"]) - jax.nn.one_hot(TARGETS, V)
    np.testing.assert_allclose(grads["strong"], lam * residual, atol=1e-6)
    np.testing.assert_allclose(grads["weak"], (1 - lam) * residual, atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_mixture_is_the_normalised_geometric_product(lam):
    objective = LogitMix(lam)
    z = logits_of(objective)
    p = {role: np.asarray(jax.nn.softmax(x), np.float64) for role, x in z.items()}
    product = p["weak"] ** (1 - lam) * p["strong"] ** lam
    product /= product.sum(axis=-1, keepdims=True)
    losses_N, _ = objective(z, TARGETS, CTX)
    np.testing.assert_allclose(losses_N, -np.log(product[np.arange(N), TARGETS]), rtol=1e-5, atol=1e-5)


def test_constant_weak_logits_are_a_temperature():
    z = logits_of(LogitMix())
    constant = {**z, "weak": jnp.full_like(z["weak"], 3.7)}
    mixed_N, _ = LogitMix(0.4)(constant, TARGETS, CTX)
    np.testing.assert_allclose(mixed_N, nll(0.4 * z["strong"], TARGETS), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(Temperature(0.4)(z, TARGETS, CTX)[0], nll(0.4 * z["strong"], TARGETS))


def test_loss_is_invariant_to_shifting_either_role():
    z = logits_of(LogitMix())
    shifted = {"strong": z["strong"] + 5.0, "weak": z["weak"] - 2.0}
    np.testing.assert_allclose(
        LogitMix(0.4)(z, TARGETS, CTX)[0], LogitMix(0.4)(shifted, TARGETS, CTX)[0], rtol=1e-5, atol=1e-5
    )


def test_theorem_1_where_every_weak_margin_is_smaller():
    """m_k(weak) <= m_k(strong) for all k: the mixture gives the target less and distractors more (PAPER eq. 13)."""
    z = logits_of(LogitMix())
    onto_target = jax.nn.one_hot(TARGETS, V)
    weak = z["strong"] - 2.0 * onto_target * jnp.abs(z["weak"])
    mixed = 0.5 * z["strong"] + 0.5 * weak
    assert bool(jnp.all(nll(mixed, TARGETS) >= nll(z["strong"], TARGETS) - 1e-6))


def test_lambda_one_is_sft_bit_for_bit():
    z = logits_of(LogitMix())
    value = lambda objective: jax.value_and_grad(lambda z: jnp.sum(objective(z, TARGETS, CTX)[0]))(z)
    (mixed, mixed_grads), (plain, plain_grads) = value(LogitMix(1.0)), value(Sft())
    assert mixed == plain
    np.testing.assert_array_equal(mixed_grads["strong"], plain_grads["strong"])
    np.testing.assert_array_equal(mixed_grads["weak"], 0.0)


def test_lambda_zero_gives_strong_no_gradient():
    z = logits_of(LogitMix())
    grads = jax.grad(lambda z: jnp.sum(LogitMix(0.0)(z, TARGETS, CTX)[0]))(z)
    np.testing.assert_array_equal(grads["strong"], 0.0)
    assert bool(jnp.any(grads["weak"] != 0))


def test_mixing_in_bfloat16_rounds_the_mixture_only():
    z = logits_of(LogitMix())
    as_released = jnp.bfloat16(0.5) * z["strong"].astype(jnp.bfloat16) + jnp.bfloat16(0.5) * z["weak"].astype(
        jnp.bfloat16
    )
    losses_N, _ = LogitMix(mix_dtype="bfloat16")(z, TARGETS, CTX)
    np.testing.assert_array_equal(losses_N, nll(as_released.astype(jnp.float32), TARGETS))
    assert not np.array_equal(losses_N, LogitMix()(z, TARGETS, CTX)[0])


def test_schedule_follows_the_step():
    schedule = Linear(start=1.0, stop=0.5, steps=10)
    z = logits_of(LogitMix())
    for step, lam in ((0, 1.0), (5, 0.75), (10, 0.5), (1000, 0.5)):
        ctx = CTX._replace(step=jnp.int32(step))
        np.testing.assert_allclose(
            LogitMix(schedule)(z, TARGETS, ctx)[0], LogitMix(lam)(z, TARGETS, ctx)[0], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("lam", [-0.1, 1.5, float("nan"), Linear(0.0, 1.2, 5)])
def test_lambda_out_of_range_is_refused(lam):
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got"):
        LogitMix(lam)


def test_entropy_of_uniform_and_of_certain():
    z = jnp.stack([jnp.zeros(V), jnp.zeros(V).at[3].set(1e4), jnp.zeros(V).at[5:].set(-1e30)])
    np.testing.assert_allclose(entropy(z), [np.log(V), 0.0, np.log(5)], atol=1e-6)
