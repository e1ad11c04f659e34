"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP instead of before, and of all query heads, all key heads."""

import jax.numpy as jnp
from flax import nnx

from wmss_jax.models import hf_config, table
from wmss_jax.models.architecture import Config
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, GatedMLP, RMSNorm
from wmss_jax.models.table import Row

_LAYER = "model.layers.{l}."
TABLE = (
    table.EMBED,
    *table.ATTENTION,
    Row("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "(N H) -> N H"),
    Row("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "(K H) -> K H"),
    Row("layers.attention_out_norm.scale", _LAYER + "post_attention_layernorm.weight", "D -> D"),
    *table.GATED_MLP,
    Row("layers.mlp_out_norm.scale", _LAYER + "post_feedforward_layernorm.weight", "D -> D"),
    *table.HEAD,
)
# What transformers assumes where a config is silent.
_DEFAULTS = {"rope_theta": 10000.0, "num_key_value_heads": None, "max_position_embeddings": 2048}


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda *shape: RMSNorm(shape, c.norm_eps, dtype)

    def block(rngs: nnx.Rngs) -> Block:
        norms = norm(c.num_heads, c.head_dim), norm(c.num_kv_heads, c.head_dim)
        return Block(
            Attention(c, rngs, dtype, norms=norms),
            GatedMLP(c, rngs, dtype),
            after=(norm(c.hidden_size), norm(c.hidden_size)),
        )

    return Decoder(c, block, rngs, dtype)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf, only={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}, known=set()
    )
    return Config(**hf_config.fields({**_DEFAULTS, **hf}))


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        **hf_config.keys(config),
        "hidden_act": "silu",
        "attention_bias": False,
    }
