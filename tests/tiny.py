"""A tiny random Qwen3 and batches for it, for tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from wmss_jax.models import CausalLM, qwen3

CONFIG = qwen3.Config(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rope_theta=1e4, norm_eps=1e-6, tied=False, max_positions=128,
)  # fmt: skip


def model(lora=None, **config) -> CausalLM:
    return CausalLM("qwen3", dataclasses.replace(CONFIG, **config), lora=lora)


@functools.cache
def params(model: CausalLM, seed: int = 0):
    """Random parameters, large enough that logits differ visibly between tokens; made without compiling anything."""
    rng = np.random.default_rng(seed)
    make = lambda leaf, letters: jnp.asarray(
        rng.normal(1, 0.2, leaf.shape) if letters in ("D", "L D", "L H") else rng.normal(0, 0.2, leaf.shape), leaf.dtype
    )
    return jax.tree.map(make, model.abstract(), model.letters)


def sharded(model: CausalLM, seed: int, mesh):
    """The same parameters on a mesh."""
    return jax.device_put(params(model, seed), model.shardings(mesh))


def batch(rows: int = 8, T: int = 24, V: int = 96, seed: int = 0, segments: bool = False) -> dict[str, np.ndarray]:
    """Random tokens with about 40 % of the targets trained; rows of very unequal token counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (rows, T)).astype(np.int32)
    share = rng.random((rows, 1))
    weights = (rng.random((rows, T)) < share).astype(np.float32)
    out = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "loss_weights": weights}
    if segments:
        cut = rng.integers(4, T - 4, (rows, 1))
        end = rng.integers(T - 3, T + 1, (rows, 1))
        index = np.arange(T)[None]
        out["segments"] = np.where(index >= end, 0, 1 + (index >= cut)).astype(np.int32)
        last = np.diff(out["segments"], axis=1, append=0) != 0
        out["loss_weights"] = np.where(last | (out["segments"] == 0), 0, weights).astype(np.float32)
    return out
