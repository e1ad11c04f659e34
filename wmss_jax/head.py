"""Hidden states to loss, metrics and head gradients, a chunk of tokens at a time; never a [B, T, V] array.

The loss takes its gradients in the forward pass: per chunk, `jax.vjp` of the objective with respect to the *logits*,
then dh = dz·Wᵀ and dW += hᵀ·dz written out with float32 accumulation. So no logits outlive their chunk, the backward
recomputes nothing, a frozen role costs one matmul and the frozen head of a trained role (LoRA) two. Under a mesh the
scan over chunks runs inside a shard_map over the batch axes; head weights are gathered before it and dW is summed
after it, on every device its own part. So a chunk communicates over `tensor` alone: [chunk] scalars and [chunk, D],
never anything of vocabulary size.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from wmss_jax import diagnostics, matmul, precision, sharding
from wmss_jax.objectives.tokens import PADDED_LOGIT, Context, Objective

# Of all roles' float32 logits tiles on one device, where the chunk is not given. Every chunk reads the head's matrix
# and reads and writes its float32 gradient: long chunks hide that behind their products. On an H100, V = 151,936, a
# weak-driven step takes 0.41 s with 256 MiB, 0.304 with chunks of 1,024 tokens (1.2 GiB), 0.298 with four times that.
# On a CPU what its cache may still help with (512 tokens of 32,768 logits: 1.4 instead of 1.7 seconds for 2,048).
CHUNK_BYTES = 256 * 2**20
GPU_CHUNK_BYTES = 2**30
CPU_CHUNK_BYTES = 64 * 2**20
_EVEN = 128  # of which a chunk is a multiple: the side of a TPU's registers


class Tokens(NamedTuple):
    """What is known of every token besides its hidden states, each [B, T] (targets as in a batch)."""

    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    example_index: Int[Array, "B T"]
    positions: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static side of a head pass.

    Attributes:
        vocab_size: rows of W beyond it are padding; None: there are none.
        chunk_tokens: tokens a device handles at once; None: as many as the platform's CHUNK_BYTES of logits hold.
        softcaps: (role, cap) of the roles whose logits are cap·tanh(z / cap) (Gemma 2, arXiv 2408.00118, §2).
        z_loss: factor on log²Σexp(z) of the trained roles' own logits, added to the loss (PaLM, arXiv 2204.02311, §5).
        diagnose_every: optimizer steps between two in which `diagnostics.measure` is among the metrics, as
            "diagnostics/..."; in the steps between they are NaN. None: never.
    """

    mesh: Mesh | None = None
    vocab_size: int | None = None
    chunk_tokens: int | None = None
    softcaps: tuple[tuple[str, float], ...] = ()
    z_loss: float = 0.0
    diagnose_every: int | None = None

    @property
    def tensor(self) -> int:
        """Over how many devices the vocabulary is split."""
        return 1 if self.mesh is None else self.mesh.shape["tensor"]

    def chunk(self, tokens: int, V: int, tiles: int = 1) -> int:
        """Return the chunk length for `tokens` tokens on one device, with so many logits tiles at once."""
        if self.chunk_tokens is not None:
            return min(tokens, self.chunk_tokens)
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        budget = {"cpu": CPU_CHUNK_BYTES, "gpu": GPU_CHUNK_BYTES, "cuda": GPU_CHUNK_BYTES}.get(platform, CHUNK_BYTES)
        most = max(_EVEN, budget * self.tensor // (4 * V * tiles) // _EVEN * _EVEN)
        # Chunks of one length, so that little of the last is filled up, and a multiple of what devices work in.
        return min(tokens, -(-tokens // -(-tokens // most) // _EVEN) * _EVEN)

    def finish(self, z: Array, role: str) -> Array:
        """Return a role's logits from hidden·W: capped, and padding put out of reach."""
        return _finish(z, self.vocab_size, dict(self.softcaps).get(role))


class When(NamedTuple):
    """What schedules and noise depend on, both traced: the optimizer step, and the data of the run's PRNG key."""

    step: Any
    seed: Any


class Inputs(NamedTuple):
    """What some roles give to the head: hidden states [B, T, D] and head matrices [D, V], by role."""

    hiddens: dict[str, Any]
    unembeds: dict[str, Any]


def logits(
    hidden: Float[Array, "... D"],
    unembed_DV: Float[Array, "D V"],
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "... V"]:
    """Return float32 logits hidden·W, soft-capped if asked for; PADDED_LOGIT in rows of W beyond `vocab_size`."""
    return _finish(_matmul("...D,DV->...V", hidden, unembed_DV.astype(hidden.dtype)), vocab_size, softcap)


def loss(
    objective: Objective,
    unembeds: Mapping[str, Float[Array, "D V"]],
    hiddens: Mapping[str, Float[Array, "B T D"]],
    tokens: Tokens,
    *,
    trainable: frozenset[str],
    frozen_heads: frozenset[str] = frozenset(),
    step: Int[Array, ""],
    seed: int | Integer[Array, ""] = 0,
    settings: Settings = Settings(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return Σ weight·loss over all tokens and the metrics, weighted and summed alike; both float32 scalars.

    Differentiable in reverse mode, once, with respect to `unembeds` and `hiddens` of the `trainable` roles; other
    roles get no gradient and cost none. Metrics carry no gradient. Forward mode and second derivatives are not
    supported. Tokens of weight 0 add nothing, even where their hidden states or logits are NaN.

    Args:
        objective: per-token loss over the logits of its roles, which `unembeds` and `hiddens` must hold.
        unembeds: per role the head's matrix, hidden states to logits.
        hiddens: per role the hidden states, in the dtype to compute in.
        frozen_heads: trainable roles whose head matrix is not trained: it gets no gradient and costs none.
    """
    with_head = trainable - frozen_heads
    some = lambda of, wanted: {role: of[role] for role in objective.roles if wanted(role)}
    trained = Inputs(some(hiddens, lambda r: r in trainable), some(unembeds, lambda r: r in with_head))
    frozen = Inputs(some(hiddens, lambda r: r not in trainable), some(unembeds, lambda r: r not in with_head))
    frozen = jax.lax.stop_gradient(frozen)
    when = When(jnp.asarray(step, jnp.int32), jax.random.key_data(jax.random.key(seed)))
    return _loss((objective, settings), trained, frozen, tokens, when)


def score(
    unembed_DV: Float[Array, "D V"],
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    settings: Settings = Settings(),
    role: str = "strong",
    wanted_BT: Bool[Array, "B T"] | None = None,
) -> dict[str, Float[Array, "B T"]]:
    """Return what every next-token distribution says of its target, float32 [B, T].

    "entropy" and "nll" in nats, "margin" in logits: that of the target minus the mean of all others (PAPER §9). Not
    differentiable.

    Args:
        role: whose soft cap in `settings` these logits have.
        wanted_BT: positions to score; all others get 0 and cost nothing. None: all are wanted.
    """
    wanted_BT = jnp.ones(targets_BT.shape, bool) if wanted_BT is None else wanted_BT
    shards = sharding.batch_shards(settings.mesh)
    # Of the shard that has most: all make as many turns, so that what they exchange within one always meets.
    most = jnp.max(jnp.sum(wanted_BT.reshape(shards, -1), axis=1))
    run = functools.partial(_score, settings, role)
    with precision.matmuls_in(hidden_BTD.dtype):
        unembed_DV = _gathered(unembed_DV, hidden_BTD.dtype)
        rows = P(sharding.BATCH_AXES)
        mapped = _on_batch_shards(run, settings.mesh, (rows, P(), rows, rows, P()), rows)
        return mapped(hidden_BTD, unembed_DV, targets_BT, wanted_BT, most)


def _score(
    settings: Settings, role: str,
    hidden_BTD: Array, unembed_DV: Array, targets_BT: Array, wanted_BT: Array, most: Array,
) -> dict[str, Array]:  # fmt: skip
    """Score the wanted positions of one batch shard, gathered chunk by chunk; `most` bounds how many there are."""
    N, (D, V) = targets_BT.size, unembed_DV.shape
    chunk = settings.chunk(N, V)
    hidden_ND, targets_N, wanted_N = hidden_BTD.reshape(N, D), targets_BT.reshape(N), wanted_BT.reshape(N)
    index_M = jnp.flatnonzero(wanted_N, size=N + -N % chunk, fill_value=0)  # M is N filled up to whole chunks

    def turn(i: Array, found: dict[str, Array]) -> dict[str, Array]:
        index_C = jax.lax.dynamic_slice_in_dim(index_M, i * chunk, chunk)
        z_CV = settings.finish(_matmul("CD,DV->CV", hidden_ND[index_C], unembed_DV), role)
        scores = diagnostics.summary(z_CV, targets_N[index_C], settings.vocab_size, settings.tensor)
        put = lambda all_M, new_C: jax.lax.dynamic_update_slice_in_dim(all_M, new_C, i * chunk, 0)
        return {name: put(found[name], scores[name]) for name in found}

    nothing = {name: jnp.zeros(index_M.shape, jnp.float32) for name in ("entropy", "nll", "margin")}
    found = jax.lax.fori_loop(0, (most + chunk - 1) // chunk, turn, nothing)
    place_N = jnp.cumsum(wanted_N) - 1  # of a wanted position, in what was found
    return {name: jnp.where(wanted_N, x_M[place_N], 0.0).reshape(wanted_BT.shape) for name, x_M in found.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: tuple, trained: Inputs, frozen: Inputs, tokens: Tokens, when: When) -> tuple[Array, dict]:
    return _run(static, trained, frozen, tokens, when, with_gradients=False)[0]


def _loss_forward(static: tuple, trained: Inputs, frozen: Inputs, tokens: Tokens, when: When) -> tuple:
    return _run(static, trained, frozen, tokens, when, with_gradients=True)


def _loss_backward(static: tuple, gradients: Inputs, cotangents: tuple) -> tuple:
    del static
    return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients), None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _run(
    static: tuple, trained: Inputs, frozen: Inputs, tokens: Tokens, when: When, with_gradients: bool
) -> tuple[tuple[Array, dict], Inputs]:
    """Return ((loss, metrics), gradients of `trained`), scanned on every batch shard and summed over them."""
    objective, settings = static
    hiddens = {**trained.hiddens, **frozen.hiddens}
    scan = functools.partial(_scan, objective, settings, with_gradients)
    rows, summed = P(sharding.BATCH_AXES), P(sharding.BATCH_AXES)
    part_specs = lambda part: Inputs(dict.fromkeys(part.hiddens, rows), dict.fromkeys(part.unembeds, P()))
    in_specs = (part_specs(trained), part_specs(frozen), rows, P())
    of_trained = Inputs(dict.fromkeys(trained.hiddens, rows), dict.fromkeys(trained.unembeds, summed))
    out_specs = (summed, of_trained if with_gradients else Inputs({}, {}))
    # Cast and gathered in here, so that dW keeps the precision of the parameters and not that of the matmuls.
    ready = lambda part: part._replace(unembeds={r: _gathered(W, hiddens[r].dtype) for r, W in part.unembeds.items()})
    with precision.matmuls_in(next(iter(hiddens.values())).dtype):
        mapped = _on_batch_shards(scan, settings.mesh, in_specs, out_specs)
        sums, gradients = mapped(ready(trained), ready(frozen), tokens, when)
    whole = lambda dW, role: _summed(dW, settings.mesh).astype(trained.unembeds[role].dtype)
    gradients = gradients._replace(unembeds={role: whole(dW, role) for role, dW in gradients.unembeds.items()})
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), gradients


def _scan(
    objective: Objective, settings: Settings, with_gradients: bool,
    trained: Inputs, frozen: Inputs, tokens: Tokens, when: When,
) -> tuple:  # fmt: skip
    """Scan the chunks of one batch shard; sums and dW leave with a leading axis of size 1."""
    unembeds = {**trained.unembeds, **frozen.unembeds}
    hiddens = {**trained.hiddens, **frozen.hiddens}
    V = next(iter(unembeds.values())).shape[-1]
    chunk = settings.chunk(tokens.targets.size, V, len(hiddens))
    finish = lambda z: {role: settings.finish(z[role], role) for role in z}

    def body(dW: dict[str, Array], xs: tuple[dict, Tokens]) -> tuple[dict, tuple]:
        h, token = xs
        # NaN · 0 is NaN: tokens that do not count are taken out of every product, not multiplied by zero.
        h = {role: jnp.where((token.weights > 0)[:, None], h[role], 0) for role in h}
        z = {role: _matmul("ND,DV->NV", h[role], unembeds[role]) for role in h}
        z_trained = {role: z.pop(role) for role in trained.hiddens}
        z = finish(z)
        ctx = Context(when.step, _keys(when.seed, token))
        loss_of = lambda z_trained: _weighted(objective, settings, finish(z_trained), z, token, ctx)
        if not with_gradients:
            return dW, (loss_of(z_trained), {})
        value, pull_back, metrics = jax.vjp(loss_of, z_trained, has_aux=True)
        (dz,) = pull_back(jnp.ones_like(value))
        if settings.diagnose_every:
            metrics |= _diagnose(objective, settings, frozenset(trained.hiddens), unembeds, h, token, ctx)
        dz = {role: dz[role].astype(h[role].dtype) for role in dz}
        dh = {role: _matmul("NV,DV->ND", dz[role], unembeds[role]).astype(h[role].dtype) for role in dz}
        dW = {role: dW[role] + _matmul("DN,NV->DV", matmul.transposed(h[role], (1, 0)), dz[role]) for role in dW}
        return dW, ((value, metrics), dh)

    zeros = {role: jnp.zeros(W.shape, jnp.float32) for role, W in trained.unembeds.items() if with_gradients}
    dW, (sums, dh) = jax.lax.scan(body, zeros, _chunked((hiddens, tokens), chunk))
    dh = {role: _unchunked(dh[role], hiddens[role].shape) for role in dh}
    gradients = Inputs(dh, {role: dW[role][None] for role in dW})
    return jax.tree.map(lambda x: jnp.sum(x, axis=0)[None], sums), gradients


def _summed(dW_1DV: Array, mesh: Mesh | None) -> Array:
    """Return Σ dW over the batch shards, on every device its own part, from [shards, D, V]."""
    if sharding.batch_shards(mesh) == 1:
        return dW_1DV[0]
    # Over all axes: within the scan's shard_map, which leaves `tensor` to the partitioner, it would gather V for this.
    scatter = lambda dW_1DV: jax.lax.psum_scatter(dW_1DV[0], "fsdp", scatter_dimension=0, tiled=True)
    return jax.shard_map(
        lambda dW_1DV: jax.lax.psum(scatter(dW_1DV), "data"), mesh=mesh,
        in_specs=P(sharding.BATCH_AXES, None, "tensor"), out_specs=sharding.spec("D V", sharding.PARAM_AXES),
    )(dW_1DV)  # fmt: skip


def _weighted(
    objective: Objective, settings: Settings, trained: dict[str, Array], frozen: dict[str, Array], token: Tokens,
    ctx: Context,
) -> tuple[Array, dict]:  # fmt: skip
    """Return the weighted sums of the objective's losses and metrics over one chunk."""
    losses_N, metrics = objective({**frozen, **trained}, token.targets, ctx)
    if settings.z_loss and trained:
        squares_N = sum(jnp.square(jax.nn.logsumexp(z_NV, axis=-1)) for z_NV in trained.values())
        losses_N, metrics = losses_N + settings.z_loss * squares_N, {**metrics, "z_loss": settings.z_loss * squares_N}
    return _total(losses_N, token), {name: _total(x, token) for name, x in jax.lax.stop_gradient(metrics).items()}


def _diagnose(
    objective: Objective, settings: Settings, trained: frozenset[str], unembeds: dict[str, Array],
    h: dict[str, Array], token: Tokens, ctx: Context,
) -> dict[str, Array]:  # fmt: skip
    """Return the weighted sums of the diagnostics over one chunk, NaN in the steps that take none.

    Of a few tokens at a time, and from logits made for this alone: kept for it, tiles would take their memory in every
    step.
    """
    chunk = token.weights.size
    piece = next(size for size in (256, 128, 64, chunk) if chunk % size == 0)
    finish = lambda z: {role: settings.finish(z[role], role) for role in z}

    def of_piece(i: Array) -> dict[str, Array]:
        cut = lambda tree: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * piece, piece), tree)
        part, here, h_part = cut(token), Context(ctx.step, cut(ctx.key_N)), cut(h)
        z = {role: _matmul("ND,DV->NV", h_part[role], unembeds[role]) for role in h}
        z_trained = {role: z.pop(role) for role in trained}
        each = part._replace(weights=jnp.ones_like(part.weights))  # the loss before weighting
        loss_of = lambda z_trained: _weighted(objective, settings, finish(z_trained), finish(z), each, here)[0]
        gradient_NV = jax.grad(loss_of)(z_trained)["strong"]
        named = finish({**z, **z_trained})
        found = diagnostics.measure(objective, named, part.targets, here, gradient_NV, settings.vocab_size)
        return {f"diagnostics/{name}": _total(x_N, part) for name, x_N in found.items()}

    measure = lambda: jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_piece, jnp.arange(chunk // piece)))
    skip = lambda: {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in jax.eval_shape(measure).items()}
    return jax.lax.cond((ctx.step + 1) % settings.diagnose_every == 0, measure, skip)


def _total(x_N: Array, token: Tokens) -> Array:
    return jnp.sum(jnp.where(token.weights > 0, x_N * token.weights, 0.0))


def _finish(z: Array, vocab_size: int | None, softcap: float | None) -> Array:
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    V = z.shape[-1]
    if vocab_size is None or vocab_size == V:
        return z
    return jnp.where(jnp.expand_dims(jnp.arange(V) < vocab_size, range(z.ndim - 1)), z, PADDED_LOGIT)


def _keys(seed: Array, token: Tokens) -> Array:
    key = jax.random.wrap_key_data(seed)
    fold = jax.vmap(lambda index, position: jax.random.fold_in(jax.random.fold_in(key, index), position))
    return fold(token.example_index, token.positions)


def _matmul(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _gathered(unembed_DV: Array, dtype: Any) -> Array:
    """Return a head matrix in the compute dtype and whole over the batch axes, as every chunk needs it."""
    # Cast where it lies and gathered then: not told so, XLA's GPU compiler gathers first, twice the bytes.
    return sharding.constrain(sharding.constrain_params(unembed_DV.astype(dtype), "D V"), "D V")


def _chunked(tree: PyTree, chunk: int) -> PyTree:
    """Return [B, T, ...] leaves as [chunks, chunk, ...]; the last chunk is filled up with zeros: weight 0."""

    def cut(x: Array) -> Array:
        flat = x.reshape(-1, *x.shape[2:])
        missing = -len(flat) % chunk
        flat = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, chunk, *flat.shape[1:])

    return jax.tree.map(cut, tree)


def _unchunked(x: Array, shape: tuple[int, ...]) -> Array:
    B, T, *_ = shape
    return x.reshape(-1, *x.shape[2:])[: B * T].reshape(shape)


def _on_batch_shards(f: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """Return `f` run once per batch shard, `tensor` left to the partitioner; `f` itself where there is one shard."""
    if sharding.batch_shards(mesh) == 1:
        return f
    return jax.shard_map(
        f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(sharding.BATCH_AXES), check_vma=False
    )
