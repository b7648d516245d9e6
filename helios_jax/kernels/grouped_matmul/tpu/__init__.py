"""Grouped matmul on TPU: Helios's own kernels for all three products.

M rows are cut into tiles; a list of which group has which rows of which tile (work.py) steers the
kernels' fetches. A group's part of a tile is multiplied in pieces of 1,024 to 64 rows under a mask,
so that a group that fills no tile takes little more time than its rows do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from helios_jax.chips import CHIPS
from helios_jax.kernels.attention.tpu.blocks import generation
from helios_jax.kernels.grouped_matmul.tpu import gradient_kernel, multiply_kernel, tiles, work
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles, MultiplyTiles


def multiply(
    rows: Float[Array, 'M _'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    transposed: bool = False,
    interpret: Any = False,
    chosen: MultiplyTiles | None = None,
) -> Float[Array, 'M _']:
    """Computes `reference.multiply`.

    Args:
      interpret: run the kernel in Python on any device; `pltpu.InterpretParams` looks for races.
      chosen: tiles in place of the calculation's.
    Raises:
      NotImplementedError: sizes that do not fit in VMEM, or an unknown TPU.
    """
    target = generation()
    (M, depth), N = rows.shape, weights.shape[1 if transposed else 2]
    if M == 0:
        return jnp.zeros((M, N), rows.dtype)
    chosen = chosen or tiles.for_multiply(
        target, M, depth, N, len(group_sizes), rows.dtype.itemsize, transposed
    )
    kernel = functools.partial(
        multiply_kernel.multiply,
        transposed=transposed,
        tiles=chosen,
        vmem=CHIPS[target].kernel_vmem_bytes,
        interpret=interpret,
    )
    listed = work.of_tiles(group_sizes, M, chosen.rows), work.turns(group_sizes, M)
    # JAX's dead-code elimination removes an unused jit call, but not an unused pallas_call: without
    # the jit, what is saved for the backward pass would be computed again nevertheless.
    return jax.jit(kernel)(rows, weights, *listed)


def weight_gradient(
    rows: Float[Array, 'M D'],
    gradient: Float[Array, 'M F'],
    group_sizes: Int[Array, 'E'],
    *,
    interpret: Any = False,
    chosen: GradientTiles | None = None,
) -> Float[Array, 'E D F']:
    """Computes `reference.weight_gradient`; arguments and errors are `multiply`'s."""
    target, num_groups = generation(), len(group_sizes)
    (M, D), F = rows.shape, gradient.shape[1]
    if M == 0:
        return jnp.zeros((num_groups, D, F), rows.dtype)
    chosen = chosen or tiles.for_gradient(target, M, D, F, num_groups, rows.dtype.itemsize)
    kernel = functools.partial(
        gradient_kernel.weight_gradient,
        num_groups=num_groups,
        tiles=chosen,
        vmem=CHIPS[target].kernel_vmem_bytes,
        interpret=interpret,
    )
    return jax.jit(kernel)(rows, gradient, work.of_groups(group_sizes, M, chosen.rows))


def able(x: Float[Array, 'M _'], weights: Float[Array, 'E D F']) -> None:
    """Raises NotImplementedError, saying why, if the sizes of a product do not fit in VMEM."""
    target, (E, D, F), itemsize = generation(), weights.shape, x.dtype.itemsize
    M = max(len(x), 1)
    tiles.for_multiply(target, M, D, F, E, itemsize, False)
    tiles.for_multiply(target, M, F, D, E, itemsize, True)
    tiles.for_gradient(target, M, D, F, E, itemsize)
