"""The text part of checkpoints that hold more: its config, and its tensors under the names of a text model."""

from collections.abc import Mapping
from typing import Any

# `model_type` of the whole -> that of its text part.
TEXT_PARTS = {"gemma3": "gemma3_text"}
# Prefixes that the text part's names had before transformers 4.52 and in files since, and those in memory since.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text part; a text model's own config as it is.

    Raises:
        ValueError: a multimodal config has no `text_config`, or one of another kind.
    """
    kind = TEXT_PARTS.get(hf.get("model_type", ""))
    if kind is None:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type", kind) != kind:
        raise ValueError(f"config.json: text_config: model_type {hf['model_type']!r} needs one of type {kind!r}")
    shared = {key: hf[key] for key in ("torch_dtype", "dtype", "tie_word_embeddings", "eos_token_id") if key in hf}
    return {**shared, **text, "model_type": kind}


def text_tensors[T](model_type: str, tensors: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """Return the tensors of the text part by their names in a text model, and the names of other parts' tensors.

    Args:
        model_type: of the whole checkpoint; tensors of one that is text only are returned as they are.
    """
    if model_type not in TEXT_PARTS:
        return dict(tensors), []
    text = {_renamed(name): tensor for name, tensor in tensors.items() if not name.startswith(_OTHER_PARTS)}
    return text, [name for name in tensors if name.startswith(_OTHER_PARTS)]


def _renamed(name: str) -> str:
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name  # neither text nor a known other part: reported as left over
