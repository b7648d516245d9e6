"""Tile sizes of the kernels: those of which a short calculation expects the least time.

It adds up the cycles of the products, some hundred more that each product and each grid step takes
to begin with, the rows of others that a ragged group's products have among theirs, and the waits
for HBM. The constants are the compiler's schedules'; `helios bench moe` shows what came of them.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from helios_jax.chips import CHIPS, MIB, Chip

LANES = 128
ROWS = (2048, 1024, 512, 256, 128)  # rows of a tile that are tried
STEP = 280  # cycles of a grid step beside its products
RATHER = 0.05  # cycles that are worth as much as one that HBM is busy, where it does not matter
LONGEST = 8192  # cycles of one product's code: longer code takes longer to compile
SLACK = 4 * MIB  # VMEM for the values of a product in progress


class Generation(NamedTuple):
    """Properties of a generation's products."""

    side: int  # of an MXU
    # Rows of a product, each half of the one before. Below the last, loading the weights into the
    # MXU, or an MXU's worth of contraction, takes the time.
    plain: tuple[int, ...]
    transposed: tuple[int, ...]
    contracted: tuple[int, ...]
    start: int  # cycles until a product's first results are there
    transposing: int  # the same where an operand is transposed before


V5 = Generation(128, (512, 256, 128, 64), (512, 256, 128, 64), (512, 256, 128), 180, 420)
V6 = Generation(256, (1024, 512, 256, 128), (1024, 512, 256), (1024, 512, 256), 320, 420)
SETUPS = {'v5e': V5, 'v5p': V5, 'v6e': V6, 'tpu7x': V6}


class MultiplyTiles(NamedTuple):
    rows: int
    columns: int
    sizes: tuple[int, ...]  # rows of a product, each half of the one before
    steps: tuple[int, ...]  # columns of a product of each size; divide `columns`
    cores: int = 1  # that share the blocks of columns


class GradientTiles(NamedTuple):
    rows: int
    height: int  # of a block of the result, along D
    width: int  # along F
    sizes: tuple[int, ...]
    steps: tuple[int, ...]  # part of the height that a product of each size makes


