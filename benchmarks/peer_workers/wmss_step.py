"""wmss_jax itself; a last argument names the objective: sft, or logit_mix with the weak model resident."""

import sys

import jax
import numpy as np
import optax
import worker

import wmss_jax as wmss

strong_dir, weak_dir, batch_file, objective_name = sys.argv[1:]
model, strong = wmss.load(strong_dir, dtype="float32", compute_dtype=worker.COMPUTE)
frozen = {"weak": wmss.load(weak_dir, dtype=worker.COMPUTE)[1]} if objective_name == "logit_mix" else {}
objective = wmss.objectives.LogitMix(worker.LAMBDA) if frozen else wmss.objectives.Sft()
adamw = optax.adamw(worker.LEARNING_RATE, worker.BETA1, worker.BETA2, worker.EPSILON, weight_decay=worker.WEIGHT_DECAY)
state = wmss.init_state({"strong": strong}, adamw)
del strong  # the state has a copy
train_step = wmss.make_train_step(model, objective, adamw)

with np.load(batch_file) as arrays:
    tokens, mask = arrays["tokens"], arrays["mask"]
weights = np.roll(mask, -1, axis=1)
weights[:, -1] = 0  # nothing follows the last token
batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "loss_weights": weights}


def step():
    global state
    state, metrics = jax.block_until_ready(train_step(state, frozen, batch))
    return float(metrics["loss"])


worker.serve(step, ("wmss-jax", "jax", "flax"))
