"""Greedy continuation of prompts, on the parameters as they lie: batched, with a key-value cache.

A batch is one compiled program: it reads the prompts, then adds a token to every row until all rows
have stopped. Letters as in models/layers.py.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from wmss_jax import head, precision, sharding
from wmss_jax.models import CausalLM
from wmss_jax.models.layers import Cache

MIN_BUCKET = 32  # tokens; below it, padding costs less than another compilation

Pick = Callable[[Array], Array]  # logits_BV -> tokens_B


def generate(
    model: CausalLM,
    params: PyTree[Array],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Return each prompt's most likely next tokens, one after another, up to the first stop token.

    Results come in the order of the prompts, without the stop token and at most `max_new_tokens`
    long. Of equally likely tokens the lowest id is taken.

    Prompts of similar length share a batch. A batch is padded on the right to its longest prompt,
    rounded up to a power of two of at least MIN_BUCKET tokens, and to `batch_size` rows (fewer
    where all prompts together need fewer: again a power of two, and a multiple of the mesh's batch
    shards). So one call compiles at most one program per power of two among its prompt lengths.

    Args:
        params: where they lie decides where the work is done: on `mesh` if they are sharded.
        stop_ids: token ids that end a row; may be empty.
        mesh: batches are split over its `data` and `fsdp` axes.
        batch_size: rows at once; the cache takes rows × (prompt bucket + max_new_tokens) × 2 L K H
            numbers in the compute dtype.

    Raises:
        ValueError: a prompt is empty or holds an id that is no token, or a number is below 1.
    """
    _check(model, prompts, max_new_tokens, batch_size)
    stop_ids = frozenset(stop_ids)
    stop = np.array(sorted(stop_ids), np.int32)
    results: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(prompts, batch_size, sharding.batch_shards(mesh)):
        out_BT = _continue(
            params,
            _placed(batch.tokens_BT, mesh),
            _placed(batch.lengths_B, mesh),
            stop,
            model=model,
            max_new_tokens=max_new_tokens,
            mesh=mesh,
            pick=greedy,
        )
        rows = np.asarray(out_BT)[: len(batch.indices)].tolist()
        for index, row in zip(batch.indices, rows, strict=True):
            results[index] = list(itertools.takewhile(lambda token: token not in stop_ids, row))
    return results


def greedy(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the most likely tokens; of equally likely ones the lowest id."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


class _Batch(NamedTuple):
    """Prompts padded on the right with 0; rows beyond `indices` are filling, of length 0."""

    indices: list[int]  # of the prompts
    tokens_BT: np.ndarray
    lengths_B: np.ndarray


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, shards: int) -> Iterator[_Batch]:
    """Yield the prompts in batches, longest first: what does not fit in memory fails at once."""
    rows = min(batch_size, _power_of_two(len(prompts)))
    rows += -rows % shards
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        longest = len(prompts[indices[0]])
        tokens_BT = np.zeros((rows, max(MIN_BUCKET, _power_of_two(longest))), np.int32)
        for row, index in enumerate(indices):
            tokens_BT[row, : len(prompts[index])] = prompts[index]
        lengths_B = np.zeros(rows, np.int32)
        lengths_B[: len(indices)] = [len(prompts[index]) for index in indices]
        yield _Batch(indices, tokens_BT, lengths_B)


class _State(NamedTuple):
    """What the decoding loop carries: `column` of `out_BT` is written next."""

    column: Int[Array, ""]
    out_BT: Int[Array, "B T"]
    stopped_B: Bool[Array, "B"]
    cache: Cache


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "mesh", "pick"))
def _continue(
    params: PyTree[Array],
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    stop: Int[Array, "stop"],
    *,
    model: CausalLM,
    max_new_tokens: int,
    mesh: Mesh | None,
    pick: Pick,
) -> Int[Array, "B new"]:
    """Return the continuations, whole on every device; what follows a row's stop token is noise."""
    B, T = tokens_BT.shape
    dtype = model.dtype(params)
    is_stop = lambda tokens_B: jnp.any(tokens_B[:, None] == stop[None], axis=1)
    more = lambda s: (s.column < max_new_tokens) & ~jnp.all(s.stopped_B)

    with sharding.use(mesh), precision.matmuls_in(dtype):
        # Gathered over fsdp here, once, and not for every token.
        unembed_DV = sharding.constrain(model.unembed(params).astype(dtype), "D V")

        def advance(tokens_BT: Array, start_B: Array, last_B: Array, cache: Cache) -> tuple:
            """Read tokens at positions start, start + 1, ...; return what follows number `last`."""
            positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
            hidden_BTD, cache = model.decode(params, tokens_BT, positions_BT, cache)
            hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
            return pick(head.logits(hidden_BD, unembed_DV, model.vocab_size)), cache

        def add_token(s: _State) -> _State:
            previous_B1 = jax.lax.dynamic_slice_in_dim(s.out_BT, s.column - 1, 1, axis=1)
            token_B, cache = advance(previous_B1, lengths_B + s.column - 1, zeros_B, s.cache)
            out_BT = jax.lax.dynamic_update_slice_in_dim(s.out_BT, token_B[:, None], s.column, 1)
            return _State(s.column + 1, out_BT, s.stopped_B | is_stop(token_B), cache)

        zeros_B = jnp.zeros_like(lengths_B)
        cache = model.empty_cache(B, T + max_new_tokens, dtype)
        first_B, cache = advance(tokens_BT, zeros_B, jnp.maximum(lengths_B - 1, 0), cache)
        out_BT = jnp.zeros((B, max_new_tokens), jnp.int32).at[:, 0].set(first_B)
        state = _State(jnp.int32(1), out_BT, is_stop(first_B) | (lengths_B == 0), cache)
        out_BT = jax.lax.while_loop(more, add_token, state).out_BT
    if mesh is None:
        return out_BT
    return jax.lax.with_sharding_constraint(out_BT, NamedSharding(mesh, P()))


def _check(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be >= 1, got {max_new_tokens} and {batch_size}")
    vocab_size = model.vocabulary[0]
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; it needs one token at least")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {index} holds token ids from {min(prompt)} to {max(prompt)}; "
                f"the model has 0 to {vocab_size - 1}"
            )


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _placed(x: np.ndarray, mesh: Mesh | None) -> np.ndarray | Array:
    """Return rows split over the mesh's batch axes; every host holds all rows and gives its own."""
    if mesh is None:
        return x
    rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
    return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])
