"""Objectives with a distribution as target: of a teacher, of an earlier checkpoint, or of a reference to hold on to.

Here N is tokens, V the vocabulary. Whatever is learned from gets no gradient, even if its role were trained.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wmss_jax.objectives.tokens import Context, PerToken, exists, is_greedy, is_target, nll

Divergence = Literal["forward", "reverse", "jensen_shannon"]


@dataclasses.dataclass(frozen=True)
class Distill:
    """Distillation from the role "teacher", a larger model: (1-w)·CE(y) + w·T²·D(teacher, strong) at temperature T.

    arXiv 1503.02531, §2 and eq. 4: the factor T² keeps the gradient's size. D by `divergence`, with q the teacher's and
    p the strong role's softmax(z/T): forward KL(q‖p); reverse KL(p‖q) (arXiv 2306.08543); jensen_shannon, half
    KL(q‖m) + half KL(p‖m) with m = (p+q)/2 (arXiv 2306.13649, with β = 1/2).

    Attributes:
        temperature: T > 0. WMSS' own SSB baseline: 1.5.
        weight: w in [0, 1], the share of the teacher; 0 is `Sft`.
    """

    divergence: Divergence = "forward"
    temperature: float = 1.0
    weight: float = 0.5
    roles: ClassVar[tuple[str, ...]] = ("strong", "teacher")

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {self.weight}")
        if self.divergence not in ("forward", "reverse", "jensen_shannon"):
            raise ValueError(f"divergence must be forward, reverse or jensen_shannon, got {self.divergence!r}")

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        strong_NV, other_NV = (logits[role] for role in self.roles)
        nll_N, T = nll(strong_NV, targets_N), self.temperature
        distance_N = T**2 * divergence(other_NV / T, strong_NV / T, self.divergence)
        losses_N = (1 - self.weight) * nll_N + self.weight * distance_N
        return losses_N, {"nll": nll_N, "divergence": distance_N, "accuracy": is_greedy(strong_NV, targets_N)}


@dataclasses.dataclass(frozen=True)
class SelfDistill(Distill):
    """`Distill` from an earlier checkpoint of the strong role itself, the role "weak" (arXiv 1805.04770).

    Which checkpoint says `joint.weak.source`: with `ema` it is a mean teacher (arXiv 1703.01780).
    """

    roles: ClassVar[tuple[str, ...]] = ("strong", "weak")


@dataclasses.dataclass(frozen=True)
class Undial:
    """UNDIAL as published, to unlearn: CE(q, P_strong), q = softmax(z_reference - γ·e_y) (arXiv 2402.10052, §3).

    The target's logit of the reference is lowered, so γ > 0 moves away from what the data say; with γ = 0 it holds on
    to the reference, and is no `Sft`. What the WMSS paper calls UNDIAL is `LogitNoise`.

    Attributes:
        gamma: γ >= 0, in its code `di_strength`: 5 by default, 3 in its README, 3 to 30 in its sweeps.
    """

    gamma: float = 5.0
    roles: ClassVar[tuple[str, ...]] = ("strong", "reference")

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma must be >= 0, got {self.gamma}")

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        z_NV, reference_NV = (logits[role] for role in self.roles)
        lowered_NV = reference_NV - jnp.where(is_target(z_NV, targets_N), self.gamma, 0.0)
        metrics = {"nll": nll(z_NV, targets_N), "accuracy": is_greedy(z_NV, targets_N)}
        return cross_entropy(lowered_NV, z_NV), metrics


@dataclasses.dataclass(frozen=True)
class Gift:
    """GIFT: CE(q, P_strong) with q ∝ P_reference(k)·exp(β·1[k=y]) (arXiv 2601.09233; its code, `ẑ`).

    SFT at a finite temperature of the reward: β → ∞ is `Sft`, β = 0 holds on to the reference.

    Attributes:
        beta: β >= 0. Its code: 20.
        smoothing: share in [0, 1) of a uniform distribution in P_reference, `smooth_lambda` in its code: 0.
    """

    beta: float = 20.0
    smoothing: float = 0.0
    roles: ClassVar[tuple[str, ...]] = ("strong", "reference")

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be >= 0 and < 1, got {self.smoothing}")

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        z_NV, reference_NV = (logits[role] for role in self.roles)
        log_q_NV = jax.nn.log_softmax(reference_NV, axis=-1)
        if self.smoothing > 0:
            exists_NV = exists(reference_NV)
            uniform_N1 = jnp.log(self.smoothing / jnp.sum(exists_NV, axis=-1, keepdims=True, dtype=jnp.float32))
            smoothed_NV = jnp.logaddexp(math.log1p(-self.smoothing) + log_q_NV, uniform_N1)
            log_q_NV = jnp.where(exists_NV, smoothed_NV, log_q_NV)
        metrics = {"nll": nll(z_NV, targets_N), "accuracy": is_greedy(z_NV, targets_N)}
        return cross_entropy(log_q_NV + jnp.where(is_target(z_NV, targets_N), self.beta, 0.0), z_NV), metrics


@dataclasses.dataclass(frozen=True)
class Asft:
    """Anchored fine-tuning, -sg(p)·log p + w·KL: `Dft` that is held to the role "reference" (arXiv 2509.23753).

    Its code takes KL(reference‖strong), "forward", which is implemented by default; the text bounds the drift of the
    policy, which "reverse", KL(strong‖reference), measures.

    Attributes:
        kl_weight: w >= 0, 0.05 to 0.1 in its code; 0 is `Dft`.
    """

    kl_weight: float = 0.05
    divergence: Literal["forward", "reverse"] = "forward"
    roles: ClassVar[tuple[str, ...]] = ("strong", "reference")

    def __post_init__(self) -> None:
        if not (self.kl_weight >= 0 and math.isfinite(self.kl_weight)):
            raise ValueError(f"kl_weight must be >= 0, got {self.kl_weight}")

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx
        z_NV, reference_NV = (logits[role] for role in self.roles)
        nll_N = nll(z_NV, targets_N)
        p_N = jax.lax.stop_gradient(jnp.exp(-nll_N))
        kl_N = divergence(reference_NV, z_NV, self.divergence)
        metrics = {"nll": nll_N, "divergence": kl_N, "accuracy": is_greedy(z_NV, targets_N)}
        return p_N * nll_N + self.kl_weight * kl_N, metrics


def cross_entropy(target_logits_NV: Float[Array, "N V"], logits_NV: Float[Array, "N V"]) -> Float[Array, "N"]:
    """Return -Σ q·log p in nats, q and p the softmax of the two; no gradient to the first."""
    q_NV = jax.nn.softmax(jax.lax.stop_gradient(target_logits_NV), axis=-1)
    return -jnp.sum(q_NV * jax.nn.log_softmax(logits_NV, axis=-1), axis=-1)


def divergence(teacher_NV: Float[Array, "N V"], student_NV: Float[Array, "N V"], kind: Divergence) -> Float[Array, "N"]:
    """Return the divergence of two softmaxes in nats (see `Distill`); no gradient to the teacher."""
    log_q_NV = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_NV), axis=-1)
    log_p_NV = jax.nn.log_softmax(student_NV, axis=-1)
    if kind == "forward":
        return _kl(log_q_NV, log_p_NV)
    if kind == "reverse":
        return _kl(log_p_NV, log_q_NV)
    log_m_NV = jnp.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    return 0.5 * _kl(log_q_NV, log_m_NV) + 0.5 * _kl(log_p_NV, log_m_NV)


def _kl(log_a_NV: Array, log_b_NV: Array) -> Array:
    return jnp.sum(jnp.exp(log_a_NV) * (log_a_NV - log_b_NV), axis=-1)
