"""The whole model under every policy: the same function, and evidence of what is stored."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.errors import UserError
from helios_jax.memory import evidence, hlo, jaxprs, policy, traced
from helios_jax.memory.hlo import HloArray
from helios_jax.memory.traced import SavedArray
from helios_jax.model.loss import cross_entropy
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

B, T, D, N, K, H, F, E, X, EXPERT_F, V = 8, 13, 40, 6, 2, 8, 56, 4, 3, 24, 61
DENSE = config.Model(
    vocab_size=V, num_layers=6, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=F,
    period='dense', compute_dtype='float32',
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE,
    prefix='dense',
    period='moe',
    num_layers=3,
    moe=config.MoE(num_experts=E, num_experts_per_token=X, mlp_dim=EXPERT_F),
    gmu=config.GMU(embedding='on'),  # which every layer reads, and none stores
)
HYPER = dataclasses.replace(
    DENSE, num_layers=3, gmu=config.GMU(kind='hyper', hyper='constrained', streams=3)
)
# With û the size of the lowest layer's values would have no gradient but rounding.
VALUES = dataclasses.replace(
    DENSE, num_layers=2, value_residual=True, norm_scale='depth',
    gmu=config.GMU(normalize_output='off', stream_scale='on', dwa='1x1'),
)  # fmt: skip
MIXED = dataclasses.replace(MOE, prefix='', period='dense,moe', num_layers=6)
# What a period of MIXED, one dense layer and one of experts, stores under each name.
STREAM = [(B, T, D)] * 2
KEPT = {
    'block_input': STREAM,
    'attention_input': STREAM,
    'q': [(B, T, N, H)] * 2,
    'k': [(B, T, K, H)] * 2,
    'v': [(B, T, K, H)] * 2,
    'attention_output': [(B, T, N, H)] * 2,
    'attention_update': STREAM,
    'attention_gate': [(B, T, 16)] * 2,
    'mlp_input': STREAM,
    'gate_up': [(B, T, F)] * 2 + [(B * T * X, 2 * EXPERT_F)],
    'expert_input': [(B * T * X, D)],
    'router_choices': [(B, T, X)],
    'mlp_update': STREAM,
    'mlp_gate': [(B, T, 16)] * 2,
    'final_hidden': [(B, T, D)],
}
# The reference recomputes its log-sum-exp, and one device dispatches to itself.
ELSEWHERE = {'log_sum_exp', 'dispatched'}


def fill(model):
    """Variables of a trained model's size, not of its initialisation: no gate is shut."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        name, value = jax.tree_util.keystr(path), rng.normal(size=leaf.shape)
        if 'scale' in name or "['embed']" in name:
            value = value if "['embed']" in name else 1 + 0.1 * value
        else:
            fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
            value *= 0.02 if 'bias' in name else fan_in**-0.5
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(abstract_variables(Transformer(model))))


def loss_of(model, memory, platform=''):
    network = Transformer(model, memory, platform)

    def loss(params, router, tokens):
        variables = {'params': params, 'router': router}
        rows, length = tokens.shape
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32)[None], (rows, 1))
        segment_ids = 1 + (positions > 8).astype(jnp.int32)
        hidden, reported = network.apply(variables, tokens, positions % 9, segment_ids)
        head = network.apply(variables, method='unembedding_weight')
        losses = cross_entropy(hidden, head, tokens, jnp.ones((rows, length)), model.vocab_size)
        stats = jax.tree.leaves([s.z_loss for g in reported.values() for s in g.values()])
        return losses.total / tokens.size + sum(s.sum() for s in stats)

    return loss


def arguments(model):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)), jnp.int32)
    variables = fill(model)
    return variables['params'], variables.get('router', {}), tokens


