"""Supervised fine-tuning as with Tunix: its Qwen3, its loader, its PeftTrainer's own loss and jitted step."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import worker
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params
from tunix.sft import peft_trainer, utils

strong_dir, _, batch_file = sys.argv[1:]
hf = json.loads((Path(strong_dir) / "config.json").read_text())
config = qwen3.ModelConfig(
    num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"],
    hidden_dim=hf["intermediate_size"], num_heads=hf["num_attention_heads"], head_dim=hf["head_dim"],
    num_kv_heads=hf["num_key_value_heads"], rope_theta=int(hf["rope_theta"]), norm_eps=hf["rms_norm_eps"],
    use_tied_embedding=hf["tie_word_embeddings"],
)  # fmt: skip
model = params.create_model_from_safe_tensors(strong_dir, config, dtype=jax.numpy.float32)
adamw = optax.adamw(worker.LEARNING_RATE, worker.BETA1, worker.BETA2, worker.EPSILON, weight_decay=worker.WEIGHT_DECAY)


def model_input(example):
    """Return what the default loss takes, as Tunix's own SFT examples make it; token 0 would be padding."""
    is_token = example.input_tokens != 0
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": utils.build_positions_from_mask(is_token),
        "attention_mask": utils.make_causal_attn_mask(is_token),
    }


trainer = peft_trainer.PeftTrainer(model, adamw, peft_trainer.TrainingConfig(eval_every_n_steps=10**9))
trainer = trainer.with_gen_model_input_fn(model_input)
train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as trainer.train() asks for it
batch = np.load(batch_file)
example = peft_trainer.TrainingInput(input_tokens=batch["tokens"], input_mask=batch["mask"])


def step():
    loss, _, grad_norm = train_step(example)
    jax.block_until_ready((loss, grad_norm))  # outputs of one program, which ends with the new parameters
    return float(loss)


worker.serve(step, ("google-tunix", "jax", "flax"))
