"""The parts that families share, and the letters every shape in this library is written in.

    B batch        D model width     N query heads           L layers
    T query time   F MLP width       K kv heads              V vocabulary
    S key time     H head size       G query heads per kv head = N / K

Arrays of rank >= 1 end in their letters (`q_BTNH`), einsums and conversion tables use the same ones. Parameters keep
the dtype they are stored in and are cast to the activations' dtype where they are used; norms and softmax are
computed in float32.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from wmss_jax import sharding
from wmss_jax.attention import attention, attention_of_one
from wmss_jax.models.lora import project

# What a layer keeps for its backward pass: everything, the results of matmuls, or only its input.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def matrix(rngs: nnx.Rngs, dtype: jnp.dtype, std: float, *shape: int) -> nnx.Param:
    """Return a normally distributed weight of the given standard deviation and shape."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape)).astype(dtype))


def embed(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """Return the tokens' rows of the embedding.

    On a mesh every device looks up its columns for all rows of its fsdp group and then trades them for whole rows of
    its own, so that the gradient goes the same way back and is added up where its slice of the table lies. Left to
    itself the partitioner sends the whole group's hidden states to every device instead: 17 GB of them at 256 rows of
    4,096 tokens and D = 4,096.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(tokens_BT) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return table_VD[tokens_BT].astype(dtype)

    def look_up(table_VD: Array, tokens_BT: Array) -> Array:
        tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        local_BT = tokens_BT - jax.lax.axis_index("tensor") * len(table_VD)
        here_BT1 = ((local_BT >= 0) & (local_BT < len(table_VD)))[..., None]
        x_BTD = table_VD[jnp.clip(local_BT, 0, len(table_VD) - 1)].astype(dtype)
        x_BTD = jax.lax.psum(jnp.where(here_BT1, x_BTD, 0), "tensor")
        return jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    rows = P(sharding.BATCH_AXES)
    table_spec = sharding.spec("V D", sharding.PARAM_AXES)
    return jax.shard_map(look_up, in_specs=(table_spec, rows), out_specs=rows)(table_VD, tokens_BT)


_noise: contextvars.ContextVar[Array | None] = contextvars.ContextVar("embedding_noise", default=None)


@contextlib.contextmanager
def embedding_noise(noise_BTD: Float[Array, "B T D"]) -> Iterator[None]:
    """Give a context, entered while tracing, in which models add this to their embeddings (`noised`)."""
    token = _noise.set(noise_BTD)
    try:
        yield
    finally:
        _noise.reset(token)


def noised(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return what enters the first layer, with the noise that `embedding_noise` gives; as it is without."""
    noise_BTD = _noise.get()
    return x_BTD if noise_BTD is None else x_BTD + noise_BTD.astype(x_BTD.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        return (wide * inverse_rms * scale).astype(x.dtype)


def rotate(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Return `x` with rotary position embeddings, the halves convention of Hugging Face (not interleaved).

    RoFormer, arXiv 2104.09864, eq. 34; pairs (i, i + H/2) rotate by position · theta^(-2i/H).
    """
    half = x_BTNH.shape[-1] // 2
    frequencies_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_h[None, None, None]
    cos, sin = jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


class Cache(NamedTuple):
    """Keys and values of a layer's tokens so far: slot s of a row holds the token at position s.

    So positions alone say what is visible, and padding after a short prompt is overwritten by the continuation before
    any query can see it. Keys lie across, so that both products of a decoding step run along what is in memory.
    """

    k_BKHS: Float[Array, "B K H S"]
    v_BKSH: Float[Array, "B K S H"]


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Cache | None]:
    """Return `attention` over a layer's cache after adding these tokens to it; without one, over them alone.

    Args:
        positions_BT: with a cache, consecutive in every row, and below S.
        cache: of this layer; rows are one segment each.
    """
    if cache is None:
        return attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, positions_BT, scale=scale), None
    start_B, dtype = positions_BT[:, 0], cache.k_BKHS.dtype
    put = lambda axis: jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis))
    k_BKHS = put(2)(cache.k_BKHS, jnp.transpose(k_BTKH, (0, 2, 3, 1)).astype(dtype), start_B)
    v_BKSH = put(1)(cache.v_BKSH, jnp.transpose(v_BTKH, (0, 2, 1, 3)).astype(dtype), start_B)
    cache = Cache(sharding.constrain(k_BKHS, "B K H S"), sharding.constrain(v_BKSH, "B K S H"))
    keys, values = cache.k_BKHS.astype(q_BTNH.dtype), cache.v_BKSH.astype(q_BTNH.dtype)
    if q_BTNH.shape[1] == 1:
        return attention_of_one(q_BTNH, keys, values, positions_BT, scale=scale), cache
    B, S = k_BKHS.shape[0], k_BKHS.shape[-1]
    slots_BS = jnp.broadcast_to(jnp.arange(S, dtype=positions_BT.dtype)[None], (B, S))
    out_BTNH = attention(
        q_BTNH,
        jnp.transpose(keys, (0, 3, 1, 2)),
        jnp.transpose(values, (0, 2, 1, 3)),
        segments_BT,
        positions_BT,
        scale=scale,
        kv_segments_BS=jnp.ones_like(slots_BS),
        kv_positions_BS=slots_BS,
    )
    return out_BTNH, cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A parameter of stacked layers, each layer's an array of its own."""

    arrays: tuple[Array, ...]

    def __getitem__(self, layer: int) -> Array:
        return self.arrays[layer]


def apart(params: PyTree[Array], layers: int) -> PyTree:
    """Return the parameters of stacked layers taken apart, a copy, where a program uses them many times one by one.

    That is on a CPU, where XLA would cut them out of the stack for every token; other backends read them where they
    lie.
    """
    platform = (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform
    if platform != "cpu":
        return params
    return jax.tree.map(lambda x: Apart(tuple(x[layer] for layer in range(layers))), params)


class GatedMLP(nnx.Module):
    """SwiGLU: (silu(x·gate) ∘ x·up)·down."""

    def __init__(self, D: int, F: int, std: float, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.gate_proj = matrix(rngs, dtype, std, D, F)
        self.up_proj = matrix(rngs, dtype, std, D, F)
        self.down_proj = matrix(rngs, dtype, std, F, D)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate_proj[...])
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up_proj[...])
        inner_BTF = sharding.constrain(jax.nn.silu(gate_BTF) * up_BTF, "B T F")
        return project("BTF,FD->BTD", inner_BTF, self.down_proj[...])


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return `layers` layers as one module whose parameters have a leading axis L."""
    return nnx.vmap(make)(rngs.split(layers))


def scan(
    layers: nnx.Module,
    x_BTD: Float[Array, "B T D"],
    body: Callable,
    remat: str,
    cache: tuple[Cache, ...] | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Cache, ...] | None]:
    """Return (x, cache) after `x, cache[l] = body(layer, x, cache[l])` for every stacked layer l.

    Without a cache compiled once for all layers, and `body` gets and returns None in its place.
    """
    graphdef, params = nnx.split(layers)
    if cache is not None:
        # One by one: a scan would copy every layer's cache out of a stack of them and back, for each token.
        caches = []
        for number, layer_cache in enumerate(cache):
            of_layer = lambda x, number=number: x[number]
            layer = nnx.merge(graphdef, jax.tree.map(of_layer, params, is_leaf=lambda x: isinstance(x, Apart)))
            x_BTD, layer_cache = body(layer, x_BTD, layer_cache)
            x_BTD = sharding.constrain(x_BTD, "B T D")
            caches.append(layer_cache)
        return x_BTD, tuple(caches)

    def step(x_BTD: Array, layer_params: nnx.State) -> tuple[Array, None]:
        x_BTD, _ = body(nnx.merge(graphdef, layer_params), x_BTD, None)
        return sharding.constrain(x_BTD, "B T D"), None

    if REMAT_POLICIES[remat] is not None:
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x_BTD, params)


__all__ = [
    "REMAT_POLICIES", "Apart", "Cache", "GatedMLP", "RMSNorm", "apart", "attention", "cached_attention", "embed",
    "embedding_noise", "matrix", "noised", "project", "rotate", "scan", "stack",
]  # fmt: skip
