"""Copies of chosen rows in Pallas for NVIDIA GPUs (Triton): a program copies a few rows."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

COLUMNS = 1024  # of a step, at most; Triton's sizes are powers of two
VALUES = 4096  # of a step
GRAIN = 128  # D must be a multiple
INDEXED = 2**31  # values that a 32-bit index reaches


def can_take(x: Float[Array, 'N D'], length: int) -> bool:
    width = x.shape[1]
    fits = x.dtype == jnp.bfloat16 and width % GRAIN == 0
    return fits and 0 < x.size < INDEXED and 0 < length * width < INDEXED


def take(
    x: Float[Array, 'N D'], index: Int[Array, 'M'], *, interpret: bool = False
) -> Float[Array, 'M D']:
    """Copies rows; an index beyond x takes the last one."""
    (N, D), M = x.shape, len(index)
    columns = math.gcd(D, COLUMNS)
    rows = math.gcd(M, VALUES // columns)

    def body(x, index, out):
        here = pl.ds(pl.program_id(0) * rows, rows)
        chosen = jnp.clip(triton.load(index.at[here]), 0, N - 1)
        for first in range(0, D, columns):
            part = pl.ds(first, columns)
            triton.store(out.at[here, part], x[chosen, part])

    return pl.pallas_call(
        body,
        grid=(M // rows,),
        out_shape=jax.ShapeDtypeStruct((M, D), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name='take_rows',
    )(x, index)
