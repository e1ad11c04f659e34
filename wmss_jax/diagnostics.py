"""What a step's logits say about why it learns: entropies, margins, gradient on wrong tokens.

Here N is tokens, V the vocabulary.

PAPER.md §2.3-2.4 and §9: cross-entropy saturates because the gradient on a wrong token is its probability; mixing a
weak agent's logits in is said to put it back. These are the figures that show whether it does.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wmss_jax.objectives import Context, Objective, at, entropy, nll, target_logits
from wmss_jax.objectives.tokens import exists, is_greedy, is_target

SATURATED = 0.99  # probability of the target above which less than a hundredth of the gradient is left
CALIBRATION_BINS = 15


def measure(
    objective: Objective,
    logits: Mapping[str, Float[Array, "N V"]],
    targets_N: Int[Array, "N"],
    ctx: Context,
    gradient_NV: Float[Array, "N V"],
    vocab_size: int | None = None,
) -> dict[str, Float[Array, "N"]]:
    """Return the figures of every token by name, float32 [N]; their means go through `finish`.

    Of every role, and of "mix" where the objective is a cross-entropy on mixed logits; "weak" is what is mixed in, a
    control of the weak signal included:
        entropy_*: in nats; target_prob_*: probability of the target;
        target_logit_*, other_logit_*: the target's logit, and the mean of all others (PAPER §9, its Table 6);
        margin_*: the first minus the second; margin_std_*: the same in standard deviations of the logits, because the
        softmax ignores a shift but not a scale (PAPER §9, the caution).
    nontarget_gradient: Σ |∂loss/∂z| of the strong role over all tokens but the target; nontarget_gradient_sft: what it
        would be under plain cross-entropy, 1 - P_strong(target).
    saturated: 1 where P_strong(target) > SATURATED.
    logit_mean: mean of the strong role's logits, along which the loss has no gradient (PAPER §2.4, Stage III): what
        changes in it while training is drift. logit_mean_drift: the same minus the weak role's.
    calibration_00 ...: parts of the expected calibration error, see `finish`.

    Of a weak role:
        agreement: 1 where weak and strong have the same most likely token.
        theorem_1: 1 where Theorem 1's condition holds, no wrong token has a larger margin under the weak role than
        under the strong one (arXiv 2602.08222v2, eq. 13).
    Of an objective that mixes with the weight λ, of the gradient on the strong role's wrong tokens relative to that of
    plain cross-entropy, λ·P_mix(k) / P_strong(k) (PAPER §2.3), in logarithms, because it has no bound:
        log_amplification: of all wrong tokens together, λ(1 - P_mix(y)) / (1 - P_strong(y)), and so of the target;
        amplified: 1 where that is above 1; log_amplification_hardest: of the strong role's most likely wrong token;
        above: 1 where P_strong(y) > 1 - λ, without which the target's gradient cannot be amplified; *_above, *_below:
        the first two where it is, and where it is not.

    Args:
        gradient_NV: of the per-token loss, with respect to the strong role's logits.
        vocab_size: rows beyond it are padding and left out.
    """
    V = logits["strong"].shape[-1]
    count = V if vocab_size is None else vocab_size
    signals, mixed = getattr(objective, "signals", None), getattr(objective, "mixed", None)
    logits = signals(logits, targets_N, ctx) if signals else logits
    named = {**logits, **({"mix": mixed(logits, targets_N, ctx)} if mixed else {})}
    found: dict[str, Array] = {}
    for name, z_NV in named.items():
        margin_N, std_N = margin(z_NV, targets_N, vocab_size), _deviation(z_NV, vocab_size)
        target_N = target_logits(z_NV, targets_N)
        found |= {
            f"entropy_{name}": entropy(z_NV),
            f"target_prob_{name}": jnp.exp(-nll(z_NV, targets_N)),
            f"target_logit_{name}": target_N,
            f"other_logit_{name}": target_N - margin_N,
            f"margin_{name}": margin_N,
            f"margin_std_{name}": margin_N / jnp.maximum(std_N, 1e-9),
        }
    others_NV = jnp.arange(V)[None, :] != targets_N[:, None]
    found["nontarget_gradient"] = jnp.sum(jnp.where(others_NV, jnp.abs(gradient_NV), 0.0), axis=-1)
    found["nontarget_gradient_sft"] = 1 - found["target_prob_strong"]
    found["saturated"] = (found["target_prob_strong"] > SATURATED).astype(jnp.float32)
    mean = lambda name: found[f"target_logit_{name}"] - found[f"margin_{name}"] * (count - 1) / count
    found["logit_mean"] = mean("strong")
    found |= _calibration(logits["strong"], targets_N)
    if "weak" in logits:
        found["agreement"] = _agreement(logits["strong"], logits["weak"])
        found["theorem_1"] = _theorem_1(logits["strong"], logits["weak"], targets_N)
        found["logit_mean_drift"] = found["logit_mean"] - mean("weak")
    if mixed and (weight := getattr(objective, "lam", None)) is not None:
        lam = jnp.asarray(at(weight, ctx.step), jnp.float32)
        found |= _amplification(logits["strong"], named["mix"], targets_N, lam)
    return found


def finish(metrics: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """Return metrics with the means of `measure` put together, whatever their prefix, once they are of all tokens.

    calibration_error: Σ_b |mean over all tokens of (confidence - correct) in bin b|, the expected calibration error of
        the strong role's most likely token in 15 bins of equal width (arXiv 1706.04599, eq. 3).
    *_above, *_below: means over the tokens where it is so; NaN where there is none.
    """
    out, gaps = {}, {}
    for name, value in metrics.items():
        prefix, _, last = name.rpartition("calibration_")
        if prefix and last.isdecimal():
            gaps[prefix] = gaps.get(prefix, 0.0) + jnp.abs(value)
        elif name.endswith(("_above", "_below")):
            share = metrics[f"{name.rpartition('/')[0]}/above"]
            share = share if name.endswith("_above") else 1 - share
            # Not 0: of weights that add up to 1 the rounding may remain.
            out[name] = jnp.where(share > 1e-6, value / jnp.maximum(share, 1e-6), jnp.nan)
        else:
            out[name] = value
    return out | {f"{prefix}calibration_error": value for prefix, value in gaps.items()}


def summary(
    logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"], vocab_size: int | None = None, shards: int = 1
) -> dict[str, Float[Array, "N"]]:
    """Return "entropy" and "nll" in nats and "margin" in logits, as `entropy`, `nll` and `margin` do, much faster.

    The logits are read twice, for their maximum and for all sums at once. Not differentiable.

    Args:
        vocab_size: rows beyond it are padding; their logits have to be finite, and too low for any probability.
        shards: parts that the vocabulary is split into over devices, which exchange [N] sums and no logits.
    """
    V = logits_NV.shape[-1]
    count = V if vocab_size is None else vocab_size
    # A short axis is summed first: XLA's CPU backend turns that into one vectorised loop over all four sums (33 us for
    # 32,768 logits on one core), but adds up a whole row number by number (125 us) and single sums with one exp each.
    fold = max(k for k in range(1, 17) if V // shards % k == 0)
    folded = lambda x: x.reshape(x.shape[0], shards, fold, V // shards // fold)
    each = lambda x_N: x_N[:, None, None, None]
    max_N = jnp.max(logits_NV, axis=-1)
    z, index = folded(logits_NV), folded(jnp.arange(V)[None])
    x = z - each(max_N)
    e = jnp.exp(x)
    terms = (e, e * x, jnp.where(index < count, z, 0.0), jnp.where(index == each(targets_N), z, 0.0))
    add = lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True))
    sums = jax.lax.reduce(terms, (jnp.float32(0),) * len(terms), add, (2,))
    e_N, ex_N, z_N, target_N = (jnp.sum(part, axis=(1, 2)) for part in sums)
    return {
        "entropy": jnp.log(e_N) - ex_N / e_N,
        "nll": jnp.log(e_N) - (target_N - max_N),
        "margin": target_N - (z_N - target_N) / max(count - 1, 1),
    }


def margin(
    logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"], vocab_size: int | None = None
) -> Float[Array, "N"]:
    """Return the target's logit minus the mean logit of all other tokens, padding left out."""
    V = logits_NV.shape[-1]
    count = V if vocab_size is None else vocab_size
    sum_N = jnp.sum(jnp.where(jnp.arange(V)[None, :] < count, logits_NV, 0.0), axis=-1)
    target_N = target_logits(logits_NV, targets_N)
    return target_N - (sum_N - target_N) / max(count - 1, 1)


