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
    # Written out: a product inside another custom_vjp is none that a checkpoint policy could keep.
    return jnp.einsum(equation, x, w.astype(x.dtype)), (x, w)


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


@jax.custom_vjp
def grouped(x_MD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """Return [M, F]: the first sizes[0] rows of x times w[0], the next sizes[1] times w[1], and so on.

    In x's dtype; the gradient of w as in `project`.
    """
    return jax.lax.ragged_dot(x_MD, w_EDF.astype(x_MD.dtype), sizes_E)


def _grouped_forward(x_MD: Array, w_EDF: Array, sizes_E: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return jax.lax.ragged_dot(x_MD, w_EDF.astype(x_MD.dtype), sizes_E), (x_MD, w_EDF, sizes_E)


def _grouped_backward(saved: tuple[Array, Array, Array], dy_MF: Array) -> tuple[Array, Array, None]:
    x_MD, w_EDF, sizes_E = saved
    dx_MD = jax.lax.ragged_dot(dy_MF, jnp.swapaxes(w_EDF, 1, 2).astype(dy_MF.dtype), sizes_E)
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    dw_EDF = jax.lax.ragged_dot_general(x_MD, dy_MF, sizes_E, over_rows, preferred_element_type=w_EDF.dtype)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), None


grouped.defvjp(_grouped_forward, _grouped_backward)
