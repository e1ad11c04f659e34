"""A loop and an objective of one's own: python examples/custom_loop.py WEAK_DIR STRONG_DIR OUT_DIR"""

import sys
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax

import wmss_jax as wmss
from wmss_jax.objectives import nll


@dataclass(frozen=True)
class KnownMix:
    floor: float = 1e-4  # mix where the weak model gives the target at least this; elsewhere plain cross-entropy
    roles = ("strong", "weak")

    def __call__(self, logits, targets_N, ctx):
        known_N = nll(logits["weak"], targets_N) < -jnp.log(self.floor)
        lam_N1 = jnp.where(known_N, 0.5, 1.0)[:, None]
        loss_N = nll(lam_N1 * logits["strong"] + (1 - lam_N1) * logits["weak"], targets_N)
        return loss_N, {"known": known_N.astype(jnp.float32)}


def main(weak_dir, strong_dir, out_dir, steps=20):
    model, strong = wmss.load(strong_dir, dtype="float32")
    weak, tx = wmss.load(weak_dir)[1], optax.adamw(1e-3)
    state = wmss.init_state({"strong": strong}, tx)
    step = wmss.make_train_step(model, KnownMix(), tx)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 32), dtype=np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": np.float32([[1] * 31 + [0]] * 4)}
    for _ in range(steps):
        state, metrics = step(state, {"weak": weak}, batch)
        print({name: round(float(value), 4) for name, value in metrics.items()})
    wmss.save(model, state.params["strong"], out_dir, tokenizer_from=strong_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
