"""The GPU kernels in Pallas' interpreter against dense attention in float64, which is written out here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmss_jax.attention import triton

KERNELS = functools.partial(triton.attention, interpret=True)


def segment_starts(T: int, *firsts: int) -> np.ndarray:
    """Return starts for segments that begin at 0 and at `firsts`."""
    firsts = np.array([0, *firsts])
    return firsts[np.searchsorted(firsts, np.arange(T), side="right") - 1]


def window_starts(T: int, window: int) -> np.ndarray:
    return np.maximum(0, np.arange(T) - window + 1)


def random_starts(T: int, seed: int) -> np.ndarray:
    """Return starts of random segments, the last of them padding, under a random window."""
    rng = np.random.default_rng(seed)
    firsts = np.sort(rng.choice(np.arange(1, T), size=min(4, T - 1), replace=False))
    return np.maximum(segment_starts(T, *firsts), window_starts(T, int(rng.integers(1, T + 1))))


def inputs(T: int, H: int, G: int, *, B: int = 2, K: int = 2, dtype: jnp.dtype = jnp.float32) -> tuple:
    """Return q, k, v and the cotangent of the output."""
    rng = np.random.default_rng(T + H + G)
    draw = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype)
    return draw(K * G), draw(K), draw(K), draw(K * G)


def dense(q_BTNH, k_BSKH, v_BSKH, starts_BT, *, scale, softcap):
    T, N, _ = q_BTNH.shape[1:]
    repeat = functools.partial(jnp.repeat, repeats=N // k_BSKH.shape[2], axis=2)
    scores_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, repeat(k_BSKH), precision="highest")
    scores_BNTS = scores_BNTS if softcap is None else softcap * jnp.tanh(scores_BNTS / softcap)
    times = jnp.arange(T)
    visible_BTS = (starts_BT[:, :, None] <= times[None, None]) & (times[None, None] <= times[None, :, None])
    probs_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS, repeat(v_BSKH), precision="highest")


@functools.partial(jax.jit, static_argnames=("softcap", "attend"))
def with_gradients(q, k, v, dout, starts_BT, *, softcap, attend):
    """Return the output and the gradients of q, k and v."""
    out, pull_back = jax.vjp(
        lambda q, k, v: attend(q, k, v, starts_BT, scale=q.shape[-1] ** -0.5, softcap=softcap), q, k, v
    )
    return out, *pull_back(dout)


def expected(arrays: tuple, starts_BT: np.ndarray, softcap: float | None = None) -> list[np.ndarray]:
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in arrays]
        return [np.asarray(x) for x in with_gradients(*arrays, starts_BT, softcap=softcap, attend=dense)]


def found(arrays: tuple, starts_BT: np.ndarray, softcap: float | None = None, attend=KERNELS) -> list[np.ndarray]:
    results = with_gradients(*arrays, starts_BT.astype(np.int32), softcap=softcap, attend=attend)
    return [np.asarray(x, np.float64) for x in results]


def assert_close(arrays: tuple, starts_BT: np.ndarray, softcap: float | None, tolerance: float, attend=KERNELS) -> None:
    pairs = zip(found(arrays, starts_BT, softcap, attend), expected(arrays, starts_BT, softcap), strict=True)
    for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


# Blocks of float32 are 32 long (16 the keys of dq at H = 96): windows within a block and across several.
CASES = {
    "one token": (1, 16, 1, [[0], [0]], None),
    "shorter than a block": (17, 16, 4, [segment_starts(17), segment_starts(17, 3, 16)], 2.0),
    "packed": (128, 64, 2, [segment_starts(128, 32, 33, 90), segment_starts(128, 100)], None),
    "short window": (200, 96, 2, [window_starts(200, 5), window_starts(200, 16)], None),
    "long window": (384, 16, 1, [window_starts(384, 150), window_starts(384, 33)], 2.0),
    "one segment": (384, 64, 1, [segment_starts(384)], None),
    "random": (200, 16, 4, [random_starts(200, 0), random_starts(200, 1)], 2.0),
    "random, large heads": (70, 160, 1, [random_starts(70, 2)], None),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_dense_attention_with_gradients(case):
    T, H, G, starts_BT, softcap = CASES[case]
    starts_BT = np.array(starts_BT)
    assert_close(inputs(T, H, G, B=len(starts_BT), K=2 if T < 300 else 1), starts_BT, softcap, 2e-5)


@pytest.mark.parametrize("I, J", [(64, 16), (16, 64)])
def test_blocks_of_queries_and_keys_differ_in_length(monkeypatch, I, J):
    monkeypatch.setattr(triton, "_BLOCKS", {(4, 256): (triton._Blocks(I, J, 4, 1),) * 3})
    starts_BT = np.stack([segment_starts(150), random_starts(150, 3)])
    fresh = functools.partial(KERNELS)  # nothing that was traced with other blocks
    assert_close(inputs(150, 16, 2, K=1), starts_BT, 2.0, 2e-5, fresh)


def test_bfloat16_rounds_probabilities_and_results_only():
    # Both sides start from the same bfloat16 numbers; the kernel rounds p, ds and the results to 8 bits: 2^-8 of
    # numbers of up to about 4.
    starts_BT = np.stack([segment_starts(384, 130, 300), window_starts(384, 200)])
    assert_close(inputs(384, 64, 2, K=1, dtype=jnp.bfloat16), starts_BT, 20.0, 2e-2)


def test_blocks_of_other_segments_are_not_read():
    starts_BT, (first, second) = segment_starts(192, 96)[None], (slice(0, 96), slice(96, 192))  # 3 blocks each
    arrays = inputs(192, 16, 2, B=1, K=1)
    clean = found(arrays, starts_BT)
    for poisoned, kept in ((first, second), (second, first)):
        dirty = found(tuple(x.at[:, poisoned].set(jnp.nan) for x in arrays), starts_BT)
        for a, b in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(a[:, kept], b[:, kept])


def test_huge_numbers_of_other_segments_change_nothing():
    starts_BT = segment_starts(70, 23, 50)[None]  # borders within blocks
    q, k, v, dout = inputs(70, 16, 2, B=1, K=1)
    clean = found((q, k, v, dout), starts_BT)
    dirty = found((q, k.at[:, 23:50].mul(1e4), v.at[:, 23:50].mul(1e4), dout), starts_BT)
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(np.delete(a, np.s_[23:50], axis=1), np.delete(b, np.s_[23:50], axis=1))


def test_without_gradients_and_under_remat():
    q, k, v, dout = inputs(40, 16, 1, B=1, K=1)
    starts_BT = jnp.asarray(segment_starts(40, 9)[None], jnp.int32)
    attend = functools.partial(KERNELS, scale=0.25)
    out, pull_back = jax.vjp(jax.checkpoint(lambda q, k, v: attend(q, k, v, starts_BT)), q, k, v)
    np.testing.assert_array_equal(out, attend(q, k, v, starts_BT))
    assert all(np.isfinite(x).all() for x in pull_back(dout))


def test_says_what_it_does_not_take():
    q, k, v, _ = inputs(16, 16, 3, B=1, K=1)
    starts_BT = jnp.zeros((1, 16), jnp.int32)
    with pytest.raises(ValueError, match="N=3, K=2"):
        triton.attention(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), starts_BT, scale=1.0)
    with pytest.raises(TypeError, match="bfloat16"):
        triton.attention(q, k.astype(jnp.bfloat16), v, starts_BT, scale=1.0)
