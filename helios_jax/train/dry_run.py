"""Describes a run in text, without touching data or an accelerator."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from helios_jax import config
from helios_jax.arch import flops, weights
from helios_jax.errors import require
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.train import optimizer
from helios_jax.train import state as states

GIB = 2**30


def describe(cfg: config.Config, num_devices: int) -> str:
    """Returns the config, parameter table, sharding rules, FLOPs and bytes for `num_devices`.

    Args:
      cfg: resolved.
    Raises:
      UserError: as a run on so many devices would, or no devices at all.
    """
    require(num_devices > 0, f'num_devices={num_devices} must be above 0.')
    mesh = meshes.abstract(cfg.mesh, num_devices)
    setup = states.create(cfg, mesh)
    tokens = cfg.train.batch_rows * cfg.data.row_length
    per_token = flops.flops_per_token(cfg.model, cfg.data.row_length)
    split = ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    sections = [
        '# Config\n' + json.dumps(dataclasses.asdict(cfg), indent=1),
        f'# Mesh of {num_devices} devices\n{split}',
        '# Sharding rules\n' + sharding.rules_text(),
        '# Parameters\n' + _parameters(setup),
        '# Sizes\n'
        f'parameters            {weights.count(cfg.model):,}\n'
        f'active in matmuls     {flops.active_matmul(cfg.model):,}\n'
        f'tokens per step       {tokens:,}\n'
        f'FLOPs per token       {per_token:.4g}\n'
        f'FLOPs per step        {per_token * tokens:.4g}\n' + _state_bytes(setup),
    ]
    return '\n\n'.join(sections)


def _parameters(setup: states.Setup) -> str:
    rules = optimizer.rules(setup.config.optimizer, setup.axes, setup.state.params)
    leaves = jax.tree.leaves(setup.state.params)
    lines = [f'{"name":60} {"shape":24} {"axes":42} {"mesh":40} optimizer']
    for rule, leaf in zip(rules, leaves, strict=True):
        update = rule.optimizer + (' decay' if rule.decay else '')
        where = ', '.join(str(axes) if axes else '·' for axes in leaf.sharding.spec)
        lines.append(
            f'{rule.name:60} {"×".join(map(str, rule.shape)):24} {", ".join(rule.axes):42} '
            f'{where:40} {update}'
        )
    return '\n'.join(lines)


def _state_bytes(setup: states.Setup) -> str:
    lines = []
    memory = setup.config.memory
    places = {'params': memory.parameters, 'optimizer': memory.optimizer}
    if setup.config.train.ema:
        places['ema'] = memory.optimizer
    for name, where in places.items():
        leaves = jax.tree.leaves(getattr(setup.state, name))
        total = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
        note = ', in the memory of its host' if where == 'host' else ''
        each = sum(_shard_bytes(leaf) for leaf in leaves)
        size = f'{total / GIB:.3f} in all, {each / GIB:.3f} per device{note}'
        lines.append(f'{name + " GiB":21} {size}')
    return '\n'.join(lines)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    size = jnp.dtype(leaf.dtype).itemsize
    for dim in leaf.sharding.shard_shape(leaf.shape):
        size *= dim
    return size
