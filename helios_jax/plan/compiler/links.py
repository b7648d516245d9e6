"""Predicts how long a collective takes on the links of a TPU slice.

A chip has two links in each dimension of its slice, one to each side; at the ends of a slice that
is no torus one is missing, and there the group's transfers are as slow as its worst chip's. All
dimensions that a group spans carry a share of its bytes. Transfers of other collectives, and of
chips outside the group, are not counted.
"""

import math
from typing import NamedTuple

from helios_jax.chips import Chip
from helios_jax.plan.compiler.collectives import Collective
from helios_jax.plan.measured import HOP_SECONDS

# Times that a group sends all of its bytes, but for each device's own share.
PASSES = {'all-gather': 1, 'reduce-scatter': 1, 'all-reduce': 2}


class Slice(NamedTuple):
    """Chips of a slice and where a program's devices lie in it."""

    chip: Chip
    sizes: tuple[int, ...]  # chips in each dimension
    places: tuple[tuple[int, ...], ...]  # coordinates of each device, in the program's order

    @property
    def torus(self) -> bool:
        return all(size % self.chip.torus == 0 for size in self.sizes)

    @property
    def link(self) -> float:
        """Bytes per second of one link, one way; a chip's devices share it."""
        links = 2 * self.chip.dimensions
        return self.chip.network_bytes_per_second / links


def seconds(one: Collective, where: Slice) -> float:
    """Predicts the time of a collective that has the links to itself."""
    count = len(one.group)
    if count == 1:
        return 0.0
    places = [where.places[device] for device in one.group]
    extents = [len(set(along)) for along in zip(*places, strict=True)]
    around = [where.torus and e == size > 2 for e, size in zip(extents, where.sizes, strict=True)]
    links = sum((2 if ring else 1) for e, ring in zip(extents, around, strict=True) if e > 1)
    if not links:  # the two devices of a chip
        return one.num_bytes / where.chip.hbm_bytes_per_second
    hops = [e // 2 if ring else e - 1 for e, ring in zip(extents, around, strict=True)]
    latency = HOP_SECONDS.value * sum(hops)
    if one.kind == 'collective-permute':
        return one.num_bytes / where.link + latency
    if one.kind == 'all-to-all':
        # A byte's mean way is half of the longest on a ring, and a third on a line.
        ways = [h / 2 if ring else h / 3 for h, ring in zip(hops, around, strict=True)]
        return one.num_bytes * math.fsum(ways) / (links * where.link) + latency
    share = (count - 1) / count
    return PASSES[one.kind] * (one.num_bytes * share / (links * where.link) + latency)
