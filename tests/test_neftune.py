"""NEFTune: the noise's size, what it is a function of, and whom it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import neftune
from wmss_jax.neftune import Neftune
from wmss_jax.objectives import LogitMix, Sft
from wmss_jax.step import complete

MODEL, TX = tiny.model(num_layers=1), optax.sgd(0.1)
D = tiny.CONFIG.hidden_size


def packed():
    """Two rows: segments of 5, 3 and 2 tokens with 2 of padding, and one of 12."""
    batch = tiny.batch(rows=2, T=12)
    batch["segments"] = np.array([[1] * 5 + [2] * 3 + [3] * 2 + [0] * 2, [1] * 12], np.int32)
    batch["example_index"] = np.array([[7] * 5 + [8] * 3 + [9] * 2 + [-1] * 2, [6] * 12], np.int32)
    return complete(batch)


def noise(batch, step=0, seed=0, **settings):
    return np.asarray(Neftune(**settings).noise(batch, D, step, seed))


def test_lengths_are_those_of_the_segments():
    found = neftune.tokens_in_segment(packed()["segments"])
    np.testing.assert_array_equal(found, [[5] * 5 + [3] * 3 + [2] * 4, [12] * 12])


@pytest.mark.parametrize("length", ["example", "row"])
def test_it_is_uniform_in_alpha_over_the_root_of_length_times_width(length):
    batch = packed()
    lengths = np.asarray(neftune.tokens_in_segment(batch["segments"])) if length == "example" else np.full((2, 12), 12)
    u = noise(batch, alpha=5.0, length=length) / (5.0 / np.sqrt(lengths * D))[..., None]
    assert np.abs(u).max() <= 1 + 1e-6
    np.testing.assert_allclose(u.mean(), 0, atol=0.08)
    np.testing.assert_allclose(u.var(), 1 / 3, atol=0.05)


def test_it_follows_the_token_wherever_it_is_packed():
    batch = packed()
    moved = {name: x[::-1] for name, x in batch.items()}
    shifted = dict(batch)
    for name in ("segments", "example_index", "positions"):
        shifted[name] = batch[name].at[0, :5].set(batch[name][0, 5:10]).at[0, 5:10].set(batch[name][0, :5])
    shifted["segments"] = jnp.asarray([[2] * 3 + [3] * 2 + [1] * 5 + [0] * 2, [1] * 12], jnp.int32)
    plain = noise(batch)
    np.testing.assert_array_equal(noise(moved), plain[::-1])
    np.testing.assert_array_equal(noise(shifted)[0, :5], plain[0, 5:10])
    np.testing.assert_array_equal(noise(shifted)[0, 5:10], plain[0, :5])
    for other in (noise(batch, step=1), noise(batch, seed=1)):
        assert (other != plain).mean() > 0.99


def run(objective, batch, mesh=None, **options):
    place = (lambda seed: tiny.params(MODEL, seed)) if mesh is None else (lambda s: tiny.sharded(MODEL, s, mesh))
    step = wmss.make_train_step(MODEL, objective, TX, mesh=mesh, donate=False, **options)
    frozen = {"weak": place(1)} if "weak" in objective.roles else {}
    return step(wmss.init_state({"strong": place(0)}, TX), frozen, batch)


def test_a_step_is_that_of_embeddings_with_the_noise_added():
    """By hand: noise on an embedding is noise on its own row of a table that has a row for every token."""
    batch = packed()
    T = batch["tokens"].shape[1]
    table = np.asarray(tiny.params(MODEL, 0)["embed"])[np.asarray(batch["tokens"])].reshape(-1, D)
    table = table + noise(batch, alpha=9.0).reshape(-1, D)
    model = tiny.model(num_layers=1, vocab_size=2 * T)
    hidden = model.hidden(
        {**tiny.params(MODEL, 0), "embed": jnp.asarray(table)}, jnp.arange(2 * T).reshape(2, T), batch["positions"],
        batch["segments"],
    )  # fmt: skip
    z = hidden @ tiny.params(MODEL, 0)["unembed"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(z), batch["targets"][..., None], axis=-1)[..., 0]
    expected = jnp.sum(losses * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])
    _, metrics = run(Sft(), batch, neftune=Neftune(9.0))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(run(Sft(), batch)[1]["loss"] - expected) > 1e-3


def test_the_frozen_role_hears_nothing_of_it():
    """With λ = 0 the loss is the weak role's alone."""
    batch = packed()
    quiet, loud = (run(LogitMix(0.0), batch, neftune=given)[1]["loss"] for given in (None, Neftune(50.0)))
    assert quiet == loud


def test_micro_batches_and_devices_do_not_matter():
    batch = tiny.batch(segments=True)
    state, metrics = run(LogitMix(), batch, neftune=Neftune())
    other, found = run(LogitMix(), batch, neftune=Neftune(), micro_batches=2, mesh=wmss.make_mesh(1, 4, 2))
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other.params, state.params)
