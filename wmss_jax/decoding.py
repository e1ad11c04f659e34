"""The programs of generation: rows of a batch that read their prompts and go on, each at its own position.

A batch has B slots. `read` puts R new prompts into free slots, in one pass over their tokens; `advance` adds tokens to
every slot that is not done, one after another, until enough are. The shapes are all that they are compiled for: which
prompts, how many tokens, the numbers of the sampling and the stop tokens are arguments. Letters as in models/layers.py;
M is the most tokens that a row can be given.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from wmss_jax import head, precision, sampling, sharding
from wmss_jax.models import CausalLM, layers
from wmss_jax.models.layers import Cache


class Program(NamedTuple):
    """What both programs are compiled for, besides shapes."""

    model: CausalLM
    kind: sampling.Kind
    mesh: Mesh | None


class Slots(NamedTuple):
    """The rows of a batch. All but the caches lie whole on every device.

    Attributes:
        out_BM: the tokens that each row was given, `made_B` of them; the rest is noise.
        position_B: of a row's last token, which is the next to be read.
        going_B: rows that are given further tokens.
        seeds_B, samples_B: of the request in the slot; see `sampling.Draws`.
    """

    caches: tuple[Cache, ...]
    out_BM: Int[Array, "B M"]
    made_B: Int[Array, "B"]
    position_B: Int[Array, "B"]
    going_B: Bool[Array, "B"]
    seeds_B: UInt[Array, "B"]
    samples_B: UInt[Array, "B"]


class Prompts(NamedTuple):
    """Prompts to read, padded on the right; rows of length 0 are filling. Rows are split like a batch.

    Attributes:
        slots_R: where they go: of a device's rows, into slots of that device; filling to slot B, which there is not.
    """

    tokens_RT: Int[Array, "R T"]
    lengths_R: Int[Array, "R"]
    slots_R: Int[Array, "R"]
    seeds_R: UInt[Array, "R"]
    samples_R: UInt[Array, "R"]


class Limits(NamedTuple):
    """When rows end.

    Attributes:
        stop: token ids; a row's last token may be one of them.
        most: tokens a row is given at most.
    """

    stop: Array | np.ndarray
    most: Array | np.int32

    def reached(self, tokens_B: Array, made_B: Array) -> Array:
        """Return the rows whose last token was their last."""
        return jnp.any(tokens_B[:, None] == jnp.asarray(self.stop)[None], axis=1) | (made_B >= self.most)


# Of parameters that it does not read, so that what it returns is bound to their devices like what `read` returns.
@functools.partial(jax.jit, static_argnames=("program", "B", "S", "M"), keep_unused=True)
def empty(params: PyTree[Array], *, program: Program, B: int, S: int, M: int) -> Slots:
    """Return B free slots for S tokens each, M of them new ones."""
    model = program.model
    with sharding.use(program.mesh):
        caches = model.empty_cache(B, S, model.dtype(params))
        zeros = lambda dtype: jnp.zeros(B, dtype)
        slots = Slots(
            caches, jnp.zeros((B, M), jnp.int32), zeros(jnp.int32), zeros(jnp.int32), zeros(bool), zeros(jnp.uint32),
            zeros(jnp.uint32),
        )  # fmt: skip
        return _whole(slots)


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("slots",))
def read(
    params: PyTree[Array],
    slots: Slots,
    prompts: Prompts,
    limits: Limits,
    numbers: sampling.Numbers,
    *,
    program: Program,
) -> Slots:
    """Return the slots with these prompts in them, each with its first new token."""
    model, mesh = program.model, program.mesh
    R, T = prompts.tokens_RT.shape
    with sharding.use(mesh), precision.matmuls_in(model.dtype(params)):
        positions_RT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (R, T))
        caches = model.empty_cache(R, T, model.dtype(params))
        hidden_RTD, caches = model.decode(params, prompts.tokens_RT, positions_RT, caches)
        last_R11 = jnp.maximum(prompts.lengths_R - 1, 0)[:, None, None]
        hidden_RD = jnp.take_along_axis(hidden_RTD, last_R11, axis=1)[:, 0]
        draws = sampling.Draws(prompts.seeds_R, prompts.samples_R, prompts.lengths_R)
        first_R = _next(program, numbers, hidden_RD, _head(params, model), draws)
        put = lambda old_B, new_R: old_B.at[prompts.slots_R].set(new_R, mode="drop")
        one_R = jnp.ones(R, jnp.int32)
        slots = Slots(
            caches=_placed(slots.caches, caches, prompts.slots_R, mesh),
            out_BM=slots.out_BM.at[prompts.slots_R, 0].set(first_R, mode="drop"),
            made_B=put(slots.made_B, one_R),
            position_B=put(slots.position_B, prompts.lengths_R),
            going_B=put(slots.going_B, ~limits.reached(first_R, one_R)),
            seeds_B=put(slots.seeds_B, prompts.seeds_R),
            samples_B=put(slots.samples_B, prompts.samples_R),
        )
        return _whole(slots)


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("slots",))
def advance(
    params: PyTree[Array],
    slots: Slots,
    dropped_B: Bool[Array, "B"],
    steps: Int[Array, ""],
    enough: Int[Array, ""],
    limits: Limits,
    numbers: sampling.Numbers,
    *,
    program: Program,
) -> Slots:
    """Return the slots after up to `steps` tokens more for every row that goes on.

    Args:
        dropped_B: rows that go on no longer.
        enough: stop early when no more than so many rows go on.
    """
    model = program.model
    with sharding.use(program.mesh), precision.matmuls_in(model.dtype(params)):
        unembed_DV = _head(params, model)
        params = {**params, "layers": layers.apart(params["layers"], len(slots.caches))}
        M = slots.out_BM.shape[1]

        def add_token(turn: tuple[Array, Slots]) -> tuple[Array, Slots]:
            step, s = turn
            column_BM = jnp.arange(M, dtype=jnp.int32)[None]
            last_B = jnp.take_along_axis(s.out_BM, s.made_B[:, None] - 1, axis=1)[:, 0]
            hidden_BTD, caches = model.decode(params, last_B[:, None], s.position_B[:, None], s.caches)
            draws = sampling.Draws(s.seeds_B, s.samples_B, s.position_B + 1)
            token_B = _next(program, numbers, hidden_BTD[:, 0], unembed_DV, draws)
            written_BM = (column_BM == s.made_B[:, None]) & s.going_B[:, None]
            made_B = s.made_B + s.going_B
            s = s._replace(
                caches=caches,
                out_BM=jnp.where(written_BM, token_B[:, None], s.out_BM),
                made_B=made_B,
                position_B=s.position_B + s.going_B,
                going_B=s.going_B & ~limits.reached(token_B, made_B),
            )
            return step + 1, _whole(s)

        more = lambda turn: (turn[0] < steps) & (jnp.sum(turn[1].going_B) > enough)
        slots = slots._replace(going_B=slots.going_B & ~dropped_B)
        return jax.lax.while_loop(more, add_token, (jnp.int32(0), slots))[1]


def _head(params: PyTree[Array], model: CausalLM) -> Array:
    """Return the head's matrix gathered over fsdp: here, once, and not for every token."""
    return sharding.constrain(model.unembed(params).astype(model.dtype(params)), "D V")


