"""Weak agents that are made of other parameters, and controls that show them other tokens, in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import optim
from wmss_jax.objectives import ControlledMix, LogitMix
from wmss_jax.step import complete
from wmss_jax.weak_source import EarlyExit, Ema, Interpolation, Noise

MODEL = tiny.model()
SMALL = tiny.model(num_layers=1)
STRONG, BASE = tiny.params(MODEL, 0), tiny.params(MODEL, 1)
LR = 0.1


def step_of(source, mesh=None, micro_batches=1):
    """One step with a source: its metrics and the state after it."""
    place = (lambda seed: tiny.params(MODEL, seed)) if mesh is None else (lambda s: tiny.sharded(MODEL, s, mesh))
    tx = optim.with_weak_average(optax.sgd(LR), source.decay) if isinstance(source, Ema) else optax.sgd(LR)
    models = {"strong": MODEL, "weak": source.model(MODEL)}
    step = wmss.make_train_step(
        models, LogitMix(), tx, mesh=mesh, micro_batches=micro_batches, donate=False, weak_source=source
    )
    frozen = {"weak": place(1)} if source.of_base else {}
    state = wmss.init_state({"strong": place(0)}, tx)
    for seed in range(3):
        state, metrics = step(state, frozen, tiny.batch(seed=seed))
    return state, metrics


def by_hand(weak_of):
    """The same three steps, with the weak parameters given to each as frozen ones."""
    tx = optax.sgd(LR)
    state, step = wmss.init_state({"strong": STRONG}, tx), None
    history = [STRONG]
    for seed in range(3):
        model, weak = weak_of(history)
        step = step or wmss.make_train_step({"strong": MODEL, "weak": model}, LogitMix(), tx, donate=False)
        state, metrics = step(state, {"weak": weak}, tiny.batch(seed=seed))
        history.append(state.params["strong"])
    return state, metrics


def averaged(decay):
    def weak_of(history):
        mean = history[0]
        for p in history[1:]:
            mean = jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, mean, p)
        return MODEL, mean

    return weak_of


def interpolated(t):
    return lambda history: (MODEL, jax.tree.map(lambda b, s: (1 - t) * b + t * s, BASE, history[-1]))


def exited(history):
    cut = jax.tree.map(lambda x: x[:1], history[-1]["layers"])
    return tiny.model(num_layers=1), {**history[-1], "layers": cut}


SOURCES = {
    "ema": (Ema(0.7), averaged(0.7)),
    "interpolation": (Interpolation(0.3), interpolated(0.3)),
    "early exit": (EarlyExit(1), exited),
}


@pytest.mark.parametrize("source, weak_of", SOURCES.values(), ids=SOURCES)
def test_a_moving_weak_agent_is_the_function_of_the_state_that_it_says(source, weak_of):
    (state, metrics), (expected, expected_metrics) = step_of(source), by_hand(weak_of)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(compare, state.params, expected.params)


def test_on_a_mesh_and_in_micro_batches_too():
    source = Interpolation(0.3)
    (state, _), (other, _) = step_of(source), step_of(source, wmss.make_mesh(2, 2, 2), micro_batches=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other.params, state.params)


def test_noise_is_relative_to_each_matrix_and_leaves_norms_alone():
    noisy = Noise(0.1)(None, {"weak": BASE})
    for path, leaf in jax.tree_util.tree_leaves_with_path(noisy):
        base = dict(jax.tree_util.tree_leaves_with_path(BASE))[path]
        if "norm" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(leaf, base)
        else:
            size = np.std(leaf - base) / np.sqrt(np.mean(np.square(base)))
            np.testing.assert_allclose(size, 0.1, rtol=0.15, err_msg=str(path))
    same, other = Noise(0.1)(None, {"weak": BASE}), Noise(0.1, seed=1)(None, {"weak": BASE})
    jax.tree.map(np.testing.assert_array_equal, noisy, same)
    assert (np.asarray(other["embed"]) != np.asarray(noisy["embed"])).mean() > 0.99
    jax.tree.map(np.testing.assert_array_equal, Noise(0.0)(None, {"weak": BASE}), BASE)


@pytest.mark.parametrize("layer", [2, 3])
def test_an_exit_that_is_not_early_is_refused(layer):
    with pytest.raises(ValueError, match=f"early_exit after layer {layer} of 2: choose 1 to 1"):
        EarlyExit(layer).model(MODEL)


def test_an_early_exit_keeps_the_windows_of_its_layers():
    windowed = tiny.model(num_layers=3, windows=(4, None, 8))
    assert EarlyExit(2).model(windowed).config.windows == (4, None)
    assert EarlyExit(1).model(windowed).config.kinds == windowed.config.kinds[:1]


# -- shuffled signals -----------------------------------------------------------------------------------------------


def rearranged(control, batch, step=0, seed=0):
    return ControlledMix(LogitMix(), control).rearranged(complete(batch), step, seed)


def test_shuffled_tokens_are_a_circle_of_the_rows_trained_ones():
    batch = tiny.batch(rows=6, T=24)
    batch["loss_weights"][0] = 0
    batch["loss_weights"][1] = 0
    batch["loss_weights"][1, 5] = 1
    moved = np.asarray(rearranged("shuffled_tokens", batch)["weak_from"])
    for row, weights in zip(moved, batch["loss_weights"], strict=True):
        trained = np.flatnonzero(weights > 0)
        np.testing.assert_array_equal(np.sort(row[trained]), trained)
        assert len(trained) < 2 or not (row[trained] == trained).any(), "none keeps its own"
        rest = np.flatnonzero(weights == 0)
        np.testing.assert_array_equal(row[rest], rest)
    again, later = rearranged("shuffled_tokens", batch), rearranged("shuffled_tokens", batch, step=1)
    np.testing.assert_array_equal(again["weak_from"], moved)
    assert (later["weak_from"] != moved).any()


def test_shuffled_examples_are_other_rows_trained_tokens_in_order():
    batch = tiny.batch(rows=6, T=24)
    batch["loss_weights"][2] = 0
    for step in range(4):
        found = {k: np.asarray(v) for k, v in rearranged("shuffled_examples", batch, step).items()}
        donors = [np.flatnonzero((batch["tokens"] == row).all(axis=1))[0] for row in found["weak_tokens"]]
        assert sorted(donors) == list(range(6)) and donors[2] == 2
        for b, donor in enumerate(donors):
            mine, theirs = (np.flatnonzero(batch["loss_weights"][r] > 0) for r in (b, donor))
            if b != 2:
                assert donor not in (b, 2), "neither itself nor a row without anything to give"
                expected = theirs[np.arange(len(mine)) % len(theirs)]
                np.testing.assert_array_equal(found["weak_from"][b, mine], expected)


@pytest.mark.parametrize("control", ["shuffled_tokens", "shuffled_examples"])
def test_a_step_mixes_in_what_the_weak_role_says_of_those_tokens(control):
    """Against whole logits; and cached hidden states, micro-batches and devices make no difference."""
    batch, objective = tiny.batch(rows=8), ControlledMix(LogitMix(0.4), control)
    full = {k: np.asarray(v) for k, v in objective.rearranged(complete(batch), 0, 0).items()}
    tokens = full.get("weak_tokens", full["tokens"])
    strong_params, weak_params = tiny.params(SMALL, 0), tiny.params(SMALL, 1)
    weak = np.asarray(SMALL.logits(weak_params, jnp.asarray(tokens)), np.float64)
    weak = np.take_along_axis(weak, full["weak_from"][..., None], axis=1)
    z = 0.4 * np.asarray(SMALL.logits(strong_params, jnp.asarray(batch["tokens"])), np.float64) + 0.6 * weak
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p, full["targets"][..., None], axis=-1)[..., 0]
    expected = (losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()

    def loss(given, mesh=None, micro_batches=1):
        place = (lambda seed: tiny.params(SMALL, seed)) if mesh is None else (lambda s: tiny.sharded(SMALL, s, mesh))
        tx = optax.sgd(LR)
        step = wmss.make_train_step(SMALL, objective, tx, mesh=mesh, micro_batches=micro_batches, donate=False)
        return step(wmss.init_state({"strong": place(0)}, tx), {"weak": place(1)}, given)[1]["loss"]

    np.testing.assert_allclose(loss(batch, wmss.make_mesh(2, 2, 2), 2), expected, rtol=1e-5)
    hidden = np.asarray(SMALL.hidden(weak_params, jnp.asarray(batch["tokens"])))
    np.testing.assert_allclose(loss({**batch, "weak_hidden": hidden}), expected, rtol=1e-5)
