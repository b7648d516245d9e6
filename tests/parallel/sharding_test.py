import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from helios_jax import config
from helios_jax.arch import rules
from helios_jax.errors import UserError
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

EVERYTHING = config.Model(
    vocab_size=300, num_layers=3, embed_dim=32, num_heads=8, num_kv_heads=4, head_dim=4,
    mlp_dim=40, prefix='dense', period='moe', qk_norm=True,
    moe=config.MoE(num_experts=12, num_shared_experts=1),
)  # fmt: skip


def test_every_rule_names_axes_of_the_mesh():
    for name, rule in rules.RULES.items():
        assert set(rule) <= set(rules.MESH_AXES), name
        assert len(rule) == len(set(rule)), name


def test_a_spec_follows_the_table():
    assert sharding.spec(('embed', 'heads', 'head_dim')) == PartitionSpec('fsdp', 'tensor', None)
    assert sharding.spec(('batch', 'length')) == PartitionSpec(
        ('slice', 'data', 'fsdp', 'expert'), 'context'
    )
    assert sharding.spec(()) == PartitionSpec()


def test_a_name_that_the_table_lacks_is_refused():
    # Linen would replicate the array silently.
    with pytest.raises(ValueError, match="'headz' is not in the sharding table"):
        sharding.spec(('embed', 'headz'))


@pytest.mark.parametrize(
    ('axes', 'clash'),
    [
        (('embed', 'embed'), 'fsdp'),
        (('heads', 'mlp'), 'tensor'),
        (('batch', 'embed'), 'fsdp'),
        (('experts', 'batch'), 'expert'),
    ],
)
def test_two_names_on_one_mesh_axis_are_refused(axes, clash):
    with pytest.raises(ValueError, match=f"{axes[0]!r} and {axes[1]!r} .*'{clash}'"):
        sharding.spec(axes)


def test_a_size_that_the_mesh_does_not_divide_names_the_weight_and_the_axes():
    mesh = meshes.abstract(config.Mesh(fsdp=4, tensor=2), 8)
    rules.check('blocks/q', (12, 6, 5), ('embed', 'heads', 'head_dim'), mesh)
    with pytest.raises(UserError, match=r'blocks/q \(12, 7, 5\): .*heads=7 .*2 pieces .*tensor'):
        rules.check('blocks/q', (12, 7, 5), ('embed', 'heads', 'head_dim'), mesh)
    tree, axes = {'a': {'w': jnp.zeros((10, 3))}}, {'a': {'w': ('embed', 'gate')}}
    with pytest.raises(UserError, match=r'a/w.*embed=10'):
        sharding.tree_shardings(mesh, axes, tree)


@pytest.mark.parametrize(
    'sizes', [{'fsdp': 8}, {'fsdp': 2, 'tensor': 4}, {'expert': 4, 'fsdp': 2}], ids=str
)
def test_weights_are_cut_into_as_many_parts_as_the_table_says(sizes):
    mesh = meshes.abstract(config.Mesh(**{'fsdp': 1} | sizes), 8)
    boxed = abstract_variables(Transformer(EVERYTHING))
    axes, shapes = sharding.logical_axes(boxed), nn.unbox(boxed)
    leaves = zip(
        jax.tree.leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(sharding.tree_shardings(mesh, axes, shapes)),
        strict=True,
    )
    for (path, leaf), names, where in leaves:
        assert len(names) == leaf.ndim, path
        expected = [
            size // np.prod([mesh.shape[axis] for axis in rules.RULES[name]], dtype=int)
            for size, name in zip(leaf.shape, names, strict=True)
        ]
        assert where.shard_shape(leaf.shape) == tuple(expected), path


def test_large_weights_are_never_whole_on_a_device_under_fsdp():
    mesh = meshes.abstract(config.Mesh(), 8)
    boxed = abstract_variables(Transformer(EVERYTHING))
    shapes = nn.unbox(boxed)
    where = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), shapes)
    whole = {
        jax.tree_util.keystr(path, simple=True, separator='/')
        for (path, leaf), place in zip(
            jax.tree.leaves_with_path(shapes), jax.tree.leaves(where), strict=True
        )
        if leaf.ndim > 1 and place.shard_shape(leaf.shape) == leaf.shape
    }
    # Vectors of the scanned layers: norms and the routers' balance bias.
    assert all(name.endswith(('scale', 'moe/bias')) for name in whole), whole


def test_constrain_moves_nothing_without_a_mesh_and_shards_with_one():
    x = jnp.arange(48.0).reshape(16, 3)
    assert sharding.constrain(x, 'batch', 'stream') is x
    mesh = meshes.make(config.Mesh())
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, 'batch', 'stream'))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 3)
    np.testing.assert_array_equal(x, y)


def test_the_table_prints_every_rule():
    lines = sharding.rules_text().splitlines()
    assert [line.split()[0] for line in lines] == list(rules.RULES)
