"""Bytes that an instruction moves, where it reads or writes a layer of all layers' arrays."""

import pytest

from helios_jax.plan.compiler.program import Instruction, content, moved, split

PROGRAM = """
%write (p: bf16[7,3,5], q: s32[], r: bf16[3,5]) -> bf16[7,3,5] {
  %p.1 = bf16[7,3,5] parameter(0)
  %q.1 = s32[] parameter(1)
  %r.1 = bf16[3,5] parameter(2)
  %bitcast.1 = bf16[1,3,5] bitcast(%r.1)
  ROOT %dynamic-update-slice.1 = bf16[7,3,5] dynamic-update-slice(%p.1, %bitcast.1, %q.1)
}

%read (p: bf16[7,3,5], q: s32[]) -> f32[3,5] {
  %p.2 = bf16[7,3,5] parameter(0)
  %q.2 = s32[] parameter(1)
  %dynamic-slice.2 = bf16[1,3,5] dynamic-slice(%p.2, %q.2)
  %bitcast.2 = bf16[3,5] bitcast(%dynamic-slice.2)
  ROOT %convert.2 = f32[3,5] convert(%bitcast.2)
}

%both (p: bf16[7,3,5], q: s32[], r: bf16[3,5]) -> (bf16[7,3,5], f32[3]) {
  %p.3 = bf16[7,3,5] parameter(0)
  %q.3 = s32[] parameter(1)
  %r.3 = bf16[3,5] parameter(2)
  %reduce.3 = f32[3] reduce(%r.3, %q.3)
  %bitcast.3 = bf16[1,3,5] bitcast(%r.3)
  %dynamic-update-slice.3 = bf16[7,3,5] dynamic-update-slice(%p.3, %bitcast.3, %q.3)
  ROOT %tuple.3 = (bf16[7,3,5], f32[3]) tuple(%dynamic-update-slice.3, %reduce.3)
}

%mixed (p: bf16[7,3,5], q: s32[]) -> bf16[7,3,5] {
  %p.4 = bf16[7,3,5] parameter(0)
  %q.4 = s32[] parameter(1)
  %dynamic-slice.4 = bf16[1,3,5] dynamic-slice(%p.4, %q.4)
  ROOT %add.4 = bf16[7,3,5] add(%p.4, %dynamic-slice.4)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %all = bf16[7,3,5] parameter(0)
  %one = bf16[3,5] parameter(1)
  %turn = s32[] parameter(2)
  %written = bf16[7,3,5] fusion(%all, %turn, %one), kind=kLoop, calls=%write
  %reading = f32[3,5] fusion(%all, %turn), kind=kLoop, calls=%read
  %doing = (bf16[7,3,5], f32[3]) fusion(%all, %turn, %one), kind=kLoop, calls=%both
  %mixing = bf16[7,3,5] fusion(%all, %turn), kind=kLoop, calls=%mixed
  %adding = bf16[7,3,5] add(%all, %written)
}
"""
ALL, ONE, TURN = 7 * 3 * 5 * 2, 3 * 5 * 2, 4


@pytest.mark.parametrize(
    ('name', 'num_bytes'),
    [
        ('written', ONE + TURN + ONE),
        ('reading', ONE + TURN + 3 * 5 * 4),
        ('doing', ONE + TURN + ONE + 3 * 4),
        ('mixing', ALL + TURN + ALL),
        ('adding', 3 * ALL),
    ],
)
def test_of_what_is_sliced_the_slice_is_moved(name, num_bytes):
    entry, computations = split(PROGRAM)
    found = {i.name: i for i in content(entry, computations) if isinstance(i, Instruction)}
    assert moved(found[name], computations) == num_bytes
