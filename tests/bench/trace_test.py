"""Reading a profile: which events count as device time, and of what kind."""

import jax
import pytest

from helios_jax.bench import trace

KERNELS = {
    'cudnn_generated_fort_native_sdpa_sm90_flash_fprop': 'attention',
    'nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN': 'matmul',
    'MemcpyD2D': 'copy',
    'input_reduce_fusion_7': 'reduction',
    'loop_add_fusion_3': 'fusion',
    'ncclDevKernel_AllGather': 'collective',
    'cask_plugin': 'other',
}


def plane(name: str, *lines: tuple[str, dict[int, list[int]]]) -> str:
    """A plane whose lines hold events: metadata id → durations in picoseconds."""
    text = ''
    for line, events in lines:
        text += f'lines {{ name: "{line}" '
        for kernel, durations in events.items():
            for picoseconds in durations:
                text += f'events {{ metadata_id: {kernel} duration_ps: {picoseconds} }} '
        text += '} '
    for number, kernel in enumerate(KERNELS, start=1):
        text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{kernel}" }} }} '
    return f'planes {{ name: "{name}" {text} }}\n'


@pytest.fixture
def profile(tmp_path):
    """Two streams of a GPU; beside them what must not count: other lines, the host, an old file."""
    seconds = 10**12
    text = plane(
        '/device:GPU:0',
        ('Stream #13(Compute)', {1: [2 * seconds, 3 * seconds], 2: [7 * seconds], 4: [seconds]}),
        ('Stream #17(Memcpy)', {3: [4 * seconds], 1: [11 * seconds]}),
        ('XLA Modules', {5: [100 * seconds]}),
    ) + plane('/host:CPU', ('Stream #1', {6: [200 * seconds]}))
    old = plane('/device:GPU:0', ('Stream #13(Compute)', {6: [300 * seconds]}))
    for folder, content in (('2026_01_02', text), ('2026_01_01', old)):
        path = tmp_path / 'plugins' / 'profile' / folder / 'host.xplane.pb'
        path.parent.mkdir(parents=True)
        path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(content))
    return tmp_path


def test_an_event_names_the_instruction_that_it_ran_for(tmp_path):
    names = {1: 'hlo_module', 2: 'hlo_op', 3: 'correlation_id'}
    metadata = ' '.join(
        f'stat_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}'
        for n, name in names.items()
    )
    stats = (
        'stats { metadata_id: 3 int64_value: 7 } stats { metadata_id: 2 str_value: "cublas.3" } '
        'stats { metadata_id: 1 str_value: "jit_train_step" }'
    )
    text = plane('/device:GPU:0', ('Stream #13(Compute)', {2: [4000], 4: [9000]}))
    text = text.replace('duration_ps: 4000 }', f'duration_ps: 4000 {stats} }}')
    text = text.removesuffix('}\n') + f'{metadata} }}\n'
    path = tmp_path / 'host.xplane.pb'
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    (events,) = trace.card_events(tmp_path)
    own = [(event.end - event.start, event.module, event.instruction) for event in events]
    assert own == [(4, 'jit_train_step', 'cublas.3'), (9, '', '')]


def test_kernels_are_summed_over_streams_longest_first(profile):
    attention, matmul, copy, reduction, *_ = KERNELS
    found = trace.kernel_seconds(profile)
    assert list(found.items()) == [(attention, 16), (matmul, 7), (copy, 4), (reduction, 1)]


def test_a_cpus_profile_holds_no_kernels(tmp_path):
    """A recorded one: what is measured without an accelerator is no time of kernels."""
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((17, 17))))
    assert trace.kernel_seconds(tmp_path) == {}


def test_kinds_go_by_the_kernels_names():
    found = trace.by_kind({name: 2.0**i for i, name in enumerate(KERNELS)})
    assert found == {kind: 2.0**i for i, kind in enumerate(KERNELS.values())}
    assert trace.by_kind({'wrapped_add': 3.0, 'loop_fusion': 4.0}) == {'fusion': 7.0}


def test_a_collective_is_exposed_where_nothing_else_runs():
    second = 1e9
    event = lambda name, start, end: trace.Event(name, start * second, end * second)
    found = trace.waiting([
        event('nvjet_a', 0, 4),
        event('ncclDevKernel_AllGather_RING_LL', 2, 7),
        event('loop_fusion', 6, 9),
        event('ncclDevKernel_ReduceScatter_Sum_bf16', 10, 13),
        event('ncclDevKernel_SendRecv', 11, 12),
        event('fusion', 9.5, 10.5),
    ])  # fmt: skip
    assert found.collectives == {
        'all_gather': (5, 2),
        'reduce_scatter': (3, 2.5),
        'send': (1, 1),
    }
    assert found.exposed == 4.5
    assert (found.idle, found.span) == (0.5, 13)


def test_no_events_wait_for_nothing():
    assert trace.waiting([]) == trace.Waiting({}, 0, 0, 0)


def test_each_card_has_its_own_events(profile):
    assert [len(events) for events in trace.card_events(profile)] == [6]
