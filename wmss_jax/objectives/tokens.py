"""What every objective is made of: the contract, schedules, and figures of a token's logits.

Here N is tokens, V the vocabulary, which may be split over devices: a [N, V] array may be asked for sums, maxima and
sorted parts, never for an indexed read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PADDED_LOGIT = -1e30  # of vocabulary rows that are only padding; -inf would give 0 · -inf = NaN when mixed
PARTS = 16  # into which a vocabulary is cut at most: the devices that it may be split over

PerToken = tuple[Float[Array, "N"], dict[str, Float[Array, "N"]]]


class Context(NamedTuple):
    """What an objective may depend on besides logits and targets.

    Attributes:
        step: int32 scalar, the optimizer step; traced, so that a schedule never recompiles.
        key_N: one PRNG key per token, a function of (seed, example, position) alone: the same token draws the same
            noise however it is packed. Fold `step` in for fresh noise every step.
    """

    step: Any
    key_N: Any


@runtime_checkable
class Objective(Protocol):
    """Logits float32 [N, V] per role and targets int32 [N] -> losses float32 [N] and metrics float32 [N] each.

    One that is a cross-entropy on logits of its own making may also have `mixed(logits, targets_N, ctx)`, which returns
    these [N, V]: diagnostics then describe them, too; and `lam`, the weight of the strong role in them.
    """

    roles: ClassVar[tuple[str, ...]]

    def __call__(
        self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context
    ) -> PerToken: ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """A number that goes from `start` to `stop` in `steps` optimizer steps, in a straight line, and stays there."""

    start: float
    stop: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        share = jnp.clip(step / self.steps, 0.0, 1.0)
        return (self.start + (self.stop - self.start) * share).astype(jnp.float32)


def at(value: float | Linear, step: Int[Array, ""]) -> float | Float[Array, ""]:
    """Return a hyper-parameter that may be a schedule, at `step`."""
    return value(step) if callable(value) else value


def target_logits(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """Return z[y] of every token.

    A masked sum instead of an indexed read: where the vocabulary is sharded, a read gathers all of it.
    """
    return jnp.sum(jnp.where(is_target(logits_NV, targets_N), logits_NV, 0.0), axis=-1)


def is_target(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Bool[Array, "N V"]:
    """Return where the target stands."""
    return jnp.arange(logits_NV.shape[-1])[None, :] == targets_N[:, None]


def exists(logits_NV: Float[Array, "N V"]) -> Bool[Array, "N V"]:
    """Return which columns are tokens and not padding of the vocabulary."""
    return logits_NV > PADDED_LOGIT / 10


def in_parts(x_NV: Array) -> Array:
    """Return [N, parts, V / parts]: as many parts as a mesh may make of the vocabulary, whatever mesh there is."""
    N, V = x_NV.shape
    parts = math.gcd(V, PARTS)
    return x_NV.reshape(N, parts, V // parts)


def nll(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """Return -log softmax(z)[y] in nats."""
    return jax.nn.logsumexp(logits_NV, axis=-1) - target_logits(logits_NV, targets_N)


def entropy(logits_NV: Float[Array, "N V"]) -> Float[Array, "N"]:
    """Return the entropy of softmax(z) in nats (PAPER eq. 7 per token)."""
    log_probs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    return -jnp.sum(jnp.exp(log_probs_NV) * log_probs_NV, axis=-1)


def is_greedy(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """Return 1 where the target is the most likely token."""
    right_N = target_logits(logits_NV, targets_N) >= jnp.max(logits_NV, axis=-1)
    return right_N.astype(jnp.float32)
