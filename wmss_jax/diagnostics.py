"""What a step's logits say about why it learns: entropies, margins, gradient on wrong tokens.

Here N is tokens, V the vocabulary.

PAPER.md §2.3-2.4 and §9: cross-entropy saturates because the gradient on a wrong token is its probability; mixing a
weak agent's logits in is said to put it back. These are the figures that show whether it does.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wmss_jax.objectives import Context, Objective, entropy, nll, target_logits

SATURATED = 0.99  # probability of the target above which less than a hundredth of the gradient is left


def measure(
    objective: Objective,
    logits: Mapping[str, Float[Array, "N V"]],
    targets_N: Int[Array, "N"],
    ctx: Context,
    gradient_NV: Float[Array, "N V"],
    vocab_size: int | None = None,
) -> dict[str, Float[Array, "N"]]:
    """Return the figures of every token by name, float32 [N].

    Of every role, and of "mix" where the objective is a cross-entropy on mixed logits:
        entropy_*: in nats; target_prob_*: probability of the target;
        margin_*: target's logit minus the mean of all others; margin_std_*: the same in standard deviations of the
        logits, because the softmax ignores a shift but not a scale (PAPER §9, the caution).
    nontarget_gradient: Σ |∂loss/∂z| of the strong role over all tokens but the target; nontarget_gradient_sft: what it
        would be under plain cross-entropy, 1 - P_strong(target).
    saturated: 1 where P_strong(target) > SATURATED.
    agreement: 1 where weak and strong have the same most likely token.

    Args:
        gradient_NV: of the per-token loss, with respect to the strong role's logits.
        vocab_size: rows beyond it are padding and left out.
    """
    V = logits["strong"].shape[-1]
    mixed = getattr(objective, "mixed", None)
    named = {**logits, **({"mix": mixed(logits, targets_N, ctx)} if mixed else {})}
    found: dict[str, Array] = {}
    for name, z_NV in named.items():
        margin_N, std_N = margin(z_NV, targets_N, vocab_size), _deviation(z_NV, vocab_size)
        found |= {
            f"entropy_{name}": entropy(z_NV),
            f"target_prob_{name}": jnp.exp(-nll(z_NV, targets_N)),
            f"margin_{name}": margin_N,
            f"margin_std_{name}": margin_N / jnp.maximum(std_N, 1e-9),
        }
    others_NV = jnp.arange(V)[None, :] != targets_N[:, None]
    found["nontarget_gradient"] = jnp.sum(jnp.where(others_NV, jnp.abs(gradient_NV), 0.0), axis=-1)
    found["nontarget_gradient_sft"] = 1 - found["target_prob_strong"]
    found["saturated"] = (found["target_prob_strong"] > SATURATED).astype(jnp.float32)
    if "weak" in logits:
        found["agreement"] = _agreement(logits["strong"], logits["weak"])
    return found


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
