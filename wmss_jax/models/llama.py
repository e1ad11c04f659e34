"""Llama 2, 3 and 3.1 to 3.3 (arXiv 2307.09288, 2407.21783): pre-norm blocks, grouped queries, SwiGLU."""

import jax.numpy as jnp
from flax import nnx

from wmss_jax.models import hf_config, table
from wmss_jax.models.architecture import Config
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, GatedMLP, RMSNorm

TABLE = (table.EMBED, *table.PRE_NORMS, *table.ATTENTION, *table.GATED_MLP, *table.HEAD)
# What transformers assumes where an older config is silent.
_DEFAULTS = {"rope_theta": 10000.0, "num_key_value_heads": None, "max_position_embeddings": 2048}


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda: RMSNorm(c.hidden_size, c.norm_eps, dtype)

    def block(rngs: nnx.Rngs) -> Block:
        return Block(Attention(c, rngs, dtype), GatedMLP(c, rngs, dtype), before=(norm(), norm()))

    return Decoder(c, block, rngs, dtype)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
        known={"head_dim", "pretraining_tp"},  # parts in which weights were trained: the same sums in another order
    )
    return Config(**hf_config.fields({**_DEFAULTS, **hf}))


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **hf_config.keys(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