def _deviation(logits_NV: Array, vocab_size: int | None) -> Array:
    V = logits_NV.shape[-1]
    exists_1V = jnp.arange(V)[None, :] < (V if vocab_size is None else vocab_size)
    return jnp.std(logits_NV, axis=-1, where=exists_1V)


def _agreement(a_NV: Array, b_NV: Array) -> Array:
    # By comparing with the maximum: an argmax over a sharded vocabulary would gather it.
    top = lambda z_NV: z_NV >= jnp.max(z_NV, axis=-1, keepdims=True)
    return jnp.any(top(a_NV) & top(b_NV), axis=-1).astype(jnp.float32)


def _calibration(logits_NV: Array, targets_N: Array) -> dict[str, Array]:
    """Return confidence minus correctness of every token, under the name of the bin that its confidence is in."""
    confidence_N = jnp.exp(jnp.max(logits_NV, axis=-1) - jax.nn.logsumexp(logits_NV, axis=-1))
    gap_N = confidence_N - is_greedy(logits_NV, targets_N)
    bin_N = jnp.clip(jnp.ceil(confidence_N * CALIBRATION_BINS).astype(jnp.int32) - 1, 0, CALIBRATION_BINS - 1)
    return {f"calibration_{b:02}": jnp.where(bin_N == b, gap_N, 0.0) for b in range(CALIBRATION_BINS)}


