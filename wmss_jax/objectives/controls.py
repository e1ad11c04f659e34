"""Controls of the weak signal: `LogitMix` with something else in the weak role's place. N is tokens, V the vocabulary.

Each takes one kind of information out of what the weak role says and leaves the rest of the computation as it is, the
factor λ on the strong role's gradient included; what a control gains as well is owed to something else (PAPER.md §13.3,
§15). What stands in the weak role's place gets no gradient, like a frozen weak agent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wmss_jax.objectives.mixing import LogitMix
from wmss_jax.objectives.tokens import (
    PADDED_LOGIT,
    Context,
    Linear,
    PerToken,
    at,
    entropy,
    exists,
    in_parts,
    is_greedy,
    is_target,
    nll,
    target_logits,
)

CONTROLS = (
    "constant", "temperature_matched", "shuffled_tokens", "shuffled_examples", "permuted_tail", "target_grad_matched",
)  # fmt: skip
_LOG_TEMPERATURES, _BISECTIONS = 7.0, 24


@dataclasses.dataclass(frozen=True)
class ControlledMix:
    """`LogitMix` whose weak logits are replaced.

    Attributes:
        mix: what they are mixed by.
        control: what by.
            constant: equal logits, which cancel in the softmax: CE(λ·z_strong), and no weak role is needed.
            temperature_matched: τ·z_strong, with τ such that its entropy is that of the weak role's softmax, token by
                token, e^-7 <= τ <= e^7: the weak role's confidence without its opinion.
            shuffled_tokens: what the weak role says of another token of the row: of the row's tokens with a loss, in a
                random circle, so that none keeps its own.
            shuffled_examples: what the weak role says of another row, which holds other examples: row b takes that of
                row b + r, in a circle of the batch's rows with a loss and r > 0 random; its i-th token with a loss the
                i-th of that row, from the start again if that has fewer. A batch with one such row alone, at the end of
                an epoch, keeps its own.
            permuted_tail: the weak logits with all but the target's permuted at random, anew for every token and step:
                the target's probability and the tail's entropy without which token is which. Within 16 equal parts of
                the vocabulary (fewer, where its size does not divide), so that none has to leave its device.
            target_grad_matched: equal logits but for the target's, which is such that P_mix(y), and with it the
                target's gradient λ·(P_mix(y) - 1), is that of the real mixture; the tail's shares are then those of
                λ·z_strong ("TargetGradMatch", PAPER §15).
    """

    mix: LogitMix
    control: str

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {self.control!r}")

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose logits are needed."""
        return ("strong",) if self.control == "constant" else self.mix.roles

    @property
    def lam(self) -> float | Linear:
        """λ of the mixture."""
        return self.mix.lam

    def signals(
        self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context
    ) -> dict[str, Float[Array, "N V"]]:
        """Return the logits that are mixed, by role."""
        strong_NV = jax.lax.stop_gradient(logits["strong"])
        if self.control == "constant":
            return {**logits, "weak": jnp.where(exists(strong_NV), 0.0, PADDED_LOGIT)}
        weak_NV = jax.lax.stop_gradient(logits["weak"])
        if self.control == "temperature_matched":
            weak_NV = temperature_of(strong_NV, entropy(weak_NV))[:, None] * strong_NV
        elif self.control == "permuted_tail":
            weak_NV = permuted_tail(weak_NV, targets_N, ctx)
        elif self.control == "target_grad_matched":
            mixed_NV = self.mix.mixed({"strong": strong_NV, "weak": weak_NV}, targets_N, ctx)
            lam = jnp.float32(at(self.lam, ctx.step))
            own_NV = jnp.where(exists(strong_NV), lam * strong_NV, PADDED_LOGIT)
            bias_N = _logit(mixed_NV, targets_N) - _logit(own_NV, targets_N)
            bias_N = bias_N / jnp.where(lam < 1, 1 - lam, 1.0)  # with λ = 1 it is 0
            onto_NV = jnp.where(is_target(weak_NV, targets_N), bias_N[:, None], 0.0)
            weak_NV = jnp.where(exists(strong_NV), onto_NV, PADDED_LOGIT)
        return {**logits, "weak": weak_NV}

    def mixed(
        self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context
    ) -> Float[Array, "N V"]:
        """Return the logits that the cross-entropy is taken on."""
        return self.mix.mixed(self.signals(logits, targets_N, ctx), targets_N, ctx)

    def __call__(self, logits: Mapping[str, Float[Array, "N V"]], targets_N: Int[Array, "N"], ctx: Context) -> PerToken:
        accuracy_N = is_greedy(logits["strong"], targets_N)
        return nll(self.mixed(logits, targets_N, ctx), targets_N), {"accuracy": accuracy_N}

    def rearranged(self, batch: Mapping[str, Array], step: Any, seed: Any) -> dict[str, Array]:
        """Return the batch with what the weak role is to see instead of the strong one's tokens, where they are others.

        "weak_from" int32 [B, T]: the position in its row whose hidden state each token takes; and, if those rows are
        others, the weak role's own "weak_tokens", "weak_positions" and "weak_segments", or "weak_hidden".
        """
        trained_BT = batch["loss_weights"] > 0
        key = jax.random.fold_in(jax.random.key(seed), step)
        if self.control == "shuffled_tokens":
            return {**batch, "weak_from": _circle_in_rows(trained_BT, batch, key)}
        if self.control == "shuffled_examples":
            donors_B, from_BT = _other_rows(trained_BT, key)
            names = ["weak_hidden"] if "weak_hidden" in batch else ["tokens", "positions", "segments"]
            moved = {f"weak_{name.removeprefix('weak_')}": batch[name][donors_B] for name in names}
            return {**batch, **moved, "weak_from": from_BT}
        return dict(batch)


