"""Permutation of rows: copies of chosen rows, and sums of chosen rows, each a gather.

XLA's gather of rows of 4 KiB takes 24 cycles a row on one core of v5e and v5p, 19 on v6e: on v5p
four times what the bytes take. Our kernels (tpu.py) are bound by HBM. On NVIDIA GPUs a kernel
copies rows (gpu.py), and XLA sums them, in one pass with what follows. Elsewhere, and for what the
kernels cannot take, XLA's gather does. No function here is differentiable: parallel/experts.py
knows that each is the other's transpose.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from helios_jax.kernels.permutation import gpu, tpu


def take(
    x: Float[Array, 'N D'], index: Int[Array, 'M'], platform: str | None = None
) -> Float[Array, 'M D']:
    """Copies rows; an index beyond x takes the last one.

    Args:
      platform: 'tpu', 'gpu' or 'cpu', where it is compiled for another machine.
    """
    here = jax.default_backend()
    if here == 'gpu' == (platform or here):
        reason = gpu.refusal(x, len(index))
        if not reason:
            return gpu.take(x, index)
        log_refusal('gpu', reason)
    if by_kernel(x, len(index), 1, platform):
        return tpu.take(x, index)
    return x.at[index].get(mode='clip')


def take_sums(
    x: Float[Array, 'N D'], index: Int[Array, 'A X'], platform: str | None = None
) -> Float[Array, 'A D']:
    """Sums, in float32 or wider, the X rows that each row of the index names; else as `take`."""
    if by_kernel(x, len(index), index.shape[1], platform):
        return tpu.take_sums(x, index)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.at[index].get(mode='clip').sum(axis=1, dtype=wide).astype(x.dtype)


def by_kernel(x: Float[Array, 'N D'], length: int, summed: int, platform: str | None) -> bool:
    """Tells whether our kernel makes the result; on a TPU, logs where it does not."""
    if (platform or jax.default_backend()) != 'tpu':
        return False
    reason = tpu.refusal(x, length, summed)
    if reason:
        log_refusal('tpu', reason)
    return not reason


@functools.cache
def log_refusal(platform: str, reason: str) -> None:
    """Logs each reason once, however often the model is traced."""
    logging.getLogger(__name__).info("permutation: XLA's gather on %s: %s", platform, reason)
