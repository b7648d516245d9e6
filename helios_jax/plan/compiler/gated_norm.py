"""Predicts the gated mix with its norm (kernels/gated_norm/tpu.py): its schedule, or its bytes."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.chips import CHIPS
from helios_jax.kernels.gated_norm import tpu
from helios_jax.kernels.gated_norm.operands import Factors, Mix, MixOperands
from helios_jax.plan.compiler import alone
from helios_jax.plan.compiler.program import SHAPE, Instruction
from helios_jax.plan.compiler.schedule import Region
from helios_jax.plan.compiler.timing import HALF


class Form(NamedTuple):
    """One of the kernels in a program: its direction, its sizes, and which operands it has."""

    backward: bool
    num_tokens: int
    width: int
    rank: int  # of the gate; 0 where it has no hidden vector
    vectors: int  # scales and biases
    normalizes: bool  # a norm reads the new stream


def form(kernel: Instruction) -> Form | None:
    """Reads which of the kernels an instruction is; None if it is none."""
    name = re.sub(r'[.\d]+$', '', kernel.name)
    shapes = re.search(r'operand_layout_constraints=\{(.*?)\}, \w+=', kernel.text)
    if name not in (tpu.FORWARD, tpu.BACKWARD) or not shapes:
        return None
    found = [
        (kind, tuple(map(int, dims.split(',')))) for kind, dims, *_ in SHAPE.findall(shapes[1])
    ]
    N, D = found[0][1]
    rank = next((dims[0] for kind, dims in found if kind == 'bf16' and dims[0] != N), 0)
    numbers = [dims for kind, dims in found if kind == 'f32']
    normalizes = (1, 1) in numbers
    return Form(name == tpu.BACKWARD, N, D, rank, len(numbers) - normalizes, normalizes)


def seconds_alone(target: str, sizes: dict[str, Any]) -> float:
    """Predicts a kernel; once in a process (`alone.compile_here`).

    Args:
      target: name of a chip.
      sizes: fields of `Form`.
    """
    at, chip = Form(**sizes), CHIPS[target]
    shape: Any = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    stream = shape(at.num_tokens, at.width)
    vector: Any = jax.ShapeDtypeStruct((at.width,), jnp.float32)
    eps: Any = jax.ShapeDtypeStruct((), jnp.float32)
    given = MixOperands(stream, stream)
    if at.rank:
        given = given._replace(hidden=shape(at.num_tokens, at.rank), out=shape(at.rank, at.width))
    names = ['next_scale'] * at.normalizes + ['vector', 'scale']
    given = given._replace(**dict.fromkeys(names[: at.vectors], vector))
    if at.normalizes:
        given = given._replace(next_eps=eps)
    mix = Mix(interpolates=True, sigmoid=at.rank > 0, eps=1e-6)
    function: Any = lambda given: tpu.forward(mix, given)
    arguments: tuple[Any, ...] = (given,)
    if at.backward:
        function = lambda given, *gradients: tpu.backward(mix, given, Factors(), *gradients)
        arguments = given, stream, stream if at.normalizes else None
    compiled = alone.compile_here(function, arguments, chip)
    (own,) = (o for o in compiled.kernels if o.name.startswith(tpu.FORWARD))
    step = compiled.schedules[own.name].grid
    rows = tpu.rows_of(target, at.num_tokens, at.width)
    turns = rows // tpu.tile_rows(rows), at.width // tpu.tile_columns(at.width)
    steps = at.num_tokens // rows
    streams = 3 + at.normalizes + at.backward * 2
    moved = HALF * rows * (streams * at.width + (1 + at.backward) * at.rank)
    busy = cycles(step, turns) / chip.clock / chip.num_cores
    return steps * max(busy, moved / chip.hbm_bytes_per_second)


def cycles(region: Region, turns: tuple[int, ...]) -> int:
    """Counts the cycles of a region whose loops, from the outermost in, turn so often.

    A loop of one turn is none, in the compiled kernel.
    """
    turns = tuple(number for number in turns if number > 1)
    total = region.cycles
    for inner in region.inner:
        loop = inner.kind == 'loop'
        total += (turns[0] if loop else 1) * cycles(inner, turns[1:] if loop else turns)
    return total
