"""Continuations of prompts, on the parameters as they lie: batched, with a key-value cache, freed rows filled again."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from wmss_jax import decoding, processes, sharding
from wmss_jax.models import CausalLM
from wmss_jax.sampling import GREEDY, Sampling

MIN_BUCKET = 32  # tokens; below it, padding costs less than another compilation
_LOOK_EVERY = 16  # tokens, where the host has to look whether a text has ended
_REFILL = 4  # a quarter of the rows is read at once

Finish = Literal["stop", "text", "length"]
Ends = Callable[[list[int]], bool]


class Completion(NamedTuple):
    """What follows a prompt.

    Attributes:
        prompt: its index.
        sample: which of its continuations, from 0.
        tokens: so far, without the stop token.
        finish: what ended it: a stop token, `ends`, or the limit; None: it goes on.
    """

    prompt: int
    sample: int
    tokens: list[int]
    finish: Finish | None


def generate(
    model: CausalLM,
    params: PyTree[Array],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    ends: Ends | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Return each prompt's next tokens up to the first stop token: `sampling.samples` lists for the first, and so on.

    See `stream` for arguments and errors; this waits for all of it.
    """
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "sampling": sampling, "seeds": seeds}
    found = stream(model, params, prompts, ends=ends, mesh=mesh, batch_size=batch_size, **settings)
    return [completion.tokens for completion in sorted(found, key=lambda c: (c.prompt, c.sample))]


