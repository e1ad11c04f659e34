"""Hidden states to loss, metrics and head gradients, a chunk of tokens at a time; never a [B, T, V] array.

The loss takes its gradients in the forward pass: per chunk, `jax.vjp` of the objective with respect to the *logits*,
then dh = dz·Wᵀ and dW += hᵀ·dz written out with float32 accumulation. So no logits outlive their chunk, the backward
recomputes nothing, and a frozen head costs one matmul. Under a mesh the scan over chunks runs inside a shard_map over
the batch axes; head weights are gathered before it and dW is summed after it, so that a chunk communicates over
`tensor` alone: [chunk] scalars and [chunk, D], never anything of vocabulary size.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from wmss_jax import precision, sharding
from wmss_jax.objectives import Context, Objective, entropy, nll, target_logits

PADDED_LOGIT = -1e30  # of vocabulary rows that are only padding; -inf would give 0 · -inf = NaN when mixed
CHUNK_BYTES = 256 * 2**20  # of one float32 logits tile on one device, where the chunk is not given


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
        chunk_tokens: tokens a device handles at once; None: as many as CHUNK_BYTES of logits hold.
    """

    mesh: Mesh | None = None
    vocab_size: int | None = None
    chunk_tokens: int | None = None

    def chunk(self, tokens: int, V: int) -> int:
        """Return the chunk length for `tokens` tokens on one device."""
        tensor = 1 if self.mesh is None else self.mesh.shape["tensor"]
        return min(tokens, self.chunk_tokens or max(128, CHUNK_BYTES * tensor // (4 * V)))


def logits(
    hidden: Float[Array, "... D"], unembed_DV: Float[Array, "D V"], vocab_size: int | None = None
) -> Float[Array, "... V"]:
    """Return float32 logits hidden·W, PADDED_LOGIT where a row of W is beyond `vocab_size`."""
    z = jnp.matmul(hidden, unembed_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)
    V = unembed_DV.shape[-1]
    if vocab_size is None or vocab_size == V:
        return z
    return jnp.where(jnp.expand_dims(jnp.arange(V) < vocab_size, range(z.ndim - 1)), z, PADDED_LOGIT)


def loss(
    objective: Objective,
    unembeds: Mapping[str, Float[Array, "D V"]],
    hiddens: Mapping[str, Float[Array, "B T D"]],
    tokens: Tokens,
    *,
    trainable: frozenset[str],
    step: Int[Array, ""],
    seed: int = 0,
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
    """
    roles = {role: (hiddens[role], unembeds[role]) for role in objective.roles}
    trained = {role: pair for role, pair in roles.items() if role in trainable}
    frozen = jax.lax.stop_gradient({role: pair for role, pair in roles.items() if role not in trainable})
    return _loss((objective, seed, settings), trained, frozen, tokens, jnp.asarray(step, jnp.int32))


def score(
    unembed_DV: Float[Array, "D V"],
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    settings: Settings = Settings(),
) -> dict[str, Float[Array, "B T"]]:
    """Return what every next-token distribution says of its target, float32 [B, T].

    "entropy" and "nll" in nats, "margin" in logits: that of the target minus the mean of all others (PAPER §9).
    """

    def scan(hidden_BTD: Array, unembed_DV: Array, targets_BT: Array) -> dict[str, Array]:
        shape = targets_BT.shape
        chunk = settings.chunk(targets_BT.size, unembed_DV.shape[-1])

        def body(_: None, xs: tuple[Array, Array]) -> tuple[None, dict[str, Array]]:
            z_NV = logits(xs[0], unembed_DV, settings.vocab_size)
            scores = {"entropy": entropy(z_NV), "nll": nll(z_NV, xs[1])}
            return None, {**scores, "margin": mean_margin(z_NV, xs[1], settings.vocab_size)}

        _, scores = jax.lax.scan(body, None, _chunked((hidden_BTD, targets_BT), chunk))
        return jax.tree.map(lambda x: x.reshape(-1)[: targets_BT.size].reshape(shape), scores)

    with precision.matmuls_in(hidden_BTD.dtype):
        unembed_DV = _gathered(unembed_DV, hidden_BTD.dtype)
        rows = P(sharding.BATCH_AXES)
        return _on_batch_shards(scan, settings.mesh, (rows, P(), rows), rows)(hidden_BTD, unembed_DV, targets_BT)


def mean_margin(
    logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"], vocab_size: int | None = None
) -> Float[Array, "N"]:
    """Return the target's logit minus the mean logit of all other tokens, padding left out."""
    V = logits_NV.shape[-1]
    count = V if vocab_size is None else vocab_size
    sum_N = jnp.sum(jnp.where(jnp.arange(V)[None, :] < count, logits_NV, 0.0), axis=-1)
    target_N = target_logits(logits_NV, targets_N)
    return target_N - (sum_N - target_N) / max(count - 1, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: tuple, trained: PyTree, frozen: PyTree, tokens: Tokens, step: Array) -> tuple[Array, dict]:
    return _run(static, trained, frozen, tokens, step, with_gradients=False)[0]


def _loss_forward(static: tuple, trained: PyTree, frozen: PyTree, tokens: Tokens, step: Array) -> tuple:
    return _run(static, trained, frozen, tokens, step, with_gradients=True)


def _loss_backward(static: tuple, gradients: PyTree, cotangents: tuple) -> tuple:
    del static
    return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients), None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _run(
    static: tuple, trained: PyTree, frozen: PyTree, tokens: Tokens, step: Array, with_gradients: bool
) -> tuple[tuple[Array, dict], PyTree]:
    """Return ((loss, metrics), gradients of `trained`), scanned on every batch shard and summed over them."""
    objective, seed, settings = static
    scan = functools.partial(_scan, objective, seed, settings, with_gradients)
    rows, summed = P(sharding.BATCH_AXES), P(sharding.BATCH_AXES)
    role_specs = lambda roles: {role: (rows, P()) for role in roles}
    in_specs = (role_specs(trained), role_specs(frozen), rows, P())
    out_specs = (summed, {role: (rows, summed) for role in trained} if with_gradients else {})
    # Cast and gathered in here, so that dW keeps the precision of the parameters and not that of the matmuls.
    ready = [{role: (h, _gathered(W, h.dtype)) for role, (h, W) in roles.items()} for roles in (trained, frozen)]
    with precision.matmuls_in(next(iter({**trained, **frozen}.values()))[0].dtype):
        sums, gradients = _on_batch_shards(scan, settings.mesh, in_specs, out_specs)(*ready, tokens, step)
    # dW leaves with a leading axis of shards and is summed out here, where the sum can end sharded over fsdp.
    gradients = {
        role: (dh, sharding.constrain_params(jnp.sum(dW, axis=0), "D V").astype(trained[role][1].dtype))
        for role, (dh, dW) in gradients.items()
    }
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), gradients


def _scan(
    objective: Objective, seed: int, settings: Settings, with_gradients: bool,
    trained: PyTree, frozen: PyTree, tokens: Tokens, step: Array,
) -> tuple:  # fmt: skip
    """Scan the chunks of one batch shard; sums and dW leave with a leading axis of size 1."""
    V = next(iter({**trained, **frozen}.values()))[1].shape[-1]
    chunk = settings.chunk(tokens.targets.size, V)
    unembeds = {role: W for role, (_, W) in {**trained, **frozen}.items()}
    hiddens = {role: h for role, (h, _) in {**trained, **frozen}.items()}

    def body(dW: dict[str, Array], xs: tuple[dict, Tokens]) -> tuple[dict, tuple]:
        h, token = xs
        # NaN · 0 is NaN: tokens that do not count are taken out of every product, not multiplied by zero.
        h = {role: jnp.where((token.weights > 0)[:, None], h[role], 0) for role in h}
        z = {role: logits(h[role], unembeds[role], settings.vocab_size) for role in h}
        loss_of = lambda z_trained: _weighted(objective, {**z, **z_trained}, token, step, seed)
        if not with_gradients:
            return dW, (loss_of({}), {})
        sums, pull_back, metrics = jax.vjp(loss_of, {role: z[role] for role in trained}, has_aux=True)
        (dz,) = pull_back(jnp.ones_like(sums))
        dz = {role: dz[role].astype(h[role].dtype) for role in dz}
        dh = {role: _matmul("NV,DV->ND", dz[role], unembeds[role]).astype(h[role].dtype) for role in dz}
        dW = {role: dW[role] + _matmul("ND,NV->DV", h[role], dz[role]) for role in dz}
        return dW, ((sums, metrics), dh)

    zeros = {role: jnp.zeros(unembeds[role].shape, jnp.float32) for role in trained if with_gradients}
    dW, (sums, dh) = jax.lax.scan(body, zeros, _chunked((hiddens, tokens), chunk))
    gradients = {role: (_unchunked(dh[role], hiddens[role].shape), dW[role][None]) for role in dh}
    return jax.tree.map(lambda x: jnp.sum(x, axis=0)[None], sums), gradients


def _weighted(objective: Objective, z: dict[str, Array], token: Tokens, step: Array, seed: int) -> tuple[Array, dict]:
    """Return the weighted sums of the objective's losses and metrics over one chunk."""
    ctx = Context(step, _keys(seed, token))
    losses_N, metrics = objective(z, token.targets, ctx)
    total = lambda x_N: jnp.sum(jnp.where(token.weights > 0, x_N * token.weights, 0.0))
    return total(losses_N), jax.tree.map(total, jax.lax.stop_gradient(metrics))


def _keys(seed: int, token: Tokens) -> Array:
    fold = jax.vmap(
        lambda index, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)
    )
    return fold(token.example_index, token.positions)


def _matmul(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _gathered(unembed_DV: Array, dtype: Any) -> Array:
    """Return a head matrix in the compute dtype and whole over the batch axes, as every chunk needs it."""
    return sharding.constrain(unembed_DV.astype(dtype), "D V")


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
