"""How much faster the entropies of a data set come packed and chunked than one example at a time.

    python -m benchmarks.score [--pairs 15]

The naive pass is the one that is written first (and that the released code has): batch size 1, the softmax of the whole
sequence, -(p · log p), results read back example by example; here it is compiled, for four lengths that examples are
padded to. Both have to find the same numbers.
"""

import argparse
import statistics
from collections.abc import Callable

from benchmarks import timing

if __name__ == "__main__":
    timing.pin(threads=1)  # before jax makes its threads

import jax
import jax.numpy as jnp
import numpy as np

from wmss_jax import data, scoring
from wmss_jax.models import CausalLM, qwen3

EXAMPLES = 80
SEQ_LEN, BATCH_SIZE, CHUNK_TOKENS = 512, 4, 128  # of those tried the fastest; 5 % before the default chunk
TOLERANCE = 1e-3  # of a mean entropy or nll, in nats


def dataset(V: int) -> data.Dataset:
    """Return examples of 16 to SEQ_LEN tokens, most of them short (log-normal), the first third of each its prompt."""
    rng = np.random.default_rng(0)
    # Quantiles, not draws: so few draws have another tail each time, and the longest example decides how far the naive
    # pass pads the longest quarter.
    normal = statistics.NormalDist(4.2, 0.8)
    quantiles = np.array([normal.inv_cdf((i + 0.5) / EXAMPLES) for i in range(EXAMPLES)])
    lengths = np.clip(np.exp(quantiles), 16, SEQ_LEN).astype(int)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, V, offsets[-1]).astype(np.int32)
    mask = np.concatenate([np.arange(n) >= n // 3 for n in lengths])
    report = data.Report(EXAMPLES, int(offsets[-1]), int(mask.sum()), 0, 0, int(lengths.max()))
    rows = np.zeros((EXAMPLES, 2), np.int64)
    return data.Dataset(tokens, mask, offsets, rows, ("random:",), "random", "none", report)


def naive(model: CausalLM, params: dict, examples: data.Dataset) -> Callable[[], np.ndarray]:
    """Return the pass at batch size 1: mean entropy and nll of every example, [n, 2]."""
    buckets = np.quantile(examples.lengths, [0.25, 0.5, 0.75, 1.0], method="higher")

    @jax.jit
    def score_one(params: dict, tokens_1T: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs_1TV = jax.nn.log_softmax(model.logits(params, tokens_1T), axis=-1)
        entropy_1T = -jnp.sum(jnp.exp(log_probs_1TV) * log_probs_1TV, axis=-1)
        targets_1T1 = jnp.roll(tokens_1T, -1, axis=1)[..., None]
        return entropy_1T, -jnp.take_along_axis(log_probs_1TV, targets_1T1, axis=-1)[..., 0]

    def run() -> np.ndarray:
        found = []
        for index, length in enumerate(examples.lengths):
            padded = np.zeros((1, buckets[np.searchsorted(buckets, length)]), np.int32)
            padded[0, :length] = examples.tokens(index)
            trained = examples.mask(index)[1:]  # the position before a token predicts it
            scores = jax.device_get(score_one(params, padded))
            found.append([values_1T[0, : length - 1][trained].mean() for values_1T in scores])
        return np.array(found)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="default 15")
    args = parser.parse_args()
    timing.say(timing.one_line(timing.machine()))
    config = qwen3.Config(
        vocab_size=32768, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=64, rope_theta=1e6, norm_eps=1e-6, tied=False, max_positions=SEQ_LEN, init_std=0.05,
    )  # fmt: skip
    model = CausalLM("qwen3", config)
    params, examples = model.init(jax.random.key(0)), dataset(config.vocab_size)
    one_by_one = naive(model, params, examples)
    settings = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "chunk_tokens": CHUNK_TOKENS}
    packed = lambda: scoring.score(model, params, examples, **settings)
    scores = packed()
    gap = float(np.abs(np.stack([scores.entropy, scores.nll], axis=1) - one_by_one()).max())
    timing.say(f"{EXAMPLES} examples, {examples.report.tokens} tokens; entropies and nlls within {gap:.1e}")
    times = timing.interleaved({"naive": one_by_one, "packed": packed}, args.pairs, warmup=1)
    speedup = timing.ratio(times, "naive", "packed")
    timing.say(f"naive / packed: {speedup}")
    counts = gap <= TOLERANCE
    timing.emit("score.speedup", speedup.median if counts else None, target=5.0, better="higher", unit="ratio")
    for name, seconds in times.items():
        rate = EXAMPLES / timing.spread(seconds).median
        timing.emit(f"score.{name}_examples_per_s", rate, target=None, better="higher", unit="examples/s")


if __name__ == "__main__":
    main()
