"""Schedules, decay by name, joint clipping, the parameter average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from wmss_jax import optim
from wmss_jax.training_config import OptimizerConfig


def config(**fields):
    return OptimizerConfig(**{"peak_lr": 1e-2, "warmup_steps": 0, "schedule": "constant", **fields})


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_learning_rate_warms_up_from_the_first_update_and_decays_to_the_floor(schedule, expected):
    _, lr = optim.make(config(schedule=schedule, warmup_steps=2), total_steps=4)
    counts = [0, 1, 2, 3, 4]
    np.testing.assert_allclose([float(lr(c)) for c in counts], 1e-2 * np.array(expected), atol=1e-9)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="7 steps of warm-up in a run of 5 steps"):
        optim.make(config(warmup_steps=7), total_steps=5)


def test_norms_do_not_decay():
    params = tiny.params(tiny.model())
    tx, _ = optim.make(config(weight_decay=0.5, clip_norm=None), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert bool(jnp.all(updates["layers"]["attention"]["q_norm"]["scale"] == 0))
    assert bool(jnp.all(updates["final_norm"]["scale"] == 0))
    np.testing.assert_allclose(
        updates["layers"]["mlp"]["up_proj"], -1e-2 * 0.5 * params["layers"]["mlp"]["up_proj"], rtol=1e-6
    )


def test_clipping_is_joint_over_roles():
    tx, _ = optim.make(config(clip_norm=1.0), 10)
    clip = optax.clip_by_global_norm(1.0)
    grads = {"strong": jnp.array([3.0, 0.0]), "weak": jnp.array([0.0, 4.0])}
    clipped, _ = clip.update(grads, clip.init(grads))
    reference = optax.adamw(1e-2, weight_decay=0.0)
    params = jax.tree.map(jnp.zeros_like, grads)
    state, reference_state = tx.init(params), reference.init(params)
    for scale in (1.0, 0.1):  # the second step tells: Adam forgets a common scale of the first
        scaled = optax.tree.scale(scale, grads)
        ours, state = tx.update(scaled, state, params)
        small, _ = clip.update(scaled, clip.init(grads))
        theirs, reference_state = reference.update(small, reference_state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-6)


def test_average_follows_the_parameters():
    tx, _ = optim.make(config(ema_decay=0.75), 10)
    params = {"strong": jnp.array([1.0, 2.0])}
    state, mean = tx.init(params), np.array([1.0, 2.0])
    for _ in range(3):
        updates, state = tx.update({"strong": jnp.array([1.0, -1.0])}, state, params)
        params = optax.apply_updates(params, updates)
        mean = 0.75 * mean + 0.25 * np.asarray(params["strong"])
    np.testing.assert_allclose(optax.tree.get(state, "average")["strong"], mean, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_rate_in_the_state_moves_the_parameters_as_one_in_the_config(schedule):
    fields = {"schedule": schedule, "warmup_steps": 2, "weight_decay": 0.1, "ema_decay": 0.5, "min_lr_ratio": 0.2}
    any_rate = optim.make_for_any_rate(config(**fields), 6)
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(None)
        updates, state = any_rate.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for rate in (1e-2, 3e-4):
        tx, _ = optim.make(config(**fields, peak_lr=rate), 6)
        mine = theirs = {"strong": jnp.array([1.0, -2.0])}
        state, their_state = optax.tree.set(any_rate.init(mine), peak_lr=jnp.float32(rate)), tx.init(theirs)
        for step in range(6):
            grads = {"strong": jnp.array([0.3, 1.0 - step])}
            mine, state = update(grads, state, mine)
            updates, their_state = tx.update(grads, their_state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(mine["strong"], theirs["strong"], rtol=2e-6)
        averages = [optax.tree.get(s, "average")["strong"] for s in (state, their_state)]
        np.testing.assert_allclose(*averages, rtol=2e-6)
    assert len(traces) == 1
