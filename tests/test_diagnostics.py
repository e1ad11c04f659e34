"""The diagnostics against numpy, in the step: every k steps, chunked, sharded, and without touching what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import diagnostics
from wmss_jax.objectives import Context, LogitMix, Sft, Temperature

MODEL, TX = tiny.model(), optax.sgd(0.1)
REAL = 90  # tokens that exist; six rows of padding


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(z, targets, gradient, lam):
    """The same figures in float64, a token at a time."""
    found = {}
    named = {role: np.asarray(x, np.float64)[:, :REAL] for role, x in z.items()}
    if lam is not None:
        named["mix"] = lam * named["strong"] + (1 - lam) * named.get("weak", 0.0)
    n = np.arange(len(targets))
    others = np.ones((len(targets), REAL), bool)
    others[n, targets] = False
    for name, x in named.items():
        p = softmax(x)
        margin = x[n, targets] - np.array([row[keep].mean() for row, keep in zip(x, others, strict=True)])
        found[f"entropy_{name}"] = -(p * np.log(p)).sum(-1)
        found[f"target_prob_{name}"] = p[n, targets]
        found[f"margin_{name}"] = margin
        found[f"margin_std_{name}"] = margin / x.std(-1)
    found["nontarget_gradient"] = (np.abs(gradient[:, :REAL]) * others).sum(-1)
    found["nontarget_gradient_sft"] = 1 - found["target_prob_strong"]
    found["saturated"] = (found["target_prob_strong"] > 0.99).astype(float)
    if "weak" in named:
        found["agreement"] = (named["strong"].argmax(-1) == named["weak"].argmax(-1)).astype(float)
    return found


@pytest.mark.parametrize("objective, lam", [(LogitMix(0.4), 0.4), (Temperature(0.4), 0.4), (Sft(), None)])
def test_every_figure_equals_numpy(objective, lam):
    rng = np.random.default_rng(0)
    z = {role: rng.normal(0, 3, (40, 96)).astype(np.float32) for role in objective.roles}
    z["strong"][:20, 3] += 20  # saturated, and agreeing, tokens
    for x in z.values():
        x[:, REAL:] = -1e30
        x[10:20, 3] += 20
    targets = np.concatenate([np.full(20, 3), rng.integers(0, REAL, 20)])
    ctx = Context(jnp.int32(0), None)
    per_token = lambda strong: objective({**z, "strong": strong}, jnp.asarray(targets), ctx)[0].sum()
    gradient = jax.grad(per_token)(jnp.asarray(z["strong"]))
    found = diagnostics.measure(
        objective, jax.tree.map(jnp.asarray, z), jnp.asarray(targets), ctx, gradient, vocab_size=REAL
    )
    expected = oracle(z, targets, np.asarray(gradient), lam)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
    assert 0 < expected["saturated"].mean() < 1
    if lam is not None:  # PAPER eq. 22: lam · (1 - P_mix(target)) of the gradient is on wrong tokens
        np.testing.assert_allclose(
            found["nontarget_gradient"], lam * (1 - found["target_prob_mix"]), rtol=1e-4, atol=1e-6
        )


def run(diagnose_every, n=4, mesh=None, **options):
    place = (lambda seed: tiny.params(MODEL, seed)) if mesh is None else (lambda s: tiny.sharded(MODEL, s, mesh))
    step = wmss.make_train_step(
        MODEL, LogitMix(), TX, mesh=mesh, donate=False, diagnose_every=diagnose_every, **options
    )
    state, history = wmss.init_state({"strong": place(0)}, TX), []
    for i in range(n):
        state, metrics = step(state, {"weak": place(1)}, tiny.batch(seed=i))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history, step


def test_every_k_steps_and_at_no_price_to_the_training():
    state, history, step = run(2)
    plain, plain_history, _ = run(None)
    jax.tree.map(np.testing.assert_array_equal, state, plain)
    names = {name for name in history[0] if name.startswith("diagnostics/")}
    assert len(names) == 16
    for number, metrics in enumerate(history, 1):
        assert all(np.isnan(metrics[name]) != (number % 2 == 0) for name in names)
    assert [{k: v for k, v in m.items() if k not in names} for m in history] == plain_history
    assert step._cache_size() == 1
    text = step.lower(state, {"weak": tiny.params(MODEL, 1)}, tiny.batch()).compile().as_text()
    assert text.count(" conditional(") == 1, "behind one conditional, and no other is left in the program"


@pytest.mark.parametrize("options", [{"chunk_tokens": 7}, {"micro_batches": 4}, {"mesh": (2, 2, 2)}])
def test_chunks_micro_batches_and_devices_do_not_matter(options):
    if "mesh" in options:
        options = {"mesh": wmss.make_mesh(*options["mesh"])}
    (_, one, _), (_, other, _) = run(1, n=1), run(1, n=1, **options)
    for name, value in one[0].items():
        np.testing.assert_allclose(other[0][name], value, rtol=2e-4, atol=1e-6, err_msg=name)
