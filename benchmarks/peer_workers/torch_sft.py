"""Supervised fine-tuning as with transformers: its model, its loss, the fused AdamW its Trainer takes by default."""

import functools
import sys

import numpy as np
import torch
import worker
from transformers import AutoModelForCausalLM

strong_dir, _, batch_file = sys.argv[1:]
batch = np.load(batch_file)
device = {"cpu": "cpu", "gpu": "cuda"}[worker.DEVICE]
autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=worker.COMPUTE == "bfloat16")
tokens = torch.from_numpy(batch["tokens"]).long().to(device)
labels = tokens.masked_fill(torch.from_numpy(batch["mask"]).to(device) == 0, -100)

model = AutoModelForCausalLM.from_pretrained(strong_dir, dtype=torch.float32, attn_implementation="sdpa")
model = model.to(device).train()
optimizer = torch.optim.AdamW(
    model.parameters(), worker.LEARNING_RATE, (worker.BETA1, worker.BETA2), worker.EPSILON, worker.WEIGHT_DECAY,
    fused=True,
)  # fmt: skip


def step():
    with autocast():
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


worker.serve(step, ("torch", "transformers"))
