"""The parts that families share, and the letters every shape in this library is written in.

    B batch        D model width     N query heads           L layers
    T query time   F MLP width       K kv heads              V vocabulary
    S key time     H head size       G query heads per kv head = N / K
    E experts      J heads of fused queries, keys and values = N + 2 K         C parts of a fused matrix

Arrays of rank >= 1 end in their letters (`q_BTNH`), einsums and conversion tables use the same ones. Parameters keep
the dtype they are stored in and are cast to the activations' dtype where they are used; norms and softmax are
computed in float32.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from wmss_jax import sharding
from wmss_jax.attention import OneOf, attention, attention_of_one
from wmss_jax.models import rope
from wmss_jax.models.architecture import Config
from wmss_jax.models.lora import project

Metrics = dict[str, Array]  # float32 scalars


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
    """x / rms(x) · (offset + scale) over the last axes, in float32.

    Args:
        shape: of the scale; the mean of squares is over all of it.
        offset: 1 in families that keep scales as their distance from 1 (Gemma).
    """

    def __init__(self, shape: int | tuple[int, ...], eps: float, dtype: jnp.dtype, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(shape, 1 - offset, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        return _normed(self.eps, self.offset, x, self.scale[...])


# What the backward pass needs is computed from x again: kept, float32 copies of it would be the largest of a layer.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 1))
def _normed(eps: float, offset: float, x: Array, scale: Array) -> Array:
    wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - scale.ndim))
    return (wide * inverse_rms * (offset + scale if offset else scale)).astype(x.dtype)


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
    window: int | OneOf | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Cache | None]:
    """Return `attention` over a layer's cache after adding these tokens to it; without one, over them alone.

    Args:
        positions_BT: with a cache, consecutive in every row, and below S.
        cache: of this layer; rows are one segment each. It holds all tokens, those beyond a window too.
        scale, window, softcap: see `attention`.
    """
    attend = functools.partial(attention, scale=scale, window=window, softcap=softcap)
    if cache is None:
        return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, positions_BT), None
    start_B, dtype = positions_BT[:, 0], cache.k_BKHS.dtype
    put = lambda axis: jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis))
    k_BKHS = put(2)(cache.k_BKHS, jnp.transpose(k_BTKH, (0, 2, 3, 1)).astype(dtype), start_B)
    v_BKSH = put(1)(cache.v_BKSH, jnp.transpose(v_BTKH, (0, 2, 1, 3)).astype(dtype), start_B)
    cache = Cache(sharding.constrain(k_BKHS, "B K H S"), sharding.constrain(v_BKSH, "B K S H"))
    keys, values = cache.k_BKHS.astype(q_BTNH.dtype), cache.v_BKSH.astype(q_BTNH.dtype)
    if q_BTNH.shape[1] == 1:
        settings = {"scale": scale, "window": window, "softcap": softcap}
        return attention_of_one(q_BTNH, keys, values, positions_BT, **settings), cache
    B, S = k_BKHS.shape[0], k_BKHS.shape[-1]
    slots_BS = jnp.broadcast_to(jnp.arange(S, dtype=positions_BT.dtype)[None], (B, S))
    out_BTNH = attend(
        q_BTNH,
        jnp.transpose(keys, (0, 3, 1, 2)),
        jnp.transpose(values, (0, 2, 1, 3)),
        segments_BT,
        positions_BT,
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


class View(NamedTuple):
    """What a layer knows of the tokens besides their hidden states.

    Attributes:
        turn: of queries and keys, by position; None where no layer has positions.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    turn: rope.Turn | None
    window: int | OneOf | None


