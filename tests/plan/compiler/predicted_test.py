"""The time of a compiled step: what an instruction takes, and a whole step on a TPU."""

import pytest

from helios_jax import config
from helios_jax.chips import CHIPS
from helios_jax.plan.compiler import attention, compiled, grouped_matmul, predicted, validate
from helios_jax.plan.compiler.program import Instruction

CHIP = CHIPS['v5p']
B, K, G, T, H = 3, 2, 4, 4096, 128
PROGRAM = """
%product (p: bf16[4,4]) -> bf16[4,4] {
  ROOT %convolution.1 = bf16[4,4] convolution(%p, %p)
}

%sum (p: bf16[4,4]) -> bf16[4,4] {
  ROOT %add.1 = bf16[4,4] add(%p, %p)
}

%rows (p: bf16[4,4]) -> bf16[4,4] {
  ROOT %gather.1 = bf16[4,4] gather(%p, %p)
}
"""


def clock() -> predicted.Clock:
    return predicted.Clock(PROGRAM, CHIP, predicted.own_kernels(config.Config(), CHIP))


def instruction(called: str, cycles: int, shape: str = 'bf16[1024,1024]') -> Instruction:
    text = f'%p), calls=%{called}, backend_config={{"estimated_cycles":"{cycles}"}}'
    return Instruction('fusion.1', shape, 'fusion', text, 1.0, False, ('bf16[512,1024]',))


def test_a_matmul_takes_its_cycles_and_other_work_its_bytes():
    assert clock()(instruction('product', 7_000)) == 7_000 / CHIP.clock
    passing = 1.5 * 2**20 * 2 / CHIP.hbm_bytes_per_second
    assert clock()(instruction('sum', 70_000)) == passing
    assert clock()(instruction('sum', 7)) == 7 / CHIP.clock  # what little there is, is in VMEM
    assert clock()(instruction('sum', 0)._replace(opcode='bitcast')) == 0.0


def kernel(name: str, results: str, *operands: str) -> Instruction:
    text = (
        '%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[32]{0}, '
        f'{", ".join(operands)}}}, frontend_attributes={{}}'
    )
    return Instruction(name, results, 'custom-call', text, 1.0, True)


Q, KEYS, LSE = (f'bf16[{B},{K},{G},{T},{H}]', f'bf16[{B},{K},{T},{H}]', f'f32[{B},{K},{G},{T}]')


def test_sizes_of_a_kernel_are_read_off_its_operands():
    forward = kernel('helios_attention_forward.3', f'({Q}, {LSE})', Q, KEYS, KEYS)
    backward = kernel('helios_attention_backward.1', f'({Q}, {KEYS}, {KEYS})', Q, LSE, KEYS)
    assert attention.heads(forward) == attention.heads(backward) == (B, K, G, T, H)
    # Keys in pieces: fewer than queries, or a sum that is carried on.
    assert attention.heads(kernel(forward.name, Q, Q, f'bf16[{B},{K},{T // 4},{H}]')) is None
    assert attention.heads(backward._replace(shape=f'(f32[{B},{K},{G},{T},{H}])')) is None
    assert attention.heads(kernel('ragged-dot.4', Q, Q, KEYS)) is None


def test_a_kernel_is_timed_alone_once_for_each_of_its_sizes(monkeypatch):
    asked = []

    predicted.kernels_alone.cache_clear()

    def alone(function, *arguments):
        asked.append((function, *arguments))
        return {attention.FORWARD: 0.25}

    monkeypatch.setattr(predicted.process, 'run', alone)
    timed = clock()
    forward = kernel('helios_attention_forward.3', Q, Q, KEYS)
    assert timed(forward) == timed(forward._replace(name='helios_attention_forward.4')) == 0.25
    assert timed(kernel('helios_attention_backward.3', Q, Q, KEYS)) is None
    assert asked == [
        (
            attention.seconds_alone,
            'v5p',
            {'batch': B, 'kv_heads': K, 'group': G, 'length': T, 'head_dim': H},
            0,
        )
    ]
    assert timed(kernel('ragged-dot.3', Q, Q, KEYS)) is None


E, D, F, ROWS = 5, 384, 640, 4096
MATRICES, OF_ROWS = f'bf16[{E},{D},{F}]', f'bf16[{ROWS},{D}]'


