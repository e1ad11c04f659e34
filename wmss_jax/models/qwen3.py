"""Qwen3, dense (arXiv 2505.09388): pre-norm blocks, grouped queries, RMSNorm on every query and key head, SwiGLU."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from wmss_jax import sharding
from wmss_jax.models import hf_config, layers
from wmss_jax.models.table import Row


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture of one checkpoint; equal configs share compiled programs."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H, independent of D / N
    rope_theta: float
    norm_eps: float
    tied: bool  # the head is the embedding, transposed
    max_positions: int  # what the checkpoint was trained for; carried along, not enforced
    init_std: float = 0.02  # of every matrix where parameters are random

    @property
    def sizes(self) -> dict[str, int]:
        """The value of every shape letter in TABLE."""
        return {
            "V": self.vocab_size, "D": self.hidden_size, "F": self.intermediate_size, "L": self.num_layers,
            "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_dim,
        }  # fmt: skip


# our path (stacked over layers under "layers") | Hugging Face name | Hugging Face axes -> ours
TABLE = (
    Row("embed", "model.embed_tokens.weight", "V D -> V D"),
    Row("layers.input_norm.scale", "model.layers.{l}.input_layernorm.weight", "D -> D"),
    Row("layers.attention.q_proj", "model.layers.{l}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    Row("layers.attention.k_proj", "model.layers.{l}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    Row("layers.attention.v_proj", "model.layers.{l}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    Row("layers.attention.o_proj", "model.layers.{l}.self_attn.o_proj.weight", "D (N H) -> N H D"),
    Row("layers.attention.q_norm.scale", "model.layers.{l}.self_attn.q_norm.weight", "H -> H"),
    Row("layers.attention.k_norm.scale", "model.layers.{l}.self_attn.k_norm.weight", "H -> H"),
    Row("layers.mlp_norm.scale", "model.layers.{l}.post_attention_layernorm.weight", "D -> D"),
    Row("layers.mlp.gate_proj", "model.layers.{l}.mlp.gate_proj.weight", "F D -> D F"),
    Row("layers.mlp.up_proj", "model.layers.{l}.mlp.up_proj.weight", "F D -> D F"),
    Row("layers.mlp.down_proj", "model.layers.{l}.mlp.down_proj.weight", "D F -> F D"),
    Row("final_norm.scale", "model.norm.weight", "D -> D"),
    Row("unembed", "lm_head.weight", "V D -> D V", untied_only=True),
)


class Attention(nnx.Module):
    """Causal self-attention with normalised query and key heads."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype):
        c = config
        self.config = config
        self.q_proj = layers.matrix(rngs, dtype, c.init_std, c.hidden_size, c.num_heads, c.head_dim)
        self.k_proj = layers.matrix(rngs, dtype, c.init_std, c.hidden_size, c.num_kv_heads, c.head_dim)
        self.v_proj = layers.matrix(rngs, dtype, c.init_std, c.hidden_size, c.num_kv_heads, c.head_dim)
        self.o_proj = layers.matrix(rngs, dtype, c.init_std, c.num_heads, c.head_dim, c.hidden_size)
        self.q_norm = layers.RMSNorm(c.head_dim, c.norm_eps, dtype)
        self.k_norm = layers.RMSNorm(c.head_dim, c.norm_eps, dtype)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: layers.Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], layers.Cache | None]:
        theta = self.config.rope_theta
        q_BTNH = self.q_norm(layers.project("BTD,DNH->BTNH", x_BTD, self.q_proj[...]))
        k_BTKH = self.k_norm(layers.project("BTD,DKH->BTKH", x_BTD, self.k_proj[...]))
        v_BTKH = layers.project("BTD,DKH->BTKH", x_BTD, self.v_proj[...])
        out_BTNH, cache = layers.cached_attention(
            layers.rotate(q_BTNH, positions_BT, theta),
            layers.rotate(k_BTKH, positions_BT, theta),
            v_BTKH,
            segments_BT,
            positions_BT,
            cache,
            scale=self.config.head_dim**-0.5,
        )
        out_BTNH = sharding.constrain(out_BTNH, "B T N H")
        return layers.project("BTNH,NHD->BTD", out_BTNH, self.o_proj[...]), cache


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.input_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = layers.GatedMLP(config.hidden_size, config.intermediate_size, config.init_std, rngs, dtype)

    def __call__(
        self,
        x_BTD: Array,
        positions_BT: Array,
        segments_BT: Array,
        cache: layers.Cache | None = None,
    ) -> tuple[Array, layers.Cache | None]:
        normed_BTD = self.input_norm(x_BTD)
        mixed_BTD, cache = self.attention(normed_BTD, positions_BT, segments_BT, cache)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Model(nnx.Module):
    """Tokens to final-norm hidden states; the head is applied elsewhere, chunk by chunk."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype):
        c = config
        self.embed = layers.matrix(rngs, dtype, c.init_std, c.vocab_size, c.hidden_size)
        self.layers = layers.stack(lambda rngs: Block(c, rngs, dtype), c.num_layers, rngs)
        self.final_norm = layers.RMSNorm(c.hidden_size, c.norm_eps, dtype)
        if not c.tied:
            self.unembed = layers.matrix(rngs, dtype, c.init_std, c.hidden_size, c.vocab_size)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        *,
        dtype: jnp.dtype,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after the final norm, computed in `dtype`."""
        return self._run(tokens_BT, positions_BT, segments_BT, None, dtype, remat)[0]

    def decode(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        cache: tuple[layers.Cache, ...],
        *,
        dtype: jnp.dtype,
    ) -> tuple[Float[Array, "B T D"], tuple[layers.Cache, ...]]:
        """Return `hidden` of tokens that follow those in `cache`, and the cache with them added."""
        segments_BT = jnp.ones_like(tokens_BT)
        return self._run(tokens_BT, positions_BT, segments_BT, cache, dtype, "none")

    def _run(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        cache: tuple[layers.Cache, ...] | None,
        dtype: jnp.dtype,
        remat: str,
    ) -> tuple[Array, Any]:
        """Return the hidden states and the cache with these tokens added; None without one."""
        x_BTD = layers.noised(layers.embed(self.embed[...], tokens_BT, dtype))
        x_BTD = sharding.constrain(x_BTD, "B T D")
        body = lambda block, x_BTD, cache: block(x_BTD, positions_BT, segments_BT, cache)
        x_BTD, cache = layers.scan(self.layers, x_BTD, body, remat, cache)
        return self.final_norm(x_BTD), cache


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={
            "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "attention_dropout": 0.0,
        },
        known={"sliding_window", "max_window_layers", "layer_types", "head_dim"},
    )  # fmt: skip
    if set(hf.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ValueError("config.json: layer_types: only full_attention is implemented for qwen3")
    need = hf_config.required(hf)
    return Config(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=need("num_attention_heads"),
        num_kv_heads=need("num_key_value_heads"),
        head_dim=hf.get("head_dim") or need("hidden_size") // need("num_attention_heads"),
        rope_theta=hf_config.rope_theta(hf),
        norm_eps=need("rms_norm_eps"),
        tied=bool(hf.get("tie_word_embeddings", False)),
        max_positions=hf.get("max_position_embeddings", 32768),
        init_std=hf.get("initializer_range", 0.02),
    )


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }
