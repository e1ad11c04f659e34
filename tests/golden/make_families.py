"""Tiny random checkpoints of every family but Qwen3, with what transformers computes from them.

In a scratch environment with torch==2.13.0 transformers==5.23.0:

    python tests/golden/make_families.py [FAMILY/CASE ...]

writes tests/golden/FAMILY/CASE: a checkpoint, and golden.npz with `tokens` and `logits` (float32, eager attention, CPU,
from the files on disk). Run with transformers==4.57.1, which needs no torch for it, the same command writes the same
configs as version 4 does, as config_v4.json. Without names: all cases.

Every sequence is longer than the sliding windows and than the original rope lengths. torch is needed here only; the
package and its tests read the committed files.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers

OUT = Path(__file__).parent
MAJOR = int(transformers.__version__.split(".")[0])
T = 40
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8, "num_key_value_heads": 1}
ORIGINAL = {"original_max_position_embeddings": 16}

# Family and case -> (transformers' name of the architecture, config, rope settings, files are bfloat16).
# Settings that a family could ignore are set such that ignoring one changes the logits.
CASES = {
    "qwen2/yarn": ("Qwen2", {"tie_word_embeddings": True}, {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}),
    "qwen2/window": (
        "Qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
        {},
    ),
    "llama/llama3": (
        "Llama",
        {"head_dim": 12},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    ),
    "llama/linear": ("Llama", {"tie_word_embeddings": True}, {"rope_type": "linear", "factor": 4.0}),
    "mistral/window": ("Mistral", {"sliding_window": 8, "head_dim": 12}, {}),
    "gemma3_text/tied": (
        "Gemma3",
        {**GEMMA, "num_hidden_layers": 7},  # five local layers, a global one, and one more
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma3/multimodal": ("Gemma3", {**GEMMA, "num_hidden_layers": 2, "sliding_window_pattern": 2}, {}),
    "gemma2/tied": (
        "Gemma2",
        {**GEMMA, "num_hidden_layers": 3, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
        {},
    ),
    "qwen3_moe/normed": (
        "Qwen3Moe",
        {"head_dim": 12, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2,
         "norm_topk_prob": True, "decoder_sparse_step": 1},
        {},
    ),
    "qwen3_moe/tied": (
        "Qwen3Moe",
        {"head_dim": 12, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 3,
         "norm_topk_prob": False, "tie_word_embeddings": True, "num_hidden_layers": 1},
        {},
    ),
    "phi3/longrope": (
        "Phi3",
        {**ORIGINAL, "num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.75},
        {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1, 2, 3, 5, 8, 12]},
    ),
    "phi3/window": ("Phi3", {"sliding_window": 8, "tie_word_embeddings": True}, {}),
    "olmo2/untied": ("Olmo2", {}, {}),
    "smollm3/nope": (
        "SmolLM3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "intermediate_size": 24}, {},
    ),
}  # fmt: skip
BFLOAT16 = {"llama/linear", "gemma2/tied", "qwen3_moe/tied"}


def config_of(case: str) -> transformers.PretrainedConfig:
    """Returns the config of a case, its rope given as the running major version wants it."""
    family, changes, rope = CASES[case]
    settings = {**SIZES, **changes}
    if case.startswith("gemma3"):
        kind = transformers.Gemma3TextConfig
        if rope and MAJOR < 5:
            whole, local = rope["full_attention"], rope["sliding_attention"]
            scaling = {key: whole[key] for key in ("rope_type", "factor")}
            settings |= {"rope_theta": whole["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
            settings |= {"rope_scaling": scaling}
        elif rope:
            settings |= {"rope_parameters": rope}
    else:
        kind = getattr(transformers, f"{family}Config")
        theta = {"rope_theta": 1000.0}
        if MAJOR >= 5:
            settings |= {"rope_parameters": {"rope_type": "default", **rope, **theta}}
        else:
            rope = {key: value for key, value in rope.items() if "longrope" not in rope.values() or key != "rope_type"}
            rope |= {"type": "longrope"} if "short_factor" in rope else {}  # the one key that it allows
            settings |= {"rope_scaling": rope or None, **theta}
    if case != "gemma3/multimodal":
        return kind(**settings)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}  # fmt: skip
    return transformers.Gemma3Config(text_config=kind(**settings), vision_config=vision, mm_tokens_per_image=4)


def randomise(model, rng: np.random.Generator) -> None:
    """Draws every weight so that an error in any of them, or in rope, is visible in the logits."""
    import torch

    config = model.config.get_text_config()
    gemma = "gemma" in config.model_type
    for name, param in model.named_parameters():
        noise, fan_in = rng.standard_normal(param.shape), param.shape[-1]
        if name.endswith(("norm.weight", "layernorm.weight")):
            value = (0 if gemma else 1) + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "lm_head" in name or ("embed_tokens" in name and config.tie_word_embeddings):
            value = 2 * noise / fan_in**0.5  # logits of std 2: the final norm's output has rms 1
        elif "embed_tokens" in name:
            value = noise
        else:
            value = 1.5 * noise / fan_in**0.5
        param.data.copy_(torch.from_numpy(value))


def write(case: str) -> None:
    """Writes one checkpoint, then its golden numbers from the checkpoint as read back."""
    import torch

    folder, family = OUT / case, CASES[case][0]
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(sum(case.encode()))
    config = config_of(case)
    name = "Gemma3ForConditionalGeneration" if case == "gemma3/multimodal" else f"{family}ForCausalLM"
    kind = getattr(transformers, name)
    model = kind(config)
    with torch.no_grad():
        randomise(model, rng)
        model.to(torch.bfloat16 if case in BFLOAT16 else torch.float32).save_pretrained(folder)
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        tokens = rng.integers(3, config.get_text_config().vocab_size, size=(2, T))
        logits_of = lambda tokens: model(torch.from_numpy(tokens), **extra).logits.numpy()
        extra = {"token_type_ids": torch.zeros((2, T), dtype=torch.long)} if "Conditional" in name else {}
        golden = {"tokens": tokens.astype(np.int32), "logits": logits_of(tokens)}
        if case == "phi3/longrope":  # sequences up to the original length have frequencies of their own
            golden |= {"short_tokens": golden["tokens"][:, :16], "short_logits": logits_of(tokens[:, :16])}
        if case == "qwen3_moe/tied":  # of one layer: version 5 mixes layers before it multiplies
            out = model(torch.from_numpy(tokens), output_router_logits=True)
            golden |= {"load_balance": np.float32(out.aux_loss)}
    np.savez_compressed(folder / "golden.npz", **golden)
    (folder / "generation_config.json").unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{case}: {size} bytes, logits std {golden['logits'].std():.2f}")


def write_v4_config(case: str) -> None:
    """Writes only the config, as the running transformers 4 saves it."""
    config = config_of(case)
    config.architectures = [f"{CASES[case][0]}ForCausalLM"]
    config.dtype = "bfloat16" if case in BFLOAT16 else "float32"
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        shutil.copy(os.path.join(scratch, "config.json"), OUT / case / "config_v4.json")
    print(f"{case}/config_v4.json by transformers {transformers.__version__}")


if __name__ == "__main__":
    for each in sys.argv[1:] or CASES:
        write(each) if MAJOR >= 5 else write_v4_config(each)
