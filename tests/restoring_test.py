"""A checkpoint path is all that is needed, on any number of devices."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from etils import epath

import helios_jax
from helios_jax import checkpoint, config, restoring
from helios_jax.data import tokenizer as tokenizers
from helios_jax.errors import UserError
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states

CONFIG = config.Config(
    model=config.Model(
        num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=40,
        prefix='dense', period='moe', moe=config.MoE(num_experts=4), compute_dtype='float32',
    ),
    data=config.Data(row_length=16),
    train=config.Train(batch_rows=8),
).resolve(256)  # fmt: skip
MESHES = {'one': ({'fsdp': 1}, 1), 'eight': ({'fsdp': 2, 'expert': 2, 'tensor': 2}, 8)}


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes, devices = MESHES[name]
    return meshes.make(config.Mesh(**sizes), jax.devices()[:devices])


def setup_on(name: str, cfg: config.Config = CONFIG) -> states.Setup:
    return states.create(cfg, mesh_of(name))


@functools.cache
def numbers() -> dict:
    """Every variable of the model, all different."""
    state = setup_on('one').state
    variables = {'params': state.params, 'router': state.router}
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), variables)


def write(directory, name: str, cfg: config.Config = CONFIG, step: int = 3):
    state = setup_on(name).state
    where = {'params': state.params, 'router': state.router}
    items = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), numbers(), where)
    with contextlib.closing(checkpoint.Checkpoints(directory / 'checkpoints', keep=3)) as writer:
        tokenizer = tokenizers.load('bytes').save(epath.Path(directory))
        writer.save(step, items, {'config': dataclasses.asdict(cfg), 'tokenizer': tokenizer})


@pytest.mark.parametrize('written', MESHES)
@pytest.mark.parametrize('read', MESHES)
def test_any_mesh_reads_what_any_other_wrote(written, read, tmp_path):
    write(tmp_path, written)
    restored = restoring.restore(tmp_path, mesh=mesh_of(read))
    jax.tree.map(np.testing.assert_array_equal, restored.variables, numbers())
    assert restored.config == CONFIG
    assert restored.tokenizer.vocab_size == 256
    state = setup_on(read).state
    for name, like in (('params', state.params), ('router', state.router)):
        jax.tree.map(
            lambda x, to: np.testing.assert_(x.sharding.is_equivalent_to(to.sharding, x.ndim)),
            restored.variables[name],
            like,
        )
    assert restoring.mesh_of(restored.variables) == mesh_of(read)


def test_without_a_mesh_all_devices_share_the_weights(tmp_path):
    write(tmp_path, 'one')
    model, variables, _, _ = helios_jax.restore(str(tmp_path / 'checkpoints'), 'latest')
    assert restoring.mesh_of(variables).shape['fsdp'] == 8
    head = variables['params']['unembedding']['w']
    assert head.sharding.shard_shape(head.shape) == (24, 32)
    assert model.model == CONFIG.model


def test_weights_that_the_devices_do_not_divide_are_copied_to_each(tmp_path):
    model = dataclasses.replace(CONFIG.model, embed_dim=20)
    shapes = setup_on('one', dataclasses.replace(CONFIG, model=model))
    where = shapes.state.params, shapes.axes
    mesh = restoring.default_mesh(where[1], where[0])
    assert (mesh.shape['data'], mesh.shape['fsdp']) == (8, 1)


def test_positions_may_be_rescaled_while_restoring(tmp_path):
    write(tmp_path, 'one')
    restored = restoring.restore(tmp_path, rope={'scaling': 'dynamic'}, mesh=mesh_of('one'))
    rope = restored.model.model.rope
    assert (rope.scaling, rope.trained_length) == ('dynamic', 16)
    with pytest.raises(UserError, match=r'factor=0\.5'):
        restoring.restore(tmp_path, rope={'scaling': 'static', 'factor': 0.5}, mesh=mesh_of('one'))


def test_a_step_is_chosen_by_number(tmp_path):
    write(tmp_path, 'one', step=3)
    write(tmp_path, 'one', step=5)
    assert checkpoint.open_step(tmp_path / 'checkpoints', 'latest').step == 5
    jax.tree.map(
        np.testing.assert_array_equal,
        restoring.restore(tmp_path, 3, mesh=mesh_of('one')).variables,
        numbers(),
    )
    with pytest.raises(UserError, match=r'step=4.*3, 5'):
        restoring.restore(tmp_path, 4)
    with pytest.raises(UserError, match='does not exist'):
        restoring.restore(tmp_path / 'none')
