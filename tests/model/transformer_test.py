"""The whole network: what it may depend on, what its scan stands for, what it counts and stores."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_rows

from helios_jax import config
from helios_jax.arch import flops, weights
from helios_jax.memory.jaxprs import equations
from helios_jax.model.block import Block, Shared
from helios_jax.model.gmu import input_eps
from helios_jax.model.layers import RMSNorm, scaled
from helios_jax.model.loss import cross_entropy
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

D, N, K, H, F, E, V, T = 40, 6, 2, 8, 56, 5, 61, 17
TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
MIXED = config.Model(
    vocab_size=V,
    num_layers=5,
    embed_dim=D,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    mlp_dim=F,
    prefix='dense',
    period='moe_window,dense',
    window=3,
    qk_norm=True,
    compute_dtype='float32',
    rope=config.Rope(base=100.0, scaling='dynamic', trained_length=4),
    moe=config.MoE(num_experts=E, num_experts_per_token=2, mlp_dim=24, num_shared_experts=1),
    gmu=config.GMU(embedding='on', stream_scale='on'),
    norm_scale='depth',
    value_residual=True,
)
PATTERNS = {
    'mixed': {},
    'dense': {'prefix': '', 'period': 'dense', 'rope': config.Rope()},
    'tied': {'tied_embeddings': True, 'qk_norm': False},
    'experts': {'prefix': 'moe', 'period': 'moe,moe_window', 'moe': config.MoE(num_experts=3)},
    'long_period': {'prefix': 'dense,dense_window', 'period': 'dense,moe,moe_window'},
}
GATES = ('low_rank', 'full', 'per_head', 'scalar', 'static')
GMUS = [
    {'kind': kind, 'gate': gate, 'normalize_output': normalize}
    for kind in ('convex', 'additive', 'highway', 'residual', 'layerscale', 'rezero')
    for gate in (GATES if config.GMU(kind=kind).has_gate else GATES[:1])
    for normalize in ('on', 'off')
]
GMUS += [{'kind': 'residual', 'dwa': '3x2'}]
GMUS += [
    {'kind': 'hyper', 'hyper': form, 'normalize_output': normalize}
    for form, normalize in (('static', 'off'), ('dynamic', 'on'), ('constrained', 'off'))
]


def packed():
    """Distinct tokens; documents of 9, 4 and 2 tokens and padding, then one of 13 and padding."""
    tokens = np.random.default_rng(0).permutation(V)[: 2 * T].reshape(2, T).astype(np.int32)
    return tokens, *packed_rows([[9, 4, 2], [13]], T)


@pytest.fixture(scope='module')
def mixed(random_variables):
    """The network with every layer kind, its variables and its compiled logits."""
    model = Transformer(MIXED)
    variables = random_variables(model, TOKENS, TOKENS)
    run = jax.jit(functools.partial(model.apply, method='logits'))

    def logits(tokens, positions, ids):
        arrays = (None if a is None else jnp.asarray(a) for a in (tokens, positions, ids))
        return np.asarray(run(variables, *arrays))[..., :V]

    return model, variables, logits


def test_a_logit_depends_on_the_past_of_its_own_document_alone(mixed):
    """Through every layer kind; tokens are distinct, so rows of the embedding stand for places."""
    model, variables, _ = mixed
    tokens, positions, ids = packed()

    def of_place(embedding, t):
        changed = variables | {'params': variables['params'] | {'embed': {'w': embedding}}}
        arrays = (jnp.asarray(a) for a in (tokens, positions, ids))
        logits = model.apply(changed, *arrays, method='logits')[..., :V]
        return jnp.sum(jnp.where((jnp.arange(T) == t)[None, :, None], logits, 0) ** 2)

    gradient = jax.jit(jax.grad(of_place))
    for t in (0, 8, 9, 12, 14):
        of_row = np.asarray(gradient(variables['params']['embed']['w'], t))
        seen = (ids == ids[:, [t]]) & (ids > 0) & (np.arange(T) <= t)
        # A padding token's own logits come from its own stream.
        seen |= (ids == 0) & (np.arange(T) == t)
        touched = np.abs(of_row).max(-1) > 0
        np.testing.assert_array_equal(touched[tokens], seen)
        assert touched.sum() == seen.sum()


@pytest.mark.slow
def test_a_packed_document_gives_the_logits_it_gives_alone(mixed):
    _, _, logits = mixed
    tokens, positions, ids = packed()
    together = logits(tokens, positions, ids)
    at = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    for row, document in ((0, 1), (0, 2), (0, 3), (1, 1)):
        place = ids[row] == document
        real = at < place.sum()
        alone = np.full((2, T), 7, np.int32)
        alone[real] = np.tile(tokens[row, place], 2)
        alone_logits = logits(alone, at, real.astype(np.int32))
        np.testing.assert_allclose(
            alone_logits[0, real[0]], together[row, place], rtol=0, atol=1e-4
        )
    # And in a row of its own length, where no segments are named.
    place = ids[1] == 1
    unnamed = logits(tokens[1:, place], positions[1:, place], None)
    np.testing.assert_allclose(unnamed[0], together[1, place], rtol=0, atol=1e-4)


def test_padding_is_inert(mixed):
    _, _, logits = mixed
    tokens, positions, ids = packed()
    real = ids > 0
    first = logits(tokens, positions, ids)
    second = logits(np.where(real, tokens, (tokens + 11) % V), positions, ids)
    np.testing.assert_array_equal(first[real], second[real])
    assert (first[~real] != second[~real]).any(-1).all()


def of_layer(model: config.Model, collections, index: int):
    """What the collections of a whole network hold of one layer."""
    first = len(model.prefix_kinds)
    repeat, place = divmod(index - first, len(model.period_kinds))
    scanned = index >= first
    group, name = ('periods', f'layer_{place}') if scanned else ('prefix', f'layer_{index}')
    return {
        collection: jax.tree.map(lambda x: x[repeat] if scanned else x, tree[group][name])
        for collection, tree in collections.items()
        if name in tree.get(group, {})
    }


def read_by_all(model, variables, x_0):
    """What every layer reads beside the stream, from the definition."""
    first = of_layer(model, variables, 0)['params']
    x_hat = scaled(x_0, first['attention_norm']['scale'], input_eps(model, 1))
    return Shared(x_0, jnp.einsum('btd,dkh->btkh', x_hat, first['attention']['v']['w']))


@pytest.mark.slow
def test_the_scan_stands_for_its_layers_one_by_one(random_variables):
    config_ = dataclasses.replace(
        MIXED, num_layers=6, prefix='moe,dense_window', period='dense,moe_window'
    )
    model = Transformer(config_)
    variables = random_variables(model, TOKENS, TOKENS)
    tokens, positions, ids = (jnp.asarray(a) for a in packed())
    assert config_.layer_kinds == ('moe', 'dense_window', *['dense', 'moe_window'] * 2)

    def unrolled(variables):
        x = variables['params']['embed']['w'][tokens]
        shared = read_by_all(config_, variables, x)
        for index, kind in enumerate(config_.layer_kinds):
            layer = of_layer(config_, variables, index)
            x, _ = Block(config_, kind).apply(layer, x, index, positions, ids, shared)
        norm = {'params': variables['params']['final_norm']}
        return RMSNorm().apply(norm, x, input_eps(config_, 2 * config_.num_layers + 1))

    hidden, reported = jax.jit(model.apply)(variables, tokens, positions, ids)
    np.testing.assert_allclose(hidden, jax.jit(unrolled)(variables), rtol=0, atol=2e-5)
    shapes = {group: {n: x.load.shape for n, x in of.items()} for group, of in reported.items()}
    assert shapes == {'prefix': {'layer_0': (E,)}, 'periods': {'layer_1': (2, E)}}
    for group in reported.values():
        for stats in group.values():
            # Padding is routed nowhere.
            np.testing.assert_array_equal(stats.load.sum(-1), 2 * (ids > 0).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ('pattern', 'policy'), [('dense', 'full'), ('mixed', 'none'), ('mixed', 'fp8_offload')]
)
def test_the_gates_of_every_layer_can_be_looked_at_under_every_policy(
    random_variables, pattern, policy
):
    config_ = dataclasses.replace(MIXED, **PATTERNS[pattern])
    model = Transformer(config_, config.Memory(policy))
    variables = random_variables(model, TOKENS, TOKENS)
    tokens, positions, ids = (jnp.asarray(a) for a in packed())
    looking = jax.jit(functools.partial(model.apply, mutable=['intermediates']))
    (hidden, _), seen = looking(variables, tokens, positions, ids)
    usual, _ = jax.jit(model.apply)(variables, tokens, positions, ids)
    np.testing.assert_allclose(hidden, usual, rtol=0, atol=2e-6)

    @jax.jit
    def one_by_one(variables):
        x = variables['params']['embed']['w'][tokens]
        shared = read_by_all(config_, variables, x)
        gates = []
        for index, kind in enumerate(config_.layer_kinds):
            layer = of_layer(config_, variables, index)
            (x, _), own = Block(config_, kind).apply(
                layer, x, index, positions, ids, shared, mutable=['intermediates']
            )
            gates.append(own['intermediates'])
        return gates

    expected = one_by_one(variables)
    assert len(expected) == 5
    for index, gates in enumerate(expected):
        found = of_layer(config_, seen, index)
        for sublayer in ('attention_gmu', 'mlp_gmu'):
            (wanted,), (gate,) = gates[sublayer]['gate'], found['intermediates'][sublayer]['gate']
            assert gate.shape == (2, T, D) and np.ptp(gate) > 0.1
            np.testing.assert_allclose(gate, wanted, rtol=0, atol=2e-5)


def covering():
    """Every layer pattern with the default unit, and every unit with one pattern."""
    for name, change in PATTERNS.items():
        yield pytest.param(dataclasses.replace(MIXED, **change), id=name)
    for settings in GMUS:
        gmu = config.GMU(rank=3, **settings)
        values = gmu.kind != 'hyper'  # which refuses them
        model = dataclasses.replace(MIXED, gmu=gmu, value_residual=values)
        yield pytest.param(model, id='-'.join(settings.values()))


@pytest.mark.parametrize('model', covering())
def test_parameters_are_counted_and_their_axes_known(model):
    boxed = abstract_variables(Transformer(model))
    shapes, axes = nn.unbox(boxed), sharding.logical_axes(boxed)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert weights.count(model) == size(shapes['params'])
    matrices = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.size if path[-1].key == 'w' else 0, shapes['params']
    )
    matmul = sum(jax.tree.leaves(matrices))
    if model.gmu.kind == 'hyper' and model.gmu.hyper == 'dynamic':  # each stream is multiplied
        n, sublayers = model.gmu.streams, 2 * model.num_layers
        matmul += sublayers * (n - 1) * D * (n + 2)
    if not model.tied_embeddings:
        matmul -= D * model.padded_vocab_size
    num_moe = sum(kind.startswith('moe') for kind in model.layer_kinds)
    idle = model.moe.num_experts - model.moe.num_experts_per_token
    assert flops.active_matmul(model) == matmul - num_moe * idle * 3 * D * model.expert_mlp_dim
    # Every parameter finds its place on a mesh, and a matrix is cut by every axis that can.
    mesh = meshes.abstract(config.Mesh(tensor=2, fsdp=4), 8)
    places = sharding.tree_shardings(mesh, axes, shapes)
    jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, places)
    q = places['params']['periods']['layer_0']['attention']['q']['w'].spec
    assert q == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor', None)


@pytest.mark.slow
@pytest.mark.parametrize('output_init', ['plain', 'depth'])
def test_a_fresh_network_has_the_variances_it_was_promised(output_init):
    model = Transformer(dataclasses.replace(MIXED, num_layers=3, output_init=output_init))
    zeros = jnp.zeros((1, 2), jnp.int32)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(3), zeros, zeros))
    fan_in = {'embed': 1, 'down': 24, 'out': N * H}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
        *_, owner, name = ('', *(key.key for key in path))
        label, values = jax.tree_util.keystr(path), np.asarray(leaf)
        assert values.dtype == np.float32
        if name == 'scale':
            assert (values == 1).all(), label
        elif name == 'w':
            if 'gmu' in label and owner == 'out':
                assert not values.any(), label
                continue
            wanted = fan_in.get(owner, D) ** -0.5
            if owner == 'down':
                wanted = {"['moe']['down']": 24, "['shared']['down']": 24, "['mlp']['down']": F}[
                    ''.join(f'[{key.key!r}]' for key in path[-3:-1])
                ] ** -0.5
            if output_init == 'depth' and owner in ('out', 'down'):
                wanted /= np.sqrt(6)  # sublayers
            error = 5 / np.sqrt(2 * values.size)  # five standard errors
            assert abs(values.std() / wanted - 1) < error, (label, values.std(), wanted)
            assert abs(values.mean()) < 5 * wanted / np.sqrt(values.size), label
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(variables['router']))


@pytest.mark.slow
def test_depth_divides_what_a_layer_reads_by_the_root_of_its_number(random_variables):
    by_depth = dataclasses.replace(MIXED, num_layers=3)
    model = Transformer(dataclasses.replace(by_depth, norm_scale='plain'))
    variables = random_variables(model, TOKENS, TOKENS)
    tokens = [jnp.asarray(a) for a in packed()]
    numbers = {'prefix': {'layer_0': 1}, 'periods': {'layer_0': np.array([[2]]), 'layer_1': 3}}

    def divided(path, leaf):
        group, layer, norm, *_ = (*(key.key for key in path), '', '')
        inputs = norm in ('attention_norm', 'mlp_norm')
        return leaf / np.sqrt(numbers[group][layer]) if inputs else leaf

    params = jax.tree_util.tree_map_with_path(divided, variables['params'])
    run = lambda model, params: model.apply(variables | {'params': params}, *tokens)[0]
    actual = jax.jit(functools.partial(run, Transformer(by_depth)))(variables['params'])
    expected = jax.jit(functools.partial(run, model))(params)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert np.abs(actual - run(model, variables['params'])).max() > 0.1


def test_tied_embeddings_are_one_matrix(random_variables):
    model = Transformer(dataclasses.replace(MIXED, tied_embeddings=True, prefix='', period='dense'))
    variables = random_variables(model, TOKENS, TOKENS)
    assert 'unembedding' not in variables['params']

    @jax.jit
    def run(tokens, positions, ids):
        hidden, _ = model.apply(variables, tokens, positions, ids)
        return hidden, model.apply(variables, tokens, positions, ids, method='logits')

    hidden, logits = (np.asarray(a) for a in run(*(jnp.asarray(a) for a in packed())))
    embedding = np.asarray(variables['params']['embed']['w'], np.float64)
    expected = hidden.astype(np.float64) @ embedding[:V].T / np.sqrt(D)
    np.testing.assert_allclose(logits[..., :V], expected, rtol=0, atol=1e-5)
    assert logits.shape[-1] == MIXED.padded_vocab_size == 256
    assert np.isneginf(logits[..., V:]).all()


@pytest.mark.slow
def test_bfloat16_computes_on_float32_parameters(random_variables):
    narrow, wide = (
        Transformer(dataclasses.replace(MIXED, compute_dtype=dtype, period='dense', prefix=''))
        for dtype in ('bfloat16', 'float32')
    )
    variables = random_variables(narrow, TOKENS, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    tokens, positions, ids = (jnp.asarray(a) for a in packed())

    def evaluate(model, params):
        hidden, _ = model.apply({'params': params}, tokens, positions, ids)
        head = model.apply({'params': params}, method='unembedding_weight')
        weights = jnp.where(ids > 0, 1.0, 0.0)
        return cross_entropy(hidden, head, (tokens + 1) % V, weights, V).total, hidden

    (loss, hidden), gradients = jax.jit(
        jax.value_and_grad(functools.partial(evaluate, narrow), has_aux=True)
    )(variables['params'])
    assert hidden.dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype('float32')}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    exact = jax.jit(functools.partial(evaluate, wide))(variables['params'])[0]
    np.testing.assert_allclose(loss, exact, rtol=1e-2)
    assert loss != exact


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def size(num_layers, **changes):
        model = Transformer(dataclasses.replace(MIXED, num_layers=num_layers, **changes))
        shapes = nn.unbox(abstract_variables(model))
        run = lambda v, t: model.apply(v, t, t, t)[0]
        return len(list(equations(jax.make_jaxpr(run)(shapes, TOKENS))))

    assert size(3) == size(41) > 100
    assert size(3) > 1.5 * size(3, prefix='', period='dense')
