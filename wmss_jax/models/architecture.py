"""The fields that every family's `Config` begins with, and how layers of one model may differ."""

import dataclasses

from wmss_jax.models.rope import Rope, Scaling


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a layer differs from others, besides its parameters.

    Attributes:
        rope: None: the layer knows no positions but through the causal mask (NoPE, arXiv 2305.19466).
        window: see `attention`.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The fields that every family's `Config` begins with; equal configs share compiled programs."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H, independent of D / N
    rope_theta: float
    rope_scaling: Scaling | None = None
    norm_eps: float
    tied: bool  # the head is the embedding, transposed
    max_positions: int  # what the checkpoint was trained for; carried along, not enforced
    init_std: float = 0.02  # of every matrix where parameters are random
    windows: tuple[int | None, ...] | None = None  # sliding window of every layer; None: there are none

    @property
    def rope(self) -> Rope:
        """The rotation of queries and keys."""
        return Rope(self.rope_theta, self.rope_scaling)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """How the layers differ, in order; a family may have more to say."""
        return tuple(Kind(self.rope, window) for window in self.windows or (None,) * self.num_layers)

    @property
    def sizes(self) -> dict[str, int]:
        """The value of every shape letter in a TABLE."""
        return {
            "V": self.vocab_size, "D": self.hidden_size, "F": self.intermediate_size, "L": self.num_layers,
            "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_dim,
        }  # fmt: skip