def stream(
    model: CausalLM,
    params: PyTree[Array],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    ends: Ends | None = None,
    every: int | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Iterator[Completion]:
    """Yield each continuation when it is finished, and with `every` also before that.

    Rows that have finished are filled with further prompts, a quarter of the batch at a time, the longest first: what
    does not fit in memory fails at once. Prompts are padded to 32, 48, 64, 96, 128, ... tokens and batches to a power
    of two of rows (and to a multiple of the mesh's batch shards), so one call compiles a program for the prompts of
    each such length, and one more that adds tokens.

    A draw depends on (seed, sample, position of the token) alone: not on the batch, its size or its other rows.
    Logits do in their last bits where the size differs.

    Args:
        params: where they lie decides where the work is done: on `mesh` if they are sharded.
        stop_ids: token ids that end a continuation; may be empty.
        seeds: of each prompt, 0 to 2**32 - 1; default: its index. Equal seeds draw the same noise.
        ends: of the tokens so far, whether they are complete: asked for every token (see `answers.StopTexts`).
        every: tokens after which unfinished continuations are yielded, too.
        mesh: batches are split over its `data` and `fsdp` axes.
        batch_size: rows at once; the cache takes rows × (prompt + max_new_tokens, padded) × 2 L K H numbers in the
            compute dtype.

    Raises:
        ValueError: a prompt is empty or holds an id that is no token, or a number is out of its range.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    _check(model, prompts, seeds, max_new_tokens=max_new_tokens, batch_size=batch_size, every=every)
    if not prompts:
        return
    waiting = sorted(
        (_Request(i, sample, seeds[i], prompts[i]) for i in range(len(prompts)) for sample in range(sampling.samples)),
        key=lambda request: -len(request.tokens),
    )
    batch = _Batch(model, params, waiting, max_new_tokens, stop_ids, sampling, mesh, batch_size)
    steps = min([n for n in (every, _LOOK_EVERY if ends else None) if n is not None], default=max_new_tokens)
    while batch.busy:
        batch.refill()
        batch.advance(steps)
        yield from batch.harvest(ends, unfinished=every is not None)


class _Request(NamedTuple):
    prompt: int
    sample: int
    seed: int
    tokens: Sequence[int]


class _Batch:
    """The slots of a batch: which request is in which, and who waits for one."""

    def __init__(
        self, model: CausalLM, params: PyTree[Array], waiting: list[_Request], max_new_tokens: int,
        stop_ids: Collection[int], sampling: Sampling, mesh: Mesh | None, batch_size: int,
    ):  # fmt: skip
        self._params, self._waiting, self._mesh = params, waiting, mesh
        self._stop_ids = frozenset(stop_ids)
        self._shards = sharding.batch_shards(mesh)
        rows = min(batch_size, _power_of_two(len(waiting)))
        rows += -rows % self._shards
        self._reads = -(-rows // _REFILL)
        self._reads += -self._reads % self._shards
        self._in_slot: list[_Request | None] = [None] * rows
        self._checked = [0] * rows  # tokens of each row that `ends` was asked about
        self._dropped_B = np.zeros(rows, bool)
        # Stop ids are padded to a power of two with -1, which no token is: their number compiles nothing.
        padded = _power_of_two(max(len(self._stop_ids), 4))
        stop = np.full(padded, -1, np.int32)
        stop[: len(self._stop_ids)] = sorted(self._stop_ids)
        self._limits = decoding.Limits(stop, np.int32(max_new_tokens))
        self._program = decoding.Program(model, sampling.kind, mesh)
        self._numbers = sampling.numbers
        longest = len(waiting[0].tokens)
        S = bucket(max(bucket(longest), longest + max_new_tokens))
        self._slots = decoding.empty(params, program=self._program, B=rows, S=S, M=bucket(max_new_tokens))

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting) or any(request is not None for request in self._in_slot)

    def refill(self) -> None:
        """Put waiting prompts into free slots, as long as there are enough of both."""
        while self._waiting and self._free >= min(self._reads, len(self._waiting)):
            self._read()

    def advance(self, steps: int) -> None:
        """Add up to `steps` tokens to every row; stop early when it is time to refill."""
        enough = len(self._in_slot) - min(self._reads, len(self._waiting)) if self._waiting else 0
        going = decoding.advance(
            self._params, self._slots, self._dropped_B, np.int32(steps), np.int32(enough), self._limits,
            self._numbers, program=self._program,
        )  # fmt: skip
        self._slots, self._dropped_B = going, np.zeros_like(self._dropped_B)

    def harvest(self, ends: Ends | None, unfinished: bool) -> Iterator[Completion]:
        """Free the slots of finished rows and yield these; with `unfinished` yield the others, too."""
        slots = self._slots
        made_B, going_B, out_BM = (processes.whole(x) for x in (slots.made_B, slots.going_B, slots.out_BM))
        for slot, request in enumerate(self._in_slot):
            if request is None:
                continue
            tokens = out_BM[slot, : made_B[slot]].tolist()
            finish: Finish | None = None if going_B[slot] else "length"
            if tokens[-1] in self._stop_ids:
                tokens, finish = tokens[:-1], "stop"
            until = None if ends is None else self._first_end(slot, tokens, ends)
            if until is not None:
                tokens, finish = tokens[:until], "text"
                self._dropped_B[slot] = True
            if finish is not None:
                self._in_slot[slot] = None
            if finish is not None or unfinished:
                yield Completion(request.prompt, request.sample, tokens, finish)

    @property
    def _free(self) -> int:
        return self._in_slot.count(None)

    def _first_end(self, slot: int, tokens: list[int], ends: Ends) -> int | None:
        """Return how many of a row's tokens are complete, the fewest; None: they are not."""
        asked, self._checked[slot] = self._checked[slot], len(tokens)
        return next((n for n in range(asked + 1, len(tokens) + 1) if ends(tokens[:n])), None)

    def _read(self) -> None:
        """Read prompts into free slots, of every shard's slots as many as it reads at once."""
        B, R = len(self._in_slot), self._reads
        slots_R = np.full(R, B, np.int32)
        for shard in range(self._shards):
            own = range(shard * B // self._shards, (shard + 1) * B // self._shards)
            free = [slot for slot in own if self._in_slot[slot] is None]
            for row, slot in zip(range(shard * R // self._shards, (shard + 1) * R // self._shards), free, strict=False):
                if self._waiting:
                    slots_R[row], self._in_slot[slot] = slot, self._waiting.pop(0)
                    self._checked[slot], self._dropped_B[slot] = 0, False
        requests = [None if slot == B else self._in_slot[slot] for slot in slots_R]
        prompts = decoding.Prompts(*(_placed(x, self._mesh) for x in _padded(requests, slots_R)))
        self._slots = decoding.read(
            self._params, self._slots, prompts, self._limits, self._numbers, program=self._program
        )  # fmt: skip


def _padded(requests: Sequence[_Request | None], slots_R: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the fields of `decoding.Prompts`."""
    lengths = [0 if request is None else len(request.tokens) for request in requests]
    tokens_RT = np.zeros((len(requests), bucket(max(lengths))), np.int32)
    seeds_R, samples_R = np.zeros(len(requests), np.uint32), np.zeros(len(requests), np.uint32)
    for row, request in enumerate(requests):
        if request is not None:
            tokens_RT[row, : lengths[row]] = request.tokens
            seeds_R[row], samples_R[row] = request.seed, request.sample
    return tokens_RT, np.array(lengths, np.int32), slots_R, seeds_R, samples_R


def bucket(n: int) -> int:
    """Return the smallest of 32, 48, 64, 96, 128, 192, ... that is at least n."""
    whole = max(_power_of_two(n), MIN_BUCKET)
    return whole * 3 // 4 if whole > MIN_BUCKET and n <= whole * 3 // 4 else whole


def _check(
    model: CausalLM, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *,
    max_new_tokens: int, batch_size: int, every: int | None,
) -> None:  # fmt: skip
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be >= 1, got {max_new_tokens} and {batch_size}")
    if every is not None and every < 1:
        raise ValueError(f"every must be >= 1 token, got {every}")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; each prompt needs one")
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds must be 0 to 2**32 - 1, got {min(seeds)} to {max(seeds)}")
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


def _placed(x: np.ndarray, mesh: Mesh | None) -> Array:
    """Return rows split over the mesh's batch axes; every host holds all rows and gives its own."""
    if mesh is None:
        return jnp.asarray(x)
    rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
    return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])
