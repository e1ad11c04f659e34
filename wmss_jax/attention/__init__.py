"""Packed causal attention: one function for training, scoring and decoding, by the backend that the devices want.

Letters: B batch, T query time, S key time, N query heads, K kv heads, G = N/K, M = G·T, H head size.

    blockwise   plain XLA, everywhere
    splash      TPUs
    triton      NVIDIA GPUs from Ampere on

All of them honour segments, sliding windows and soft caps. A kernel handles the rows and heads of one device, so on a
mesh it runs inside a shard_map over both; the plain one is partitioned by XLA.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from wmss_jax import sharding
from wmss_jax.attention import blockwise

Backend = Literal["blockwise", "splash", "triton"]
_PLATFORMS = {"splash": ("tpu",), "triton": ("gpu", "cuda")}
_BEFORE_AMPERE = re.compile(r".*\b(K80|P4|P40|P100|V100|T4|RTX 6000|GTX .*|TITAN .*|RTX 20\d\d.*)\b.*")

_wanted: contextvars.ContextVar[str | None] = contextvars.ContextVar("attention_backend", default=None)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_segments_BS: Int[Array, "B S"] | None = None,
    kv_positions_BS: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(cap(scale · q·k)) v over the keys of the same segment at the same or an earlier position.

    Scores and softmax are float32 whatever the inputs are. Segment ids come from the packer: a segment's tokens are
    neighbours, and their positions count up from 0. Padding is a segment like any other (0), so a padding query attends
    to padding and no row of the softmax is empty.

    Args:
        scale: factor on q·k, usually H ** -0.5.
        window: positions that a query sees, its own included; None: all up to its own.
        softcap: squeezes scores s to cap·tanh(s / cap) (Gemma 2, arXiv 2408.00118, §2); None: leaves them.
        kv_segments_BS, kv_positions_BS: those of the keys where keys are not the queries' own tokens (decoding).
    """
    settings = {"scale": scale, "window": window, "softcap": softcap}
    backend = backend_on(_device(), _wanted.get())
    if kv_positions_BS is not None or backend == "blockwise":  # one query a row leaves a kernel nothing to do
        kv_segments_BS = segments_BT if kv_segments_BS is None else kv_segments_BS
        kv_positions_BS = positions_BT if kv_positions_BS is None else kv_positions_BS
        return blockwise.attention(
            q_BTNH, k_BSKH, v_BSKH, segments_BT, positions_BT, kv_segments_BS, kv_positions_BS, **settings
        )
    if backend == "splash":
        from wmss_jax.attention import splash  # kernels are imported where they run: Pallas takes 0.3 s

        kernel = functools.partial(splash.attention, **settings)
        return _on_each_device(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT)
    from wmss_jax.attention import triton

    kernel = functools.partial(triton.attention, scale=scale, softcap=softcap)
    return _on_each_device(kernel, q_BTNH, k_BSKH, v_BSKH, first_keys(segments_BT, window))


def attention_of_one(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    positions_B1: Int[Array, "B 1"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """Return `attention` of one query a row, over keys and values of its own segment at positions 0, 1, 2, ...

    One query leaves a kernel nothing to do: on all devices this is plain XLA.
    """
    return blockwise.of_one(q_B1NH, k_BKHS, v_BKSH, positions_B1, scale=scale, window=window, softcap=softcap)


def backend_on(device: jax.Device | AbstractDevice, wanted: str | None = None) -> Backend:
    """Return the backend for a device, or `wanted` if it can run there.

    Raises:
        ValueError: there is no such backend, or it cannot run there.
    """
    kernels = [name for name, platforms in _PLATFORMS.items() if device.platform in platforms]
    if _BEFORE_AMPERE.fullmatch(device.device_kind):
        kernels.remove("triton")
    able = (*kernels, "blockwise")
    if wanted is not None and wanted not in able:
        known = ", ".join(get_args(Backend))
        raise ValueError(
            f"attention: {wanted} " + ("cannot run on" if wanted in get_args(Backend) else f"is none of {known}; on")
            + f" {device.device_kind} ({device.platform}); "
            f"leave it out there, or choose {' or '.join(able)}"
        )  # fmt: skip
    return wanted or able[0]  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def using(backend: str | None) -> Iterator[None]:
    """Give a context, entered while tracing, in which `attention` takes this backend; None: the device's own."""
    token = _wanted.set(backend)
    try:
        yield
    finally:
        _wanted.reset(token)


def first_keys(segments_BT: Int[Array, "B T"], window: int | None) -> Int[Array, "B T"]:
    """Return the index of the first key that every query sees; it sees all from there to its own."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None], segments_BT.shape)
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
    return first_BT if window is None else jnp.maximum(first_BT, index_BT - (window - 1))


def _device() -> jax.Device | AbstractDevice:
    """Return the kind of device that the program at hand is for: the mesh's, which need not be this host's."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if of_mesh is None else of_mesh


def _on_each_device(kernel, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, rows_BT: Array) -> Array:
    """Return kernel(q, k, v, rows), run on every device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q_BTNH, k_BTKH, v_BTKH, rows_BT)
    heads, rows = sharding.spec("B T N H", sharding.ACTIVATION_AXES), P(sharding.BATCH_AXES)
    mapped = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, rows_BT)


__all__ = ["Backend", "attention", "attention_of_one", "backend_on", "first_keys", "using"]
