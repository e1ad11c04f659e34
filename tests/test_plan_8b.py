"""Qwen3-8B on the slices and hosts that it is meant for: does it fit; later families the same, as they come."""

import json
from pathlib import Path

import plans
import pytest

from wmss_jax.models import ARCHS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(plans.TRITON_IS_DEPRECATED)]

QWEN3_8B = Path(__file__).parent.parent / "configs" / "models" / "qwen3_8b.json"
STEPS = {"sft": ("sft", ()), "cached": ("joint", ("joint.weak.placement=cached",)), "resident": ("joint", ())}
MESHES = {"v5p:4x4x4": ("mesh.fsdp=16", "mesh.tensor=4"), "v5e:8x8": ()}

# (topology, step): most GB of temporaries. One row of 4,096 tokens a group of devices, layers recomputed whole.
TEMPORARIES = {
    ("v5p:4x4x4", "sft"): 4.7, ("v5p:4x4x4", "cached"): 4.7, ("v5p:4x4x4", "resident"): 5.0,
    ("v5e:8x8", "sft"): 10.0, ("v5e:8x8", "cached"): 10.4, ("v5e:8x8", "resident"): 10.6,
}  # fmt: skip


@pytest.mark.parametrize("topology, kind", TEMPORARIES)
def test_qwen3_8b_on_a_slice(topology, kind):
    step, overrides = STEPS[kind]
    _, plan = plans.planned(topology, step, *MESHES[topology], *overrides, config=QWEN3_8B)
    assert (plan.fits, plan.seq_len, plan.remat, plan.attention) == (True, 4096, "full", "splash")
    assert plan.rows == plan.mesh["fsdp"]
    assert plan.memory["temporaries"] / 1e9 <= TEMPORARIES[topology, kind]
    assert plan.compile_seconds <= 3 * 120


def test_qwen3_8b_on_a_host_of_gpus():
    _, plan = plans.planned("h100:1x1x8", "joint", config=QWEN3_8B)
    assert (plan.fits, plan.attention) == (True, "triton")
    assert plan.total / 1e9 <= 30
    assert plan.compile_seconds <= 3 * 40


# -- families to come ---------------------------------------------------------------------------------------------

_LLAMA = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
# name: (topology, overrides, config.json)
FAMILIES = {
    "Llama-3.1-70B": ("v5p:4x4x8", ("mesh.fsdp=32", "mesh.tensor=4"), _LLAMA | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "mlp_bias": False, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }),
    "Qwen2.5-72B": ("v5p:4x4x8", ("mesh.fsdp=32", "mesh.tensor=4"), {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 8192,
        "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
        "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "bfloat16",
    }),
    "Gemma-3-27B": ("v5p:4x4x4", ("mesh.fsdp=16", "mesh.tensor=4"), {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262208,
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 131072, "sliding_window": 1024, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 168, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "tie_word_embeddings": True, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "torch_dtype": "bfloat16",
    }),
    "Qwen3-30B-A3B": ("v5p:4x4x4", ("mesh.fsdp=16", "mesh.tensor=4"), _LLAMA | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "use_sliding_window": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_to_come(name, tmp_path):
    topology, overrides, config = FAMILIES[name]
    if config["model_type"] not in ARCHS:
        pytest.skip(f"{config['model_type']} is not implemented yet")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    _, plan = plans.planned(topology, "joint", *overrides, config=file)
    assert plan.fits and plan.attention == "splash"
