"""Greedy continuations by transformers; a last argument says which cache: dynamic (its default) or static."""

import sys

import numpy as np
import torch
import worker
from transformers import AutoModelForCausalLM

model_dir, prompts_file, new_tokens, cache = sys.argv[1:]
device, dtype = {"cpu": "cpu", "gpu": "cuda"}[worker.DEVICE], getattr(torch, worker.COMPUTE)
tokens = torch.from_numpy(np.load(prompts_file)).long().to(device)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").to(device).eval()
model.generation_config.eos_token_id = None
# Compiling the decoding step is what a static cache asks for on accelerators, and not on a CPU.
how = {"cache_implementation": "static", "disable_compile": device == "cpu"} if cache == "static" else {}


def step():
    with torch.inference_mode():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=int(new_tokens), do_sample=False,
            pad_token_id=0, **how,
        )  # fmt: skip
    return out[:, tokens.shape[1] :].tolist()


worker.serve(step, ("torch", "transformers"))
