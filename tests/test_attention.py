"""Every attention backend against a dense float64 reference. Run: pytest tests/test_attention.py"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmss_jax import attention, sharding
from wmss_jax.attention import blockwise, splash

TOLERANCE = 2e-5  # float32, of values and gradients of order 1


def segments_of(*lengths, T):
    """One row: segments 1, 2, ... of these lengths, then padding (0)."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.pad(ids, (0, T - len(ids)))[None], jnp.int32)


def positions_of(segments_BT):
    segments_BT = np.asarray(segments_BT)
    starts = np.diff(segments_BT, axis=1, prepend=-1) != 0
    index = np.broadcast_to(np.arange(segments_BT.shape[1]), segments_BT.shape)
    return jnp.asarray(index - np.maximum.accumulate(np.where(starts, index, 0), axis=1), jnp.int32)


def inputs(rng, segments_BT, N=4, K=2, H=16):
    B, T = segments_BT.shape
    make = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32)
    return make(N), make(K), make(K), make(N)


def dense(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale, window=None, softcap=None):
    """Every query and key by hand, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    segments_BT = np.asarray(segments_BT)
    G = q.shape[2] // k.shape[2]
    scores = scale * np.einsum("btnh,bsnh->bnts", q, np.repeat(k, G, axis=2))
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    t, s = np.indices(scores.shape[-2:])
    seen = (t >= s) & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    seen &= True if window is None else t - s < window
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), np.repeat(v, G, axis=2))


def dense_gradients(arguments, out_BTNH, step=1e-6, probes=12):
    """Central differences of Σ out·dense(q, k, v) at a few places of each argument: {(which, index): value}."""
    rng, found = np.random.default_rng(1), {}
    arrays, rest = [np.array(x, np.float64) for x in arguments[:3]], arguments[3:]
    value = lambda: np.sum(np.asarray(out_BTNH, np.float64) * dense(*arrays, *rest))
    for which, array in enumerate(arrays):
        for place in zip(*(rng.integers(0, size, probes) for size in array.shape), strict=True):
            kept = array[place]
            array[place] = kept + step
            above = value()
            array[place] = kept - step
            found[which, place] = (above - value()) / (2 * step)
            array[place] = kept
    return found


def run_blockwise(q, k, v, segments_BT, **settings):
    positions_BT = positions_of(segments_BT)
    return blockwise.attention(q, k, v, segments_BT, positions_BT, segments_BT, positions_BT, **settings)


def run_splash(q, k, v, segments_BT, **settings):
    return splash.attention(q, k, v, segments_BT, interpret=True, **settings)


def run_triton(q, k, v, segments_BT, *, scale, window=None, softcap=None):
    from wmss_jax.attention import triton

    first_BT = attention.first_keys(segments_BT, window)
    return triton.attention(q, k, v, first_BT, scale=scale, softcap=softcap, interpret=True)


BACKENDS = {"blockwise": run_blockwise, "splash": run_splash, "triton": run_triton}
each_backend = pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)


@each_backend
@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 2.0), (40, 5.0)])
@pytest.mark.parametrize(
    "lengths, T, N, K",
    [((128,), 128, 4, 4), ((50, 9, 60), 128, 4, 2), ((1, 30, 5), 77, 4, 1), ((100, 90), 200, 2, 2)],
    ids=["one segment", "packed", "not a multiple of a block", "more than a block"],
)
def test_every_backend_equals_the_dense_reference(run, rng, window, softcap, lengths, T, N, K):
    segments_BT = segments_of(*lengths, T=T)
    q, k, v, out = inputs(rng, segments_BT, N, K)
    settings = {"scale": 0.25, "window": window, "softcap": softcap}
    found, pull_back = jax.vjp(lambda q, k, v: run(q, k, v, segments_BT, **settings), q, k, v)
    np.testing.assert_allclose(found, dense(q, k, v, segments_BT, **settings), atol=TOLERANCE)
    gradients = pull_back(out)
    for (which, place), expected in dense_gradients((q, k, v, segments_BT, 0.25, window, softcap), out).items():
        assert gradients[which][place] == pytest.approx(expected, abs=TOLERANCE * 4, rel=TOLERANCE)


@each_backend
def test_what_another_segment_holds_makes_no_difference(run, rng):
    segments_BT = segments_of(40, 50, T=128)
    q, k, v, _ = inputs(rng, segments_BT)
    second = segments_BT[0] == 2
    spoiled = [jnp.where(second[None, :, None, None], x, 1e4) for x in (k, v)]
    before, after = (run(q, *kv, segments_BT, scale=0.25) for kv in ((k, v), spoiled))
    np.testing.assert_array_equal(before[:, second], after[:, second])


def test_long_rows_are_computed_block_by_block_and_equal_one_block(rng):
    T = blockwise.LONG + 100
    segments_BT = jnp.concatenate([segments_of(700, 300, T=T), segments_of(T, T=T)])
    q, k, v, out = inputs(rng, segments_BT, N=2, K=1, H=8)

    def run(q, k, v):
        return jnp.sum(run_blockwise(q, k, v, segments_BT, scale=0.3, window=600) * out)

    blocks = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))
    assert f"{T},{T}" not in blocks.lower(q, k, v).as_text().replace("x", ",")
    value, gradients = blocks(q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "LONG", T)
        expected, expected_gradients = jax.jit(jax.value_and_grad(lambda *a: run(*a), argnums=(0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["splash", "triton"])
def test_kernels_on_a_mesh_equal_one_device(backend, rng):
    segments_BT = jnp.concatenate([segments_of(50, 70, T=128), segments_of(128, T=128)] * 2)
    q, k, v, _ = inputs(rng, segments_BT)
    run = BACKENDS[backend]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    @jax.jit
    def on_mesh(q, k, v):
        with sharding.use(mesh):
            kernel = lambda q, k, v, rows_BT: run(q, k, v, rows_BT, scale=0.25)
            return attention._on_each_device(kernel, q, k, v, segments_BT)

    q, k, v = jax.device_put((q, k, v), sharding.NamedSharding(mesh, sharding.P(sharding.BATCH_AXES, None, "tensor")))
    np.testing.assert_allclose(on_mesh(q, k, v), dense(q, k, v, segments_BT, 0.25), atol=TOLERANCE)


def device(platform, kind):
    return jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)


@pytest.mark.parametrize(
    "on, backend",
    [
        (device("cpu", "cpu"), "blockwise"), (device("tpu", "TPU v5p"), "splash"),
        (device("gpu", "NVIDIA H100 80GB HBM3"), "triton"), (device("gpu", "Tesla V100-SXM2-16GB"), "blockwise"),
        (device("gpu", "Tesla T4"), "blockwise"),
    ],
)  # fmt: skip
def test_the_device_decides_on_the_backend_and_any_may_have_the_plain_one(on, backend):
    assert attention.backend_on(on) == backend
    assert attention.backend_on(on, "blockwise") == "blockwise"


@pytest.mark.parametrize(
    "on, wanted, said",
    [
        (device("cpu", "cpu"), "splash", "splash cannot run on cpu (cpu); leave it out there, or choose blockwise"),
        (
            device("tpu", "TPU v5p"),
            "triton",
            "triton cannot run on TPU v5p (tpu); leave it out there, or choose spl",
        ),
        (device("gpu", "Tesla V100"), "triton", "triton cannot run on Tesla V100 (gpu)"),
        (device("cpu", "cpu"), "flash", "flash is none of blockwise, splash, triton; on cpu (cpu)"),
    ],
)
def test_a_backend_that_cannot_run_there_is_refused(on, wanted, said):
    with pytest.raises(ValueError) as error:
        attention.backend_on(on, wanted)
    assert said in str(error.value)


def test_a_window_that_differs_by_layer_is_the_chosen_one(rng):
    segments_BT = segments_of(9, 20, T=32)
    q, k, v, _ = inputs(rng, segments_BT)
    positions_BT = positions_of(segments_BT)
    windows = (None, 4, 7)

    @jax.jit
    def run(index):
        window = attention.OneOf(windows, index)
        out = attention.attention(q, k, v, segments_BT, positions_BT, scale=0.25, window=window)
        return out, attention.first_keys(segments_BT, window.chosen())  # of which Triton makes its mask

    for index, window in enumerate(windows):
        out, first_BT = run(index)
        np.testing.assert_allclose(out, dense(q, k, v, segments_BT, 0.25, window), atol=TOLERANCE)
        np.testing.assert_array_equal(first_BT, attention.first_keys(segments_BT, window))


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=["one device", "eight devices"])
def test_splash_runs_the_kernel_of_the_chosen_window(mesh, rng, monkeypatch):
    """As TPUs do for Gemma: a branch for each window, inside of a scan over layers; values and gradients."""
    segments_BT = jnp.concatenate([segments_of(50, 70, T=128), segments_of(128, T=128)] * 2)
    q, k, v, out = inputs(rng, segments_BT)
    positions_BT = positions_of(segments_BT)
    windows, order, softcap = (None, 9), (1, 0), 3.0
    monkeypatch.setattr(attention, "backend_on", lambda *_: "splash")
    monkeypatch.setattr(splash, "attention", functools.partial(splash.attention, interpret=True))
    mesh = mesh and sharding.make_mesh(*mesh)
    if mesh:
        spread = sharding.NamedSharding(mesh, sharding.P(sharding.BATCH_AXES, None, "tensor"))
        q, k, v = jax.device_put((q, k, v), spread)

    @jax.jit
    def run(q, k, v):
        def layer(_, index):
            window = attention.OneOf(windows, index)
            settings = {"scale": 0.25, "window": window, "softcap": softcap}
            return None, attention.attention(q, k, v, segments_BT, positions_BT, **settings)

        with sharding.use(mesh):
            return jax.lax.scan(layer, None, jnp.array(order))[1]

    found, pull_back = jax.vjp(run, q, k, v)
    for layer, index in enumerate(order):
        settings = (segments_BT, 0.25, windows[index], softcap)
        np.testing.assert_allclose(found[layer], dense(q, k, v, *settings), atol=TOLERANCE)
        gradients = pull_back(jnp.zeros_like(found).at[layer].set(out))
        for (which, place), expected in dense_gradients((q, k, v, *settings), out).items():
            assert gradients[which][place] == pytest.approx(expected, abs=TOLERANCE * 4, rel=TOLERANCE)
