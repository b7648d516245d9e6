"""The table of actions: every name exists, saves what it says, and changes no value."""

import collections
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.memory import policy
from helios_jax.model.loss import cross_entropy
from helios_jax.model.transformer import Layers, Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

B, T, D, N, K, H, F, E, X, EXPERT_F = 2, 13, 40, 6, 2, 8, 56, 5, 3, 24
MODEL = config.Model(
    vocab_size=61,
    num_layers=6,
    embed_dim=D,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    mlp_dim=F,
    period='dense,moe',
    compute_dtype='float32',
    moe=config.MoE(num_experts=E, num_experts_per_token=X, mlp_dim=EXPERT_F),
)
TOKENS = jax.ShapeDtypeStruct((B, T), jnp.int32)
# What a name adds to a period, one dense layer and one of experts, when it is saved.
STREAM = [(B, T, D)] * 2
KEPT = {
    # A layer's input is what jax.checkpoint keeps in any case.
    'block_input': [],
    'attention_input': STREAM,
    'q': [(B, T, N, H)] * 2,
    'k': [(B, T, K, H)] * 2,
    'v': [(B, T, K, H)] * 2,
    'attention_output': [(B, T, N, H)] * 2,
    'attention_update': STREAM,
    'attention_gate': STREAM,
    'mlp_input': STREAM,
    'gate_up': [(B, T, F)] * 2 + [(B * T * X, EXPERT_F)] * 2,
    'dispatched': [(B * T * X, D)],
    # Saved unless the user says otherwise.
    'router_choices': [],
    'mlp_update': STREAM,
    'mlp_gate': STREAM,
}


def inner_jaxprs(equation):
    is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')  # noqa: E731
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(x, 'jaxpr', x) for x in leaves if is_jaxpr(x)]


def names_in(jaxpr):
    found = {e.params['name'] for e in jaxpr.eqns if e.primitive.name == 'name'}
    for equation in jaxpr.eqns:
        for inner in inner_jaxprs(equation):
            found |= names_in(inner)
    return found


def residuals(memory):
    """Shapes that the forward pass of a period leaves for its backward pass, with their counts."""
    layers = Layers(MODEL, MODEL.period_kinds, '', policy.checkpoint_policy(memory), scanned=False)
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    variables = nn.unbox(jax.eval_shape(layers.init, jax.random.key(0), x, 0, TOKENS, TOKENS))

    def backward(variables, x, tokens):
        run = lambda variables, x: layers.apply(variables, x, 0, tokens, tokens)[0]  # noqa: E731
        return jax.vjp(run, variables, x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, variables, x, TOKENS))
    return collections.Counter(leaf.shape for leaf in leaves)


@pytest.fixture(scope='module')
def full():
    return residuals(config.Memory('full'))


def elements(shapes):
    return sum(math.prod(shape) * count for shape, count in shapes.items())


def test_every_named_action_names_a_tensor_of_the_model():
    network = Transformer(MODEL)
    variables = nn.unbox(abstract_variables(network))
    traced = jax.make_jaxpr(lambda v, t: network.apply(v, t, t, t)[0])(variables, TOKENS)
    assert set(policy.NAMES) == names_in(traced.jaxpr) == set(KEPT)


@pytest.mark.parametrize('name', KEPT)
def test_a_name_saves_its_tensor_and_no_other(name, full):
    chosen = residuals(config.Memory('full', config.Actions(**{name: 'device'})))
    assert not full - chosen
    assert chosen - full == collections.Counter(KEPT[name])


def test_offload_saves_what_device_saves():
    every = [config.Actions(**dict.fromkeys(KEPT, action)) for action in ('offload', 'device')]
    moved, kept = (residuals(config.Memory('full', actions)) for actions in every)
    assert moved == kept


def test_chosen_experts_are_saved_unless_told_otherwise(full):
    assert full[B, T, X] == 1
    forgotten = config.Memory('full', config.Actions(router_choices='remat'))
    assert residuals(forgotten)[B, T, X] == 0


def test_presets_save_less_and_less(full):
    sizes = {
        name: elements(residuals(config.Memory(name)))
        for name in config.run.POLICIES
        if name != 'full'
    }
    assert elements(full) < sizes['dots'] < sizes['none']
    assert elements(full) < sizes['minimal'] < sizes['none']
    assert elements(full) == sizes['offload']
    # Of the many streams in a layer, one.
    assert full[B, T, D] == 2


@pytest.mark.parametrize('preset', ['none', 'dots'])
def test_actions_beside_a_preset_without_names_are_refused(preset):
    memory = config.Memory(preset, config.Actions(q='offload', mlp_gate='device'))
    with pytest.raises(config.UserError, match=f'{preset!r}.*q, mlp_gate.*full, minimal, offload'):
        policy.checkpoint_policy(memory)