def equations(jaxpr):
    """Primitive and output types, with what only differentiation looks at inlined."""
    for e in jaxpr.eqns:
        inner = jaxprs.inner_jaxprs(e)
        if jaxprs.primitive(e) in ('custom_vjp_call', *jaxprs.CALLS) and inner:
            yield from equations(inner[0])
            continue
        yield jaxprs.primitive(e), tuple(v.aval.str_short() for v in e.outvars)
        for j in inner:
            yield from equations(j)


@pytest.mark.parametrize(
    'model',
    [
        DENSE,
        *(pytest.param(model, marks=pytest.mark.slow) for model in (MOE, MIXED, HYPER, VALUES)),
    ],
    ids=['dense', 'moe', 'mixed', 'hyper', 'values'],
)
def test_every_policy_computes_the_same_jaxpr(model):
    args = jax.eval_shape(lambda: arguments(model))
    of = lambda memory: list(equations(jax.make_jaxpr(loss_of(model, memory))(*args).jaxpr))
    plain = of(config.Memory('none'))
    assert len(plain) > 20
    for preset in policy.PRESETS:
        assert of(config.Memory(preset)) == plain, preset


MODELS = {'dense': DENSE, 'moe': MOE, 'hyper': HYPER, 'values': VALUES}
# Every model, both dtypes and both sizes run in CI, the rest before a release.
IN_CI = [
    ('dense', 'float32', 8), ('dense', 'bfloat16', 1), ('moe', 'float32', 1),
    ('hyper', 'float32', 1), ('values', 'float32', 1),
]  # fmt: skip
RUNS = [
    pytest.param(
        MODELS[case[0]],
        *case[1:],
        marks=pytest.mark.slow if case in IN_CI else pytest.mark.long,
        id='-'.join(map(str, case)),
    )
    for case in itertools.product(MODELS, ('float32', 'bfloat16'), (1, 8))
]


def by_policy(model, dtype, devices):
    """Loss and gradient under `none`, and under every preset."""
    model = dataclasses.replace(model, compute_dtype=dtype)
    shape = {'fsdp': 2, 'expert': 2, 'tensor': 2} if devices == 8 else {'fsdp': 1}
    mesh = meshes.make(config.Mesh(**shape), jax.devices()[:devices])
    results = {}
    with jax.set_mesh(mesh):
        for preset in ('none', *policy.PRESETS):
            run = jax.value_and_grad(loss_of(model, config.Memory(preset)))
            results[preset] = jax.jit(run)(*arguments(model))
    return results.pop('none'), results


EXACT = ('minimal', 'full', 'offload')  # policies that round nothing


def assert_near(results, expected, rounding):
    """Gradients under the exact policies, within a share of the largest value of each."""
    near = lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=rounding * abs(e).max())
    for preset in EXACT:
        jax.tree.map(near, results[preset][1], expected)


# `none` differentiates the gates as they are, the others from what they start from: cotangents add
# up in another order. In bfloat16 this network makes of any rounding more than its gradients are
# (they are off by 1.7 of the largest from those in float32).
ORDER = {'float32': 2e-5, 'bfloat16': 0.1}


@pytest.mark.parametrize(('model', 'dtype', 'devices'), RUNS)
def test_no_policy_moves_a_bit_of_the_loss(model, dtype, devices):
    """As it is traced, that is without what the compiler makes of it; nor of an exact gradient."""
    jax.config.update('jax_disable_most_optimizations', True)
    try:
        (loss, gradient), results = by_policy(model, dtype, devices)
    finally:
        jax.config.update('jax_disable_most_optimizations', False)
    for preset, (value, _) in results.items():
        assert value == loss, preset
    assert_near(results, results['minimal'][1], 0)
    assert_near(results, gradient, ORDER[dtype])


