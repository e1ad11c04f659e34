"""An adapter as PEFT loads it: adapter_config.json and adapter_model.safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Array, PyTree
from safetensors.numpy import save_file

from wmss_jax import hf, processes
from wmss_jax.models import CausalLM


def save(
    model: CausalLM,
    adapter: PyTree[Array],
    out_dir: str | os.PathLike,
    *,
    base: str,
    tokenizer_from: str | os.PathLike | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter directory; it appears whole or not at all.

    Args:
        model: with `lora`.
        base: Hugging Face directory or hub id that the adapter is loaded onto, as the config file says it.
        tokenizer_from: directory to copy tokenizer and template files from.
        files: {name: text} of further files, such as a model card.

    Raises:
        FileExistsError: `out_dir` holds something.
    """
    assert model.lora is not None
    tensors = {}
    for row in model.rows:
        tensors |= hf.tensors_of(row, hf.leaf_of(adapter, row), model.sizes)
    if not processes.first():
        return
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with hf.new_directory(out_dir) as directory:
        (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        if tokenizer_from is not None:
            hf.carry(Path(tokenizer_from), directory)
        hf.write_texts(directory, files or {})
