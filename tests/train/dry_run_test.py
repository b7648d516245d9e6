import dataclasses
import json
import math
import re

import jax
import pytest

from helios_jax import config
from helios_jax.arch import flops, weights
from helios_jax.errors import UserError
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.train import dry_run
from helios_jax.train import state as states

CONFIG = config.Config(
    model=config.Model(
        num_layers=5, embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=56,
        prefix='dense', period='moe,dense_window', window=7,
        moe=config.MoE(num_experts=12, mlp_dim=32),
    ),
    data=config.Data(row_length=20),
    train=config.Train(batch_rows=24),
    mesh=config.Mesh(fsdp=4, expert=3, tensor=2),
).resolve(300)  # fmt: skip


@pytest.fixture(scope='module')
def described() -> dict[str, str]:
    """Section title → text, for more devices than there are."""
    text = dry_run.describe(CONFIG, 24)
    parts = re.split(r'^# (.*)\n', text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_config_printed_is_the_resolved_one(described):
    assert json.loads(described['Config']) == dataclasses.asdict(CONFIG)
    assert 'fsdp=4, expert=3, context=1, tensor=2' in described['Mesh of 24 devices']
    assert described['Sharding rules'].strip() == sharding.rules_text()


def test_every_parameter_has_its_shape_axes_place_and_rule(described):
    setup = states.create(CONFIG, meshes.abstract(CONFIG.mesh, 24))
    lines = {line.split()[0]: line for line in described['Parameters'].strip().splitlines()[1:]}
    leaves = jax.tree.leaves_with_path(setup.state.params)
    assert len(lines) == len(leaves)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        assert f' {"×".join(map(str, leaf.shape))} ' in lines[name]
    _, shape, rest = lines['periods.layer_0.moe.gate.w'].split(maxsplit=2)
    assert shape == '2×12×48×32'
    places = 'layers, experts, embed, mlp ·, expert, fsdp, tensor adamw decay'
    assert ' '.join(rest.split()) == places
    assert lines['final_norm.scale'].endswith('adamw')


def test_sizes_are_those_of_the_state(described):
    sizes = dict(
        re.match(r'(.*?)  +(.*)', line).groups() for line in described['Sizes'].strip().splitlines()
    )
    setup = states.create(CONFIG, meshes.abstract(CONFIG.mesh, 24))
    stored = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))
    assert sizes['parameters'] == f'{stored:,}'
    assert sizes['tokens per step'] == f'{24 * 20:,}'
    per_token = flops.flops_per_token(CONFIG.model, 20)
    assert float(sizes['FLOPs per token']) == pytest.approx(per_token, rel=1e-3)
    assert float(sizes['FLOPs per step']) == pytest.approx(480 * per_token, rel=1e-3)
    total, each = map(float, re.findall(r'\d+\.\d+', sizes['optimizer GiB']))
    assert each <= total


def test_bytes_per_device_are_those_of_its_shards():
    cfg = config.replace(CONFIG, {
        'mesh': config.Mesh(), 'model.embed_dim': 4096, 'model.mlp_dim': 16384,
        'model.head_dim': 128,
    })  # fmt: skip
    text = dry_run.describe(cfg, 8)
    totals = re.search(r'params GiB +(\S+) in all, (\S+) per device', text)
    everywhere, one = map(float, totals.groups())
    exact = 4 * weights.count(cfg.model) / 2**30
    assert everywhere == pytest.approx(exact, abs=1e-3)
    # Norms and biases alone are whole on each device.
    assert everywhere / 8 <= one <= 1.01 * everywhere / 8 + 1e-3
    moments = re.search(r'optimizer GiB +(\S+) in all', text)
    assert float(moments[1]) == pytest.approx(2 * exact, abs=1e-2)
    assert math.isfinite(one)


@pytest.mark.parametrize('count', [0, -4])
def test_no_devices_are_refused(count):
    with pytest.raises(UserError, match=f'num_devices={count} must be above 0'):
        dry_run.describe(CONFIG, count)


def test_a_mesh_that_does_not_fit_is_refused_as_a_run_would():
    with pytest.raises(UserError, match='23 devices'):
        dry_run.describe(CONFIG, 23)
    uneven = dataclasses.replace(CONFIG, mesh=config.Mesh(tensor=5))
    with pytest.raises(UserError, match=r'embed/w.*vocab=512 is not divisible'):
        dry_run.describe(uneven, 5)
