"""The clock of the gated mix: what it reads off a program, and how it counts a schedule."""

import pytest

from helios_jax import process
from helios_jax.chips import CHIPS
from helios_jax.plan.compiler import gated_norm
from helios_jax.plan.compiler.gated_norm import Form
from helios_jax.plan.compiler.program import Instruction
from helios_jax.plan.compiler.schedule import Region

TOKENS, VECTOR, OUT = 'bf16[1024,384]{1,0}', 'f32[1,384]{1,0}', 'bf16[24,384]{1,0}'
HIDDEN = 'bf16[1024,24]{1,0}'


def kernel(name, *operands):
    text = f'custom-call(%a), operand_layout_constraints={{{", ".join(operands)}}}, frontend_a={{}}'
    return Instruction(name, TOKENS, 'custom-call', text, 1.0, True)


@pytest.mark.parametrize(
    ('name', 'operands', 'expected'),
    [
        (
            'helios_gated_norm.2',
            (TOKENS, TOKENS, HIDDEN, OUT, *[VECTOR] * 3, 'f32[1,1]{1,0}'),
            Form(False, 1024, 384, 24, 3, True),
        ),
        (
            'helios_gated_norm_gradient',
            (TOKENS, TOKENS, HIDDEN, OUT, *[VECTOR] * 2, TOKENS),
            Form(True, 1024, 384, 24, 2, False),
        ),
        ('helios_gated_norm', (TOKENS, TOKENS, VECTOR), Form(False, 1024, 384, 0, 1, False)),
        ('helios_rows_take', (TOKENS,), None),
    ],
)
def test_a_program_tells_which_kernel_it_runs(name, operands, expected):
    assert gated_norm.form(kernel(name, *operands)) == expected


def test_loops_count_by_their_turns():
    region = lambda kind, cycles, *inner: Region(kind, 0, cycles, {}, inner)
    step = region(
        'loop', 7, region('predicated', 11, region('loop', 2, region('loop', 3))), region('loop', 5)
    )
    assert gated_norm.cycles(step, (4, 8)) == 7 + 11 + 4 * (2 + 8 * 3) + 4 * 5
    flat = region('loop', 7, region('loop', 3))
    assert gated_norm.cycles(flat, (1, 8)) == 7 + 8 * 3  # one row of tiles is no loop


@pytest.mark.slow
def test_a_kernel_takes_what_its_bytes_take_or_a_little_more():
    sizes = Form(True, 4096, 1024, 16, 3, True)
    seconds = process.run(gated_norm.seconds_alone, 'v5e', sizes._asdict())
    least = 6 * 4096 * 1024 * 2 / CHIPS['v5e'].hbm_bytes_per_second
    assert least <= seconds <= 1.5 * least
