"""Packed causal attention for GPUs: flash attention in Pallas kernels that Triton compiles (compute capability >= 8.0).

The algorithm is FlashAttention-2 (Dao, arXiv 2307.08691): a program holds one block of queries and walks over the
blocks of keys that it sees, with a running maximum and sum of the softmax (algorithm 1); the backward pass makes the
scores again from the saved log-sum-exp (algorithm 2), here in one kernel for dq and one for dk and dv, so that no two
programs add to the same number. Nothing of size T · T is ever in memory, and blocks of other segments or outside the
window are not read: what a query sees is one range of keys, starts[t] <= s <= t, and what sees a key is one range of
queries, s <= t < ends[s].

16-bit heads of more than 128 need the shared memory of a data-centre GPU (8.0, 9.0, 10.0; not the 99 KB of 8.6 or 8.9).

Letters: B batch, T time, N query heads, K kv heads, G = N/K, H head size; inside a kernel I the queries of a block, J
the keys of a block. Scores and log-sum-exp are in base 2, because the hardware's exponential is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

MAX_HEAD_SIZE = 256
_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # where the running maximum begins: finite, so that before the first visible key nothing is inf - inf
_MIN_BLOCK = 16  # the shortest side of a product of matrices that Triton takes


class _Blocks(NamedTuple):
    """How one kernel is cut."""

    I: int  # queries per block
    J: int  # keys per block
    warps: int  # of 32 threads, per program
    stages: int  # blocks of its loop that are loaded or computed at once


# (Bytes per number, H up to): the cuts of the forward, dq and dkv kernels. Of 16 bits and H up to 128 those that an
# H100 was fastest with on rows of 4,096 tokens packed from four examples (2026-11-26), of about ten that stay within
# the 163 KB of shared memory of an A100. Products of float32 become unrolled multiply-adds: long blocks of them spill
# kilobytes, and loads are not what they wait for. At 16 bits and H = 256, dkv with 64 keys would not fit the tensor
# memory of sm_100; that row and those of float32 were chosen with the compiler: the largest whose accumulators stay in
# registers on sm_80 and sm_90.
_BLOCKS = {
    (2, 64): (_Blocks(64, 64, 4, 3), _Blocks(64, 64, 4, 3), _Blocks(32, 64, 4, 3)),
    (2, 128): (_Blocks(64, 64, 4, 3), _Blocks(128, 64, 8, 3), _Blocks(32, 64, 4, 3)),
    (2, 256): (_Blocks(64, 64, 8, 2), _Blocks(64, 32, 8, 2), _Blocks(64, 32, 8, 2)),
    (4, 64): (_Blocks(32, 32, 4, 1), _Blocks(32, 32, 4, 1), _Blocks(32, 32, 4, 1)),
    (4, 128): (_Blocks(32, 32, 8, 1), _Blocks(32, 16, 8, 1), _Blocks(32, 32, 8, 1)),
    (4, 256): (_Blocks(16, 16, 8, 1), _Blocks(16, 16, 8, 1), _Blocks(16, 16, 8, 1)),
}


class _Static(NamedTuple):
    """What the kernels are specialised to."""

    H: int
    scale: float
    softcap: float | None
    interpret: bool
    forward: _Blocks
    dq: _Blocks
    dkv: _Blocks


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    starts_BT: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale · q·k) v over the keys starts[t] <= s <= t; differentiable once, in reverse mode.

    Softmax and accumulators are float32. Products are taken in the inputs' dtype (float32 in full, not as TF32), with
    the probabilities rounded to it. XLA cannot partition a kernel: under a mesh, call this inside a shard_map.

    Args:
        starts_BT: per query the first key it sees, at most its own position and never decreasing along T: the start of
            its segment, or of its sliding window where that is later.
        scale: factor on q·k, usually H ** -0.5.
        softcap: scores are cap·tanh(scale·q·k / cap) (Gemma 2, arXiv 2408.00118, §2).
        interpret: run the kernels in Pallas' interpreter, on any device and slowly.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BTKH.shape[2], q_BTNH.dtype
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or not dtype == k_BTKH.dtype == v_BTKH.dtype:
        raise TypeError(f"expected one dtype, of 16 bits or float32, got {dtype}, {k_BTKH.dtype}, {v_BTKH.dtype}")
    if N % K or H > MAX_HEAD_SIZE:
        raise ValueError(f"expected query heads a multiple of kv heads and H <= {MAX_HEAD_SIZE}, got {N=}, {K=}, {H=}")
    static = _Static(H, scale, softcap, interpret, *_cuts(T, H, dtype.itemsize))
    missing = -T % max(max(cut.I, cut.J) for cut in (static.forward, static.dq, static.dkv))
    # A padding query sees itself alone, a key of zeros: its row is finite, and its cotangent 0 makes its gradients 0.
    pad = lambda x: jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
    itself_BT = jnp.broadcast_to(jnp.arange(T, T + missing, dtype=jnp.int32)[None], (B, missing))
    starts_BT = jnp.concatenate([starts_BT.astype(jnp.int32), itself_BT], axis=1)
    return _attention(static, pad(q_BTNH), pad(k_BTKH), pad(v_BTKH), starts_BT)[:, :T]


def _cuts(T: int, H: int, itemsize: int) -> list[_Blocks]:
    """Return the cuts of the three kernels, no block longer than the sequence has to be padded to anyway."""
    longest = max(_MIN_BLOCK, pl.next_power_of_2(T))
    cuts = next(_BLOCKS[size, most] for size, most in _BLOCKS if size == itemsize and most >= H)
    return [cut._replace(I=min(cut.I, longest), J=min(cut.J, longest)) for cut in cuts]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, starts_BT: Array) -> Array:
    return _attention_forward(static, q_BTNH, k_BTKH, v_BTKH, starts_BT)[0]


def _attention_forward(
    static: _Static, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, starts_BT: Array
) -> tuple[Array, tuple]:
    of = _by_queries(static.forward, q_BTNH, k_BTKH)
    B, T, N, _ = q_BTNH.shape
    out_BTNH, lse_BNT = _call(
        _forward_kernel, static, static.forward, of.grid,
        in_specs=(of.queries, of.keys, of.keys, of.bounds),
        out_specs=(of.queries, of.stats),
        out_shape=(q_BTNH, jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
    )(q_BTNH, k_BTKH, v_BTKH, starts_BT)  # fmt: skip
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, starts_BT, out_BTNH, lse_BNT)


def _attention_backward(static: _Static, residuals: tuple, dout_BTNH: Array) -> tuple[Array, Array, Array, None]:
    q_BTNH, k_BTKH, v_BTKH, starts_BT, out_BTNH, lse_BNT = residuals
    products_BTNH = out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)
    delta_BNT = jnp.transpose(jnp.sum(products_BTNH, axis=-1), (0, 2, 1))  # Σ_s p·dp of each softmax row
    of = _by_queries(static.dq, q_BTNH, k_BTKH)
    (dq_BTNH,) = _call(
        _dq_kernel, static, static.dq, of.grid,
        in_specs=(of.queries, of.keys, of.keys, of.bounds, of.queries, of.stats, of.stats),
        out_specs=(of.queries,),
        out_shape=(q_BTNH,),
    )(q_BTNH, k_BTKH, v_BTKH, starts_BT, dout_BTNH, lse_BNT, delta_BNT)  # fmt: skip
    of = _by_keys(static.dkv, q_BTNH, k_BTKH)
    dk_BTKH, dv_BTKH = _call(
        _dkv_kernel, static, static.dkv, of.grid,
        in_specs=(of.queries, of.keys, of.keys, of.bounds, of.queries, of.stats, of.stats),
        out_specs=(of.keys, of.keys),
        out_shape=(k_BTKH, v_BTKH),
    )(q_BTNH, k_BTKH, v_BTKH, _ends(starts_BT), dout_BTNH, lse_BNT, delta_BNT)  # fmt: skip
    return dq_BTNH, dk_BTKH, dv_BTKH, None


_attention.defvjp(_attention_forward, _attention_backward)


def _ends(starts_BT: Array) -> Array:
    """Return per key the first later query that does not see it any more."""
    times_T = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)
    find = lambda starts_T: jnp.searchsorted(starts_T, times_T, side="right", method="scan_unrolled")
    return jax.vmap(find)(starts_BT).astype(jnp.int32)


class _Layout(NamedTuple):
    """Which part of every array a program gets."""

    grid: tuple[int, int, int]
    queries: pl.BlockSpec
    keys: pl.BlockSpec
    bounds: pl.BlockSpec
    stats: pl.BlockSpec


def _by_queries(cut: _Blocks, q_BTNH: Array, k_BTKH: Array) -> _Layout:
    """Return the layout of a program per block of queries of one head, with all keys of its kv head.

    The programs of later queries, whose loops are longer, start first. The heads are the innermost axis, so that those
    of one kv head run side by side and find each other's keys in the L2 cache.
    """
    B, T, N, H = q_BTNH.shape
    G, H, last = N // k_BTKH.shape[2], _padded(H), T // cut.I - 1
    return _Layout(
        grid=(N, last + 1, B),
        queries=pl.BlockSpec((None, cut.I, None, H), lambda n, i, b: (b, last - i, n, 0)),
        keys=pl.BlockSpec((None, T, None, H), lambda n, i, b: (b, 0, lax.div(n, G), 0)),
        bounds=pl.BlockSpec((None, cut.I), lambda n, i, b: (b, last - i)),
        stats=pl.BlockSpec((None, None, cut.I), lambda n, i, b: (b, n, last - i)),
    )


def _by_keys(cut: _Blocks, q_BTNH: Array, k_BTKH: Array) -> _Layout:
    """Return the layout of a program per block of keys of one kv head, with all queries of its G heads."""
    B, T, N, H = q_BTNH.shape
    K, H = k_BTKH.shape[2], _padded(H)
    return _Layout(
        grid=(K, T // cut.J, B),
        queries=pl.BlockSpec((None, T, N // K, H), lambda k, j, b: (b, 0, k, 0)),
        keys=pl.BlockSpec((None, cut.J, None, H), lambda k, j, b: (b, j, k, 0)),
        bounds=pl.BlockSpec((None, cut.J), lambda k, j, b: (b, j)),
        stats=pl.BlockSpec((None, N // K, T), lambda k, j, b: (b, k, 0)),
    )


def _call(
    kernel: Callable, static: _Static, cut: _Blocks, grid: tuple[int, int, int], *,
    in_specs: tuple, out_specs: tuple, out_shape: tuple,
) -> Callable:  # fmt: skip
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        name=f"attention{kernel.__name__}",
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=static.interpret,
    )


def _forward_kernel(q_ref, k_ref, v_ref, starts_ref, out_ref, lse_ref, *, static: _Static) -> None:
    I, J, *_ = static.forward
    i = pl.num_programs(1) - 1 - pl.program_id(1)
    q_IH = _load(q_ref, static.H)
    starts_I, times_I = starts_ref[...], i * I + jnp.arange(I)

    def step(j: Array, carry: tuple, masked: bool) -> tuple:
        sums_IH, total_I, max_I = carry
        rows = pl.ds(j * J, J)
        scores_IJ, _ = _scores(q_IH, _load(k_ref.at[rows, :], static.H), static)
        if masked:
            keys_J = j * J + jnp.arange(J)
            visible_IJ = (starts_I[:, None] <= keys_J[None]) & (keys_J[None] <= times_I[:, None])
            scores_IJ = jnp.where(visible_IJ, scores_IJ, -jnp.inf)
        new_max_I = jnp.maximum(max_I, jnp.max(scores_IJ, axis=1))
        shrink_I = jnp.exp2(max_I - new_max_I)
        probs_IJ = jnp.exp2(scores_IJ - new_max_I[:, None])
        v_JH = _load(v_ref.at[rows, :], static.H)
        sums_IH = sums_IH * shrink_I[:, None] + _dot(probs_IJ.astype(v_JH.dtype), v_JH)
        return sums_IH, total_I * shrink_I + jnp.sum(probs_IJ, axis=1), new_max_I

    zeros_I = jnp.zeros((I,), jnp.float32)
    carry = jnp.zeros(q_ref.shape, jnp.float32), zeros_I, zeros_I + _LOWEST
    sums_IH, total_I, max_I = _loop(_seen_keys(starts_ref, i, I, J), step, carry)
    lse_ref[...] = max_I + jnp.log2(total_I)
    _store(out_ref, sums_IH / total_I[:, None], static.H)


def _dq_kernel(q_ref, k_ref, v_ref, starts_ref, dout_ref, lse_ref, delta_ref, dq_ref, *, static: _Static) -> None:
    I, J, *_ = static.dq
    i = pl.num_programs(1) - 1 - pl.program_id(1)
    q_IH, dout_IH = _load(q_ref, static.H), _load(dout_ref, static.H)
    lse_I, delta_I = lse_ref[...], delta_ref[...]
    starts_I, times_I = starts_ref[...], i * I + jnp.arange(I)

    def step(j: Array, dq_IH: Array, masked: bool) -> Array:
        rows = pl.ds(j * J, J)
        k_JH, v_JH = _load(k_ref.at[rows, :], static.H), _load(v_ref.at[rows, :], static.H)
        scores_IJ, slopes_IJ = _scores(q_IH, k_JH, static)
        probs_IJ = jnp.exp2(scores_IJ - lse_I[:, None])
        if masked:
            keys_J = j * J + jnp.arange(J)
            visible_IJ = (starts_I[:, None] <= keys_J[None]) & (keys_J[None] <= times_I[:, None])
            probs_IJ = jnp.where(visible_IJ, probs_IJ, 0.0)
        dscores_IJ = probs_IJ * (_dot(dout_IH, v_JH, trans_b=True) - delta_I[:, None]) * slopes_IJ
        return dq_IH + _dot(dscores_IJ.astype(k_JH.dtype), k_JH)

    dq_IH = _loop(_seen_keys(starts_ref, i, I, J), step, jnp.zeros(q_ref.shape, jnp.float32))
    _store(dq_ref, dq_IH * static.scale, static.H)


def _dkv_kernel(
    q_ref, k_ref, v_ref, ends_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, static: _Static
) -> None:  # fmt: skip
    I, J, *_ = static.dkv
    j = pl.program_id(1)
    k_JH, v_JH = _load(k_ref, static.H), _load(v_ref, static.H)
    ends_J, keys_J = ends_ref[...], j * J + jnp.arange(J)

    def step(i: Array, carry: tuple, g: Array, masked: bool) -> tuple:
        dk_JH, dv_JH = carry
        rows = pl.ds(i * I, I)
        q_IH, dout_IH = _load(q_ref.at[rows, g, :], static.H), _load(dout_ref.at[rows, g, :], static.H)
        # Keys by queries, so that no probabilities have to be transposed for the two products below.
        scores_JI, slopes_JI = _scores(k_JH, q_IH, static)
        probs_JI = jnp.exp2(scores_JI - lse_ref[g, rows][None])
        if masked:
            times_I = i * I + jnp.arange(I)
            visible_JI = (keys_J[:, None] <= times_I[None]) & (times_I[None] < ends_J[:, None])
            probs_JI = jnp.where(visible_JI, probs_JI, 0.0)
        dv_JH += _dot(probs_JI.astype(dout_IH.dtype), dout_IH)
        dscores_JI = probs_JI * (_dot(v_JH, dout_IH, trans_b=True) - delta_ref[g, rows][None]) * slopes_JI
        dk_JH += _dot(dscores_JI.astype(q_IH.dtype), q_IH)
        return dk_JH, dv_JH

    spans = _seeing_queries(ends_ref, j, I, J)
    head = lambda g, carry: _loop(spans, functools.partial(step, g=g), carry)
    zeros_JH = jnp.zeros(k_ref.shape, jnp.float32)
    dk_JH, dv_JH = lax.fori_loop(0, q_ref.shape[1], head, (zeros_JH, zeros_JH))
    _store(dk_ref, dk_JH * static.scale, static.H)
    _store(dv_ref, dv_JH, static.H)


def _seen_keys(starts_ref: Any, i: Array, I: int, J: int) -> tuple[Array, ...]:
    """Return the blocks of keys that block i of queries sees, as `_loop` wants them."""
    seen_by_all = _ceil_div(starts_ref[I - 1], J)
    return lax.div(starts_ref[0], J), seen_by_all, lax.div(i * I + 1, J), _ceil_div((i + 1) * I, J)


def _seeing_queries(ends_ref: Any, j: Array, I: int, J: int) -> tuple[Array, ...]:
    """Return the blocks of queries that see block j of keys, as `_loop` wants them."""
    seeing_all = _ceil_div((j + 1) * J - 1, I)
    return lax.div(j * J, I), seeing_all, lax.div(ends_ref[0], I), _ceil_div(ends_ref[J - 1], I)


def _loop(spans: tuple[Array, ...], step: Callable, carry: Any) -> Any:
    """Fold `step` over blocks first..last; those from whole to whole_end need no mask, which is most of a long loop."""
    first, whole, whole_end, last = spans
    whole_end = jnp.maximum(whole, whole_end)
    for begin, end, masked in ((first, whole, True), (whole, whole_end, False), (whole_end, last, True)):
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=masked), carry)
    return carry


def _scores(a_XH: Array, b_YH: Array, static: _Static) -> tuple[Array, Array | float]:
    """Return the scores in base 2 and the slope of the soft cap, by which their gradient is multiplied."""
    products_XY = _dot(a_XH, b_YH, trans_b=True)
    if static.softcap is None:
        return products_XY * (static.scale * _LOG2_E), 1.0
    tanh_XY = jnp.tanh(products_XY * (static.scale / static.softcap))
    return tanh_XY * (static.softcap * _LOG2_E), 1.0 - tanh_XY * tanh_XY


def _dot(a: Array, b: Array, trans_b: bool = False) -> Array:
    return plgpu.dot(a, b, trans_b=trans_b, allow_tf32=False)


def _ceil_div(x: Array, size: int) -> Array:
    return lax.div(x + (size - 1), size)


def _padded(H: int) -> int:
    return max(_MIN_BLOCK, pl.next_power_of_2(H))


def _load(ref: Any, H: int) -> Array:
    """Return rows of heads, zeros beyond H: such columns are in no array, only in the blocks."""
    if ref.shape[-1] == H:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=_inside(ref, H), other=0.0)


def _store(ref: Any, value: Array, H: int) -> None:
    plgpu.store(ref, value.astype(ref.dtype), mask=None if ref.shape[-1] == H else _inside(ref, H))


def _inside(ref: Any, H: int) -> Array:
    return jnp.broadcast_to((jnp.arange(ref.shape[-1]) < H)[None], ref.shape)
