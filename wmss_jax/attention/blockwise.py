"""Attention in plain XLA: for CPUs, for decoding, and what the kernels are checked against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30  # finite, so that a fully masked score is exp(-huge) = 0 and never inf - inf
BLOCK = 512  # queries whose scores exist at once, where there are more than LONG
LONG = 1024


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    kv_positions_BS: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return `wmss_jax.attention.attention`, its scores [B, N, BLOCK, S] for a block of queries at a time.

    The backward pass computes them again, block by block. Up to LONG queries are one block, whose probabilities are
    kept: there they are small, and computing them twice is what costs.
    """

    def attend(q_BTNH: Array, segments_BT: Array, positions_BT: Array) -> Array:
        visible_BTS = _visible(segments_BT, positions_BT, kv_segments_BS, kv_positions_BS, window)
        return _attend(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale, softcap)

    B, T, N, H = q_BTNH.shape
    if T <= LONG:
        return attend(q_BTNH, segments_BT, positions_BT)

    def blocks(x_BT: Array) -> Array:
        """[B, T, ...] to [blocks, B, BLOCK, ...]; what fills the last block up is cut off again."""
        filled = jnp.pad(x_BT, [(0, 0), (0, -T % BLOCK)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(filled.reshape(B, -1, BLOCK, *x_BT.shape[2:]), 1, 0)

    one_block = jax.checkpoint(lambda queries: attend(*queries))
    out = jax.lax.map(one_block, (blocks(q_BTNH), blocks(segments_BT), blocks(positions_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]


def of_one(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    positions_B1: Int[Array, "B 1"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """Return `attention` of one query a row over keys and values at positions 0, 1, 2, ..., laid out for it."""
    B, _, N, H = q_B1NH.shape
    K, S = v_BKSH.shape[1:3]
    back_BS = positions_B1 - jnp.arange(S, dtype=positions_B1.dtype)[None]
    visible_BS = (back_BS >= 0) if window is None else (back_BS >= 0) & (back_BS < window)
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    scores_BKGS = scale * jnp.einsum("BKGH,BKHS->BKGS", q_BKGH, k_BKHS, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    probs_BKGS = jax.nn.softmax(jnp.where(visible_BS[:, None, None], scores_BKGS, _MASKED), axis=-1)
    return jnp.einsum("BKGS,BKSH->BKGH", probs_BKGS.astype(v_BKSH.dtype), v_BKSH).reshape(B, 1, N, H)


def _visible(
    segments_BT: Array, positions_BT: Array, kv_segments_BS: Array, kv_positions_BS: Array, window: int | None
) -> Array:
    back_BTS = positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    visible_BTS = (segments_BT[:, :, None] == kv_segments_BS[:, None, :]) & (back_BTS >= 0)
    return visible_BTS if window is None else visible_BTS & (back_BTS < window)


def _attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array, scale: float, softcap: float | None
) -> Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # The G heads that share a key head stand below one another: each key head is then one plain product of matrices.
    q_BKMH = jnp.transpose(q_BTNH.reshape(B, T, K, G, H), (0, 2, 3, 1, 4)).reshape(B, K, G * T, H)
    scores_BKMS = scale * jnp.einsum("BKMH,BSKH->BKMS", q_BKMH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_BKMS = softcap * jnp.tanh(scores_BKMS / softcap)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKMS.reshape(B, K, G, T, S), _MASKED)
    probs_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype).reshape(B, K, G * T, S)
    out_BKGTH = jnp.einsum("BKMS,BSKH->BKMH", probs_BKMS, v_BSKH).reshape(B, K, G, T, H)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, N, H)
