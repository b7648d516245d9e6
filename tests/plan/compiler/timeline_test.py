"""A program by hand, played: what runs beside what, and what is waited for."""

import pytest

from helios_jax.chips import CHIPS
from helios_jax.plan.compiler import links
from helios_jax.plan.compiler.collectives import Collective
from helios_jax.plan.compiler.links import Slice
from helios_jax.plan.compiler.timeline import Item, Timeline, source_lines

CHIP = CHIPS['v5e']
WHERE = Slice(CHIP, (2, 2), ((0, 0), (0, 1), (1, 0), (1, 1)))
GROUPS = 'replica_groups={{0,1,2,3}}'
ROWS = 40_960
GATHER = links.seconds(
    Collective('all-gather', ROWS * 512 * 2, 1, True, True, '', (0, 1, 2, 3)), WHERE
)
TURNS = 5
HEAD = """HloModule step, is_scheduled=true

FileNames
1 "/somewhere/helios_jax/model/layers.py"
2 "/somewhere/helios_jax/model/loss.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=51 end_line=51 column=15 end_column=15}
2 {file_name_id=2 function_name_id=2 line=7 end_line=9 column=15 end_column=15}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

"""
GATHERED = f'bf16[{ROWS},512] all-gather(%p), channel_id=3, {GROUPS}, dimensions={{0}}'


def program(body: str) -> str:
    """A loop over `body`."""
    return f"""{HEAD}
%called (p: bf16[8,512]) -> bf16[{ROWS},512] {{
  ROOT %all-gather.9 = {GATHERED}
}}

%other (p: bf16[8,512]) -> bf16[{ROWS},512] {{
  ROOT %all-gather.5 = {GATHERED.replace('channel_id=3', 'channel_id=5')}
}}

%starting (p: bf16[8,512]) -> bf16[{ROWS},512] {{
  %all-gather.8 = {GATHERED}
  ROOT %custom-call.8 = bf16[{ROWS},512] custom-call(%all-gather.8), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.7 (p: bf16[8,512]) -> bf16[4,4] {{
  %all-gather.7 = {GATHERED}
  ROOT %convolution.7 = bf16[4,4] convolution(%p, %p)
}}

%ending (p: bf16[8,512]) -> bf16[{ROWS},512] {{
  %all-gather.6 = {GATHERED}
  ROOT %custom-call.6 = bf16[{ROWS},512] custom-call(%all-gather.6), custom_call_target="AsyncCollectiveDone"
}}

%product (p: bf16[4,4]) -> bf16[4,4] {{
  ROOT %convolution.1 = bf16[4,4] convolution(%p, %p)
}}

%condition (state: (s32[])) -> pred[] {{
  %bound = s32[] constant({TURNS})
}}

%body (state: (s32[])) -> (s32[]) {{
{body}
}}

ENTRY %main (x: f32[2]) -> f32[2] {{
  %while = (s32[]) while(%state), condition=%condition, body=%body
  %last.1 = f32[2] convert(%x), metadata={{op_name="step/loss" stack_frame_id=1}}
}}
"""  # noqa: E501


def played(body: str, **seconds: float) -> Timeline:
    """Plays a loop over `body`, whose instructions take the seconds of their names."""
    return Timeline(
        program(body), WHERE, lambda i: None if i.kernel else seconds.get(i.name.split('.')[0], 0.0)
    )


START = (
    f'  %gather.1 = ((bf16[8,512]), bf16[{ROWS},512]) call-start(%p), '
    'async_execution_thread="sparsecore", to_apply=%called'
)
DONE = f'  %gather.2 = bf16[{ROWS},512] call-done(%gather.1), metadata={{op_name="step/q"}}'
WORK = (
    '  %work.1 = bf16[4,4] fusion(%p), calls=%product, metadata={op_name="step/q" stack_frame_id=2}'
)


@pytest.mark.parametrize('share', [0.25, 1.5])
def test_work_hides_a_collective_as_far_as_it_goes(share):
    work = share * GATHER
    found = played('\n'.join([START, WORK, DONE]), work=work, last=0.125)
    waited = max(0.0, GATHER - work)
    assert found.seconds == pytest.approx(TURNS * (work + waited) + 0.125)
    assert found.spent[Item('matmuls', 'step/q', 'model/layers.py:51')] == pytest.approx(
        TURNS * work
    )
    assert found.spent[Item('network', 'step/q', '')] == pytest.approx(TURNS * waited)
    assert found.spent[Item('other', 'step/loss', 'model/loss.py:7')] == 0.125
    assert sum(found.spent.values()) == pytest.approx(found.seconds)


def test_what_is_not_started_before_is_waited_for():
    found = played(f'  %gather.3 = {GATHERED}\n{WORK}', work=0.5)
    assert found.seconds == pytest.approx(TURNS * (GATHER + 0.5))


def test_a_collective_within_matmuls_ends_where_its_fusion_says():
    fusion = lambda name, calls: f'  %{name}.1 = bf16[4,4] fusion(%p), calls=%{calls}'
    body = [
        fusion('first', 'starting'),
        fusion('second', 'async_collective_fusion.7'),
        fusion('third', 'ending'),
    ]
    found = played('\n'.join(body), second=0.25 * GATHER)
    assert found.seconds == pytest.approx(TURNS * GATHER)
    assert played('\n'.join(body), second=3 * GATHER).seconds == pytest.approx(TURNS * 3 * GATHER)


def test_collectives_take_turns_on_the_links_and_the_next_turn_finds_them_busy():
    other = START.replace('gather.1', 'gather.4').replace('%called', '%other')
    # Nobody waits for the second, which is under way when the next turn begins.
    found = played('\n'.join([START, other, DONE]))
    assert found.seconds == pytest.approx((2 * TURNS - 1) * GATHER)


def test_a_short_collective_shares_the_links_with_a_long_one():
    short = '  %sum.1 = f32[2048] all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}'
    alone = played(short).seconds / TURNS
    assert 0 < alone < GATHER / 10
    found = played('\n'.join([START, short, DONE]))
    # Half as fast, and the long one is as much later.
    assert found.seconds == pytest.approx(TURNS * (GATHER + alone))
    waited = [found.spent[item] for item in found.spent if item.source != 'step/q']
    assert waited == [pytest.approx(TURNS * 2 * alone)]


def test_a_copy_to_the_host_uses_its_own_link():
    size = 2**20
    start = f'  %copy.1 = (f32[{size}]{{0:S(5)}}, f32[{size}]{{0}}, u32[]) copy-start(%p)'
    done = f'  %copy.2 = f32[{size}]{{0:S(5)}} copy-done(%copy.1)'
    found = played('\n'.join([START, start, done, DONE]))
    copied = size * 4 / CHIP.host_bytes_per_second
    assert found.seconds == pytest.approx(TURNS * max(GATHER, copied))
    kinds = {item.kind: seconds for item, seconds in found.spent.items()}
    assert kinds['host'] == pytest.approx(TURNS * copied)


def test_kernels_of_unknown_time_are_counted_and_left_out():
    found = played('  %ragged.3 = f32[2] custom-call(%z), custom_call_target="tpu_custom_call"')
    assert (found.seconds, dict(found.unknown)) == (0.0, {'ragged': TURNS})


def test_a_program_without_tables_has_no_lines():
    assert source_lines('HloModule x\n') == {}
    assert source_lines(program('')) == {1: 'model/loss.py:7', 2: 'model/layers.py:51'}
