"""Numerics on a real GPU or TPU: that a kernel compiles proves no numbers. Skipped where there is none.

pytest -m accelerator
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from conftest import accelerators
from plans import TRITON_IS_DEPRECATED
from test_attention import dense, inputs, segments_of

from wmss_jax import attention, sharding, step, train_state
from wmss_jax.objectives import LogitMix

pytestmark = [pytest.mark.accelerator, pytest.mark.filterwarnings(TRITON_IS_DEPRECATED)]
MODEL = tiny.model(head_dim=64)


@pytest.fixture(scope="module")
def mesh():
    found = accelerators()
    if not found:
        pytest.skip("no GPU or TPU here")
    return sharding.make_mesh(devices=found[:1])


def on(mesh, tree):
    """The arrays on the mesh's one device."""
    return jax.device_put(tree, sharding.NamedSharding(mesh, sharding.P()))


# Tolerance: float32 products on a TPU are six bfloat16 ones; of bfloat16, 8 bits of inputs of order 1.
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 5e-5), (jnp.bfloat16, 4e-2)])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("window, softcap", [(None, None), (100, None), (None, 5.0), (300, 5.0)])
def test_attention_equals_the_dense_reference(mesh, rng, dtype, tolerance, H, window, softcap):
    segments_BT = jnp.concatenate([segments_of(300, 150, T=512), segments_of(500, T=512)])
    q, k, v, out = (x.astype(dtype) for x in inputs(rng, segments_BT, N=4, K=2, H=H))
    settings = {"scale": H**-0.5, "window": window, "softcap": softcap}

    @functools.partial(jax.jit, static_argnames="backend")
    def run(q, k, v, out, segments_BT, backend):
        positions_BT = jnp.broadcast_to(jnp.arange(512)[None], segments_BT.shape)
        with sharding.use(mesh), attention.using(backend), jax.default_matmul_precision("float32"):
            attend = lambda q, k, v: attention.attention(q, k, v, segments_BT, positions_BT, **settings)
            found, pull_back = jax.vjp(attend, q, k, v)
            return found, pull_back(out)

    found, gradients = run(*on(mesh, (q, k, v, out, segments_BT)), backend=None)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(np.float32(found), dense(*wide, segments_BT, **settings), atol=tolerance)
    _, expected = run(*on(mesh, (q, k, v, out, segments_BT)), backend="blockwise")
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=4 * tolerance)


@pytest.mark.parametrize("compute, tolerance", [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_the_step_learns_as_on_a_cpu(mesh, compute, tolerance):
    """Head, attention and update: the losses of five steps, relative."""
    model = dataclasses.replace(MODEL, compute_dtype=compute)
    plain = dataclasses.replace(MODEL, compute_dtype="float32")
    batch, tx = tiny.batch(segments=True), optax.adamw(1e-2)

    def losses(model, mesh, device):
        place = (lambda tree: on(mesh, tree)) if mesh else (lambda tree: jax.device_put(tree, device))
        state, weak = train_state.init_state({"strong": place(tiny.params(MODEL, 0))}, tx), place(tiny.params(MODEL, 1))
        train_step = step.make_train_step(model, LogitMix(), tx, mesh=mesh)
        found = []
        for _ in range(5):
            state, metrics = train_step(state, {"weak": weak}, place(batch))
            found.append(float(metrics["loss"]))
        return found

    expected = losses(plain, None, jax.devices("cpu")[0])
    np.testing.assert_allclose(losses(model, mesh, None), expected, rtol=tolerance)
