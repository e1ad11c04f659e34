"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): pre-norm blocks, grouped queries with biases, SwiGLU."""

import jax.numpy as jnp
from flax import nnx

from wmss_jax.models import hf_config, table
from wmss_jax.models.architecture import Config
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, GatedMLP, RMSNorm

TABLE = (
    table.EMBED, *table.PRE_NORMS, *table.ATTENTION, *table.QKV_BIASES, *table.GATED_MLP, *table.HEAD,
)  # fmt: skip


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda: RMSNorm(c.hidden_size, c.norm_eps, dtype)

    def block(rngs: nnx.Rngs) -> Block:
        attention = Attention(c, rngs, dtype, qkv_bias=True)
        return Block(attention, GatedMLP(c, rngs, dtype), before=(norm(), norm()))

    return Decoder(c, block, rngs, dtype)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf, only={"hidden_act": "silu", "attention_dropout": 0.0}, known=hf_config.QWEN_WINDOW_KEYS
    )
    hf = {"rope_theta": 10000.0, **hf}
    return Config(**hf_config.fields(hf), windows=hf_config.qwen_windows(hf))


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **hf_config.keys(config),
        **hf_config.qwen_window_keys(config.windows, config.num_layers),
        "hidden_act": "silu",
    }
