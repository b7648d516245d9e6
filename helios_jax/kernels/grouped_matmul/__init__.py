"""The only door to the grouped matmul: each group of rows times its own matrix."""

import logging

import jax
from jaxtyping import Array, Float, Int

from helios_jax.kernels.grouped_matmul import reference

log = logging.getLogger(__name__)
_warned: set[str] = set()


def grouped_matmul(
    x: Float[Array, 'M D'], weights: Float[Array, 'E D F'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'M F']:
    """Rows of group e times weights[e]; rows are sorted by group.

    Accumulates in float32, returns x.dtype. Rows beyond sum(group_sizes) belong to no group:
    their result is unspecified and must not be read.

    Raises:
      ValueError: the dtypes of x and weights differ.
    """
    if x.dtype != weights.dtype:
        raise ValueError(f'x is {x.dtype}, but weights are {weights.dtype}')
    if jax.default_backend() == 'gpu' and 'gpu' not in _warned:
        _warned.add('gpu')
        log.warning('grouped_matmul: no kernel for GPUs yet; XLA computes every expert densely')
    return reference.grouped_matmul(x, weights, group_sizes)
