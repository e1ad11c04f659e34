"""Reading a Hugging Face config.json, as transformers 4 and 5 write it; what a family does not implement is refused."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from wmss_jax.models import rope

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


def fields(hf: Mapping[str, Any], rope_kinds: Sequence[str] = ("linear", "llama3", "yarn")) -> dict[str, Any]:
    """Return the fields of `architecture.Config` but `windows`.

    Args:
        hf: with the family's defaults filled in. Its `num_key_value_heads` may be null: as many as there are heads.
        rope_kinds: see `rope.read`.

    Raises:
        ValueError: a key is missing, or the positions are scaled in a way that is not implemented.
    """
    need = required(hf)
    grouped = hf.get("num_key_value_heads", 0) is not None
    theta, scaling = rope.read(hf, rope_kinds)
    return {
        "vocab_size": need("vocab_size"),
        "hidden_size": need("hidden_size"),
        "intermediate_size": need("intermediate_size"),
        "num_layers": need("num_hidden_layers"),
        "num_heads": need("num_attention_heads"),
        "num_kv_heads": need("num_key_value_heads" if grouped else "num_attention_heads"),
        "head_dim": hf.get("head_dim") or need("hidden_size") // need("num_attention_heads"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": need("rms_norm_eps"),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "max_positions": hf.get("max_position_embeddings", 32768),
        "init_std": hf.get("initializer_range", 0.02),
    }


def keys(config: Any) -> dict[str, Any]:
    """Return the keys that say what `fields` reads, `head_dim` aside; transformers 4 and 5 both read them."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **rope.write(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
    }


def windows(hf: Mapping[str, Any], types: Sequence[str]) -> tuple[int | None, ...] | None:
    """Return the sliding window of every layer; None where all layers see everything.

    Args:
        types: "sliding_attention" or "full_attention" for every layer, where the config has no `layer_types`.

    Raises:
        ValueError: there are other types or another number of them, or no window's size.
    """
    types = hf.get("layer_types") or types
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"config.json: layer_types: {', '.join(sorted(unknown))} is not implemented")
    if len(types) != required(hf)("num_hidden_layers"):
        raise ValueError(f"config.json: layer_types has {len(types)} entries for {hf['num_hidden_layers']} layers")
    if "sliding_attention" not in types:
        return None
    size = required(hf)("sliding_window")
    return tuple(size if each == "sliding_attention" else None for each in types)


def window_keys(windows: tuple[int | None, ...] | None, layers: int) -> dict[str, Any]:
    """Return the keys that say what `windows` reads."""
    windows = windows or (None,) * layers
    return {
        "sliding_window": next((size for size in windows if size is not None), None),
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in windows],
    }


# Qwen writes a sliding window into every config and says elsewhere whether, and from which layer on, there is one.
QWEN_WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}


def qwen_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    """Return `windows` of a Qwen config: of layers from `max_window_layers` on, where `use_sliding_window` is set."""
    full, layers = "full_attention", required(hf)("num_hidden_layers")
    if not hf.get("use_sliding_window"):
        if set(hf.get("layer_types") or [full]) != {full}:
            raise ValueError(
                "config.json: layer_types names other layers than full_attention, and use_sliding_window is off"
            )
        return None
    first = hf.get("max_window_layers", 28)
    return windows(hf, [full if layer < first else "sliding_attention" for layer in range(layers)])


def qwen_window_keys(windows: tuple[int | None, ...] | None, layers: int) -> dict[str, Any]:
    """Return the keys that say what `qwen_windows` reads."""
    if windows is None:
        return {"use_sliding_window": False}
    full = sum(size is None for size in windows)
    return {"use_sliding_window": True, "max_window_layers": full, **window_keys(windows, layers)}


def dtype(hf: Mapping[str, Any]) -> str:
    """Return the dtype that the config names (`dtype` in transformers 5, `torch_dtype` in 4), float32 if none."""
    return str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
