"""Steps of small models, compiled for accelerators that are not there; each of them once in a worker."""

import functools
import json
import tempfile
from pathlib import Path

import pytest

from wmss_jax import plan, programs, topologies

# Small, yet no two of its sizes are equal, so that an array tells by its shape what it is.
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
FEW_TOKENS = ("dataset.seq_len=128", "train.diagnose_every_steps=")
COMPILERS = {"v": "libtpu", "t": "libtpu"}  # by the first letter of a topology
TRITON_IS_DEPRECATED = (
    "ignore:The Pallas Triton backend is deprecated and will be removed in a future JAX version. To keep using Pallas "
    "on GPU, please migrate to the Mosaic GPU backend. To keep using Triton, switch to the official Triton bindings "
    "and jax_triton.:DeprecationWarning"
)


def need_compiler(topology: str) -> None:
    """Skip the test where there is no compiler for this topology."""
    pytest.importorskip(COMPILERS.get(topology[0], "jax_plugins.xla_cuda13"))


def write(directory: Path, **changes) -> Path:
    """Write the model's config.json, with changes, and return it."""
    file = directory / "config.json"
    file.write_text(json.dumps({**CONFIG, **changes}))
    return file


@functools.cache
def planned(topology: str, step: programs.Step, *overrides: str, config: Path | None = None):
    """Return (compiled, plan) of a step; without `config`, of the small model."""
    need_compiler(topology)
    with tempfile.TemporaryDirectory() as directory:
        devices = topologies.devices(topology)
        recipe = plan.recipe(config or write(Path(directory)), devices, overrides)
        compiled = plan.compiled(recipe, step, devices)
    return compiled, plan.read(compiled, recipe, step, topology, devices)
