"""Describes a grouped matmul to measure: its sizes, its loads, its three products."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.chips import Chip
from helios_jax.plan.compiler.timing import HALF, Visits

FORWARD, ROWS, WEIGHTS = PRODUCTS = 'rows·w', 'd rows', 'd w'
LOADS = 'even', 'skewed'
# Rows (16,384 tokens times the experts that each visits), experts, D and F.
SHAPES = {
    'e8': (32768, 8, 4096, 14336),
    'e128': (131072, 128, 2048, 768),
    'e56': (229376, 56, 4096, 2048),
}


@dataclasses.dataclass(frozen=True)
class GroupedProblem:
    """Gate or up projection of one layer: M rows [D] times weights [E D F], in bfloat16."""

    num_rows: int
    experts: int
    embed_dim: int
    expert_dim: int
    load: str = 'even'

    @property
    def flops(self) -> float:
        """FLOPs of each product."""
        return 2.0 * self.num_rows * self.embed_dim * self.expert_dim

    @property
    def group_sizes(self) -> np.ndarray:
        """Rows of each expert: equal, or the busiest four times the idlest, in no order."""
        E, M = self.experts, self.num_rows
        shares = np.ones(E) if self.load == 'even' else np.linspace(1, 4, E)
        shares = np.random.default_rng(E).permutation(shares)
        ends = np.rint(np.cumsum(shares) / np.sum(shares) * M)
        return np.diff(ends, prepend=0).astype(np.int32)

    def arguments(self, product: str) -> tuple[Any, Any, Any]:
        """Shapes of a product's operands and of the group sizes."""
        M, E, D, F = self.num_rows, self.experts, self.embed_dim, self.expert_dim
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
        operands = {
            FORWARD: (shape(M, D), shape(E, D, F)),
            ROWS: (shape(M, F), shape(E, D, F)),
            WEIGHTS: (shape(M, D), shape(M, F)),
        }
        return *operands[product], jax.ShapeDtypeStruct((E,), jnp.int32)

    def floor_seconds(self, chip: Chip) -> dict[str, float]:
        """Seconds that no kernel can beat.

        Returns:
          `flops`: of a dense matmul at the chip's peak; `bytes`: of reading operands and writing
          the result once.
        """
        M, E, D, F = self.num_rows, self.experts, self.embed_dim, self.expert_dim
        moved = HALF * (M * D + M * F + E * D * F)
        return {
            'flops': self.flops / chip.peak_flops,
            'bytes': moved / chip.hbm_bytes_per_second,
        }


class GroupedCandidate(NamedTuple):
    """A way to compute a product, and how often the regions of its kernel run."""

    function: Any  # of GroupedProblem.arguments
    kernel: str  # what the kernel's name contains
    visits: Visits
