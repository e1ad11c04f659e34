"""Objectives of the strong role's own logits: cross-entropy and what others weigh or blur it by.

Here N is tokens, V the vocabulary; p is P_strong(y), the target's probability, and sg stops the gradient.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wmss_jax.objectives.tokens import Context, PerToken, exists, is_greedy, nll


@dataclasses.dataclass(frozen=True)
class Sft:
    """Cross-entropy of the strong role, -log softmax(z_strong)[y] (arXiv 2602.08222, eq. 1)."""

    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx  # plain cross-entropy depends on nothing else
        return nll(logits["strong"], targets_N), {"accuracy": is_greedy(logits["strong"], targets_N)}


@dataclasses.dataclass(frozen=True)
class LabelSmoothing:
    """Cross-entropy with (1-ε)·e_y + ε/|V|, the target among the |V| (arXiv 1512.00567, §7, with u(k) = 1/K).

    Attributes:
        smoothing: ε in [0, 1); 0 is `Sft`.
    """

    smoothing: float = 0.1
    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __post_init__(self) -> None:
        _check("smoothing", self.smoothing, below=1.0)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        z_NV, nll_N = logits["strong"], nll(logits["strong"], targets_N)
        exists_NV = exists(z_NV)  # padding has no share: its -log p would be 1e30
        mean_N = jnp.mean(z_NV, axis=-1, where=exists_NV)
        uniform_N = jax.nn.logsumexp(z_NV, axis=-1) - mean_N
        losses_N = (1 - self.smoothing) * nll_N + self.smoothing * uniform_N
        return losses_N, {"nll": nll_N, "accuracy": is_greedy(z_NV, targets_N)}


@dataclasses.dataclass(frozen=True)
class LogitNoise:
    """Cross-entropy on z_strong + σ·ε/√L, ε ~ N(0, I): what the WMSS paper runs under the name UNDIAL.

    arXiv 2602.08222 v2, E.1 and E.6, calls Gaussian noise on the logits UNDIAL, with σ = 1; UNDIAL as published is
    unlearning by self-distillation, `Undial` here. Its division by √L, NEFTune's, makes the noise nearly vanish. The
    paper does not say what L is: here the length of the row, as in the hook for NEFTune that its code has. The noise is
    a function of (seed, step, example, position), fresh in every step.

    Attributes:
        sigma: σ >= 0; 0 is `Sft`.
        seq_len: L. v2: rows of 4096 tokens; 1 is the noise without the division, as it stands in the first code.
    """

    sigma: float = 1.0
    seq_len: int = 4096
    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __post_init__(self) -> None:
        _check("sigma", self.sigma)
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {self.seq_len}")

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        z_NV = logits["strong"]
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, ctx.step), (z_NV.shape[-1],))
        noise_NV = jnp.float32(self.sigma / math.sqrt(self.seq_len)) * jax.vmap(draw)(ctx.key_N)
        metrics = {"nll": nll(z_NV, targets_N), "accuracy": is_greedy(z_NV, targets_N)}
        return nll(z_NV + noise_NV, targets_N), metrics


@dataclasses.dataclass(frozen=True)
class Dft:
    """Dynamic fine-tuning, -sg(p)·log p (arXiv 2508.05629): the gradient of -p."""

    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        nll_N = nll(logits["strong"], targets_N)
        p_N = jax.lax.stop_gradient(jnp.exp(-nll_N))
        return p_N * nll_N, {"nll": nll_N, "accuracy": is_greedy(logits["strong"], targets_N)}


@dataclasses.dataclass(frozen=True)
class AlphaLoss:
    """(1 - p^α) / α, whose limit for α → 0 is -log p (arXiv 2510.00526: its family f^α). α = 1 is 1 - p.

    Attributes:
        alpha: α >= 0; 0 is `Sft`. Their finding: 1 and above for strong bases, 0 for weak ones.
    """

    alpha: float = 1.0
    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __post_init__(self) -> None:
        _check("alpha", self.alpha)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        nll_N = nll(logits["strong"], targets_N)
        # expm1, because 1 - p^α of a small α is all rounding.
        losses_N = -jnp.expm1(-self.alpha * nll_N) / self.alpha if self.alpha > 0 else nll_N
        return losses_N, {"nll": nll_N, "accuracy": is_greedy(logits["strong"], targets_N)}


@dataclasses.dataclass(frozen=True)
class Eaft:
    """Entropy-adaptive fine-tuning, -sg(H̃)^α·log p (arXiv 2601.02151): confident tokens weigh little.

    H̃ = H_K / ln K with H_K the entropy of the K most likely tokens, renormalised. Its released code divides by 3.0, for
    ln 20 = 2.996; other implementations do not divide at all.

    Attributes:
        alpha: α >= 0; 0 is `Sft`.
        top_k: K >= 2.
    """

    alpha: float = 1.0
    top_k: int = 20
    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __post_init__(self) -> None:
        _check("alpha", self.alpha)
        if self.top_k < 2:
            raise ValueError(f"top_k must be >= 2, got {self.top_k}")

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        z_NV = logits["strong"]
        nll_N = nll(z_NV, targets_N)
        entropy_N = top_entropy(jax.lax.stop_gradient(z_NV), self.top_k) / math.log(self.top_k)
        weight_N = jnp.clip(entropy_N, 0.0, 1.0) ** self.alpha
        return weight_N * nll_N, {"nll": nll_N, "weight": weight_N, "accuracy": is_greedy(z_NV, targets_N)}


def top_entropy(z_NV: Float[Array, "N V"], k: int) -> Float[Array, "N"]:
    """Return the entropy in nats of the `k` largest logits' softmax.

    The k-th largest is found bit by bit, by counting: sorting would gather a vocabulary that is split over devices.
    """
    bits_NV = jax.lax.bitcast_convert_type(z_NV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_NV = jnp.where(bits_NV < sign, bits_NV | sign, ~bits_NV)  # unsigned numbers in the logits' order

    def next_bit(i: Int[Array, ""], least_N: Array) -> Array:
        tried_N = least_N | (sign >> i.astype(jnp.uint32))
        enough_N = jnp.sum(order_NV >= tried_N[:, None], axis=-1) >= k
        return jnp.where(enough_N, tried_N, least_N)

    least_N1 = jax.lax.fori_loop(0, 32, next_bit, jnp.zeros(len(z_NV), jnp.uint32))[:, None]
    above_NV, equal_NV = order_NV > least_N1, order_NV == least_N1
    count = lambda which_NV: jnp.sum(which_NV, axis=-1, keepdims=True, dtype=jnp.float32)
    share_N1 = (k - count(above_NV)) / jnp.maximum(count(equal_NV), 1.0)  # of the places that equal ones have left
    x_NV = z_NV - jnp.max(z_NV, axis=-1, keepdims=True)
    e_NV = jnp.exp(x_NV) * jnp.where(above_NV, 1.0, jnp.where(equal_NV, jnp.minimum(share_N1, 1.0), 0.0))
    total_N = jnp.sum(e_NV, axis=-1)
    return jnp.log(total_N) - jnp.sum(e_NV * x_NV, axis=-1) / total_N


def _check(name: str, value: float, below: float = math.inf) -> None:
    if not 0 <= value < below:
        raise ValueError(f"{name} must be >= 0{'' if math.isinf(below) else f' and < {below:g}'}, got {value}")
