"""The gradient of SwiGLU in one pass over memory, in Pallas for NVIDIA GPUs (Triton).

A program takes a few rows and walks over their columns: gate, up and the product's gradient are
read once, all results are written once, and the weight's gradient adds up in registers.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

COLUMNS = 512  # of a step, at most; Triton's sizes are powers of two
VALUES = 2048  # of each operand in a step
GRAIN = 128  # F must be a multiple
INDEXED = 2**31  # values that a 32-bit index reaches


def refusal(gate_up: Float[Array, 'M two_F'], weight: Float[Array, 'M']) -> str:
    """Reason why the kernel cannot take these; '' if it can."""
    if gate_up.dtype != jnp.bfloat16 or weight.dtype != jnp.float32:
        return f'the kernel takes bfloat16 and float32 weights, no {gate_up.dtype}.'
    if gate_up.shape[1] % (2 * GRAIN) or not 0 < gate_up.size < INDEXED:
        return f'the kernel takes F in multiples of {GRAIN}, up to {INDEXED - 1} values.'
    return ''


def gradient(
    gate_up: Float[Array, 'M two_F'],
    weight: Float[Array, 'M'],
    d_product: Float[Array, 'M F'],
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Computes the gradient of gate and up, the product, and the gradient of the weight."""
    M, F = d_product.shape
    columns = math.gcd(F, COLUMNS)
    rows = math.gcd(M, VALUES // columns)

    def body(gate_up, weight, d_product, d_gate_up, product, d_weight):
        here = pl.ds(pl.program_id(0) * rows, rows)
        share = triton.load(weight.at[here])

        def step(count: Array, total: Array) -> Array:
            first, second = pl.ds(count * columns, columns), pl.ds(F + count * columns, columns)
            gate = triton.load(gate_up.at[here, first]).astype(jnp.float32)
            up = triton.load(gate_up.at[here, second]).astype(jnp.float32)
            d_out = triton.load(d_product.at[here, first]).astype(jnp.float32)
            sigmoid = 1 / (1 + jnp.exp(-gate))
            silu = gate * sigmoid
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            weighted = d_out * share[:, None]
            narrow = lambda x: x.astype(d_gate_up.dtype)
            triton.store(d_gate_up.at[here, first], narrow(weighted * up * slope))
            triton.store(d_gate_up.at[here, second], narrow(weighted * silu))
            triton.store(product.at[here, first], narrow(silu * up * share[:, None]))
            return total + jnp.sum(d_out * silu * up, axis=1)

        total = jax.lax.fori_loop(0, F // columns, step, jnp.zeros(rows, jnp.float32))
        triton.store(d_weight.at[here], total)

    return pl.pallas_call(
        body,
        grid=(M // rows,),
        out_shape=(
            jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype),
            jax.ShapeDtypeStruct(d_product.shape, gate_up.dtype),
            jax.ShapeDtypeStruct((M,), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name='swiglu_gradient',
    )(gate_up, weight, d_product)
