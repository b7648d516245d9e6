"""Tile sizes of the kernels: those of which a short calculation expects the least time.

A grid step takes its products' cycles, and some hundred more to begin with, or what its bytes in
HBM take. The constants are the compiler's schedules'; `helios bench moe` shows what came of them.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from helios_jax.chips import CHIPS, MIB, Chip

LANES = 128
RATHER = 0.05  # cycles that are worth as much as one that HBM is busy, where it does not matter
ROWS = (1024, 512, 256, 128)  # rows of a tile that are tried
STEP = 280  # cycles of a grid step beside its products
SLACK = 4 * MIB  # VMEM for the values of a product in progress
# Cycles of one product's code: longer code takes longer to compile, shorter waits more for results.
LONGEST = 8192


class Setup(NamedTuple):
    """Properties of a generation's products."""

    sizes: tuple[int, ...]  # rows of a product, each half of the one before
    contractions: tuple[int, ...]  # the same where rows are contracted: no fewer than an MXU's
    start: int  # cycles until a product's first results are there
    transposing: int  # the same where an operand is transposed before


SETUPS = {
    'v5e': Setup((512, 256, 128, 64), (512, 256, 128), 180, 420),
    'v5p': Setup((512, 256, 128, 64), (512, 256, 128), 180, 420),
    'v6e': Setup((512, 256, 128), (512, 256), 320, 420),
    'tpu7x': Setup((512, 256, 128), (512, 256), 280, 420),
}


class MultiplyTiles(NamedTuple):
    rows: int
    columns: int
    sizes: tuple[int, ...]  # rows of a product, each half of the one before
    steps: tuple[int, ...]  # columns of a product of each size; divide `columns`


class GradientTiles(NamedTuple):
    rows: int
    height: int  # of a block of the result, along D
    width: int  # along F
    sizes: tuple[int, ...]
    steps: tuple[int, ...]  # part of the height that a product of each size makes


@functools.cache
def for_multiply(
    generation: str, num_rows: int, depth: int, width: int, num_groups: int, itemsize: int
) -> MultiplyTiles:
    """Chooses tiles for rows [M depth] times [E depth width].

    Raises:
      NotImplementedError: not even the smallest fit in VMEM.
    """
    chip, setup = CHIPS[generation], SETUPS[generation]

    def fits(tile: tuple[int, int]) -> bool:
        rows, columns = tile
        blocks = rows * padded(depth) + padded(depth) * columns + rows * columns
        return 2 * itemsize * blocks + SLACK <= chip.kernel_vmem_bytes

    def cycles(tile: tuple[int, int]) -> float:
        rows, columns = tile
        block = min(setup.sizes[0], rows)
        product = block * columns * depth / speed(chip)
        step = STEP + rows / block * (product + setup.start * -(-product // LONGEST))
        moved = rows * (depth + columns) * itemsize * cycles_per_byte(chip)
        more = depth * columns * itemsize * cycles_per_byte(chip)  # weights, of a group's first
        steps = num_rows / rows
        usual = max(step, moved) + RATHER * moved
        waits = min(num_groups, steps) * max(0.0, moved + more - usual)
        return turns(chip, -(-width // columns)) * (steps * usual + waits)

    tiles = itertools.product(row_sizes(num_rows, num_groups, itemsize), sizes(width))
    rows, columns = best(filter(fits, tiles), cycles, f'a contraction over {depth}')
    heights = heights_of(setup.sizes, rows)
    steps = [part(columns, LONGEST * speed(chip) / (size * depth)) for size in heights]
    return MultiplyTiles(rows, columns, heights, tuple(steps))


@functools.cache
def for_gradient(
    generation: str, num_rows: int, height: int, width: int, num_groups: int, itemsize: int
) -> GradientTiles:
    """Chooses tiles for a result [E height width] of M rows.

    Raises:
      NotImplementedError: not even the smallest fit in VMEM.
    """
    chip, setup = CHIPS[generation], SETUPS[generation]

    def fits(tile: tuple[int, int, int]) -> bool:
        rows, h, w = tile
        blocks = 2 * itemsize * (rows * (h + w) + h * w) + 4 * h * w
        return blocks + SLACK <= chip.kernel_vmem_bytes

    def cycles(tile: tuple[int, int, int]) -> float:
        rows, h, w = tile
        block = min(setup.sizes[0], rows)
        product = block * h * w / speed(chip)
        step = STEP + rows / block * (product + setup.transposing * -(-product // LONGEST))
        moved = rows * (h + w) * itemsize * cycles_per_byte(chip)
        more = h * w * itemsize * cycles_per_byte(chip)  # the result, after a group's last
        steps = num_rows / rows
        usual = max(step, moved) + RATHER * moved
        waits = min(num_groups, steps) * max(0.0, moved + more - usual)
        return turns(chip, -(-height // h) * -(-width // w)) * (steps * usual + waits)

    rows_tried = row_sizes(num_rows, num_groups, itemsize)
    tiles = itertools.product(rows_tried, sizes(height), sizes(width))
    rows, h, w = best(filter(fits, tiles), cycles, f'a result of {height} by {width}')
    heights = heights_of(setup.contractions, rows)
    steps = [part(h, LONGEST * speed(chip) / (size * w)) for size in heights]
    return GradientTiles(rows, h, w, heights, tuple(steps))


def best(tiles: Iterable[tuple], cycles, what: str) -> tuple:
    found = min(tiles, key=cycles, default=None)
    if found is None:
        raise NotImplementedError(f'has no tiles that fit in VMEM for {what}.')
    return found


def heights_of(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Keeps the sizes of products that a tile is made of; a small tile is one."""
    return tuple(size for size in sizes if rows % size == 0) or (rows,)


def row_sizes(num_rows: int, num_groups: int, itemsize: int) -> list[int]:
    """Lists the rows of a tile worth a try: none longer than a group's even share."""
    share = max(num_rows // num_groups, ROWS[-1])
    found = [rows for rows in ROWS if rows <= min(share, num_rows)]
    sublanes = 32 // itemsize
    return found or [-(-num_rows // sublanes) * sublanes]


def sizes(width: int) -> list[int]:
    """Lists the sizes of a block along an axis: multiples of a register's lanes, or the axis."""
    whole = [width] if width <= 2 * LANES or width % LANES == 0 else []
    return sorted({*range(LANES, min(width, 4096 + 1), LANES), *whole})


def part(size: int, most: float) -> int:
    """Finds the largest multiple of a register's lanes that divides `size`, `most` if it can."""
    if size % LANES:
        return size
    lanes = size // LANES
    return LANES * max(n for n in range(1, lanes + 1) if lanes % n == 0 and (n == 1 or n * LANES <= most))


def padded(size: int) -> int:
    return -(-size // LANES) * LANES


def speed(chip: Chip) -> int:
    """Multiply-adds of one core a cycle."""
    return chip.num_mxus * chip.macs


def cycles_per_byte(chip: Chip) -> float:
    """Cycles that a core waits for a byte, when all cores do."""
    return chip.clock / chip.hbm_bytes_per_second * chip.num_cores


def turns(chip: Chip, blocks: int) -> int:
    """Counts the blocks that the busiest core works on."""
    return -(-blocks // chip.num_cores)
