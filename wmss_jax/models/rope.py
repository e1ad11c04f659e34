"""Rotary position embeddings (RoFormer, arXiv 2104.09864), and how checkpoints stretch them to longer contexts.

A `Rope` is a base and, where positions are scaled, one of SCALINGS, each with the fields under which Hugging Face's
config.json has it. All of them change the frequencies of the rotation, some also the length of what is rotated; the
formulas are those of transformers' `modeling_rope_utils.py` (5.23).

h is the number of pairs that rotate, at most half the head size.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> np.ndarray:
        """Return the frequencies of the stretched rotation."""
        del theta
        return frequencies_h / self.factor

    @property
    def length(self) -> float:
        """The factor on rotated queries and keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1, arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> np.ndarray:
        """Return the frequencies of the stretched rotation."""
        del theta
        turns_h = self.original_max_position_embeddings * frequencies_h / (2 * math.pi)  # in the original context
        kept_h = (turns_h - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept_h = np.clip(kept_h, 0, 1)
        return (1 - kept_h) * frequencies_h / self.factor + kept_h * frequencies_h

    @property
    def length(self) -> float:
        """The factor on rotated queries and keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): blended by turns in the original context, and longer queries and keys."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> np.ndarray:
        """Return the frequencies of the stretched rotation."""
        h = len(frequencies_h)
        # The pair that makes so many turns in the original context, a real number.
        original = self.original_max_position_embeddings
        pair = lambda turns: h * math.log(original / (turns * 2 * math.pi)) / math.log(theta)
        low, high = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        if self.truncate is None or self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * h - 1)
        kept_h = 1 - np.clip((np.arange(h) - low) / (high - low if high != low else 0.001), 0, 1)
        return (1 - kept_h) * frequencies_h / self.factor + kept_h * frequencies_h

    @property
    def length(self) -> float:
        """The factor on rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        grown = lambda mscale: 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0
        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): every frequency divided by its own factor, in long sequences by another one.

    Which factors a token gets depends on the length of its own sequence, so packing does not change it; while
    decoding, on the length that the cache has room for, because keys once rotated stay as they are.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> np.ndarray:
        """Return the frequencies in sequences of up to the original length."""
        del theta
        return frequencies_h / np.array(self.short_factor)

    def stretch_long(self, frequencies_h: np.ndarray) -> np.ndarray:
        """Return the frequencies in longer sequences."""
        return frequencies_h / np.array(self.long_factor)

    @property
    def length(self) -> float:
        """The factor on rotated queries and keys."""
        return self.attention_factor

    @staticmethod
    def default_attention_factor(max_positions: int, original: int) -> float:
        """Return what `attention_factor` is where a config does not say (arXiv 2402.13753, §4.2)."""
        grown = max_positions / original
        return 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(original))


Scaling = Linear | Llama3 | Yarn | LongRope
SCALINGS: dict[str, type[Scaling]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn, "longrope": LongRope}


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotation: pair i of a head turns by position · theta^(-i/h), before scaling.

    Attributes:
        fraction: of the head that rotates; the rest passes through.
    """

    theta: float
    scaling: Scaling | None = None
    fraction: float = 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Return [2, h]: the angles by which a pair turns from one position to the next, in short and long sequences.

        In float64: rounded once, where they are used.
        """
        h = int(head_dim * self.fraction) // 2
        plain_h = self.theta ** (-np.arange(h) / h)
        if self.scaling is None:
            return np.stack([plain_h, plain_h])
        short_h = self.scaling.stretch(plain_h, self.theta)
        long_h = self.scaling.stretch_long(plain_h) if isinstance(self.scaling, LongRope) else short_h
        return np.stack([short_h, long_h])

    @property
    def long_from(self) -> int | None:
        """The length from which on a sequence is long; None: there is no difference."""
        return self.scaling.original_max_position_embeddings + 1 if isinstance(self.scaling, LongRope) else None

    @property
    def length(self) -> float:
        """The factor on rotated queries and keys."""
        return 1.0 if self.scaling is None else self.scaling.length


class Turn(NamedTuple):
    """How far every token's queries and keys are turned; without positions (NoPE) by nothing."""

    cos_BTh: Float[Array, "*R B T h"]
    sin_BTh: Float[Array, "*R B T h"]


def turns(
    ropes: Sequence[Rope | None],
    head_dim: int,
    positions_BT: Int[Array, "B T"],
    lengths_BT: Int[Array, "B T"],
) -> Turn:
    """Return the turns of several ropes, stacked along a leading axis R; where one is None, its tokens stay unturned.

    Args:
        lengths_BT: of the sequence that each token is in.
    """
    made = [_turn(rope, head_dim, positions_BT, lengths_BT) for rope in ropes if rope is not None]
    unturned = Turn(jnp.ones_like(made[0].cos_BTh), jnp.zeros_like(made[0].sin_BTh))
    found = iter(made)
    each = [unturned if rope is None else next(found) for rope in ropes]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _turn(rope: Rope, head_dim: int, positions_BT: Array, lengths_BT: Array) -> Turn:
    short_h, long_h = (jnp.asarray(row, jnp.float32) for row in rope.frequencies(head_dim))
    frequencies_BTh = short_h[None, None]
    if rope.long_from is not None:
        frequencies_BTh = jnp.where((lengths_BT >= rope.long_from)[..., None], long_h[None, None], frequencies_BTh)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies_BTh
    return Turn(rope.length * jnp.cos(angles_BTh), rope.length * jnp.sin(angles_BTh))


