import math

import jax
import pytest

from helios_jax import config
from helios_jax.arch import rules
from helios_jax.errors import UserError
from helios_jax.parallel import mesh as meshes


@pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
        ({}, (1, 1, 8, 1, 1, 1)),
        ({'data': -1, 'fsdp': 2}, (1, 4, 2, 1, 1, 1)),
        ({'slice': 2, 'expert': 2, 'tensor': 2}, (2, 1, 1, 2, 1, 2)),
        ({'fsdp': 2, 'context': -1}, (1, 1, 2, 1, 4, 1)),
    ],
)
def test_axes_have_their_sizes_and_the_open_one_takes_what_is_left(sizes, expected):
    mesh = meshes.make(config.Mesh(**sizes))
    assert mesh.axis_names == rules.MESH_AXES
    assert tuple(mesh.shape.values()) == expected
    assert meshes.abstract(config.Mesh(**sizes), 8).shape == mesh.shape
    # Linen's constraints fail under explicit axes, the default of jax.make_mesh.
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_every_device_appears_once_and_neighbours_share_the_last_axis():
    mesh = meshes.make(config.Mesh(fsdp=4, tensor=2))
    ids = [device.id for device in mesh.devices.flat]
    assert sorted(ids) == ids == list(range(8))
    assert meshes.make(config.Mesh(), jax.devices()[:3]).size == 3


def test_an_abstract_mesh_may_be_larger_than_any_machine():
    mesh = meshes.abstract(config.Mesh(fsdp=-1, tensor=8), 6144)
    assert math.prod(mesh.shape.values()) == 6144
    assert mesh.shape['fsdp'] == 768


@pytest.mark.parametrize(
    'sizes', [{'fsdp': 5}, {'tensor': 3}, {'fsdp': 4}, {'data': 16, 'fsdp': 1}]
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    (axis, size) = next(iter(sizes.items()))
    with pytest.raises(UserError, match=rf'{axis}={size}.*8 devices.*-1'):
        meshes.make(config.Mesh(**sizes))
    with pytest.raises(UserError, match='8 devices'):
        meshes.abstract(config.Mesh(**sizes), 8)


@pytest.mark.parametrize('sizes', [{'data': -1, 'fsdp': -1}, {'tensor': 0}, {'context': -2}])
def test_sizes_that_mean_nothing_are_refused(sizes):
    with pytest.raises(UserError, match='mesh'):
        config.Mesh(**sizes)
