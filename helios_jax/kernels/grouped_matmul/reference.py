"""Grouped matmul by XLA's ragged dot: masked dense products of every group where it has no kernel.

It is right on any device, and slow on all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def multiply(
    rows: Float[Array, 'M _'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    transposed: bool = False,
) -> Float[Array, 'M _']:
    """Rows of group e times weights[e], or its transpose; zeros for rows of no group."""
    dims = (((1,), (2 if transposed else 1,)), ((), ()))
    return ragged(rows, weights, group_sizes, dims, [0])


def weight_gradient(
    rows: Float[Array, 'M D'], gradient: Float[Array, 'M F'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'E D F']:
    """Transpose of each group's rows times its rows of `gradient`; zeros for an empty group."""
    return ragged(rows, gradient, group_sizes, (((0,), (0,)), ((), ())), [])


def ragged(x: Array, y: Array, group_sizes: Array, dims: Any, groups: list[int]) -> Array:
    """Ragged along the first dimension of x; `groups` is the one of y that counts groups."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dims, lhs_ragged_dimensions=[0], rhs_group_dimensions=groups
    )
    return jax.lax.ragged_dot_general(
        x,
        y,
        group_sizes.astype(jnp.int32),
        numbers,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=x.dtype,
    )
