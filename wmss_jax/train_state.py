"""What training changes: parameters, optimizer state, and how these lie on a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree


class TrainState(NamedTuple):
    """All that training changes: optimizer step, parameters of the trained roles, optimizer state."""

    step: Int[Array, ""]
    params: PyTree[Array]
    opt_state: PyTree[Array]


def abstract_state(params: Mapping[str, PyTree], tx: optax.GradientTransformation) -> PyTree:
    """Return a `TrainState` of shapes, dtypes and shardings: what a checkpoint is restored onto.

    Optimizer state is sharded like the parameters it belongs to, everything else replicated.

    Args:
        params: {role: parameters} of the trained roles, arrays or ShapeDtypeStructs with shardings.
    """
    # Only shardings on a mesh are asked for: where there is none, arrays are left uncommitted to a device.
    on_mesh = lambda leaf: leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
    one = on_mesh(jax.tree.leaves(params)[0])
    replicated = None if one is None else NamedSharding(one.mesh, P())
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    opt_state = map_params(
        tx,
        lambda leaf, param: place(leaf, on_mesh(param)),
        params,
        dict(params),
        otherwise=lambda x: place(x, replicated),
    )
    params = jax.tree.map(lambda leaf: place(leaf, on_mesh(leaf)), dict(params))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, params, opt_state)


def init_state(params: Mapping[str, PyTree[Array]], tx: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; optimizer state is born sharded like the parameters it belongs to.

    Args:
        params: {role: parameters} of the trained roles; copied, since the train step gives the state's memory away.
    """
    abstract = abstract_state(params, tx)
    params = jax.tree.map(jnp.copy, dict(params))
    if abstract.step.sharding is None:
        return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))
    opt_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding), params, opt_state)


def map_params(
    tx: optax.GradientTransformation,
    f: Callable,
    params: PyTree,
    rest: PyTree,
    *,
    tree: PyTree | None = None,
    otherwise: Callable = lambda leaf: leaf,
) -> PyTree:
    """Return `tree` (default: the shapes of tx's state) with f(leaf, rest) on the leaves that mirror a parameter."""
    state = jax.eval_shape(tx.init, params) if tree is None else tree
    return optax.tree.map_params(tx, f, state, rest, transform_non_params=otherwise)  # pyright: ignore[reportArgumentType]
