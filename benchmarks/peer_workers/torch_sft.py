"""Supervised fine-tuning as with transformers: its model, its loss, the fused AdamW its Trainer takes by default."""

import sys

import numpy as np
import torch
import worker
from transformers import AutoModelForCausalLM

strong_dir, _, batch_file = sys.argv[1:]
batch = np.load(batch_file)
tokens = torch.from_numpy(batch["tokens"]).long()
labels = tokens.masked_fill(torch.from_numpy(batch["mask"]) == 0, -100)

model = AutoModelForCausalLM.from_pretrained(strong_dir, dtype=torch.float32, attn_implementation="sdpa").train()
optimizer = torch.optim.AdamW(
    model.parameters(), worker.LEARNING_RATE, (worker.BETA1, worker.BETA2), worker.EPSILON, worker.WEIGHT_DECAY,
    fused=True,
)  # fmt: skip


def step():
    loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


worker.serve(step, ("torch", "transformers"))
