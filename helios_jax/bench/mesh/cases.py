"""Rows of `helios bench mesh` as configs: CONFIG:MESH or CONFIG:MESH:T.

Each device takes the same tokens of a step on every mesh, so that tokens a second of a device
compare. Rows are plain causal ones. A model that the devices cannot hold is cut to as many layers
as they can.
"""

import dataclasses
from typing import NamedTuple

from helios_jax import config, options
from helios_jax.arch import rules
from helios_jax.chips import Topology
from helios_jax.errors import UserError, nearest, require
from helios_jax.plan import planning

# Sizes of mesh axes; -1 takes the devices that are left, which must be more than one.
MESHES = {
    'fsdp': config.Mesh(),
    'data': config.Mesh(data=-1, fsdp=1),
    'data_fsdp': config.Mesh(data=2),
    'tensor': config.Mesh(fsdp=1, tensor=-1),
    'context': config.Mesh(fsdp=1, context=-1),
    'expert': config.Mesh(fsdp=1, expert=-1),
    'expert_fsdp': config.Mesh(expert=2),
}
ROWS = (
    *(f'{name}:{mesh}' for name in ('helios_1b', 'helios_8b')
      for mesh in ('fsdp', 'data', 'data_fsdp')),
    'helios_8b:tensor',
    *(f'helios_1b:context:{length}' for length in (32_768, 131_072)),
    *(f'{name}:{mesh}' for name in ('hydra_30b_a3b', 'hydra_8x7b')
      for mesh in ('fsdp', 'expert', 'expert_fsdp')),
)  # fmt: skip
# Tokens of a step that a device takes; a config that is not named here: all of its batch.
TOKENS = {'helios_1b': 32_768, 'helios_8b': 16_384, 'hydra_30b_a3b': 16_384, 'hydra_8x7b': 16_384}
POLICIES = ('minimal', 'full')
ROOM = 0.9  # share of a device's memory that a plan may take: plans differ from what runs
NO_PERIOD_FITS = 'not even one period of layers fits'


class MeshCase(NamedTuple):
    """A row on a number of devices."""

    name: str
    config: config.Config  # resolved
    num_devices: int
    layers: int  # of the whole model
    on_one: config.Config | None  # the same rows a device, on one device; None: does not fit


def read(name: str, topology: Topology, *, kind: str, most_layers: int) -> MeshCase:
    """Makes a row's config for these devices.

    Args:
      kind: GMU kind.
      most_layers: that are kept, at the most; 0: as many as fit.
    Raises:
      UserError: no such config, mesh or kind; a mesh that these devices do not form, or that does
        not divide the model; not a layer fits.
    """
    model, _, rest = name.partition(':')
    mesh, colon, length = rest.partition(':')
    require(
        mesh in MESHES,
        f'--rows={name}: {mesh!r} is no mesh.{nearest(mesh, MESHES)} A row is CONFIG:MESH or '
        f'CONFIG:MESH:T; meshes are {", ".join(MESHES)}.',
    )
    require(
        not colon or (length.isdecimal() and int(length) >= 4),
        f'--rows={name}: {length!r} must be a number of tokens, 4 or more.',
    )
    require(most_layers >= 0, f'--layers={most_layers} must be 0 (as many as fit) or more.')
    whole = settings(model, kind, int(length or 0))
    require_enough(mesh, topology.num_devices)
    many = dataclasses.replace(whole, mesh=MESHES[mesh])
    rows = whole.train.batch_rows * topology.num_devices
    many = fitted(config.replace(many, {'train.batch_rows': rows}), topology, most_layers, name)
    one = dataclasses.replace(whole, model=many.model, memory=many.memory)
    alone = topology._replace(num_devices=1)
    return MeshCase(
        name,
        many,
        topology.num_devices,
        whole.model.num_layers,
        one if fits(one, alone) else None,
    )


def settings(name: str, kind: str, length: int) -> config.Config:
    """Loads a shipped config, as it trains on one device in these rows.

    Args:
      length: T; 0: the config's.
    """
    cfg = options.load_config(name)
    length = length or cfg.data.row_length
    tokens = TOKENS.get(name, cfg.train.batch_rows * cfg.data.row_length)
    changes = {
        'model.gmu.kind': kind,
        'data.packing': 'concatenate',
        'data.row_length': length,
        'train.batch_rows': max(1, tokens // length),
        'optimizer.warmup_steps': 0,
    }
    return config.replace(cfg, changes).resolve(cfg.model.vocab_size or 256)


def fitted(cfg: config.Config, topology: Topology, most_layers: int, name: str) -> config.Config:
    """Cuts layers until the step fits, under the policy that keeps most of them."""
    model = cfg.model
    prefix, period = len(model.prefix_kinds), len(model.period_kinds)
    most = min(model.num_layers, most_layers or model.num_layers)
    for layers in range(prefix + (most - prefix) // period * period, prefix, -period):
        for policy in POLICIES:
            changes = {'model.num_layers': layers, 'memory.policy': policy}
            cut = config.replace(cfg, changes)
            if fits(cut, topology):
                return cut
    raise UserError(f'--rows={name}: {NO_PERIOD_FITS} {topology.num_devices} {topology.chip.name}.')


def fits(cfg: config.Config, topology: Topology) -> bool:
    """Tells whether the planner leaves room for what it does not count.

    Raises:
      UserError: the mesh does not divide the model or the batch.
    """
    made = planning.plan(cfg, topology.chip, topology.num_devices)
    return made.memory.peak <= ROOM * topology.chip.hbm_bytes


def predicted(cfg: config.Config, topology: Topology) -> dict[str, float]:
    """Returns the planner's milliseconds of a step, and its peak in GiB."""
    made = planning.plan(cfg, topology.chip, topology.num_devices)
    return {'planned_ms': 1e3 * made.seconds.step, 'planned_gib': made.memory.peak / 2**30}


def rows_of(num_devices: int) -> list[str]:
    """Lists the rows whose mesh so many devices form."""
    formed = []
    for name in ROWS:
        try:
            require_enough(name.split(':')[1], num_devices)
            formed.append(name)
        except UserError:
            continue
    return formed


def require_enough(name: str, num_devices: int) -> None:
    """Refuses a mesh whose last axis would have a size of 1: it is another mesh.

    Raises:
      UserError: naming the mesh.
    """
    mesh = MESHES[name]
    filled = rules.sizes(mesh, num_devices)
    last = next(
        n for n, axis in zip(filled, rules.MESH_AXES, strict=True) if getattr(mesh, axis) == -1
    )
    require(
        last > 1,
        f'mesh {name}: {num_devices} devices are too few; take more, or leave it out.',
    )
