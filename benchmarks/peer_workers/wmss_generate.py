"""Greedy continuations by wmss_jax itself."""

import sys

import numpy as np
import worker

import wmss_jax as wmss
from wmss_jax.generate import generate

model_dir, prompts_file, new_tokens = sys.argv[1:]
prompts = np.load(prompts_file).tolist()
model, params = wmss.load(model_dir, dtype=worker.COMPUTE)


def step():
    return generate(model, params, prompts, max_new_tokens=int(new_tokens), stop_ids=(), batch_size=len(prompts))


worker.serve(step, ("wmss-jax", "jax", "flax"))
