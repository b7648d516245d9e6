"""Floors of a step's kernels, of a program and of events that were written by hand."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax import config
from helios_jax.bench import floors, trace, train
from helios_jax.bench.floors import Needs, SeenKeys

# 24 rows of 6 values times [6, 10]; in a loop of 4 turns a cuBLAS product with a workspace, of a
# layer of a stack; attention of 2 rows of 8 tokens, 6 heads on 3, of 16 values.
FMHA = (
    'backend_config={"operation_queue_id":"0","cudnn_fmha_backend_config":{"fmha_scale":0.25,'
    '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","6","8","8"],'
    '"layout":{"minor_to_major":["3","2"]}},"mask_type":"MASK","sliding_window_length":WINDOW,'
    '"max_seg_per_batch":SEGMENTS}}'
)


def fmha(mask: str, window: int = 0, segments: int = 1) -> str:
    text = FMHA.replace('MASK', mask).replace('WINDOW', str(window))
    return text.replace('SEGMENTS', str(segments))


PROGRAM = """HloModule jit_train_step, is_scheduled=true

FileNames
1 "step.py"

%fused_mix (p.0: bf16[24,6], p.1: f32[6]) -> bf16[24,6] {
  %p.0 = bf16[24,6] parameter(0)
  %p.1 = f32[6] parameter(1)
  ROOT %mix.1 = bf16[24,6] multiply(%p.0, %p.1)
}

%fused_layer (p.2: bf16[4,6,10], p.3: s32[]) -> bf16[6,10] {
  %p.2 = bf16[4,6,10] parameter(0)
  %p.3 = s32[] parameter(1)
  %slice.1 = bf16[1,6,10] dynamic-slice(%p.2, %p.3), dynamic_slice_sizes={1,6,10}
  ROOT %bitcast.1 = bf16[6,10] bitcast(%slice.1)
}

