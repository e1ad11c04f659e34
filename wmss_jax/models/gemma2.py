"""Gemma 2 (arXiv 2408.00118): every other layer with a sliding window, soft caps on attention scores and on logits,
norms before and after attention and MLP, scaled embeddings."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from wmss_jax.models import architecture, hf_config, table
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, GatedMLP, RMSNorm, gelu_tanh

TABLE = (table.EMBED, *table.SANDWICH_NORMS, *table.ATTENTION, *table.GATED_MLP, *table.HEAD)
# What transformers assumes where a config is silent.
_DEFAULTS = {
    "head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 10000.0,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(architecture.Config):
    """The architecture of one checkpoint."""

    query_pre_attn_scalar: float  # scores are divided by its square root
    attention_softcap: float | None
    logit_softcap: float | None


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda: RMSNorm(c.hidden_size, c.norm_eps, dtype, offset=1.0)

    def block(rngs: nnx.Rngs) -> Block:
        return Block(
            Attention(c, rngs, dtype, scale=c.query_pre_attn_scalar**-0.5, softcap=c.attention_softcap),
            GatedMLP(c, rngs, dtype, gelu_tanh),
            before=(norm(), norm()),
            after=(norm(), norm()),
        )

    return Decoder(c, block, rngs, dtype, norm_offset=1.0, embed_scale=c.hidden_size**0.5)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={
            "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
            "attention_dropout": 0.0, "use_bidirectional_attention": False,
        },
        known={
            "head_dim", "query_pre_attn_scalar", "sliding_window", "sliding_window_size", "layer_types",
            "final_logit_softcapping", "attn_logit_softcapping", "cache_implementation",
        },
    )  # fmt: skip
    hf = {**_DEFAULTS, **hf}
    numbers = range(1, hf_config.required(hf)("num_hidden_layers") + 1)
    return Config(
        **hf_config.fields(hf),
        windows=hf_config.windows(hf, ["sliding_attention" if number % 2 else "full_attention" for number in numbers]),
        query_pre_attn_scalar=hf["query_pre_attn_scalar"],
        attention_softcap=hf["attn_logit_softcapping"],
        logit_softcap=hf["final_logit_softcapping"],
    )


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **hf_config.keys(config),
        **hf_config.window_keys(config.windows, config.num_layers),
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }
