"""Every objective and every control of the weak signal against numpy in float64: value, and gradient by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from wmss_jax import head
from wmss_jax.objectives import (
    OBJECTIVES,
    AlphaLoss,
    Asft,
    Context,
    ControlledMix,
    Dft,
    Distill,
    Eaft,
    Gift,
    LabelSmoothing,
    Linear,
    LogitMix,
    LogitNoise,
    SelfDistill,
    Sft,
    Temperature,
    Undial,
)
from wmss_jax.objectives.likelihood import top_entropy
from wmss_jax.objectives.tokens import PADDED_LOGIT

N, V, REAL = 10, 48, 45  # three columns are padding
STEP = 3
CTX = Context(jnp.int32(STEP), jax.random.split(jax.random.key(7), N))
ROLES = ("strong", "weak", "teacher", "reference")
RNG = np.random.default_rng(0)
Y = RNG.integers(0, REAL, N)
Z = {role: RNG.normal(0, 2, (N, V)).astype(np.float32) for role in ROLES}
Z["strong"][:3, Y[0]] += 9  # confident, rightly in one token at least
for z in Z.values():
    z[:, REAL:] = PADDED_LOGIT
WIDE = {role: z[:, :REAL].astype(np.float64) for role, z in Z.items()}


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def nll(z):
    return -log_softmax(z)[np.arange(N), Y]


def kl(log_a, log_b):
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


def entropy(z):
    return -(np.exp(log_softmax(z)) * log_softmax(z)).sum(-1)


ONTO = np.eye(REAL)[Y]
fixed = WIDE["strong"]  # what stop_gradient sees


def smoothed(z, e):
    return -(((1 - e) * ONTO + e / REAL) * log_softmax(z)).sum(-1)


def soft_target(z, logits):
    return -(np.exp(log_softmax(logits)) * log_softmax(z)).sum(-1)


def largest_entropy(k):
    best = -np.sort(-fixed, axis=-1)[:, :k]
    return entropy(best)


def noise(sigma, L):
    """ε as documented: the token's key with the step folded in."""
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, STEP), (V,))
    return sigma * np.asarray(jax.vmap(draw)(CTX.key_N), np.float64)[:, :REAL] / np.sqrt(L)


def distilled(other, kind, T, w):
    def loss(z):
        log_q, log_p = log_softmax(WIDE[other] / T), log_softmax(z / T)
        middle = np.log(0.5 * np.exp(log_q) + 0.5 * np.exp(log_p))
        distance = {
            "forward": lambda: kl(log_q, log_p),
            "reverse": lambda: kl(log_p, log_q),
            "jensen_shannon": lambda: 0.5 * kl(log_q, middle) + 0.5 * kl(log_p, middle),
        }[kind]()
        return (1 - w) * nll(z) + w * T * T * distance

    return loss


def gift(beta, smoothing):
    p = (1 - smoothing) * np.exp(log_softmax(WIDE["reference"])) + smoothing / REAL
    return lambda z: soft_target(z, np.log(p) + beta * ONTO)


P = np.exp(-nll(fixed))
REFERENCE = log_softmax(WIDE["reference"])
mix = lambda lam, weak: lambda z: nll(lam * z + (1 - lam) * weak)

CASES = [
    (Sft(), nll),
    (LabelSmoothing(0.1), lambda z: smoothed(z, 0.1)),
    (LabelSmoothing(0.7), lambda z: smoothed(z, 0.7)),
    (LogitMix(0.3), mix(0.3, WIDE["weak"])),
    (Temperature(0.3), lambda z: nll(0.3 * z)),
    (Undial(3.0), lambda z: soft_target(z, WIDE["reference"] - 3 * ONTO)),
    (LogitNoise(2.0, 4), lambda z: nll(z + noise(2, 4))),
    *[
        (cls(kind, T, w), distilled(role, kind, T, w))
        for cls, role in ((Distill, "teacher"), (SelfDistill, "weak"))
        for kind, T, w in (("forward", 1.0, 0.5), ("reverse", 2.0, 1.0), ("jensen_shannon", 1.5, 0.3))
    ],
    (Dft(), lambda z: P * nll(z)),
    (AlphaLoss(0.4), lambda z: (1 - np.exp(-0.4 * nll(z))) / 0.4),
    (AlphaLoss(2.0), lambda z: (1 - np.exp(-nll(z)) ** 2) / 2),
    (Asft(0.2), lambda z: P * nll(z) + 0.2 * kl(REFERENCE, log_softmax(z))),
    (Asft(0.2, "reverse"), lambda z: P * nll(z) + 0.2 * kl(log_softmax(z), REFERENCE)),
    (Eaft(), lambda z: largest_entropy(20) / np.log(20) * nll(z)),
    (Eaft(2.0, 5), lambda z: (largest_entropy(5) / np.log(5)) ** 2 * nll(z)),
    (Gift(2.0), gift(2, 0)),
    (Gift(1.0, 0.3), gift(1, 0.3)),
]