@pytest.mark.long
@pytest.mark.parametrize(('model', 'dtype', 'devices'), RUNS)
def test_fusion_moves_the_loss_of_one_run_by_its_last_bit(model, dtype, devices):
    """Where XLA fuses otherwise what comes after the layers; gradients, by rounding."""
    (loss, gradient), results = by_policy(model, dtype, devices)
    moves = (model, dtype, devices) == (MOE, 'float32', 1)
    for value, _ in results.values():
        np.testing.assert_array_max_ulp(value, loss, 1 if moves else 0)
    assert_near(results, results['minimal'][1], {'float32': 2e-5, 'bfloat16': 3e-2}[dtype])
    assert_near(results, gradient, ORDER[dtype])


def saved(model, memory, platform=''):
    args = jax.eval_shape(lambda: arguments(model))
    jaxpr = jax.jit(jax.grad(loss_of(model, memory, platform))).trace(*args).jaxpr
    return traced.saved(jaxpr)


def test_every_setting_has_a_tensor():
    assert set(KEPT) | ELSEWHERE == set(policy.NAMES)


@pytest.mark.parametrize(
    'name',
    [
        name if name in ('q', 'gate_up') else pytest.param(name, marks=pytest.mark.slow)
        for name in KEPT
    ],
)
def test_a_setting_saves_its_tensor_alone(name):
    actions = config.Actions(**{name: 'device'})
    found = saved(MIXED, config.Memory('full', actions=actions))
    assert sorted(a.shape for a in found if a.name == name) == sorted(KEPT[name])
    assert {a.name for a in found} == {name, 'block_input', 'router_choices', 'final_hidden'}


@pytest.mark.slow
def test_presets_save_less_and_less():
    sizes = {
        preset: sum(a.num_bytes for a in saved(MIXED, config.Memory(preset)))
        for preset in policy.PRESETS
    }
    assert sizes['full'] == sizes['offload'] > sizes['fp8_offload']
    assert 3 * sizes['fp8'] < sizes['minimal']  # float32 here
    assert sizes['full'] < sizes['fp8']


def test_an_action_without_effect_is_an_error_that_names_the_tensor():
    memory = config.Memory('full', actions=config.Actions(dispatched='fp8'))
    with pytest.raises(UserError, match=r'dispatched=.fp8.*no effect.*block_input, final'):
        evidence.check_traced(memory, saved(DENSE, memory))


def test_a_large_array_that_nobody_named_is_an_error():
    """Which differentiation saves if a kernel's results carry no name that the table knows."""
    memory = config.Memory('full')
    small = SavedArray('', 'device', 'bfloat16', (1, 2**12), (1, 2**12), 8)
    evidence.check_traced(memory, [small])
    with pytest.raises(UserError, match=r'bfloat16 \(1, 4096\) × 9 layers, 73728 bytes.*without a'):
        evidence.check_traced(memory, [small._replace(layers=9)])


@pytest.mark.parametrize(
    'preset',
    [
        name if name == 'fp8' else pytest.param(name, marks=pytest.mark.slow)
        for name in policy.PRESETS
    ],
)
def test_no_preset_saves_an_array_without_a_name(preset):
    """Not even with the kernel for TPUs, which has more to save than the reference."""
    assert all(array.name for array in saved(MIXED, config.Memory(preset), 'tpu'))


def program(*loops: list[str], entry: str = '') -> str:
    """Text of a program with loops that carry these arrays."""
    lines = [f'  %w.{i} = ({", ".join(loop)}) while(%t.{i})' for i, loop in enumerate(loops)]
    return '\n'.join([*lines, entry])


FAR, NEAR = 'u8[6,8,13,6,8]{4,3,2,1,0:T(8,128)S(5)}', 'u8[6,8,13,6,8]{4,3,2,1,0}'
OTHER = 's8[6,8,13,6]{3,2,1,0:S(5)}', 'f32[6,8,13,40]{3,2,1,0}', 'f32[8,13,40]{2,1,0}'


@pytest.fixture(scope='module')
def q_on_host():
    memory = config.Memory('full', actions=config.Actions(q='fp8+offload'))
    return saved(DENSE, memory)