def test_products_of_experts_are_read_off_their_operands(monkeypatch):
    multiply = kernel('helios_grouped_multiply.5', f'bf16[{ROWS},{F}]', OF_ROWS, MATRICES)
    gradient = kernel('helios_grouped_weight_gradient', MATRICES, OF_ROWS, f'bf16[{ROWS},{F}]')
    transposed = kernel(
        'helios_grouped_multiply_transposed.2', OF_ROWS, f'bf16[{ROWS},{F}]', MATRICES
    )
    for one in (multiply, gradient, transposed):
        name = one.name.split('.')[0]
        assert grouped_matmul.product(one) == (name, ROWS, E, D, F)
    in_float32 = multiply._replace(text=multiply.text.replace('bf16', 'f32'), shape='f32[1,1]')
    assert grouped_matmul.product(in_float32) is None
    predicted.product_alone.cache_clear()
    asked = []
    monkeypatch.setattr(predicted.process, 'run', lambda _, *given: asked.append(given) or 0.25)
    assert clock()(multiply) == clock()(multiply._replace(name=f'{multiply.name}.7')) == 0.25
    sizes = {'num_rows': ROWS, 'num_groups': E, 'height': D, 'width': F}
    assert asked == [('v5p', {'name': 'helios_grouped_multiply', **sizes})]


def test_permuted_rows_take_their_bytes_and_xlas_gathers_their_cycles():
    words = f'u32[{ROWS * 8},128]'
    pack = kernel('helios_rows_pack.1', words, OF_ROWS)
    passing = ROWS * (2 * D + 4096) / CHIP.hbm_bytes_per_second
    assert clock()(pack) == pytest.approx(passing, rel=1e-4)  # the helper's scalars are small
    take = kernel('helios_rows_take_sums.1', f'bf16[512,{D}]', words)
    take = take._replace(text=take.text.replace('s32[32]', 's32[1024]'))
    assert clock()(take) == (1024 * 4096 + 512 * 2 * D) / CHIP.hbm_bytes_per_second
    rows = instruction('rows', 0, f'bf16[{ROWS},2048]')
    assert clock()(rows) == pytest.approx(ROWS * 24 / CHIP.clock)
    wider = instruction('rows', 0, f'bf16[{ROWS},8192]')
    assert clock()(wider) == pytest.approx(ROWS * (4 + 5 * 16) / CHIP.clock)


def test_a_step_with_kernels_of_unknown_time_is_said_to_take_more():
    found = {'step_seconds': 2.0, 'step_mfu': 0.5, 'step_by_kind': {'matmuls': 1.5, 'network': 0.5}}
    found |= {'largest': [], 'left_out': {}}
    assert predicted.text(found).startswith('2.000 s a step, MFU 50.0%, 25.0% of it waiting')
    less = predicted.text(found | {'left_out': {'ragged-dot': 96}})
    assert less.startswith('more than 2.000 s a step, MFU below 50.0%')
    assert less.endswith('ragged-dot × 96')


@pytest.mark.long
@pytest.mark.parametrize('layers', ['dense', 'moe'])
@pytest.mark.parametrize('topology', ['v5p:2x2x1', 'v5e:2x2', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_a_small_step_on_every_tpu(layers, topology):
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")
    model = config.Model(
        vocab_size=2048, num_layers=4, embed_dim=512, num_heads=4, num_kv_heads=1, head_dim=128,
        mlp_dim=2048, period=layers,
        moe=config.MoE(num_experts=6, num_experts_per_token=2, mlp_dim=256),
    )  # fmt: skip
    cfg = config.Config(
        model=model, data=config.Data(row_length=2048), memory=config.Memory('full'),
        train=config.Train(batch_rows=8, compiler_options=validate.LITTLE_VMEM),
    ).resolve(2048)  # fmt: skip
    found = compiled.compiled_figures(cfg, topology, timed=True)
    assert found['left_out'] == {}
    assert sum(found['step_by_kind'].values()) == pytest.approx(found['step_seconds'])
    assert found['step_by_kind']['attention'] > 0
    assert (found['step_by_kind'].get('experts', 0) > 0) == (layers == 'moe')
    # Full rematerialisation: a third of the FLOPs is not counted.
    assert 0.05 < found['step_mfu'] < 0.75
    assert {'line', 'source', 'kind', 'seconds'} == found['largest'][0].keys()
    assert found['largest'][0]['line'].endswith(tuple('0123456789'))
    assert 'MFU' in predicted.text(found)
    # No partial results of a product in HBM, and, but on v5e, which has no SparseCores, no
    # collective of the layers that is waited for.
    assert found['partial_sums'] == 0
    looped = [row for row in found['collectives'] if row['place'] == 'loops']
    assert looped
    for row in looped:
        assert topology.startswith('v5e') or row['largest_waited_mib'] <= 1, row