def measured(objective):
    given = {role: jnp.asarray(Z[role]) for role in objective.roles}
    run = lambda strong: objective({**given, "strong": strong}, jnp.asarray(Y, jnp.int32), CTX)[0]
    losses, pull_back = jax.vjp(run, given["strong"])
    return np.asarray(losses), np.asarray(pull_back(jnp.ones(N))[0])


def differences(loss, z, h=1e-5):
    gradient = np.zeros_like(z)
    for k in range(z.shape[1]):
        up, down = z.copy(), z.copy()
        up[:, k] += h
        down[:, k] -= h
        gradient[:, k] = (loss(up) - loss(down)) / (2 * h)
    return gradient


def check(objective, loss):
    losses, gradient = measured(objective)
    np.testing.assert_allclose(losses, loss(fixed), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient[:, :REAL], differences(loss, fixed), rtol=2e-4, atol=3e-6)
    np.testing.assert_array_equal(gradient[:, REAL:], 0.0)


@pytest.mark.parametrize("objective, loss", CASES, ids=[repr(objective) for objective, _ in CASES])
def test_value_and_gradient(objective, loss):
    check(objective, loss)


def test_no_objective_is_without_an_oracle():
    assert {type(objective) for objective, _ in CASES} == set(OBJECTIVES.values())


@pytest.mark.parametrize(
    "objective",
    [
        LabelSmoothing(0.0), LogitMix(1.0), Temperature(1.0), LogitNoise(0.0), Distill(weight=0.0),
        SelfDistill("reverse", 2.0, 0.0), AlphaLoss(0.0), AlphaLoss(1e-7), Eaft(0.0), Gift(200.0),
    ],
    ids=repr,
)  # fmt: skip
def test_at_their_limits_they_are_sft(objective):
    (losses, gradient), (sft_losses, sft_gradient) = measured(objective), measured(Sft())
    np.testing.assert_allclose(losses, sft_losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, sft_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [Undial(0.0), Gift(0.0)], ids=repr)
def test_without_their_shift_of_the_target_they_distil_the_reference(objective):
    """And are no SFT: what they hold on to is the reference's whole distribution."""
    expected = differences(lambda z: kl(REFERENCE, log_softmax(z)), fixed)
    np.testing.assert_allclose(measured(objective)[1][:, :REAL], expected, rtol=2e-4, atol=2e-6)


