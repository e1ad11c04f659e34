"""Qwen3, dense (arXiv 2505.09388): pre-norm blocks, grouped queries, RMSNorm on every query and key head, SwiGLU."""

import jax.numpy as jnp
from flax import nnx

from wmss_jax.models import hf_config, table
from wmss_jax.models.architecture import Config
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, GatedMLP, RMSNorm

TABLE = (
    table.EMBED, *table.PRE_NORMS, *table.ATTENTION, *table.HEAD_NORMS, *table.GATED_MLP, *table.HEAD,
)  # fmt: skip


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda size: RMSNorm(size, c.norm_eps, dtype)

    def block(rngs: nnx.Rngs) -> Block:
        attention = Attention(c, rngs, dtype, norms=(norm(c.head_dim), norm(c.head_dim)))
        return Block(attention, GatedMLP(c, rngs, dtype), before=(norm(c.hidden_size), norm(c.hidden_size)))

    return Decoder(c, block, rngs, dtype)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
        known=hf_config.QWEN_WINDOW_KEYS | {"head_dim"},
    )
    return Config(**hf_config.fields(hf), windows=hf_config.qwen_windows(hf))


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **hf_config.keys(config),
        **hf_config.qwen_window_keys(config.windows, config.num_layers),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
    }
