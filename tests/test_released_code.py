"""The numbers of the released PyTorch code, reproduced through the public API (tests/golden/released_code)."""

import json

import jax
import numpy as np
import optax
import pytest

import wmss_jax as wmss


@pytest.fixture(scope="module")
def released(golden):
    directory = golden / "released_code"
    numbers = json.loads((directory / "golden.json").read_text())
    model, strong = wmss.load(directory / "strong")
    _, weak = wmss.load(directory / "weak")
    return numbers, model, {"strong": strong, "weak": weak}, batch(numbers)


def batch(numbers):
    """Their right-padded examples as our batch: labels belong to tokens, our weights to the predicting positions."""
    tokens = np.array(numbers["input_ids"], np.int32)
    trained = np.array(numbers["labels"]) != -100
    lengths = np.array(numbers["lengths"])[:, None]
    inside = np.arange(tokens.shape[1])[None] < lengths
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.pad(trained[:, 1:], [(0, 0), (0, 1)]).astype(np.float32),
        "segments": inside.astype(np.int32),
        "example_index": np.where(inside, np.arange(len(tokens))[:, None], -1).astype(np.int32),
    }


def norms(model, grads):
    """Gradient norm of every parameter under its Hugging Face name."""
    out = {}
    for row in model.rows:
        leaf = grads
        for name in row.path.split("."):
            leaf = leaf[name]
        for layer, name in enumerate(row.names(model.config.sizes)):
            out[name] = float(np.linalg.norm(np.asarray(leaf[layer] if row.stacked else leaf).ravel()))
    return out


def test_losses_and_gradient_norms_of_the_mixture(released):
    numbers, model, params, batch = released
    for lam, case in numbers["cases"].items():
        objective = wmss.objectives.LogitMix(lam=float(lam))
        of = lambda p: wmss.loss(model, objective, p, {"weak": params["weak"]}, batch)[0]  # noqa: B023
        loss, grads = jax.jit(jax.value_and_grad(of))({"strong": params["strong"]})
        np.testing.assert_allclose(loss, case["loss"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(optax.tree.norm(grads), case["grad_norm"], rtol=1e-4)
        ours = norms(model, grads["strong"])
        assert ours.keys() == case["grad_norms"].keys()
        for name, expected in case["grad_norms"].items():
            np.testing.assert_allclose(ours[name], expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("role", ["weak", "strong"])
def test_sft_loss_and_entropies_in_both_conventions(released, role):
    numbers, model, params, batch = released
    metrics = wmss.make_eval_step(model, wmss.objectives.Sft())({"strong": params[role]}, batch)
    np.testing.assert_allclose(metrics["loss"], numbers[role]["sft_loss"], rtol=0, atol=1e-5)
    entropy = np.asarray(jax.jit(lambda p: wmss.score(model, p, batch))(params[role])["entropy"])
    for shifted, key in ((True, "entropy_predictive"), (False, "entropy_official")):
        index, mean, _ = wmss.curriculum.example_means(
            entropy, batch["loss_weights"], batch["example_index"], shifted=shifted
        )
        np.testing.assert_array_equal(index, np.arange(6))
        np.testing.assert_allclose(mean, numbers[role][key], rtol=0, atol=1e-5)


def test_sampling_probabilities(released):
    case = released[0]["curriculum"]
    probs = wmss.curriculum.sampling_probs(
        np.array(case["h_weak"]), np.array(case["h_strong"]), case["alpha"], case["beta"], case["gamma"], "v1", True
    )
    np.testing.assert_allclose(probs, case["p"], rtol=0, atol=1e-12)
