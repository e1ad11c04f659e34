"""Mistral 7B and its successors (arXiv 2310.06825): Llama's blocks, all layers with one sliding window or none."""

from wmss_jax.models import hf_config, llama
from wmss_jax.models.architecture import Config

TABLE = llama.TABLE
Model = llama.Model
# What transformers assumes where a config is silent. A window that is null is none.
_DEFAULTS = {"rope_theta": 10000.0, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf, only={"hidden_act": "silu", "attention_dropout": 0.0}, known={"head_dim", "sliding_window"}
    )
    hf = {**_DEFAULTS, **hf}
    window = hf["sliding_window"]
    fields = hf_config.fields(hf)
    return Config(**fields, windows=None if window is None else (window,) * fields["num_layers"])


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **hf_config.keys(config),
        "head_dim": config.head_dim,
        "sliding_window": None if config.windows is None else config.windows[0],
        "hidden_act": "silu",
    }
