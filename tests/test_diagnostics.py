"""The diagnostics against numpy, in the step: every k steps, chunked, sharded, and without touching what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import diagnostics
from wmss_jax.objectives import Context, ControlledMix, LogitMix, Sft, Temperature

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
        other = np.array([row[keep].mean() for row, keep in zip(x, others, strict=True)])
        found[f"entropy_{name}"] = -(p * np.log(p)).sum(-1)
        found[f"target_prob_{name}"] = p[n, targets]
        found[f"target_logit_{name}"] = x[n, targets]
        found[f"other_logit_{name}"] = other
        found[f"margin_{name}"] = x[n, targets] - other
        found[f"margin_std_{name}"] = found[f"margin_{name}"] / x.std(-1)
    found["nontarget_gradient"] = (np.abs(gradient[:, :REAL]) * others).sum(-1)
    found["nontarget_gradient_sft"] = 1 - found["target_prob_strong"]
    found["saturated"] = (found["target_prob_strong"] > 0.99).astype(float)
    strong = named["strong"]
    found["logit_mean"] = strong.mean(-1)
    gap = softmax(strong).max(-1) - (strong.argmax(-1) == targets)
    for b in range(15):
        inside = (softmax(strong).max(-1) > b / 15) & (softmax(strong).max(-1) <= (b + 1) / 15)
        found[f"calibration_{b:02}"] = np.where(inside, gap, 0.0)
    if "weak" in named:
        weak = named["weak"]
        found["agreement"] = (strong.argmax(-1) == weak.argmax(-1)).astype(float)
        margins = [(x[n, targets][:, None] - x) for x in (weak, strong)]
        found["theorem_1"] = (margins[0] <= margins[1] + 1e-12).all(-1).astype(float)
        found["logit_mean_drift"] = strong.mean(-1) - weak.mean(-1)
    if lam is not None:
        ratio = lam * softmax(named["mix"]) / softmax(strong)
        wrong = (lam * softmax(named["mix"]) * others).sum(-1) / (softmax(strong) * others).sum(-1)
        hardest = np.where(others, strong, -np.inf).argmax(-1)
        found["above"] = (found["target_prob_strong"] > 1 - lam).astype(float)
        found["log_amplification"] = np.log(wrong)
        found["log_amplification_hardest"] = np.log(ratio[n, hardest])
        found["amplified"] = (wrong > 1).astype(float)
        for name in ("log_amplification", "amplified"):
            found[f"{name}_above"] = found[name] * found["above"]
            found[f"{name}_below"] = found[name] * (1 - found["above"])
    return found


@pytest.mark.parametrize("objective, lam", [(LogitMix(0.4), 0.4), (Temperature(0.4), 0.4), (Sft(), None)])
def test_every_figure_equals_numpy(objective, lam):
    rng = np.random.default_rng(0)
    z = {role: rng.normal(0, 3, (40, 96)).astype(np.float32) for role in objective.roles}
    z["strong"][:20, 3] += 20  # saturated, and agreeing, tokens
    if "weak" in z:  # a weak role that is the strong one with a lower target obeys Theorem 1's condition
        z["weak"][:5] = z["strong"][:5]
        z["weak"][:5, 3] -= 4
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
    if "weak" in z:
        assert 0 < expected["theorem_1"].mean() < 1 and 0 < expected["above"].mean() < 1
    if lam is not None:  # PAPER eq. 22: lam · (1 - P_mix(target)) of the gradient is on wrong tokens
        np.testing.assert_allclose(
            found["nontarget_gradient"], lam * (1 - found["target_prob_mix"]), rtol=1e-4, atol=1e-6
        )


def test_means_are_put_together_as_in_numpy():
    """Expected calibration error in its usual form, and means over a part of the tokens, weights and all."""
    rng = np.random.default_rng(1)
    z = {role: rng.normal(0, 2, (400, 30)).astype(np.float32) for role in ("strong", "weak")}
    targets, weights = rng.integers(0, 30, 400), rng.random(400) / 200
    targets[:200] = z["strong"][:200].argmax(-1)
    weights /= weights.sum()
    ctx = Context(jnp.int32(0), None)
    found = diagnostics.measure(
        LogitMix(0.3), jax.tree.map(jnp.asarray, z), jnp.asarray(targets), ctx, jnp.zeros((400, 30))
    )
    means = {f"diagnostics/{name}": jnp.sum(x * weights) for name, x in found.items()}
    done = diagnostics.finish({"loss": jnp.float32(3.0), **means})
    confidence, right = softmax(z["strong"]).max(-1), z["strong"].argmax(-1) == targets
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            w = weights[inside]
            error += w.sum() * abs(np.average(right[inside], weights=w) - np.average(confidence[inside], weights=w))
    np.testing.assert_allclose(done["diagnostics/calibration_error"], error, rtol=1e-4)
    above = np.asarray(found["above"]) > 0
    log = np.asarray(found["log_amplification"])
    assert 0 < above.mean() < 1
    for name, where in (("above", above), ("below", ~above)):
        mean = np.average(log[where], weights=weights[where])
        np.testing.assert_allclose(done[f"diagnostics/log_amplification_{name}"], mean, rtol=1e-4)
    assert done["loss"] == 3 and not any("calibration_0" in name for name in done)


def test_a_mean_over_no_tokens_is_nan():
    given = {"diagnostics/above": 1.0, "diagnostics/amplified_below": 0.0, "diagnostics/amplified_above": 0.4}
    done = diagnostics.finish({name: jnp.float32(value) for name, value in given.items()})
    assert np.isnan(done["diagnostics/amplified_below"]) and done["diagnostics/amplified_above"] == jnp.float32(0.4)


def test_diagnostics_describe_the_control_that_is_mixed_in():
    rng = np.random.default_rng(0)
    z = {role: jnp.asarray(rng.normal(0, 2, (8, 30)), jnp.float32) for role in ("strong", "weak")}
    ctx, y = Context(jnp.int32(0), None), jnp.arange(8)
    constant, cold = (
        diagnostics.measure(objective, {"strong": z["strong"]}, y, ctx, jnp.zeros((8, 30)))
        for objective in (ControlledMix(LogitMix(0.4), "constant"), Temperature(0.4))
    )
    np.testing.assert_allclose(constant["entropy_weak"], np.log(30), rtol=1e-6)
    for name in ("target_prob_mix", "log_amplification", "log_amplification_hardest"):
        np.testing.assert_allclose(constant[name], cold[name], rtol=1e-5, err_msg=name)


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
    assert len(names) == 34
    for number, metrics in enumerate(history, 1):
        seen = {name for name in names if not np.isnan(metrics[name])}
        partial = {name for name in names if name.endswith(("_above", "_below"))}  # NaN without such tokens
        assert seen - partial == (names - partial if number % 2 == 0 else set())
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
