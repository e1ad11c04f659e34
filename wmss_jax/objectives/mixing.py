"""Weak-driven learning: cross-entropy on logits with the weak role's mixed in. Here N is tokens, V the vocabulary."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wmss_jax.objectives.tokens import Context, Linear, PerToken, at, is_greedy, nll


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

    def mixed(
        self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context
    ) -> Float[Array, "N V"]:
        """Return z_mix, the logits that the cross-entropy is taken on."""
        del targets_N
        lam = jnp.asarray(at(self.lam, ctx.step), self.mix_dtype)
        strong_NV, weak_NV = (logits[role].astype(self.mix_dtype) for role in self.roles)
        return (lam * strong_NV + (1 - lam) * weak_NV).astype(jnp.float32)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        accuracy_N = is_greedy(logits["strong"], targets_N)
        return nll(self.mixed(logits, targets_N, ctx), targets_N), {"accuracy": accuracy_N}


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

    def mixed(
        self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context
    ) -> Float[Array, "N V"]:
        """Return λ·z_strong, the logits that the cross-entropy is taken on."""
        del targets_N
        return at(self.lam, ctx.step) * logits["strong"]

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        accuracy_N = is_greedy(logits["strong"], targets_N)
        return nll(self.mixed(logits, targets_N, ctx), targets_N), {"accuracy": accuracy_N}


def _check_lam(lam: float | Linear) -> None:
    for value in (lam.start, lam.stop) if isinstance(lam, Linear) else (lam,):
        if not 0 <= value <= 1:
            raise ValueError(f"lam must be in [0, 1], got {value}")
