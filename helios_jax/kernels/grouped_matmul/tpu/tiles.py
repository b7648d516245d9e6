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
ROWS = (1024, 512, 256, 128)  # rows of a tile that are tried
STEP = 280  # cycles of a grid step beside its products
SLACK = 4 * MIB  # VMEM for the values of a product in progress
# Cycles of one product's code: longer code takes longer to compile, shorter waits more for results.
WHOLE, STRIP = 8192, 4096


class Setup(NamedTuple):
    """Properties of a generation's products."""

    strip: int  # rows of a strip, by which tiles of several groups are worked through
    start: int  # cycles until a product's first results are there
    transposing: int  # the same where an operand is transposed before


SETUPS = {
    'v5e': Setup(128, 180, 420),
    'v5p': Setup(128, 180, 420),
    'v6e': Setup(128, 320, 420),
    'tpu7x': Setup(128, 280, 420),
}


class MultiplyTiles(NamedTuple):
    rows: int
    columns: int
    strip: int  # rows; divides `rows`
    whole_step: int  # columns of one product of a whole tile; divides `columns`
    strip_step: int  # columns of one product of a strip


class GradientTiles(NamedTuple):
    rows: int
    height: int  # of a block of the result, along D
    width: int  # along F
    strip: int
    whole_step: int  # part of the height that one product of a whole tile makes
    strip_step: int


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
        product = rows * columns * depth / speed(chip)
        step = STEP + product + setup.start * -(-product // WHOLE)
        moved = rows * (depth + columns) * itemsize * cycles_per_byte(chip)
        more = depth * columns * itemsize * cycles_per_byte(chip)  # weights, of a group's first
        steps = num_rows / rows
        usual = max(step, moved)
        waits = min(num_groups, steps) * max(0.0, moved + more - usual)
        return turns(chip, -(-width // columns)) * (steps * usual + waits)

    tiles = itertools.product(row_sizes(num_rows, num_groups, itemsize), sizes(width))
    rows, columns = best(filter(fits, tiles), cycles, f'a contraction over {depth}')
    strip = min(setup.strip, rows)
    return MultiplyTiles(
        rows,
        columns,
        strip,
        whole_step=part(columns, WHOLE * speed(chip) / (rows * depth)),
        strip_step=part(columns, STRIP * speed(chip) / (strip * depth)),
    )


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
        product = rows * h * w / speed(chip)
        step = STEP + product + setup.transposing * -(-product // WHOLE)
        moved = rows * (h + w) * itemsize * cycles_per_byte(chip)
        more = h * w * itemsize * cycles_per_byte(chip)  # the result, after a group's last
        steps = num_rows / rows
        usual = max(step, moved)
        waits = min(num_groups, steps) * max(0.0, moved + more - usual)
        return turns(chip, -(-height // h) * -(-width // w)) * (steps * usual + waits)

    rows_tried = row_sizes(num_rows, num_groups, itemsize)
    tiles = itertools.product(rows_tried, sizes(height), sizes(width))
    rows, h, w = best(filter(fits, tiles), cycles, f'a result of {height} by {width}')
    strip = min(setup.strip, rows)
    return GradientTiles(
        rows,
        h,
        w,
        strip,
        whole_step=part(h, WHOLE * speed(chip) / (rows * w)),
        strip_step=part(h, STRIP * speed(chip) / (strip * w)),
    )


def best(tiles: Iterable[tuple], cycles, what: str) -> tuple:
    found = min(tiles, key=cycles, default=None)
    if found is None:
        raise NotImplementedError(f'has no tiles that fit in VMEM for {what}.')
    return found


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
