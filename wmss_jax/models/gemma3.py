"""Gemma 3, the text model (arXiv 2503.19786): five layers with a sliding window and their own rotary base to each that
sees everything, norms before and after attention and MLP, RMSNorm on query and key heads, scaled embeddings.

`gemma3` checkpoints hold it besides a vision tower, see `multimodal`; what is exported is `gemma3_text`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from wmss_jax.models import architecture, hf_config, rope, table
from wmss_jax.models.architecture import Kind
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, GatedMLP, RMSNorm, gelu_tanh

TABLE = (
    table.EMBED, *table.SANDWICH_NORMS, *table.ATTENTION, *table.HEAD_NORMS, *table.GATED_MLP, *table.HEAD,
)  # fmt: skip
# What transformers assumes where a config is silent; published multimodal configs leave most of it out.
_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(architecture.Config):
    """The architecture of one checkpoint; `rope_theta` and `rope_scaling` are those of layers without a window."""

    local_rope_theta: float
    local_rope_scaling: rope.Scaling | None = None
    query_pre_attn_scalar: float  # scores are divided by its square root
    logit_softcap: float | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """How the layers differ, in order."""
        local = rope.Rope(self.local_rope_theta, self.local_rope_scaling)
        windows = self.windows or (None,) * self.num_layers
        return tuple(Kind(self.rope if window is None else local, window) for window in windows)


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda size: RMSNorm(size, c.norm_eps, dtype, offset=1.0)

    def block(rngs: nnx.Rngs) -> Block:
        norms = norm(c.head_dim), norm(c.head_dim)
        return Block(
            Attention(c, rngs, dtype, norms=norms, scale=c.query_pre_attn_scalar**-0.5),
            GatedMLP(c, rngs, dtype, gelu_tanh),
            before=(norm(c.hidden_size), norm(c.hidden_size)),
            after=(norm(c.hidden_size), norm(c.hidden_size)),
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
            "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "use_bidirectional_attention": False,
        },
        known={
            "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types", "sliding_window_pattern",
            "_sliding_window_pattern", "rope_local_base_freq", "final_logit_softcapping", "cache_implementation",
        },
    )  # fmt: skip
    hf = {**_DEFAULTS, **hf}
    whole, local = _ropes(hf)
    local_theta, local_scaling = rope.read(local)
    period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    numbers = range(1, hf["num_hidden_layers"] + 1)
    return Config(
        **hf_config.fields(whole),
        windows=hf_config.windows(
            hf, ["sliding_attention" if number % period else "full_attention" for number in numbers]
        ),
        local_rope_theta=local_theta,
        local_rope_scaling=local_scaling,
        query_pre_attn_scalar=hf["query_pre_attn_scalar"],
        logit_softcap=hf.get("final_logit_softcapping"),
    )


def _ropes(hf: dict) -> tuple[dict, dict]:
    """Return the config as it would be if all layers had the rope of those without a window, and of those with one."""
    both = hf.get("rope_parameters") or {}
    own = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")}
    unknown = both.keys() - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"config.json: rope_parameters: {', '.join(sorted(unknown))}: not a layer type of gemma3")
    whole = {"rope_theta": hf["rope_theta"], "rope_scaling": hf.get("rope_scaling")}
    local = {"rope_theta": hf["rope_local_base_freq"]}
    return (
        {**own, **whole, "rope_parameters": both.get("full_attention")},
        {**own, **local, "rope_parameters": both.get("sliding_attention")},
    )


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it, 4 without a scaling of local layers."""
    whole = rope.write(config.rope_theta, config.rope_scaling)
    local = rope.write(config.local_rope_theta, config.local_rope_scaling)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **hf_config.keys(config),
        **hf_config.window_keys(config.windows, config.num_layers),
        "rope_local_base_freq": config.local_rope_theta,
        "rope_parameters": {
            "full_attention": whole["rope_parameters"],
            "sliding_attention": local["rope_parameters"],
        },
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }
