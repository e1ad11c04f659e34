"""Matmul precision: float32 arrays are multiplied in float32 on every platform."""

import contextlib

import jax
import jax.numpy as jnp


def matmuls_in(dtype: jnp.dtype | str) -> contextlib.AbstractContextManager[None]:
    """Return a context, entered while tracing, in which a matmul of `dtype` arrays keeps that dtype's precision.

    TPUs multiply float32 arrays in bfloat16 and recent GPUs in TF32 unless told otherwise, and a run asked to compute
    in float32 is one that compares numbers. bfloat16 needs nothing: products are exact and accumulate in float32.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()