class Operands(NamedTuple):
    """Sizes of the operands, and the chip."""

    generation: str
    num_rows: int
    num_groups: int
    itemsize: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def setup(self) -> Generation:
        return SETUPS[self.generation]

    @property
    def speed(self) -> float:
        """Multiply-adds of one core a cycle; an exact product of float32 takes six of bfloat16."""
        return self.chip.num_mxus * self.chip.macs / (6 if self.itemsize == 4 else 1)

    @property
    def cost(self) -> float:
        """Cycles that a core waits for an element, when all cores do."""
        chip = self.chip
        return chip.clock / chip.hbm_bytes_per_second * chip.num_cores * self.itemsize

    def cores(self, blocks: int) -> int:
        """Counts the cores that have as many blocks of columns each: all or one."""
        return self.chip.num_cores if blocks % self.chip.num_cores == 0 else 1

    def fits(self, operands: int, results: int) -> bool:
        """Tells whether blocks of so many elements, two of each, fit in VMEM."""
        # What an exact product of float32 takes operands apart into is three times bfloat16.
        parts = 6 * operands if self.itemsize == 4 else 0
        taken = 2 * self.itemsize * (operands + results) + parts + SLACK
        return taken <= self.chip.kernel_vmem_bytes

    def row_sizes(self, least: int) -> list[int]:
        """Lists the rows of a tile worth a try: no more than a group's even share, or `least`."""
        most = max(self.num_rows // self.num_groups, least)
        found = [rows for rows in ROWS if least <= rows <= min(most, self.num_rows)]
        return found or [up(min(self.num_rows, least), 16)]

    def products(self, sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
        """Keeps the sizes of products that a tile is made of; a small tile is one."""
        return tuple(size for size in sizes if rows % size == 0) or (rows,)

    def steps(self, products: tuple[int, ...], size: int, other: int) -> tuple[int, ...]:
        """Cuts `size`, for each product with `other`, into parts of no more than LONGEST."""
        most = [LONGEST * self.speed / (rows * other) for rows in products]
        return tuple(part(size, limit, self.setup.side) for limit in most)

    def cycles(
        self, products: tuple[int, ...], rows: int, area: int, start: int, usual: int, more: int
    ) -> float:
        """Expects the cycles of one core for a block that all items go through.

        Args:
          products: rows of a product, by size.
          rows: of a tile.
          area: multiply-adds of one row.
          start: cycles until a product's first results are there.
          usual: elements that are moved for a tile.
          more: elements that are moved besides for a group.
        """
        items = self.num_rows / rows + self.num_groups - 1
        product = products[0] * area / self.speed
        each = (product + start * -(-product // LONGEST)) / products[0]
        ragged = min(items, 2 * self.num_groups) * products[-1] / 2
        busy = items * STEP + (self.num_rows + ragged) * each
        groups = min(self.num_groups, items)
        moved = self.cost * (self.num_rows / rows * usual + groups * more)
        # A tile is fetched while the last group's part of the one before is worked on: any share
        # of a tile, where a group ends in it; a quarter of the groups is taken to.
        fetch, tile = self.cost * usual, rows * each
        wait = fetch**2 / (2 * tile) if fetch < tile else fetch - tile / 2
        return max(busy, moved) + groups * wait / 4 + RATHER * moved


@functools.cache
def for_multiply(
    generation: str,
    num_rows: int,
    depth: int,
    width: int,
    num_groups: int,
    itemsize: int,
    transposed: bool,
) -> MultiplyTiles:
    """Chooses tiles for rows [M depth] times [E depth width].

    Raises:
      NotImplementedError: not even the smallest fit in VMEM.
    """
    at = Operands(generation, num_rows, num_groups, itemsize)
    setup, long = at.setup, up(depth, LANES)
    sizes = setup.transposed if transposed else setup.plain

    def cycles(tile: tuple[int, int]) -> float:
        rows, columns = tile
        area = up(depth, setup.side) * up(columns, setup.side)
        found = at.cycles(
            at.products(sizes, rows), rows, area, setup.start,
            usual=rows * (depth + columns), more=depth * columns,
        )  # fmt: skip
        # What comes before the first step is waited for.
        waits = at.cost * depth * columns
        return width // columns // at.cores(width // columns) * found + waits

    columns_tried = [n for n in (width, *sides(width)) if width % n == 0]
    tiles = itertools.product(at.row_sizes(max(sizes[-1], ROWS[-1])), columns_tried)
    able = (tile for tile in tiles if at.fits(long * sum(tile), tile[0] * tile[1]))
    rows, columns = best(able, cycles, f'a contraction over {depth}')
    products = at.products(sizes, rows)
    steps = at.steps(products, columns, depth)
    return MultiplyTiles(rows, columns, products, steps, at.cores(width // columns))


@functools.cache
def for_gradient(
    generation: str, num_rows: int, height: int, width: int, num_groups: int, itemsize: int
) -> GradientTiles:
    """Chooses tiles for a result [E height width] of M rows.

    Raises:
      NotImplementedError: not even the smallest fit in VMEM.
    """
    at = Operands(generation, num_rows, num_groups, itemsize)
    setup = at.setup

    def cycles(tile: tuple[int, int, int]) -> float:
        rows, h, w = tile
        found = at.cycles(
            at.products(setup.contracted, rows), rows, up(h, setup.side) * up(w, setup.side),
            setup.transposing, usual=rows * (h + w), more=h * w,
        )  # fmt: skip
        blocks = -(-height // h) * -(-width // w)
        return -(-blocks // at.chip.num_cores) * found

    tiles = itertools.product(at.row_sizes(setup.contracted[-1]), sides(height), sides(width))
    # The sums are float32.
    able = ((r, h, w) for r, h, w in tiles if at.fits(r * (h + w), h * w * (1 + 2 // itemsize)))
    rows, h, w = best(able, cycles, f'a result of {height} by {width}')
    products = at.products(setup.contracted, rows)
    return GradientTiles(rows, h, w, products, at.steps(products, h, w))


def best(tiles: Iterable[Any], cycles: Callable[[Any], float], what: str) -> Any:
    found = min(tiles, key=cycles, default=None)
    if found is None:
        raise NotImplementedError(f'has no tiles that fit in VMEM for {what}.')
    return found


def sides(size: int) -> list[int]:
    """Lists the sizes of a block along an axis: multiples of a register's lanes, or the axis."""
    return [*range(LANES, min(size, 4096 + 1), LANES), *([size] if size <= 4096 else [])]


def part(size: int, most: float, side: int) -> int:
    """Finds the largest part of a block that divides it, of `most` if it can be.

    A part is a multiple of an MXU's side where the block is, or of a register's lanes.
    """
    if size % LANES:
        return size
    unit = side if size % side == 0 else LANES
    count = size // unit
    return unit * max(
        n for n in range(1, count + 1) if count % n == 0 and n * unit <= max(most, unit)
    )


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
