"""Predicts our attention kernels: how often their regions run, and the time that takes."""

import contextlib
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from helios_jax.chips import CHIPS
from helios_jax.kernels.attention import Setting, Tokens, tpu
from helios_jax.kernels.attention.tpu import blocks, work
from helios_jax.kernels.attention.tpu.specs import MARKS
from helios_jax.kernels.attention.tpu.work import Blocks
from helios_jax.plan.compiler import alone, timing
from helios_jax.plan.compiler.program import SHAPE, Instruction
from helios_jax.plan.compiler.timing import FLOAT, HALF, Visits, changes, tally

FORWARD, BACKWARD = 'helios_attention_forward', 'helios_attention_backward'


def visits(
    segment_ids: np.ndarray,
    positions: np.ndarray,
    *,
    heads: tuple[int, int, int],
    window: int,
    sizes: Blocks,
    backward: bool,
) -> Visits:
    """Counts the visits of the forward kernel, which has no last_k, or of the backward kernel.

    Args:
      segment_ids, positions: [B T].
      heads: K, G and H.
      window: keys that a query sees; 0: all before it.
      sizes: the kernel's blocks.
    """
    K, _, H = heads
    marks = np.stack([segment_ids, positions], axis=1).astype(np.float32)
    listed = work.make(marks, marks, sizes, window, ordered=True)
    if backward:
        runs, moved = count_items(heads, sizes, listed, query_arrays=4, tables=~0xFFFF)
        del runs['start']  # and it writes dk and dv
        moved = moved + 2 * sizes.k * H * HALF * changes(np.asarray(listed.items.writes))
    else:
        runs, moved = count_items(heads, sizes, listed, query_arrays=2, tables=0xFFFF)
        del runs['last_k']
    every_head = {name: np.tile(count, K) for name, count in runs.items()}
    return tally(every_head, np.tile(moved, K), 1)


def count_items(
    heads: tuple[int, int, int], sizes: Blocks, listed: work.Work, query_arrays: int, tables: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Counts, for one key head's work items, how often each region runs and the bytes copied.

    Args:
      query_arrays: arrays of H values a query that an item reads or writes.
      tables: masks the half of `Items.keys` that the tables of keys follow.
    """
    items = work.Items(*map(np.asarray, listed.items))
    strips, queries, keys = items.strips, items.queries, items.keys
    at = work.spans(strips)
    whole = at.mixed - at.full
    halves = [1 << i for i in reversed(range(sizes.run.bit_length() - 1))]
    runs = {
        'first_q': strips & work.FIRST_Q > 0,
        'start': np.arange(len(strips)) == 0,
        'first_k': strips & work.FIRST_K > 0,
        'run': whole // sizes.run,
        **{f'run/{sizes.run // size}': whole // size % 2 for size in halves},
        'masked': at.end - at.first - whole,
        'last_q': strips & work.LAST_Q > 0,
        'last_k': strips & work.LAST_K > 0,
    }
    _, G, H = heads
    rows = changes(queries)
    moved = rows * sizes.q * (G * (query_arrays * H * HALF + FLOAT) + (H + MARKS) * FLOAT)
    moved += changes(queries >> 16, keys & 0xFFFF) * 2 * sizes.k * H * HALF
    moved += changes(queries >> 16, keys & tables) * sizes.k * (H + MARKS) * FLOAT
    return {name: np.asarray(x, np.int64) for name, x in runs.items()}, moved


class Heads(NamedTuple):
    """Sizes of a kernel of ours in a program."""

    batch: int
    kv_heads: int
    group: int
    length: int
    head_dim: int


def heads(kernel: Instruction) -> Heads | None:
    """Reads the sizes of an attention kernel; None if it takes a row's keys in pieces."""
    shapes = re.search(r'operand_layout_constraints=\{(.*?)\}, \w+=', kernel.text)
    if not shapes or not (FORWARD in kernel.name or BACKWARD in kernel.name):
        return None
    arrays = [tuple(map(int, dims.split(','))) for _, dims, *_ in SHAPE.findall(shapes[1]) if dims]
    found = Heads(*next(dims for dims in arrays if len(dims) == 5))
    keys = next(dims for dims in arrays if len(dims) == 4 and dims[-1] == found.head_dim)
    # dq that is carried from piece to piece is float32.
    in_pieces = keys[2] != found.length or kernel.shape.startswith('(f32')
    return None if in_pieces else found


def seconds_alone(target: str, sizes: dict[str, int], window: int) -> dict[str, float]:
    """Predicts both kernels by their schedules; once in a process (`alone.compile_here`).

    Rows are one document each. Kernels that store q, k and v in a byte are timed as those that do
    not.

    Args:
      target: name of a chip.
      sizes: fields of `Heads`.
    Returns:
      Seconds of a call, by the kernel's name. A kernel is left out that takes a row's keys in
      pieces, or is compiled to other regions than are counted, as for rows of a few blocks.
    """
    at, chip = Heads(**sizes), CHIPS[target]
    _, K, G, T, H = at
    angles = jnp.zeros(H // 2, jnp.float32)

    def gradients(q: Array, k: Array, v: Array, positions: Array, cotangent: Array) -> Any:
        attend = functools.partial(
            tpu.attention, tokens=Tokens(positions), setting=Setting(angles, window=window)
        )
        _, backward = jax.vjp(attend, q, k, v)
        return backward(cotangent)

    arrays = [jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (K * G, K, K, K * G)]
    positions = jax.ShapeDtypeStruct((1, T), jnp.int32)
    compiled = alone.compile_here(gradients, (*arrays[:3], positions, arrays[3]), chip)
    tokens = np.arange(T, dtype=np.int32)[None]
    found = {}
    for name in (FORWARD, BACKWARD):
        own = [o for o in compiled.kernels if name in o.name and o.times == 1]
        if len(own) == 1:
            backward = name == BACKWARD
            counted = visits(
                np.ones_like(tokens), tokens, heads=(K, G, H), window=window, backward=backward,
                sizes=blocks.choose(target, G, H, T, T, wide=False, backward=backward),
            )  # fmt: skip
            with contextlib.suppress(ValueError):
                row = timing.predict(compiled.schedules[own[0].name], counted, chip).seconds
                found[name] = at.batch * row
    return found