%fused_gemm (p.4: bf16[24,6], p.5: bf16[6,14]) -> bf16[24,14] {
  %p.4 = bf16[24,6] parameter(0)
  %p.5 = bf16[6,14] parameter(1)
  ROOT %dot.1 = bf16[24,14] dot(%p.4, %p.5), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (carried: (s32[], bf16[24,6], bf16[4,6,10])) -> (s32[], bf16[24,6], bf16[4,6,10]) {
  %carried = (s32[], bf16[24,6], bf16[4,6,10]) parameter(0)
  %turn = s32[] get-tuple-element(%carried), index=0
  %x.1 = bf16[24,6] get-tuple-element(%carried), index=1
  %stack = bf16[4,6,10] get-tuple-element(%carried), index=2
  %layer.7 = bf16[6,10] fusion(%stack, %turn), kind=kLoop, calls=%fused_layer
  %cublas-gemm.3 = (bf16[24,10], s8[4194304]) custom-call(%x.1, %layer.7), \
    custom_call_target="__cublas$gemm", \
    backend_config={"gemm_backend_config":{"alpha_real":1, \
    "dot_dimension_numbers":{"lhs_contracting_dimensions":["1"], \
    "rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[], \
    "rhs_batch_dimensions":[]}}}
  ROOT %out.1 = (s32[], bf16[24,6], bf16[4,6,10]) tuple(%turn, %x.1, %stack)
}

%condition (carried.2: (s32[], bf16[24,6], bf16[4,6,10])) -> pred[] {
  %carried.2 = (s32[], bf16[24,6], bf16[4,6,10]) parameter(0)
  %turn.2 = s32[] get-tuple-element(%carried.2), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%turn.2, %four), direction=LT
}

ENTRY %main (x: bf16[24,6], scale: f32[6], w: bf16[4,6,10]) -> bf16[24,6] {
  %x = bf16[24,6] parameter(0)
  %scale = f32[6] parameter(1)
  %w = bf16[4,6,10] parameter(2)
  %v = bf16[6,14] parameter(3)
  %q = bf16[2,8,6,16] parameter(4)
  %k = bf16[2,8,3,16] parameter(5)
  %lengths = s32[2,4] parameter(6)
  %experts = bf16[5,6,10] parameter(7)
  %work = s32[9,3] parameter(8)
  %zero = s32[] constant(0)
  %loop_mix_fusion.2 = bf16[24,6] fusion(%x, %scale), kind=kLoop, calls=%fused_mix
  %gemm_fusion_dot.4 = bf16[24,14] fusion(%loop_mix_fusion.2, %v), kind=kCustom, calls=%fused_gemm
  %start = (s32[], bf16[24,6], bf16[4,6,10]) tuple(%zero, %x, %w)
  %while.1 = (s32[], bf16[24,6], bf16[4,6,10]) while(%start), \
    condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %plain.1 = (bf16[2,6,8,16], f32[2,6,8], u8[65536]) custom-call(%q, %k, %k), \
    custom_call_target="__cudnn$fmhaSoftmax", <PLAIN>
  %window.1 = (bf16[2,6,8,16], u8[0]) custom-call(%q, %k, %k), \
    custom_call_target="__cudnn$fmhaSoftmax", <WINDOWED>
  %packed.1 = (bf16[2,6,8,16], u8[0]) custom-call(%q, %k, %k, %lengths), \
    custom_call_target="__cudnn$fmhaSoftmaxBackward", <PACKED>
  %both.1 = (bf16[2,6,8,16], u8[0]) custom-call(%q, %k, %k, %lengths), \
    custom_call_target="__cudnn$fmhaSoftmax", <BOTH>
  %grouped.1 = bf16[24,10] custom-call(%work, %x, %experts), custom_call_target="mosaic_gpu_v2"
  %gradient.1 = bf16[5,6,10] custom-call(%work, %x, %grouped.1), custom_call_target="mosaic_gpu_v2"
  %unknown.1 = bf16[24,10] custom-call(%x, %x), custom_call_target="__cublas$lt$groupedMatmul"
  %mixed.1 = bf16[24,6] custom-call(%x, %x, %scale), custom_call_target="__gpu$xla.gpu.triton"
  %elsewhere.1 = bf16[24,6] fusion(%x), kind=kLoop, calls=%absent
  %all-reduce.1 = bf16[24,6] all-reduce(%x), replica_groups={}
  %offloaded.1 = bf16[24,6]{1,0:S(5)} copy(%x)
  ROOT %copy.1 = bf16[24,6] copy(%x)
}
"""
for place, text in (
    ('<PLAIN>', fmha('CAUSAL')),
    ('<WINDOWED>', fmha('CAUSAL', 3)),
    ('<PACKED>', fmha('PADDING_CAUSAL', 0, 4)),
    ('<BOTH>', fmha('PADDING_CAUSAL', 3, 4)),
):
    PROGRAM = PROGRAM.replace(place, text)
KEYS = SeenKeys(full=2.5, window=1.75)
X, LAYER, Q, K = 24 * 6 * 2, 6 * 10 * 2, 2 * 8 * 6 * 16 * 2, 2 * 8 * 3 * 16 * 2
ATTENTION = 2 * 2 * 6 * 8 * 16  # FLOPs of one product for each key that a query sees
CAUSAL = sum(range(1, 9)) / 8
WINDOW = (1 + 2 + 6 * 3) / 8


@pytest.mark.parametrize(
    ('name', 'needed'),
    [
        ('loop_mix_fusion.2', Needs(X + 6 * 4 + X, 0)),
        ('layer.7', Needs(LAYER + 4 + LAYER, 0)),  # of the stack a layer
        ('cublas-gemm.3', Needs(X + LAYER + 24 * 10 * 2, 2 * 24 * 10 * 6)),  # and no workspace
        ('gemm_fusion_dot.4', Needs(X + 6 * 14 * 2 + 24 * 14 * 2, 2 * 24 * 14 * 6)),
        (
            'plain.1',
            Needs(Q + K + Q + 2 * 6 * 8 * 4, 2 * ATTENTION * CAUSAL),
        ),
        ('window.1', Needs(Q + K + Q, 2 * ATTENTION * WINDOW)),
        ('packed.1', Needs(Q + K + 2 * 4 * 4 + Q, 5 * ATTENTION * 2.5)),
        ('both.1', Needs(Q + K + 2 * 4 * 4 + Q, 2 * ATTENTION * 1.75)),
        ('grouped.1', Needs(9 * 3 * 4 + X + 5 * LAYER + 24 * 10 * 2, 2 * 24 * 6 * 10)),
        ('gradient.1', Needs(9 * 3 * 4 + X + 24 * 10 * 2 + 5 * LAYER, 2 * 24 * 6 * 10)),
        ('mixed.1', Needs(X + 6 * 4 + X, 0)),
        ('copy.1', Needs(2 * X, 0)),
    ],
)
def test_an_instruction_moves_its_arrays_once_and_multiplies(name, needed):
    assert dict(floors.of_program(PROGRAM, KEYS))[name] == needed


@pytest.mark.parametrize(
    'name', ['unknown.1', 'elsewhere.1', 'all-reduce.1', 'offloaded.1', 'while.1', 'x']
)
def test_what_is_not_understood_or_waits_for_others_has_no_floor(name):
    assert name not in dict(floors.of_program(PROGRAM, KEYS))


def test_names_that_two_programs_use_unlike_have_no_floor():
    other = PROGRAM.replace('%copy.1 = bf16[24,6] copy(%x)', '%copy.1 = s32[] copy(%zero)')
    found = floors.of_programs([PROGRAM, other], KEYS)
    alone = floors.of_programs([PROGRAM], KEYS)
    assert set(alone) - set(found) == {('jit_train_step', 'copy.1')}
    elsewhere = floors.of_programs([PROGRAM, other.replace('jit_train_step', 'jit_other')], KEYS)
    assert elsewhere['jit_other', 'copy.1'] == Needs(8, 0)


def event(kernel: str, microseconds: float, instruction: str = '', module: str = '') -> trace.Event:
    start = 1e9
    module = module or ('jit_train_step' if instruction else '')
    return trace.Event(kernel, start, start + 1e3 * microseconds, module, instruction)


def test_each_kind_of_kernel_stands_beside_its_floor():
    """Two steps on a card of 1 GFLOP/s and 1 GB/s; floors in microseconds are bytes, or FLOPs."""
    gemms = [event('nvjet_tst_a', 10, 'cublas-gemm.3') for _ in range(2 * 4)]
    events = [
        *gemms,
        *[event('splitk_reduce', 1, 'cublas-gemm.3') for _ in range(2 * 4)],
        *[event('cudnn_sdpa_bprop', 90, 'packed.1') for _ in range(2)],
        *[event('Memset', 2, 'packed.1') for _ in range(2 * 2)],  # two of each run
        *[event('loop_mix_fusion_2', 3) for _ in range(2)],  # by its kernel's name alone
        *[event('loop_mix_fusion_2', 5, 'loop_mix_fusion.2', 'jit_other') for _ in range(2)],
        *[event('ncclDevKernel_AllReduce', 7, 'all-reduce.1') for _ in range(2)],
    ]
    needs = floors.of_programs([PROGRAM], KEYS)
    found = floors.compare(events, needs, (1e9, 1e9), each=1e6 / 2)  # microseconds of a step
    gemm, attention = 4 * 2 * 24 * 10 * 6 / 1e3, 5 * ATTENTION * 2.5 / 1e3
    mix = (2 * X + 6 * 4) / 1e3
    expected = {
        'attention': (90, 90, attention, attention / 90, 'FLOPs'),
        'matmul': (40, 40, gemm, gemm / 40, 'FLOPs'),
        'fusion': (8, 3, mix, mix / 3, 'bytes'),
        'collective': (7, 0, None, None, None),
        'reduction': (4, 4, None, None, None),  # its product's floor counts where the product does
        'copy': (4, 4, None, None, None),
    }
    assert list(found)[:4] == ['attention', 'matmul', 'fusion', 'collective']
    names = ('ms', 'known_ms', 'floor_ms', 'reached', 'bound')
    for kind, values in expected.items():
        for name, value in zip(names, values, strict=True):
            assert found[kind][name] == (pytest.approx(value) if name != 'bound' else value), kind
    assert found.keys() == expected.keys()


def test_lines_have_a_dash_where_no_floor_is_known():
    known = {'ms': 278.06, 'known_ms': 139.03, 'floor_ms': 111.2, 'reached': 0.8, 'bound': 'FLOPs'}
    unknown = dict.fromkeys(known) | {'ms': 7.0, 'known_ms': 0.0}
    head, first, second = floors.lines({'matmul': known, 'collective': unknown})
    assert head.split() == ['kernels', 'ms', 'floor', 'ms', 'reached', 'bound', 'by', 'known']
    assert first.split() == ['matmul', '278.1', '111.2', '80%', 'FLOPs', '50%']
    assert second.split() == ['collective', '7.0', '–', '–', '–', '0%']
    assert floors.lines({}) == []


def test_a_compiled_programs_products_are_counted_where_its_loops_are():
    """A program as this jaxlib prints it: tables in front, a loop, products within fusions."""

    def run(a, b, w):
        product = lambda c, w: (jnp.tanh(c @ w), None)
        return jax.lax.scan(product, a @ b, w)[0]

    arrays = jnp.ones((5, 6)), jnp.ones((6, 7)), jnp.ones((3, 7, 7))
    text = jax.jit(run).lower(*arrays).compile().as_text()
    needs = floors.of_programs([text], KEYS)
    assert {module for module, _ in needs} == {'jit_run'}
    assert {needed.flops for needed in needs.values()} == {0, 2 * 5 * 7 * 6, 2 * 5 * 7 * 7}


def test_keys_are_counted_over_all_queries_padding_among_them():
    changes = {'train.batch_rows': 2, 'data.row_length': 8}
    cfg = config.replace(config.Config(), changes)
    steps = [
        {'tokens': jnp.int32(12), 'mean_context': jnp.float32(3), 'mean_window_context': 2.0},
        {'tokens': jnp.int32(16), 'mean_context': jnp.float32(4), 'mean_window_context': 2.5},
    ]
    assert train.keys_seen(cfg, steps) == SeenKeys((36 + 64) / 32, (24 + 40) / 32)
    del steps[0]['mean_window_context'], steps[1]['mean_window_context']
    assert train.keys_seen(cfg, steps).window == 0