def rotate(x_BTNH: Float[Array, "B T N H"], turn: Turn) -> Float[Array, "B T N H"]:
    """Return `x` turned, in the halves convention of Hugging Face (not interleaved); in float32.

    RoFormer, eq. 34; pairs are (i, i + h), and what is beyond 2·h passes through.
    """
    cos_BT1h, sin_BT1h = turn.cos_BTh[:, :, None], turn.sin_BTh[:, :, None]
    h = cos_BT1h.shape[-1]
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [h, 2 * h], axis=-1)
    turned = [first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x_BTNH.dtype)


def lengths(positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return how long the segment of each token is: the position of its last token, plus one."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None], segments_BT.shape)
    is_last_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (0, 1)], constant_values=True)
    last_BT = jax.lax.cummin(jnp.where(is_last_BT, index_BT, segments_BT.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, last_BT, axis=1) + 1


# -- config.json ---------------------------------------------------------------------------------------------------


def read(hf: Mapping[str, Any], kinds: Sequence[str] = ("linear", "llama3", "yarn")) -> tuple[float, Scaling | None]:
    """Return (theta, scaling) of a config.json, from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (4).

    Args:
        kinds: of SCALINGS, those that the family is known with.

    Raises:
        ValueError: a key is missing or unknown, the scaling is none of `kinds`, or the two forms say different things.
    """
    given = {key: hf[key] for key in ("rope_scaling", "rope_parameters") if hf.get(key)}
    thetas = [settings.get("rope_theta") for settings in given.values()] + [hf.get("rope_theta")]
    theta = next((theta for theta in thetas if theta is not None), None)
    if theta is None:
        raise ValueError("config.json: neither rope_theta nor rope_parameters.rope_theta is given")
    found = [scaling(settings, key, hf, kinds) for key, settings in given.items()]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("config.json: rope_scaling and rope_parameters say different things; remove one of them")
    return float(theta), found[0] if found else None


def scaling(settings: Mapping[str, Any], key: str, hf: Mapping[str, Any], kinds: Sequence[str]) -> Scaling | None:
    """Return the scaling of one dict of rope settings; None where positions are as they are. See `read`."""
    settings = {name: value for name, value in settings.items() if value is not None}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        fields, type_ = {}, None
    elif kind in kinds:
        type_ = SCALINGS[kind]
        fields = {field.name: field for field in dataclasses.fields(type_)}
    else:
        known = ", ".join(repr(known) for known in ("default", *kinds))
        raise ValueError(
            f"config.json: {key}: rope type {kind!r} is not implemented for {hf.get('model_type')}, only {known}"
        )
    unknown = settings.keys() - fields.keys() - {"rope_type", "type", "rope_theta"}
    if settings.get("partial_rotary_factor") == 1.0:
        unknown -= {"partial_rotary_factor"}
    if unknown:
        raise ValueError(
            f"config.json: {key}: {', '.join(sorted(unknown))}: rope type {kind!r} here knows no such setting"
        )
    if type_ is None:
        return None
    original = "original_max_position_embeddings"
    if original in fields and settings.get(original) is None:
        settings[original] = hf.get("max_position_embeddings")
    absent = [name for name, field in fields.items() if field.default is dataclasses.MISSING and not settings.get(name)]
    if absent:
        raise ValueError(f"config.json: {key}: rope type {kind!r} needs {', '.join(absent)}")
    freeze = lambda value: tuple(value) if isinstance(value, list) else value
    values: dict[str, Any] = {name: freeze(settings[name]) for name in fields if name in settings}
    return type_(**values)


def write(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """Return the keys of config.json from which transformers 4 and 5 both read this rope.

    Version 4 ignores `rope_parameters`; 5 prefers it and knows the others as older forms of it.
    """
    settings = settings_of(scaling)
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else settings,
        "rope_parameters": {**settings, "rope_theta": theta},
    }


def settings_of(scaling: Scaling | None) -> dict[str, Any]:
    """Return a scaling as Hugging Face's rope settings, without the base."""
    if scaling is None:
        return {"rope_type": "default"}
    kind = next(kind for kind, type_ in SCALINGS.items() if isinstance(scaling, type_))
    thaw = lambda value: list(value) if isinstance(value, tuple) else value
    given = {name: thaw(value) for name, value in dataclasses.asdict(scaling).items() if value is not None}
    return {"rope_type": kind, **given}