def test_a_program_with_every_array_in_its_place_passes(q_on_host):
    evidence.check_compiled(q_on_host, program([FAR, *OTHER]), host=True)
    # In a loop of which nothing is known but the number of values.
    flat = [text.replace('6,8,13,', '624,') for text in (FAR, *OTHER)]
    evidence.check_compiled(q_on_host, program([], flat, entry='f32[8,13,40]'), host=True)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (program([NEAR, *OTHER]), r"'q'.*fp8\+offload.*uint8.*on the host.*only on the other side"),
        (program(OTHER), r"'q'.*of 1 such arrays the compiled step has 0 there; choose"),
        (program(OTHER, entry=FAR), r"'q'.* has 0 there"),
        (program([FAR, OTHER[0], OTHER[2]]), r"'block_input'.*on the device.* has 0 there; choose"),
        (program([FAR, *OTHER[:2]]), r"'final_hidden'.* has 0 there; choose"),
        (program([FAR, NEAR, *OTHER]), r"'q' was to be moved.*uint8 .* × 6 layers stay on the dev"),
    ],
    ids=['wrong-place', 'nowhere', 'in-no-loop', 'input', 'outside', 'both-places'],
)
def test_a_program_with_an_array_out_of_place_is_refused(text, message, q_on_host):
    with pytest.raises(UserError, match=message):
        evidence.check_compiled(q_on_host, text, host=True)


def test_a_scan_of_two_layers_may_have_been_written_out():
    memory = config.Memory('full', actions=config.Actions(q='fp8+offload'))
    arrays = saved(dataclasses.replace(DENSE, num_layers=2), memory)
    text = ' '.join((FAR, *OTHER)).replace('[6,', '[2,')
    evidence.check_compiled(arrays, program([], entry=text), host=True)
    with pytest.raises(UserError, match=r"'q'.*on the host.* has 0 there, only on the other side"):
        evidence.check_compiled(arrays, program([], entry=text.replace('S(5)', '')), host=True)


def test_as_many_arrays_are_wanted_as_there_are():
    """Gate and up are two of one size: one of them in the program is not both."""
    memory = config.Memory('full', actions=config.Actions(gate_up='device'))
    arrays, one = saved(DENSE, memory), 'f32[6,8,13,56]{3,2,1,0}'
    rest = OTHER[1:]
    evidence.check_compiled(arrays, program([one, one, *rest]), host=False)
    with pytest.raises(UserError, match=r"'gate_up'.*of 2 such arrays the compiled step has 1"):
        evidence.check_compiled(arrays, program([one, *rest], [one, *rest]), host=False)


def test_a_neighbour_of_the_same_size_on_the_device_is_no_copy_left_behind():
    memory = config.Memory('offload', actions=config.Actions(attention_update='device'))
    arrays = saved(DENSE, memory)
    near, far = 'f32[6,8,13,40]{3,2,1,0}', 'f32[6,8,13,40]{3,2,1,0:S(5)}'
    evidence.check_compiled(arrays, program([near, far, OTHER[2]]), host=True)
    with pytest.raises(UserError, match=r"'block_input' was to be moved"):
        evidence.check_compiled(arrays, program([near, near, far, OTHER[2]]), host=True)


@pytest.mark.parametrize('microbatches', [1, pytest.param(3, marks=pytest.mark.slow)])
def test_what_a_prefix_saves_is_not_stacked_by_a_scan_around_it(microbatches):
    args = jax.eval_shape(lambda: arguments(MOE))

    def mean(params, router, tokens):
        run = jax.grad(loss_of(MOE, config.Memory('full')))
        add = lambda total, t: (jax.tree.map(jnp.add, total, run(params, router, t)), None)
        return jax.lax.scan(add, params, jnp.stack([tokens] * microbatches))[0]

    arrays = traced.saved(jax.jit(mean).trace(*args).jaxpr)
    found = sorted(a.layers for a in arrays if a.name == 'block_input')
    assert found == [0, MOE.num_layers - 1]


