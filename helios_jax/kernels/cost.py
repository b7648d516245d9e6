"""Tells XLA what a kernel costs: its scheduler hides transfers behind what it knows to take time.

A kernel without an estimate counts as taking none. Then the transfers of a layer are crowded beside
its matmuls, in front of an attention kernel that could hide them all.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl


def estimate(flops: int, arrays: Any, transcendentals: int = 0) -> pl.CostEstimate:
    """Estimates a kernel.

    Args:
      arrays: all that it reads and writes, once each: arrays or their shapes.
      transcendentals: number of exponentials and the like.
    """
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=read)