def test_unknown_actions_and_presets_are_refused():
    with pytest.raises(
        config.UserError, match=r"memory\.actions\.q='ofload'.*Did you mean 'offload'"
    ):
        config.Actions(q='ofload')
    with pytest.raises(config.UserError, match=r"memory\.policy='ful'.*Did you mean 'full'"):
        config.Memory('ful')


def test_a_layers_input_cannot_be_recomputed():
    memory = config.Memory('minimal', config.Actions(block_input='remat'))
    with pytest.raises(config.UserError, match=r"block_input='remat'.*device or offload"):
        policy.checkpoint_policy(memory)


def test_the_users_action_overrides_the_presets():
    memory = config.Memory('minimal', config.Actions(q='remat', mlp_gate='offload'))
    table = policy.actions(memory)
    preset = policy.actions(config.Memory('minimal'))
    changed = {name: action for name, action in table.items() if action != preset[name]}
    assert changed == {'q': 'remat', 'mlp_gate': 'offload'}
    assert tuple(table) == policy.NAMES


EXPERTS = dataclasses.replace(MODEL, num_layers=3, period='moe')


@pytest.fixture(scope='module')
def unsaved():
    """Arguments, and loss and gradients where everything is saved."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name, value = jax.tree_util.keystr(path), rng.normal(size=leaf.shape)
        value = (
            value if "['embed']" in name else 1 + 0.1 * value if 'scale' in name else 0.2 * value
        )
        return jnp.asarray(value, leaf.dtype)

    shapes = nn.unbox(abstract_variables(Transformer(EXPERTS)))
    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    tokens = jnp.asarray(rng.integers(0, 61, size=(B, T)), jnp.int32)
    return (variables, tokens), evaluate(config.Memory('none'), variables, tokens)


def evaluate(memory, variables, tokens):
    network = Transformer(EXPERTS, policy.checkpoint_policy(memory))
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (B, 1))
    segment_ids = 1 + (positions > 8)

    def loss(params, router, tokens):
        variables = {'params': params, 'router': router}
        hidden, reported = network.apply(variables, tokens, positions % 9, segment_ids)
        head = network.apply(variables, method='unembedding_weight')
        losses = cross_entropy(hidden, head, tokens, jnp.ones((B, T)), 61)
        return losses.total + reported['periods']['layer_0'].z_loss.sum()

    # Optimising would take most of the time and change nothing that is at stake.
    options = {'xla_backend_optimization_level': 0}
    run = jax.jit(jax.value_and_grad(loss), compiler_options=options)
    return run(variables['params'], variables['router'], tokens)


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['full', 'dots', 'minimal', 'offload'])
def test_no_policy_changes_a_value(preset, unsaved):
    """Beyond rounding: the function is the same, what XLA fuses is not."""
    actions = config.Actions()
    if preset == 'offload':
        actions = config.Actions(gate_up='offload', q='device', dispatched='offload')
    arguments, (expected_loss, expected) = unsaved
    loss, gradients = evaluate(config.Memory(preset, actions), *arguments)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=5e-5 * np.abs(e).max()),
        gradients,
        expected,
    )


TPU_MODEL = config.Model(
    vocab_size=256,
    num_layers=3,
    embed_dim=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    mlp_dim=256,
    gmu=config.GMU(kind='residual'),
)
TPU_B, TPU_T = 4, 128
STREAM_BYTES = 2 * 3 * TPU_B * TPU_T * 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ('memory', 'host_bytes'),
    [
        (config.Memory('full'), 0),
        (config.Memory('offload'), STREAM_BYTES),
        (config.Memory('full', config.Actions(q='offload')), 2 * STREAM_BYTES),
    ],
    ids=['full', 'offload', 'q'],
)
def test_offload_takes_effect_on_a_tpu(memory, host_bytes):
    """By the compiler's own account of a gradient for four chips; no TPU is needed."""
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[aot]'")
    mesh = meshes.make(config.Mesh(fsdp=4), meshes.topology_devices('v5e:2x2'))
    network = Transformer(TPU_MODEL, policy.checkpoint_policy(memory), 'tpu')
    boxed = abstract_variables(network)
    shapes = nn.unbox(boxed)
    places = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), shapes)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    tokens = place(
        jax.ShapeDtypeStruct((TPU_B, TPU_T), jnp.int32),
        sharding.sharding(mesh, ('batch', 'length')),
    )

    def loss(variables, tokens):
        return network.apply(variables, tokens, tokens)[0].astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.numpy_rank_promotion('allow'):
        lowered = jax.jit(jax.grad(loss)).lower(jax.tree.map(place, shapes, places), tokens)
    compiled = lowered.compile()
    assert compiled.memory_analysis().host_temp_size_in_bytes == host_bytes // mesh.size