def test_the_log_says_what_is_saved_and_where():
    arrays = saved(DENSE, config.Memory('fp8_offload'))
    bytes_saved = 6 * B * T * (D + 1)
    text = evidence.line(arrays, host=True)
    assert f'{bytes_saved / 2**20:.1f} MiB on the host: ' in text
    assert 'block_input fp8+offload' in text
    assert 'nothing is offloaded' in evidence.line(arrays, host=False)


TPU = config.Model(
    vocab_size=256, num_layers=3, embed_dim=128, num_heads=2, num_kv_heads=1, head_dim=128,
    mlp_dim=384,
)  # fmt: skip
EVERYTHING = config.Actions(
    gate_up='fp8+offload', attention_output='offload', q='int8+offload', k='int8', v='int8',
    block_input='fp8', attention_gate='fp8', mlp_input='offload', final_hidden='int8+offload',
)  # fmt: skip


def compiled_for_tpu(model, memory, shape):
    """The gradient, traced and compiled for four chips."""
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")
    mesh = meshes.make(config.Mesh(**shape), meshes.topology_devices('v5e:2x2'))
    boxed = abstract_variables(Transformer(model))
    shapes = nn.unbox(boxed)
    places = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), shapes)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    tokens = place(
        jax.ShapeDtypeStruct((4, 256), jnp.int32), sharding.sharding(mesh, ('batch', 'length'))
    )
    params = jax.tree.map(place, shapes, places)['params']
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.numpy_rank_promotion('allow'):
        step = jax.jit(jax.grad(loss_of(model, memory, 'tpu'))).trace(params, {}, tokens)
    return step, step.lower().compile()


@pytest.mark.slow
@pytest.mark.parametrize('preset', [pytest.param('fp8', marks=pytest.mark.long), 'fp8_offload'])
def test_actions_take_effect_on_a_tpu_where_no_loop_is(preset):
    """In a layer before the scan, and in a scan of two layers, which XLA may write out."""
    memory = config.Memory(preset)
    model = dataclasses.replace(TPU, prefix='dense')
    step, compiled = compiled_for_tpu(model, memory, {'fsdp': 4})
    arrays = evidence.verified(memory, step, compiled, host=True)
    assert {a.layers for a in arrays if a.name == 'block_input'} == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    'memory',
    [
        config.Memory('full'),
        config.Memory('fp8'),
        config.Memory('offload'),
        config.Memory('fp8_offload'),
        config.Memory('minimal', actions=EVERYTHING),
    ],
    ids=['full', 'fp8', 'offload', 'fp8_offload', 'everything'],
)
@pytest.mark.parametrize(
    'shape',
    [
        pytest.param({'fsdp': 4}, id='fsdp'),
        pytest.param({'fsdp': 2, 'tensor': 2}, marks=pytest.mark.long, id='tensor'),
    ],
)
def test_actions_take_effect_on_a_tpu(memory, shape):
    """By the compiled program for four chips; no TPU is needed."""
    model = dataclasses.replace(TPU, num_kv_heads=2, num_heads=4) if 'tensor' in shape else TPU
    step, compiled = compiled_for_tpu(model, memory, shape)
    arrays = evidence.verified(memory, step, compiled, host=True)
    # Each scanned array that was moved is there with its own dimensions, so that a copy of it on
    # the device would be seen.
    moved = [a for a in arrays if a.host and a.layers]
    far = {HloArray(hlo.DTYPES[a.dtype], (a.layers, *a.local), True) for a in moved}
    assert far <= set().union(*hlo.loops(hlo.text(compiled)))
    wanted = sum(a.num_bytes for a in arrays if a.host)
    # Exponents are padded to whole tiles.
    assert wanted <= compiled.memory_analysis().host_temp_size_in_bytes <= 1.2 * wanted
