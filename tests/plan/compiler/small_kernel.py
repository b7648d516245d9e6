"""A kernel with everything that a schedule can hold, small; and how its dumps came to be.

    python tests/plan/compiler/small_kernel.py TARGET DIRECTORY

compiles it and leaves its three files there, shorn of what nobody reads.
"""

import functools
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

STEPS = (4, 3)


def kernel(turns, x_ref, y_ref, out_ref, total):
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(j <= i)
    def _():
        def add(turn, _):
            total[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        jax.lax.fori_loop(0, turns[i], add, None)

    @pl.when(j == STEPS[1] - 1)
    def _():
        out_ref[...] = jnp.tanh(total[...])


@functools.partial(jax.jit, static_argnames='semantics')
def run(turns, x, y, semantics='parallel'):
    """Sums of products of row blocks i of x and y, in `turns[i]` turns each: float32 [512 128]."""
    block = pl.BlockSpec((128, 128), lambda i, j, turns: (i, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=STEPS,
            in_specs=[block, pl.BlockSpec((128, 128), lambda i, j, turns: (j, 0))],
            out_specs=block,
            scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((512, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics, 'arbitrary')),
        name=f'small_kernel_{semantics}',
    )(turns, x, y)


def shorn(bundles: str) -> str:
    """The lines of the program, without the operations that no one reads."""
    lines = []
    for line in bundles.splitlines():
        head, brace, rest = line.partition('{')
        if brace and re.match(r'\s*(0x[0-9a-f]+|0) ', head):
            marks = re.findall(r'/\* (?:Start|End)[^*]*\*/', rest)
            for mark in marks:
                rest = rest.replace(mark, '')
            operations = [operation.strip(' }') for operation in rest.split(';;')]
            kept = [x for x in operations if re.search(r'sbr|core id|scmp\.ne', x)]
            line = ' '.join([head + '{', ' ;; '.join(kept), '}', *marks])
        lines.append(line.rstrip())
    return '\n'.join(lines) + '\n'


def main(target: str, directory: Path) -> None:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax.parallel import mesh
    from helios_jax.plan.compiler import schedule, timing

    chip = timing.CHIPS[target]
    with schedule.dumped() as dumps:
        where = jax.sharding.SingleDeviceSharding(mesh.topology_devices(chip.topology)[0])
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=where)
        x, y = shape((512, 128), jnp.bfloat16), shape((384, 128), jnp.bfloat16)
        for semantics in ('parallel', 'arbitrary'):
            run.lower(shape((4,), jnp.int32), x, y, semantics=semantics).compile()
        for path in sorted(dumps.iterdir()):
            match = schedule.FILE.fullmatch(path.name)
            if match and 'small_kernel' in match[2]:
                text = path.read_text()
                shorter = shorn(text) if match[3] == schedule.FILES[0] else text
                (directory / f'1-{match[2]}-00-{match[3]}.txt').write_text(shorter)


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
