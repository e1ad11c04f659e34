"""SmolLM3 (huggingface.co/blog/smollm3): Llama's blocks, of which every fourth knows no positions (NoPE)."""

import dataclasses

from wmss_jax.models import architecture, hf_config, llama
from wmss_jax.models.architecture import Kind

TABLE = llama.TABLE
Model = llama.Model
# What transformers assumes where a config is silent.
_DEFAULTS = {"rope_theta": 2000000.0, "tie_word_embeddings": True, "num_key_value_heads": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(architecture.Config):
    """The architecture of one checkpoint."""

    rotary: tuple[bool, ...]  # of every layer: whether it turns queries and keys

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """How the layers differ, in order."""
        return tuple(Kind(self.rope if rotary else None) for rotary in self.rotary)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
            "use_sliding_window": False,
        },
        known={
            "sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval",
            "pretraining_tp",  # see llama
        },
    )  # fmt: skip
    hf = {**_DEFAULTS, **hf}
    layers = hf_config.required(hf)("num_hidden_layers")
    if hf_config.windows(hf, ["full_attention"] * layers) is not None:
        raise ValueError("config.json: layer_types: only full_attention is implemented for smollm3")
    interval = hf.get("no_rope_layer_interval") or 4
    rotary = hf.get("no_rope_layers") or [number % interval != 0 for number in range(1, layers + 1)]
    if len(rotary) < layers:
        raise ValueError(f"config.json: no_rope_layers has {len(rotary)} entries for {layers} layers")
    return Config(**hf_config.fields(hf), rotary=tuple(map(bool, rotary[:layers])))


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **hf_config.keys(config),
        "no_rope_layers": [int(rotary) for rotary in config.rotary],  # 1: this layer has them
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * config.num_layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
