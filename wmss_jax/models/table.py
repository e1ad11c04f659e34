"""The conversion table's row: one parameter of ours and its Hugging Face tensors, read in both directions."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Row:
    """Our dotted `path`, the Hugging Face `name` ({l} = layer, {e} = expert) and the axes of both, "theirs -> ours".

    The right side of `axes` also names the axes for the sharding table, so conversion and sharding read one row.
    """

    path: str
    name: str
    axes: str
    untied_only: bool = False

    @property
    def stacks(self) -> str:
        """The letters along which ours stacks tensors: "L" for all layers, "LE" for all experts of all layers."""
        return "".join(letter for letter in "LE" if f"{{{letter.lower()}}}" in self.name)

    @property
    def stacked(self) -> bool:
        """Whether ours stacks the tensors of all layers along a leading axis L."""
        return bool(self.stacks)

    @property
    def letters(self) -> str:
        """Our shape letters, such as "L D N H"."""
        return " ".join([*self.stacks, self.axes.split("->")[1].strip()])

    def indices(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Return where in ours each of `names` lies: an index along the stacked axes."""
        return list(itertools.product(*(range(sizes[letter]) for letter in self.stacks)))

    def names(self, sizes: Mapping[str, int]) -> list[str]:
        """Return the Hugging Face tensors that make up this parameter, in the order of `indices`."""
        keys = self.stacks.lower()
        return [self.name.format(**dict(zip(keys, index, strict=True))) for index in self.indices(sizes)]

    @property
    def their_axes(self) -> list[str]:
        """The axes of each Hugging Face tensor, several letters where ours are one of theirs: ["N H", "D"]."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.axes.split("->")[0])
        return [inside or single for inside, single in groups]

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that each Hugging Face tensor must have."""
        return tuple(math.prod(sizes[letter] for letter in axis.split()) for axis in self.their_axes)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of our parameter, layers stacked."""
        return tuple(sizes[letter] for letter in self.letters.split())

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Return one Hugging Face tensor with our axes (of one layer)."""
        return rearrange(tensor, self.axes, **self._named(sizes))

    def to_theirs(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Return one layer of our parameter with Hugging Face's axes."""
        theirs, ours = (side.strip() for side in self.axes.split("->"))
        return np.ascontiguousarray(rearrange(array, f"{ours} -> {theirs}", **self._named(sizes)))

    def _named(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {letter: sizes[letter] for letter in re.findall(r"[A-Z]", self.axes.split("->")[1])}


_LAYER = "model.layers.{l}."

# What most families have in common: our path (stacked over layers) | Hugging Face name | Hugging Face axes -> ours.
EMBED = Row("embed", "model.embed_tokens.weight", "V D -> V D")
ATTENTION = (
    Row("layers.attention.q_proj", _LAYER + "self_attn.q_proj.weight", "(N H) D -> D N H"),
    Row("layers.attention.k_proj", _LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    Row("layers.attention.v_proj", _LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    Row("layers.attention.o_proj", _LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
)
HEAD_NORMS = (
    Row("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "H -> H"),
    Row("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "H -> H"),
)
QKV_BIASES = (
    Row("layers.attention.q_bias", _LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    Row("layers.attention.k_bias", _LAYER + "self_attn.k_proj.bias", "(K H) -> K H"),
    Row("layers.attention.v_bias", _LAYER + "self_attn.v_proj.bias", "(K H) -> K H"),
)
GATED_MLP = (
    Row("layers.mlp.gate_proj", _LAYER + "mlp.gate_proj.weight", "F D -> D F"),
    Row("layers.mlp.up_proj", _LAYER + "mlp.up_proj.weight", "F D -> D F"),
    Row("layers.mlp.down_proj", _LAYER + "mlp.down_proj.weight", "D F -> F D"),
)
PRE_NORMS = (
    Row("layers.input_norm.scale", _LAYER + "input_layernorm.weight", "D -> D"),
    Row("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", "D -> D"),
)
SANDWICH_NORMS = (  # before and after: `post_attention_layernorm` is another one than in PRE_NORMS
    Row("layers.input_norm.scale", _LAYER + "input_layernorm.weight", "D -> D"),
    Row("layers.attention_out_norm.scale", _LAYER + "post_attention_layernorm.weight", "D -> D"),
    Row("layers.mlp_norm.scale", _LAYER + "pre_feedforward_layernorm.weight", "D -> D"),
    Row("layers.mlp_out_norm.scale", _LAYER + "post_feedforward_layernorm.weight", "D -> D"),
)
HEAD = (
    Row("final_norm.scale", "model.norm.weight", "D -> D"),
    Row("unembed", "lm_head.weight", "V D -> D V", untied_only=True),
)
