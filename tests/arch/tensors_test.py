"""The table of named tensors: axes that exist, shapes that the settings' comments promise."""

import dataclasses
import re

import pytest

from helios_jax import config
from helios_jax.arch import rules, tensors
from helios_jax.parallel import sharding

MODEL = config.Model(
    embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=56, period='moe',
    gmu=config.GMU(rank=20), moe=config.MoE(num_experts=12, num_experts_per_token=3),
)  # fmt: skip
SIZES = {'B': 4, 'T': 64, 'D': 48, 'N': 6, 'K': 2, 'H': 10, 'F': 56, 'R': 20, 'X': 3}


def test_every_setting_is_a_tensor_whose_axes_are_in_the_sharding_table():
    assert tuple(field.name for field in dataclasses.fields(config.Actions)) == tensors.NAMES
    for tensor in tensors.TENSORS.values():
        sharding.spec(tensor.axes)


@pytest.mark.parametrize('name', [name for name in tensors.NAMES if name != 'expert_input'])
def test_a_tensor_has_the_shape_that_its_comment_says(name):
    _, comment = config.describe(config.Actions)[name]
    letters = re.search(r'\[([A-Z ]+)\]', comment)[1].split()
    assert tensors.shape(MODEL, name, 4, 64) == tuple(SIZES[letter] for letter in letters)


def test_streams_lie_side_by_side_between_layers_alone():
    hyper = config.replace(MODEL, {'gmu': config.GMU(kind='hyper', streams=5)})
    sizes = {name: tensors.shape(hyper, name, 4, 64) for name in tensors.NAMES}
    changed = {n: size for n, size in sizes.items() if size != tensors.shape(MODEL, n, 4, 64)}
    gate = (4, 64, 5 * (5 + 2))
    assert changed == {'block_input': (4, 64, 5 * 48), 'attention_gate': gate, 'mlp_gate': gate}


def test_what_rounding_would_make_another_function_keeps_its_own_dtype():
    exact = {tensor.name: tensor.dtype for tensor in tensors.TENSORS.values() if tensor.exact}
    assert exact == {'log_sum_exp': 'float32', 'router_choices': 'int32'}


def test_a_length_that_the_mesh_does_not_divide_for_storage_is_split_less():
    placed = type('Mesh', (), {'shape': dict.fromkeys(rules.MESH_AXES, 1) | {'tensor': 3}})
    axes = tensors.TENSORS['block_input'].axes
    assert rules.fitting((4, 63, 48), axes, placed) == axes
    assert rules.fitting((4, 64, 48), axes, placed) == ('batch', 'length', 'streams')
