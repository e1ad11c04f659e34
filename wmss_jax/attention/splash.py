"""Attention on TPUs: JAX's Splash kernel (Mosaic), on the rows and heads of one device.

Compiled by `jax.experimental.pallas.ops.tpu.splash_attention`, which skips blocks that causality or a window masks,
compares segment ids inside the kernel and never writes scores to memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

LANES = 128  # of a TPU's vector unit: blocks are multiples of it


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return packed causal attention, as `wmss_jax.attention.attention` defines it.

    Args:
        interpret: run the kernel's program in XLA instead of compiling it for a TPU.
    """
    T, N = q_BTNH.shape[1:3]
    fill = -T % LANES
    kernel = _kernel(T + fill, N, window, softcap, interpret)
    # Splash multiplies no scale: it goes into the queries, one rounding in their dtype more.
    q_BNTH, k_BKTH, v_BKTH = (_heads_first(x, fill) for x in (q_BTNH * scale, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(segments_BT, [(0, 0), (0, fill)], constant_values=-1)  # fill attends to itself alone
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments_BT)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :T]


def _heads_first(x_BTNH: Array, fill: int) -> Array:
    return jnp.pad(jnp.swapaxes(x_BTNH, 1, 2), [(0, 0), (0, 0), (0, fill), (0, 0)])


def _kernel(T: int, N: int, window: int | None, softcap: float | None, interpret: bool) -> Callable[..., Any]:
    """Return (q [N, T, H], k and v [K, T, H], segments [T]) -> [N, T, H]."""
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), offset=0)
    # Large blocks keep the matrix unit busy; 512 is what fits beside the backward kernels' accumulators at H = 256.
    block = next(size for size in (512, 384, 256, LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * N), block_sizes=sizes, attn_logits_soft_cap=softcap, interpret=interpret
    )
    return lambda q_NTH, k_KTH, v_KTH, segments_T: kernel(
        q_NTH, k_KTH, v_KTH, splash.SegmentIds(segments_T, segments_T)
    )