def _next(
    program: Program,
    numbers: sampling.Numbers,
    hidden_BD: Float[Array, "B D"],
    unembed_DV: Array,
    draws: sampling.Draws,
) -> Int[Array, "B"]:
    model = program.model
    logits_BV = sharding.constrain(head.logits(hidden_BD, unembed_DV, model.vocab_size, model.softcap), "B V")
    return sampling.pick(program.kind, numbers, logits_BV, draws)


def _placed(
    caches: tuple[Cache, ...], new: tuple[Cache, ...], slots_R: Int[Array, "R"], mesh: Mesh | None
) -> tuple[Cache, ...]:
    """Return caches with rows of other, shorter ones in some of their slots; on every device its own."""

    def place(old: Array, new: Array, slots_R: Array) -> Array:
        B = len(old)

        def one(r: Array, old: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(new, r, 1)
            start = (jnp.minimum(slots_R[r], B - 1), 0, 0, 0)
            there = jax.lax.dynamic_slice(old, start, row.shape)
            return jax.lax.dynamic_update_slice(old, jnp.where(slots_R[r] < B, row, there), start)

        return jax.lax.fori_loop(0, len(slots_R), one, old)

    if mesh is None:
        return jax.tree.map(lambda old, new: place(old, new, slots_R), caches, new)
    shards = sharding.batch_shards(mesh)

    def place_own(caches: tuple[Cache, ...], new: tuple[Cache, ...], slots_R: Array) -> tuple[Cache, ...]:
        own = len(caches[0].k_BKHS)
        first = jax.lax.axis_index(sharding.BATCH_AXES) * own
        local_R = jnp.where(slots_R < own * shards, slots_R - first, own)
        return jax.tree.map(lambda old, new: place(old, new, local_R), caches, new)

    spec, rows = sharding.spec("B K S H", sharding.ACTIVATION_AXES), P(sharding.BATCH_AXES)
    return jax.shard_map(place_own, in_specs=(spec, spec, rows), out_specs=spec)(caches, new, slots_R)


def _whole(slots: Slots) -> Slots:
    """Return slots of which all but the caches lies whole on every device, for hosts to read."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return slots
    whole = lambda x: jax.lax.with_sharding_constraint(x, P())
    return slots._replace(**{name: whole(x) for name, x in slots._asdict().items() if name != "caches"})
