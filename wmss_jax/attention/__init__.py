"""Packed causal attention: one function for training, scoring and decoding.

Letters: B batch, T query time, S key time, N query heads, K kv heads, G = N/K, M = G·T, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30  # finite, so that a fully masked score is exp(-huge) = 0 and never inf - inf


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    scale: float,
    kv_segments_BS: Int[Array, "B S"] | None = None,
    kv_positions_BS: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale · q·k) v over the keys of the same segment at the same or an earlier position.

    Scores and softmax are float32 whatever the inputs are. Segment ids come from the packer; padding is a segment
    like any other (0), so a padding query attends to padding and no row of the softmax is empty.

    Args:
        scale: factor on q·k, usually H ** -0.5.
        kv_segments_BS, kv_positions_BS: those of the keys where keys are not the queries' own tokens (decoding).
    """
    kv_segments_BS = segments_BT if kv_segments_BS is None else kv_segments_BS
    kv_positions_BS = positions_BT if kv_positions_BS is None else kv_positions_BS
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # The G heads that share a key head stand below one another: each key head is then one plain product of matrices.
    q_BKMH = jnp.transpose(q_BTNH.reshape(B, T, K, G, H), (0, 2, 3, 1, 4)).reshape(B, K, G * T, H)
    scores_BKMS = scale * jnp.einsum("BKMH,BSKH->BKMS", q_BKMH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(B, K, G, T, S)
    visible_BTS = (segments_BT[:, :, None] == kv_segments_BS[:, None, :]) & (
        positions_BT[:, :, None] >= kv_positions_BS[:, None, :]
    )
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)
    probs_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype).reshape(B, K, G * T, S)
    out_BKGTH = jnp.einsum("BKMS,BSKH->BKMH", probs_BKMS, v_BSKH).reshape(B, K, G, T, H)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, N, H)