def _theorem_1(strong_NV: Array, weak_NV: Array, targets_N: Array) -> Array:
    # m_k(weak) <= m_k(strong) for all k is: z_strong - z_weak is nowhere larger than at the target.
    gain_NV = jnp.where(exists(strong_NV), strong_NV - weak_NV, -jnp.inf)
    return (target_logits(strong_NV - weak_NV, targets_N) >= jnp.max(gain_NV, axis=-1)).astype(jnp.float32)


def _amplification(strong_NV: Array, mixed_NV: Array, targets_N: Array, lam: Array) -> dict[str, Array]:
    total = lambda z_NV: jax.nn.logsumexp(z_NV, axis=-1)
    wrong = lambda z_NV: jnp.where(is_target(z_NV, targets_N), -jnp.inf, z_NV)
    # As differences of logarithms: 1 - p of a saturated token is 0 in float32.
    rise_N = jnp.log(lam) - total(mixed_NV) + total(strong_NV)
    log_N = rise_N + total(wrong(mixed_NV)) - total(wrong(strong_NV))
    hardest_N1 = jnp.max(wrong(strong_NV), axis=-1, keepdims=True)
    gap_N = jnp.max(jnp.where(wrong(strong_NV) == hardest_N1, mixed_NV - strong_NV, -jnp.inf), axis=-1)
    above_N = (jnp.exp(-nll(strong_NV, targets_N)) > 1 - lam).astype(jnp.float32)
    amplified_N = (log_N > 0).astype(jnp.float32)
    found = {"log_amplification": log_N, "amplified": amplified_N}
    found |= {f"{name}_above": above_N * x_N for name, x_N in list(found.items())}
    found |= {f"{name}_below": (1 - above_N) * found[name] for name in ("log_amplification", "amplified")}
    return {**found, "log_amplification_hardest": rise_N + gap_N, "above": above_N}
