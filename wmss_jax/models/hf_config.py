"""Reading a Hugging Face config.json, as transformers 4 and 5 write it; what a family does not implement is refused."""

from collections.abc import Callable, Mapping, Set
from typing import Any

# Keys that say nothing about the forward pass of a causal language model.
_HARMLESS = {
    "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "max_position_embeddings", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Keys that every family here reads.
_READ = {
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip


def refuse_unimplemented(hf: Mapping[str, Any], only: Mapping[str, Any], known: Set[str]) -> None:
    """Raise unless every key is one that the family reads, ignores for a reason, or holds its only implemented value.

    Args:
        only: keys with one implemented value.
        known: further keys that the family's `from_hf` looks at itself.
    """
    for key, value in hf.items():
        if key in only and value is not None and value != only[key]:
            raise ValueError(
                f"config.json: {key}={value!r} is not implemented for {hf.get('model_type')}, only {only[key]!r}"
            )
        if key not in only and key not in known | _READ | _HARMLESS and value not in (None, False):
            raise ValueError(f"config.json: {key}={value!r}: {hf.get('model_type')} here knows no such feature")


def required(hf: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a look-up that names the key it does not find."""

    def need(key: str) -> Any:
        if hf.get(key) is None:
            raise ValueError(f"config.json: {key} is missing")
        return hf[key]

    return need


def rope_theta(hf: Mapping[str, Any]) -> float:
    """Return the rotary base, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4).

    Raises:
        ValueError: the positions are scaled, which is not implemented.
    """
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    for settings, key in ((rope, "rope_parameters"), (scaling, "rope_scaling")):
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind != "default":
            raise ValueError(f"config.json: {key}: rope type {kind!r} is not implemented, only 'default'")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or scaling.get("rope_theta")
    if theta is None:
        raise ValueError("config.json: neither rope_theta nor rope_parameters.rope_theta is given")
    return float(theta)


def dtype(hf: Mapping[str, Any]) -> str:
    """Return the dtype that the config names (`dtype` in transformers 5, `torch_dtype` in 4), float32 if none."""
    return str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
