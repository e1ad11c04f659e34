"""NEFTune (arXiv 2310.05914, Algorithm 1): uniform noise on the embeddings, in training alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wmss_jax import attention, sharding


@dataclasses.dataclass(frozen=True)
class Neftune:
    """α/√(L·D) · U[-1, 1]^D on every token.

    Attributes:
        alpha: α >= 0.
        length: what L is. "example": the tokens of the example, whatever it is packed with, as in its authors' code
            (`experiment_code/train.py`); "row": all of the row, padding included, as in the hook of Hugging Face.
    """

    alpha: float = 5.0
    length: Literal["example", "row"] = "example"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha}")

    def noise(self, batch: Mapping[str, Array], width: int, step: Any, seed: Any) -> Float[Array, "B T D"]:
        """Return the noise, float32: a function of (seed, step, example, position) and of L alone.

        Args:
            batch: complete (`step.complete`).
            width: D.
        """
        # Apart from the keys of an objective's noise, which are made of (seed, example, position).
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x4E4546), step)
        fold = lambda example, position: jax.random.fold_in(jax.random.fold_in(key, example), position)
        draw = lambda example, position: jax.random.uniform(fold(example, position), (width,), minval=-1.0, maxval=1.0)
        u_BTD = jax.vmap(jax.vmap(draw))(batch["example_index"], batch["positions"])
        tokens_BT = batch["segments"]
        length_BT = (
            tokens_in_segment(tokens_BT) if self.length == "example" else jnp.full_like(tokens_BT, tokens_BT.shape[1])
        )
        scale_BT = self.alpha / jnp.sqrt(length_BT.astype(jnp.float32) * width)
        return sharding.constrain(scale_BT[..., None] * u_BTD, "B T D")


def tokens_in_segment(segments_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return for every token how many there are in its segment."""
    T = segments_BT.shape[1]
    first_BT = attention.first_keys(segments_BT, window=None)
    # Of the row read backwards, the first of a segment is its last.
    last_BT = T - 1 - jnp.flip(attention.first_keys(jnp.flip(segments_BT, axis=1), window=None), axis=1)
    return last_BT - first_BT + 1
