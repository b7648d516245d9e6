"""Rows of the bench of meshes: their configs, what is cut, what is refused."""

import pytest

from helios_jax import chips
from helios_jax.arch import rules
from helios_jax.bench.mesh import cases
from helios_jax.errors import UserError


def read(name, topology='h200:8', kind='residual', most_layers=0):
    return cases.read(name, chips.topology(topology), kind=kind, most_layers=most_layers)


@pytest.mark.parametrize('name', cases.ROWS)
def test_each_row_gives_every_device_the_same_tokens_and_fits(name):
    case = read(name)
    cfg = case.config
    tokens = cfg.train.batch_rows * cfg.data.row_length
    expected = max(cases.TOKENS[name.split(':')[0]], cfg.data.row_length)
    assert tokens == 8 * expected
    assert cases.fits(cfg, chips.topology('h200:8'))
    assert not cfg.data.documents_apart
    if case.on_one:
        one = case.on_one
        assert (one.model, one.memory) == (cfg.model, cfg.memory)
        assert one.train.batch_rows * one.data.row_length == expected
        assert rules.sizes(one.mesh, 1) == [1] * len(rules.MESH_AXES)


def test_all_rows_are_those_that_the_devices_form():
    assert cases.rows_of(8) == list(cases.ROWS)
    two = cases.rows_of(2)
    assert two and not [name for name in two if 'data_fsdp' in name or 'expert_fsdp' in name]


@pytest.mark.slow
def test_a_model_that_the_devices_cannot_hold_loses_layers_and_says_so():
    few, many = read('hydra_30b_a3b:fsdp', 'h200:2'), read('hydra_30b_a3b:fsdp', 'h200:8')
    assert few.layers == many.layers == 48
    assert few.config.model.num_layers < many.config.model.num_layers <= 48
    assert read('hydra_30b_a3b:fsdp', most_layers=5).config.model.num_layers == 5


def test_rows_may_be_longer_and_another_policy_may_be_needed():
    case = read('helios_1b:context:131072')
    assert case.config.data.row_length == case.config.model.rope.trained_length == 131_072
    assert case.config.mesh.context == -1
    assert (case.config.train.batch_rows, case.config.memory.policy) == (8, 'full')


def test_the_planner_says_seconds_and_peak_of_a_row():
    case, topology = read('helios_1b:data'), chips.topology('h200:8')
    found = cases.predicted(case.config, topology)
    assert 200 < found['planned_ms'] < 800
    assert 20 < found['planned_gib'] < 0.9 * topology.chip.hbm_bytes / 2**30


@pytest.mark.parametrize(
    ('name', 'topology', 'message'),
    [
        ('helios_1b:dta', 'h200:8', "'dta' is no mesh. Did you mean 'data'"),
        ('helios_1b', 'h200:8', "'' is no mesh"),
        ('helios_2b:data', 'h200:8', 'helios_2b: no such file'),
        ('helios_1b:data:4k', 'h200:8', "'4k' must be a number of tokens"),
        ('helios_1b:data_fsdp', 'h200:2', '2 devices are too few'),
        ('helios_1b:data_fsdp', 'h200:7', 'mesh .* does not fit 7 devices'),
        ('helios_1b:tensor', 'h200:8', 'kv_heads=4 is not divisible'),
        ('helios_8b:fsdp:8388608', 'h200:2', 'not even one period'),
    ],
)
def test_a_row_that_cannot_be_is_refused(name, topology, message):
    with pytest.raises(UserError, match=message):
        read(name, topology)
