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


def refusal(x: Float[Array, 'N D'], length: int) -> str:
    """Reason why the kernel cannot copy so many rows; '' if it can."""
    width = x.shape[1]
    if x.dtype != jnp.bfloat16 or width % GRAIN:
        return f'the kernel copies bfloat16 and multiples of {GRAIN} columns, no {x.dtype} {width}.'
    if min(x.size, length) == 0 or max(x.size, length * width) >= INDEXED:
        return f'the kernel copies 1 to {INDEXED - 1} values, not {length} rows of {x.shape}.'
    return ''


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
