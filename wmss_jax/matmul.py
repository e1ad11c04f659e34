"""Products with a parameter matrix, forward and backward."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def transposed(x: Array, axes: Sequence[int]) -> Array:
    """Return `x` with its axes permuted, for a product that sums over what was in front.

    On a CPU as an array of its own: XLA's CPU backend multiplies a matrix that it must read across its rows at less
    than half the speed (32 instead of 78 GFLOP/s on one core, for the gradient of a head matrix), and the copy is small
    beside the product. Other backends choose layouts by themselves.
    """
    permute = lambda x: jnp.transpose(x, axes)
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(permute(x)), default=permute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: Array, w: Array) -> Array:
    """Return the einsum of activations and a matrix in the activations' dtype, such as "BTD,DNH->BTNH".

    The matrix' letters are those it sums over with x, in x the last ones, then new ones. Its gradient is accumulated
    and returned in its own dtype: parameters in float32 get gradients that were never rounded to bfloat16.
    """
    return jnp.einsum(equation, x, w.astype(x.dtype))


def _forward(equation: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(equation, x, w), (x, w)


def _backward(equation: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, w.astype(dy.dtype))
    kept = [axis for axis, letter in enumerate(x_letters) if letter not in w_letters]
    summed = [axis for axis, letter in enumerate(x_letters) if letter in w_letters]
    swapped = "".join(x_letters[axis] for axis in (*summed, *kept))
    dw = jnp.einsum(
        f"{swapped},{y_letters}->{w_letters}", transposed(x, (*summed, *kept)), dy, preferred_element_type=w.dtype
    )
    return dx, dw.astype(w.dtype)


project.defvjp(_forward, _backward)