def temperature_of(logits_NV: Float[Array, "N V"], entropy_N: Float[Array, "N"]) -> Float[Array, "N"]:
    """Return τ > 0 such that softmax(τ·z) has the given entropy in nats, within [e^-7, e^7], by bisection."""

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_N, high_N = bounds
        middle_N = 0.5 * (low_N + high_N)
        too_high_N = entropy(jnp.exp(middle_N)[:, None] * logits_NV) > entropy_N  # it falls as τ rises
        return jnp.where(too_high_N, middle_N, low_N), jnp.where(too_high_N, high_N, middle_N)

    ends = (jnp.full_like(entropy_N, -_LOG_TEMPERATURES), jnp.full_like(entropy_N, _LOG_TEMPERATURES))
    low_N, high_N = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
    return jnp.exp(0.5 * (low_N + high_N))


def permuted_tail(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"], ctx: Context) -> Float[Array, "N V"]:
    """Return the logits with all but the target's and the padding's permuted within `in_parts` of the vocabulary."""
    V = logits_NV.shape[-1]
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, ctx.step), (V,))
    fixed_NV = is_target(logits_NV, targets_N) | ~exists(logits_NV)
    order = in_parts(jnp.where(fixed_NV, 2.0, jax.vmap(draw)(ctx.key_N)))  # what is fixed comes last
    _, dealt = jax.lax.sort((order, in_parts(logits_NV)), dimension=-1, num_keys=1)
    # Those before the target move to their own rank, those after it one further; padding is at the vocabulary's end.
    place = in_parts(jnp.broadcast_to(jnp.arange(V)[None], logits_NV.shape))
    after = (place > targets_N[:, None, None]) & (place[..., :1] <= targets_N[:, None, None])
    dealt = jnp.where(after, jnp.roll(dealt, 1, axis=-1), dealt)
    return jnp.where(fixed_NV, logits_NV, dealt.reshape(logits_NV.shape))


def _logit(logits_NV: Array, targets_N: Array) -> Array:
    """Return log p/(1-p) of the target's probability p, also where p is 1 to the last bit."""
    others_NV = jnp.where(is_target(logits_NV, targets_N), -jnp.inf, logits_NV)
    return target_logits(logits_NV, targets_N) - jax.nn.logsumexp(others_NV, axis=-1)


def _circle_in_rows(trained_BT: Bool[Array, "B T"], batch: Mapping[str, Array], key: Array) -> Int[Array, "B T"]:
    """Return for each trained position the one that follows it in a random circle of its row's; others stay."""
    fold = lambda example, position: jax.random.fold_in(jax.random.fold_in(key, example), position)
    draw = jax.vmap(jax.vmap(lambda example, position: jax.random.uniform(fold(example, position))))
    u_BT = jnp.where(trained_BT, draw(batch["example_index"], batch["positions"]), 2.0)
    order_BT = jnp.argsort(u_BT, axis=1)
    rank_BT = jnp.argsort(order_BT, axis=1)
    count_B1 = jnp.maximum(jnp.sum(trained_BT, axis=1, keepdims=True), 1)
    next_BT = jnp.take_along_axis(order_BT, (rank_BT + 1) % count_B1, axis=1)
    here_BT = jnp.broadcast_to(jnp.arange(trained_BT.shape[1])[None], trained_BT.shape)
    return jnp.where(trained_BT, next_BT, here_BT).astype(jnp.int32)


def _other_rows(trained_BT: Bool[Array, "B T"], key: Array) -> tuple[Int[Array, "B"], Int[Array, "B T"]]:
    """Return for each row another one with trained positions, and for each trained position one of that row's."""
    some_B = jnp.any(trained_BT, axis=1)
    order_B, n = jnp.argsort(~some_B), jnp.maximum(jnp.sum(some_B), 1)
    shift = 1 + jax.random.randint(key, (), 0, jnp.maximum(n - 1, 1))
    donors_B = order_B[(jnp.argsort(order_B) + shift) % n]
    donors_B = jnp.where(some_B, donors_B, jnp.arange(len(some_B)))
    places_BT, count_B1 = jnp.argsort(~trained_BT, axis=1), jnp.maximum(jnp.sum(trained_BT, axis=1, keepdims=True), 1)
    rank_BT = jnp.maximum(jnp.cumsum(trained_BT, axis=1) - 1, 0) % count_B1[donors_B]
    return donors_B, jnp.take_along_axis(places_BT[donors_B], rank_BT, axis=1).astype(jnp.int32)
