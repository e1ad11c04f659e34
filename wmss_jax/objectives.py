"""Per-token training objectives over the logits of one or more roles. Here N is tokens, V the vocabulary.

An objective is a frozen dataclass of hyper-parameters with the names of its `roles` and one method: logits per role
and targets in, one loss per token out. Chunking, masking, stopping gradients and dividing by the token count happen
once, in head.py and step.py. To add one: write the dataclass, add a row to OBJECTIVES.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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

    One that is a cross-entropy on logits of its own making may also have `mixed(logits, ctx)`, which returns these
    [N, V]: diagnostics then describe them, too.
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
    is_target_NV = jnp.arange(logits_NV.shape[-1])[None, :] == targets_N[:, None]
    return jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)


def nll(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """Return -log softmax(z)[y] in nats."""
    return jax.nn.logsumexp(logits_NV, axis=-1) - target_logits(logits_NV, targets_N)


def entropy(logits_NV: Float[Array, "N V"]) -> Float[Array, "N"]:
    """Return the entropy of softmax(z) in nats (PAPER eq. 7 per token)."""
    log_probs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    return -jnp.sum(jnp.exp(log_probs_NV) * log_probs_NV, axis=-1)


def _is_greedy(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    right_N = target_logits(logits_NV, targets_N) >= jnp.max(logits_NV, axis=-1)
    return right_N.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Sft:
    """Cross-entropy of the strong role, -log softmax(z_strong)[y] (arXiv 2602.08222, eq. 1)."""

    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        del ctx  # plain cross-entropy depends on nothing else
        return nll(logits["strong"], targets_N), {"accuracy": _is_greedy(logits["strong"], targets_N)}


@dataclasses.dataclass(frozen=True)
class LogitMix:
    """Weak-driven learning: cross-entropy on z_mix = λ·z_strong + (1-λ)·z_weak (arXiv 2602.08222, eqs. 5-6).

    The gradient is λ·(P_mix - e_y) on the strong logits and (1-λ)·(P_mix - e_y) on the weak ones (eqs. 22, 49-50).

    Attributes:
        lam: λ in [0, 1], the weight of the *strong* role, or a `Linear` schedule of it. Every version of the paper
            uses 0.5; its sweep is flat from 0.42 to 0.5.
        mix_dtype: "float32", or "bfloat16" to mix as the released code does; the cross-entropy is float32 either way.
    """

    lam: float | Linear = 0.5
    mix_dtype: Literal["float32", "bfloat16"] = "float32"
    roles: ClassVar[tuple[str, ...]] = ("strong", "weak")

    def __post_init__(self) -> None:
        _check_lam(self.lam)
        if self.mix_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"mix_dtype must be 'float32' or 'bfloat16', got {self.mix_dtype!r}")

    def mixed(self, logits: Mapping[str, Float[Array, "N V"]], ctx: Context) -> Float[Array, "N V"]:
        """Return z_mix, the logits that the cross-entropy is taken on."""
        lam = jnp.asarray(at(self.lam, ctx.step), self.mix_dtype)
        strong_NV, weak_NV = (logits[role].astype(self.mix_dtype) for role in self.roles)
        return (lam * strong_NV + (1 - lam) * weak_NV).astype(jnp.float32)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        return nll(self.mixed(logits, ctx), targets_N), {"accuracy": _is_greedy(logits["strong"], targets_N)}


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Cross-entropy on λ·z_strong: weak-driven learning with a weak role that knows nothing.

    Constant weak logits cancel in the softmax, so this is `LogitMix` without the weak role's information, at no cost:
    the control that a gain of `LogitMix` has to beat (PAPER §2.3, "D0").

    Attributes:
        lam: λ in [0, 1], as in `LogitMix`.
    """

    lam: float | Linear = 0.5
    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __post_init__(self) -> None:
        _check_lam(self.lam)

    def mixed(self, logits: Mapping[str, Float[Array, "N V"]], ctx: Context) -> Float[Array, "N V"]:
        """Return λ·z_strong, the logits that the cross-entropy is taken on."""
        return at(self.lam, ctx.step) * logits["strong"]

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        return nll(self.mixed(logits, ctx), targets_N), {"accuracy": _is_greedy(logits["strong"], targets_N)}


def _check_lam(lam: float | Linear) -> None:
    for value in (lam.start, lam.stop) if isinstance(lam, Linear) else (lam,):
        if not 0 <= value <= 1:
            raise ValueError(f"lam must be in [0, 1], got {value}")


OBJECTIVES: dict[str, type] = {"sft": Sft, "logit_mix": LogitMix, "temperature": Temperature}
