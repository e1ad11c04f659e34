"""Logits to tokens: the most likely one, or a draw at a temperature from the top k or the top share p.

A draw is the argmax of logits plus Gumbel noise, so that the vocabulary may be split over devices: nothing is sorted
or gathered along it. The noise is a function of (seed, sample, position) and of nothing else, hence the same whatever
else is generated at the time.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

_MASKED = -1e30  # of tokens that may not be drawn; finite, as in head.py


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token, of equally likely ones the lowest id.
        top_k: draw among the k most likely tokens only, and those exactly as likely as the k-th; None: among all.
        top_p: then draw among the fewest most likely tokens whose probabilities, at this temperature and among those
            that top_k left, add up to p (arXiv 1904.09751), and those exactly as likely as the last; None: among all.
        samples: continuations of each prompt; all are the same at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}; leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p have no effect at temperature 0; set a temperature, or leave them out")

    @property
    def kind(self) -> "Kind":
        """What a program that draws like this is compiled for."""
        return Kind(self.temperature > 0, self.top_k is not None, self.top_p is not None)

    @property
    def numbers(self) -> "Numbers":
        """What such a program is given."""
        return Numbers(
            np.float32(self.temperature), np.int32(min(self.top_k or 1, 2**31 - 1)), np.float32(self.top_p or 1.0)
        )


class Kind(NamedTuple):
    """The static side of a `Sampling`: other numbers are another call of the same program."""

    drawn: bool = False
    top_k: bool = False
    top_p: bool = False


class Numbers(NamedTuple):
    """The traced side of a `Sampling`, scalars."""

    temperature: Array | np.float32
    top_k: Array | np.int32
    top_p: Array | np.float32


class Draws(NamedTuple):
    """What the noise of every row is a function of: its request's seed, the sample's number, the token's position."""

    seeds_B: UInt[Array, "B"]
    samples_B: UInt[Array, "B"]
    positions_B: Int[Array, "B"]


def pick(kind: Kind, numbers: Numbers, logits_BV: Float[Array, "B V"], draws: Draws) -> Int[Array, "B"]:
    """Return the next token of every row."""
    if not kind.drawn:
        return greedy(logits_BV)
    z_BV = logits_BV / numbers.temperature
    if kind.top_k:
        z_BV = _at_least(z_BV, _threshold(z_BV, jnp.ones_like(z_BV), numbers.top_k.astype(jnp.float32)))
    if kind.top_p:
        probs_BV = jax.nn.softmax(z_BV, axis=-1)
        z_BV = _at_least(z_BV, _threshold(z_BV, probs_BV, numbers.top_p * jnp.sum(probs_BV, axis=-1)))
    return greedy(z_BV + _noise(draws, z_BV.shape[-1]))


def greedy(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the most likely tokens; of equally likely ones the lowest id."""
    # Not by argmax: its reduction of pairs takes XLA's CPU backend ten times as long as these two.
    V = logits_BV.shape[-1]
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_1V = jnp.arange(V, dtype=jnp.int32)[None]
    first_B = jnp.min(jnp.where(logits_BV == best_B1, ids_1V, V), axis=-1)
    return jnp.minimum(first_B, V - 1)  # NaN equals nothing


def _at_least(z_BV: Array, threshold_B: Array) -> Array:
    return jnp.where(z_BV >= threshold_B[:, None], z_BV, _MASKED)


def _threshold(z_BV: Array, mass_BV: Array, wanted: Array) -> Array:
    """Return per row the greatest value of z such that tokens of at least that value hold `wanted` of the mass.

    Floats are ordered like their bits, so bisecting the 32 bits finds it exactly: 32 sums over the vocabulary instead
    of a sort, which a split vocabulary would have to be gathered for and a CPU takes 15 times as long for.
    """
    keys_BV = _ordered_bits(z_BV)

    def set_bit(i: Array, known_B: Array) -> Array:
        tried_B = known_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        held_B = jnp.sum(jnp.where(keys_BV >= tried_B[:, None], mass_BV, 0), axis=-1)
        return jnp.where(held_B >= wanted, tried_B, known_B)

    key_B = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(len(z_BV), jnp.uint32))
    # No token may be at the threshold itself where the mass of all falls short of what is wanted by rounding.
    reached_BV = keys_BV >= key_B[:, None]
    return jnp.min(jnp.where(reached_BV, z_BV, jnp.inf), axis=-1)


def _ordered_bits(x: Array) -> Array:
    """Return uint32 that are ordered as the float32 are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _noise(draws: Draws, V: int) -> Float[Array, "B V"]:
    def of_row(seed: Array, sample: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.gumbel(key, (V,))

    return jax.vmap(of_row)(*draws)


GREEDY = Sampling()
