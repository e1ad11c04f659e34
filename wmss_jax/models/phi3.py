"""Phi-3, 3.5 and 4, dense (arXiv 2404.14219, 2412.08905): pre-norm blocks whose matrices are fused, LongRoPE.

One matrix makes queries, keys and values, one the gate and what it gates, in the files and here alike: so an adapter
of one is what PEFT makes of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from wmss_jax import sharding
from wmss_jax.models import architecture, hf_config, layers, rope, table
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Block, Cache, Metrics, RMSNorm, View
from wmss_jax.models.table import Row

_LAYER = "model.layers.{l}."
TABLE = (
    table.EMBED,
    *table.PRE_NORMS,
    Row("layers.attention.qkv_proj", _LAYER + "self_attn.qkv_proj.weight", "(J H) D -> D J H"),
    Row("layers.attention.o_proj", _LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
    Row("layers.mlp.gate_up_proj", _LAYER + "mlp.gate_up_proj.weight", "(C F) D -> D C F"),
    Row("layers.mlp.down_proj", _LAYER + "mlp.down_proj.weight", "D F -> F D"),
    *table.HEAD,
)
# What transformers assumes where a config is silent.
_DEFAULTS = {
    "rope_theta": 10000.0, "num_key_value_heads": None, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(architecture.Config):
    """The architecture of one checkpoint."""

    rotary_fraction: float = 1.0  # of every head; the rest knows no positions
    original_max_positions: int  # carried along; what counts is in rope_scaling

    @property
    def rope(self) -> rope.Rope:
        """The rotation of queries and keys."""
        return rope.Rope(self.rope_theta, self.rope_scaling, self.rotary_fraction)

    @property
    def sizes(self) -> dict[str, int]:
        """The value of every shape letter in TABLE."""
        return {**super().sizes, "J": self.num_heads + 2 * self.num_kv_heads, "C": 2}


class Attention(nnx.Module):
    """Causal self-attention of grouped queries, all heads from one matrix: first queries, then keys, then values."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype):
        c, J = config, config.sizes["J"]
        self.scale = c.head_dim**-0.5
        self.cuts = (c.num_heads, c.num_heads + c.num_kv_heads)
        self.qkv_proj = layers.matrix(rngs, dtype, c.init_std, c.hidden_size, J, c.head_dim)
        self.o_proj = layers.matrix(rngs, dtype, c.init_std, c.num_heads, c.head_dim, c.hidden_size)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], view: View, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        heads_BTJH = layers.project("BTD,DJH->BTJH", x_BTD, self.qkv_proj[...])
        q_BTNH, k_BTKH, v_BTKH = jnp.split(heads_BTJH, self.cuts, axis=2)
        out_BTNH, cache = layers.attend(q_BTNH, k_BTKH, v_BTKH, view, cache, scale=self.scale)
        return layers.project("BTNH,NHD->BTD", out_BTNH, self.o_proj[...]), cache


class MLP(nnx.Module):
    """(silu(x·gate) ∘ x·up)·down, with gate and up in one matrix."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_proj = layers.matrix(rngs, dtype, config.init_std, D, 2, F)
        self.down_proj = layers.matrix(rngs, dtype, config.init_std, F, D)

    def __call__(self, x_BTD: Float[Array, "B T D"], view: View) -> tuple[Float[Array, "B T D"], Metrics]:
        del view
        both_BTCF = layers.project("BTD,DCF->BTCF", x_BTD, self.gate_up_proj[...])
        inner_BTF = sharding.constrain(layers.gated(jax.nn.silu, both_BTCF[:, :, 0], both_BTCF[:, :, 1]), "B T F")
        return layers.project("BTF,FD->BTD", inner_BTF, self.down_proj[...]), {}


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda: RMSNorm(c.hidden_size, c.norm_eps, dtype)
    block = lambda rngs: Block(Attention(c, rngs, dtype), MLP(c, rngs, dtype), before=(norm(), norm()))
    return Decoder(c, block, rngs, dtype)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
        },
        known={"sliding_window", "original_max_position_embeddings", "partial_rotary_factor", "auto_map"},
    )  # fmt: skip
    hf = {**_DEFAULTS, **hf}
    fractions = {
        settings["partial_rotary_factor"]
        for settings in (hf, hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {})
        if settings.get("partial_rotary_factor", 1.0) != 1.0
    }
    if len(fractions) > 1:
        raise ValueError(f"config.json: partial_rotary_factor: several values: {sorted(fractions)}")
    for key in ("rope_scaling", "rope_parameters"):
        hf[key] = _explicit(hf[key], hf) if hf.get(key) else None
    fields, window = hf_config.fields(hf, ("longrope",)), hf.get("sliding_window")
    return Config(
        **fields,
        windows=None if window is None else (window,) * fields["num_layers"],
        rotary_fraction=fractions.pop() if fractions else 1.0,
        original_max_positions=hf["original_max_position_embeddings"],
    )


def _explicit(settings: dict, hf: dict) -> dict:
    """Return rope settings with what transformers takes from elsewhere in a Phi-3 config."""
    settings = {key: value for key, value in settings.items() if key != "partial_rotary_factor"}
    kind = settings.pop("type", None) or settings.get("rope_type", "default")
    settings["rope_type"] = kind = "longrope" if kind in ("su", "yarn") else kind  # names of earlier versions
    if kind != "longrope":
        return {key: value for key, value in settings.items() if key != "original_max_position_embeddings"}
    original, factor = hf["original_max_position_embeddings"], settings.pop("factor", None)
    settings["original_max_position_embeddings"] = original
    if settings.get("attention_factor") is None:
        longest = hf["max_position_embeddings"] if factor is None else factor * original
        settings["attention_factor"] = rope.LongRope.default_attention_factor(longest, original)
    return settings


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it.

    Version 4 takes three keys of `rope_scaling` and no fourth, and works the attention factor out for itself.
    """
    c = config
    keys = hf_config.keys(c)
    if isinstance(c.rope_scaling, rope.LongRope):
        scaling = keys["rope_scaling"]
        keys["rope_scaling"] = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
        default = rope.LongRope.default_attention_factor(c.max_positions, c.original_max_positions)
        if c.rope_scaling.attention_factor != default:
            keys["rope_scaling"]["attention_factor"] = c.rope_scaling.attention_factor
        keys["rope_parameters"] |= {"partial_rotary_factor": c.rotary_fraction}
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **keys,
        "original_max_position_embeddings": c.original_max_positions,
        "partial_rotary_factor": c.rotary_fraction,
        "sliding_window": None if c.windows is None else c.windows[0],
        "hidden_act": "silu",
        "attention_bias": False,
    }