def test_dft_has_the_gradient_of_the_probability():
    np.testing.assert_allclose(measured(Dft())[1], measured(AlphaLoss(1.0))[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [2, 3, 20, 60])
def test_the_entropy_of_the_largest_logits_with_ties_signs_and_too_few(k):
    z = np.random.default_rng(k).normal(0, 3, (50, 40)).astype(np.float32)
    z[10:20] = np.round(z[10:20])  # ties, zeros of both signs among them
    z[20:25] = 0.0
    z[25:30, 5:] = -1e30
    best = -np.sort(-z.astype(np.float64), axis=-1)[:, :k]
    p = np.exp(log_softmax(best))
    expected = -(p * np.where(p > 0, log_softmax(best), 0)).sum(-1)
    np.testing.assert_allclose(jax.jit(top_entropy, static_argnums=1)(z, k), expected, rtol=1e-5, atol=1e-6)


def test_logit_noise_is_fresh_in_every_step_and_follows_the_token():
    given, y = {"strong": jnp.asarray(Z["strong"])}, jnp.asarray(Y, jnp.int32)
    first, again, later = (
        LogitNoise(1.0, 1)(given, y, CTX._replace(step=jnp.int32(step)))[0] for step in (STEP, STEP, STEP + 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(later - first).min() > 0
    order = np.arange(N)[::-1]
    moved = {"strong": given["strong"][order]}
    backwards = LogitNoise(1.0, 1)(moved, y[order], CTX._replace(key_N=CTX.key_N[order]))[0]
    np.testing.assert_allclose(backwards, first[order], rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LabelSmoothing(1.0), "smoothing must be >= 0 and < 1, got 1.0"),
        (lambda: LogitNoise(-1.0), "sigma must be >= 0, got -1.0"),
        (lambda: LogitNoise(1.0, 0), "seq_len must be >= 1, got 0"),
        (lambda: AlphaLoss(-0.5), "alpha must be >= 0, got -0.5"),
        (lambda: Eaft(1.0, 1), "top_k must be >= 2, got 1"),
        (lambda: Distill(temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: SelfDistill(weight=1.5), r"weight must be in \[0, 1\], got 1.5"),
        (lambda: Undial(-1.0), "gamma must be >= 0, got -1.0"),
        (lambda: Gift(float("inf")), "beta must be >= 0, got inf"),
        (lambda: Gift(1.0, 1.0), "smoothing must be >= 0 and < 1, got 1.0"),
        (lambda: Asft(-0.1), "kl_weight must be >= 0, got -0.1"),
        (lambda: ControlledMix(LogitMix(), "none"), "control must be one of constant, "),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- controls of the weak signal -----------------------------------------------------------------------------------


def test_constant_is_a_temperature_and_needs_no_weak_role():
    objective = ControlledMix(LogitMix(0.3), "constant")
    assert objective.roles == ("strong",)
    check(objective, lambda z: nll(0.3 * z))


def test_temperature_matched_has_the_weak_entropy_and_the_strong_order():
    tau = np.array([
        brentq(lambda log_t, n=n: entropy(np.exp(log_t) * fixed[n][None])[0] - entropy(WIDE["weak"][n][None])[0], -7, 7)
        for n in range(N)
    ])  # fmt: skip
    weak = np.exp(tau)[:, None] * fixed
    np.testing.assert_allclose(entropy(weak), entropy(WIDE["weak"]), rtol=1e-9)
    check(ControlledMix(LogitMix(0.3), "temperature_matched"), mix(0.3, weak))


def test_target_grad_matched_has_the_targets_gradient_and_the_strong_tail():
    lam = 0.3
    p_mix = np.exp(-nll(lam * fixed + (1 - lam) * WIDE["weak"]))
    p_own = np.exp(-nll(lam * fixed))
    logit = lambda p: np.log(p) - np.log1p(-p)
    bias = (logit(p_mix) - logit(p_own)) / (1 - lam)
    objective = ControlledMix(LogitMix(lam), "target_grad_matched")
    check(objective, mix(lam, bias[:, None] * ONTO))
    _, gradient = measured(objective)
    _, real = measured(LogitMix(lam))
    np.testing.assert_allclose(gradient[np.arange(N), Y], real[np.arange(N), Y], rtol=1e-4, atol=1e-7)
    tail, own = gradient[:, :REAL] * (1 - ONTO), np.exp(log_softmax(lam * fixed)) * (1 - ONTO)
    np.testing.assert_allclose(
        tail / tail.sum(-1, keepdims=True), own / own.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("lam", [0.0, 1.0, Linear(1.0, 0.5, 2 * STEP)])
def test_target_grad_matched_at_the_ends_of_lambda_and_on_a_schedule(lam):
    objective = ControlledMix(LogitMix(lam), "target_grad_matched")
    losses, _ = measured(objective)
    value = 0.75 if isinstance(lam, Linear) else lam
    np.testing.assert_allclose(losses, mix(value, WIDE["weak"])(fixed), rtol=1e-5, atol=1e-5)
    assert objective.lam == lam, "what export folds into the shipped model"


def signals(step=STEP, keys=CTX.key_N):
    given = {role: jnp.asarray(Z[role]) for role in ("strong", "weak")}
    ctx = Context(jnp.int32(step), keys)
    return np.asarray(ControlledMix(LogitMix(), "permuted_tail").signals(given, jnp.asarray(Y, jnp.int32), ctx)["weak"])


def test_permuted_tail_keeps_target_padding_and_the_set_of_the_rest():
    found = signals()
    np.testing.assert_array_equal(found[np.arange(N), Y], Z["weak"][np.arange(N), Y])
    np.testing.assert_array_equal(found[:, REAL:], Z["weak"][:, REAL:])
    parts = lambda x: np.sort(x.reshape(N, 16, -1), axis=-1)
    np.testing.assert_array_equal(parts(found), parts(Z["weak"]))
    others = (ONTO == 0) & (found[:, :REAL] != Z["weak"][:, :REAL])
    assert 0.4 < others.mean() < 0.9, "most have moved; of three or two in a part some stay by chance"
    np.testing.assert_array_equal(found, signals())
    assert (found != signals(step=STEP + 1)).any() and (found != signals(keys=CTX.key_N[::-1])).any()


def test_every_place_of_a_permuted_tail_gets_every_logit_alike():
    n, width = 6000, 5
    z = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None], (n, width))
    ctx = Context(jnp.int32(0), jax.random.split(jax.random.key(1), n))
    given = {"strong": z, "weak": z}
    dealt = ControlledMix(LogitMix(), "permuted_tail").signals(given, jnp.full(n, 2, jnp.int32), ctx)["weak"]
    for place in (0, 1, 3, 4):
        share = np.bincount(np.asarray(dealt)[:, place].astype(int), minlength=width) / n
        np.testing.assert_allclose(share, [0.25, 0.25, 0, 0.25, 0.25], atol=0.03)


def test_padding_changes_no_control():
    """A padded vocabulary is a smaller one, but for the parts that permuted_tail deals in."""
    y = jnp.asarray(Y, jnp.int32)
    settings = head.Settings(vocab_size=REAL)
    for control in ("constant", "temperature_matched", "target_grad_matched"):
        objective = ControlledMix(LogitMix(0.3), control)
        real = {role: jnp.asarray(Z[role][:, :REAL]) for role in objective.roles}
        padded = {role: settings.finish(jnp.pad(x, ((0, 0), (0, 3))), role) for role, x in real.items()}
        few, many = objective(real, y, CTX)[0], objective(padded, y, CTX)[0]
        np.testing.assert_allclose(few, many, rtol=1e-6, err_msg=control)
