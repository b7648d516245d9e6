"""The arrays that a traced step stores for its backward pass: memory/store.py marks them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from helios_jax.memory import jaxprs, policy
from helios_jax.memory.store import Mark


class SavedArray(NamedTuple):
    """One array that lives from forward to backward."""

    name: str  # '' for one that nobody named
    action: str
    dtype: str
    shape: tuple[int, ...]  # of one layer, on all devices
    local: tuple[int, ...]  # of one layer, on one device
    layers: int  # stacked by a scan; 0 if it lies outside of one

    @property
    def elements(self) -> int:
        """Number on one device, all layers."""
        return max(1, self.layers) * math.prod(self.local)

    @property
    def num_bytes(self) -> int:
        """Bytes on one device, all layers."""
        return self.elements * jnp.dtype(self.dtype).itemsize

    @property
    def host(self) -> bool:
        return policy.parse(self.action).host


def saved(jaxpr: jex.ClosedJaxpr) -> list[SavedArray]:
    """The stored arrays of a traced step, in order."""
    return list(_walk(jaxpr.jaxpr, 0))


def _walk(jaxpr: Any, layers: int) -> Iterator[SavedArray]:
    makers = jaxprs.made_by(jaxpr)
    for equation in jaxpr.eqns:
        if mark := Mark.read(jaxprs.given_name(equation)):
            aval = equation.outvars[0].aval
            maker, _ = makers.get(id(equation.invars[0]), (None, 0))
            local = _local(aval.shape, mark, maker)
            stacked = layers if mark.scanned else 0
            yield SavedArray(mark.tensor, mark.action, str(aval.dtype), aval.shape, local, stacked)
        # The innermost scan is that over layers; one over microbatches, around it, stacks nothing.
        inner_layers = jaxprs.scan_length(equation) or layers
        for inner in jaxprs.inner_jaxprs(equation):
            yield from _walk(inner, inner_layers)


def _local(shape: tuple[int, ...], mark: Mark, maker: Any) -> tuple[int, ...]:
    """Shape on one device, by the sharding constraint that made the array."""
    if mark.local is not None:
        return mark.local[: len(shape)]  # exponents lack the last axis
    sharding = jaxprs.constraint(maker) if maker is not None else None
    return tuple(sharding.shard_shape(shape)) if sharding is not None else shape