class Attention(nnx.Module):
    """Causal self-attention of grouped queries.

    Args:
        qkv_bias: add a vector to queries, keys and values.
        norms: of queries and of keys, before they are turned.
        scale: factor on scores; default H ** -0.5.
        softcap: see `attention`.
    """

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        *,
        qkv_bias: bool = False,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.softcap = H**-0.5 if scale is None else scale, softcap
        self.q_proj = matrix(rngs, dtype, config.init_std, D, N, H)
        self.k_proj = matrix(rngs, dtype, config.init_std, D, K, H)
        self.v_proj = matrix(rngs, dtype, config.init_std, D, K, H)
        self.o_proj = matrix(rngs, dtype, config.init_std, N, H, D)
        if qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros((n, H), dtype)) for n in (N, K, K))
        if norms is not None:
            self.q_norm, self.k_norm = norms

    def __call__(
        self, x_BTD: Float[Array, "B T D"], view: View, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q_BTNH = self._heads("BTD,DNH->BTNH", x_BTD, "q")
        k_BTKH = self._heads("BTD,DKH->BTKH", x_BTD, "k")
        v_BTKH = self._heads("BTD,DKH->BTKH", x_BTD, "v")
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, view, cache, scale=self.scale, softcap=self.softcap)
        return project("BTNH,NHD->BTD", out_BTNH, self.o_proj[...]), cache

    def _heads(self, equation: str, x_BTD: Array, letter: str) -> Array:
        heads = project(equation, x_BTD, getattr(self, f"{letter}_proj")[...])
        if hasattr(self, f"{letter}_bias"):
            heads = heads + getattr(self, f"{letter}_bias")[...].astype(heads.dtype)[None, None]
        return getattr(self, f"{letter}_norm")(heads) if hasattr(self, f"{letter}_norm") else heads


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    view: View,
    cache: Cache | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Cache | None]:
    """Return `cached_attention` of what a layer's projections gave, turned by position and in the layer's window."""
    if view.turn is not None:
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, view.turn), rope.rotate(k_BTKH, view.turn)
    out_BTNH, cache = cached_attention(
        q_BTNH, k_BTKH, v_BTKH, view.segments_BT, view.positions_BT, cache,
        scale=scale, window=view.window, softcap=softcap,
    )  # fmt: skip
    return sharding.constrain(out_BTNH, "B T N H"), cache


def gelu_tanh(x: Array) -> Array:
    """Return GELU by its tanh approximation, `gelu_pytorch_tanh` in a config.json."""
    return jax.nn.gelu(x, approximate=True)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def gated(activation: Callable[[Array], Array], gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Array:
    """Return act(gate) ∘ up, of which only these two are kept for the backward pass."""
    return activation(gate) * up


class GatedMLP(nnx.Module):
    """(act(x·gate) ∘ x·up)·down; SwiGLU with the default activation."""

    def __init__(
        self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype, activation: Callable[[Array], Array] = jax.nn.silu
    ):
        D, F = config.hidden_size, config.intermediate_size
        self.activation = activation
        self.gate_proj = matrix(rngs, dtype, config.init_std, D, F)
        self.up_proj = matrix(rngs, dtype, config.init_std, D, F)
        self.down_proj = matrix(rngs, dtype, config.init_std, F, D)

    def __call__(self, x_BTD: Float[Array, "B T D"], view: View) -> tuple[Float[Array, "B T D"], Metrics]:
        del view
        gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate_proj[...])
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up_proj[...])
        inner_BTF = sharding.constrain(gated(self.activation, gate_BTF, up_BTF), "B T F")
        return project("BTF,FD->BTD", inner_BTF, self.down_proj[...]), {}


class Block(nnx.Module):
    """x + attention(x), then x + mlp(x), with a norm before each of the two, after it, or both.

    Args:
        before, after: norms of (attention, MLP); None: there are none.
    """

    def __init__(
        self,
        attention: nnx.Module,
        mlp: nnx.Module,
        *,
        before: tuple[RMSNorm, RMSNorm] | None = None,
        after: tuple[RMSNorm, RMSNorm] | None = None,
    ):
        self.attention, self.mlp = attention, mlp
        if before is not None:
            self.input_norm, self.mlp_norm = before
        if after is not None:
            self.attention_out_norm, self.mlp_out_norm = after

    def __call__(
        self, x_BTD: Float[Array, "B T D"], view: View, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None, Metrics]:
        """Return the hidden states after this layer, its cache with these tokens added, and what the MLP measured."""
        mixed_BTD, cache = self.attention(self._norm("input_norm", x_BTD), view, cache)
        x_BTD = x_BTD + self._norm("attention_out_norm", mixed_BTD)
        mixed_BTD, metrics = self.mlp(self._norm("mlp_norm", x_BTD), view)
        return x_BTD + self._norm("mlp_out_norm", mixed_BTD), cache, metrics

    def _norm(self, name: str, x_BTD: Array) -> Array:
        return getattr(self, name)(x_BTD) if hasattr(self, name) else x_BTD


__all__ = [
    "Apart", "Attention", "Block", "Cache", "GatedMLP", "Metrics", "RMSNorm", "View", "apart", "attend",
    "attention", "cached_attention", "embed", "embedding_noise", "gated", "gelu_tanh", "matrix", "noised", "project",
]  # fmt: skip
