"""Holds every mesh of these devices against one of them: the losses of 20 steps of a small model.

All is float32. In the middle the state of a run is saved, and half of the devices go on with it.
"""

import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from helios_jax import checkpoint, config, options, process
from helios_jax.bench.mesh import cases, measure
from helios_jax.data import pipeline
from helios_jax.errors import UserError, require
from helios_jax.parallel import cluster, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train.step import compile_step

log = logging.getLogger(__name__)

STEPS = 20
# Sums over devices are rounded in another order; a step of AdamW passes that on.
TOLERANCE = 2e-5  # relative, of a loss
VOCAB = 320


def small(experts: bool, mesh: config.Mesh, num_devices: int) -> config.Config:
    """Makes the config of a small model with two rows for each device."""
    moe = config.MoE(num_experts=16, num_experts_per_token=2, mlp_dim=64)
    model = config.Model(
        num_layers=2, embed_dim=128, num_heads=16, num_kv_heads=8, head_dim=16, mlp_dim=192,
        compute_dtype='float32', moe=moe, period='moe' if experts else 'dense',
    )  # fmt: skip
    return config.Config(
        model=model,
        data=config.Data(row_length=128, packing='concatenate'),
        optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=0, eps=1e-3),
        train=config.Train(num_steps=STEPS, batch_rows=2 * num_devices),
        mesh=mesh,
        memory=config.Memory(policy='none', layers='scan'),
    ).resolve(VOCAB)


class Training:
    """A model in training on the first devices."""

    def __init__(self, cfg: config.Config, num_devices: int) -> None:
        self.config = cfg
        self.mesh = meshes.make(cfg.mesh, jax.devices()[:num_devices])
        self.setup = states.create(cfg, self.mesh)
        with jax.set_mesh(self.mesh):
            self.state = states.initialize(self.setup)
            self.step = compile_step(self.setup, self.state, self.batch(0))

    def batch(self, step: int) -> pipeline.Batch:
        rows = sharding.sharding(self.mesh, ('batch', 'length'))
        return pipeline.to_global(measure.random_rows(self.config, seed=step), rows)

    def losses(self, first: int, last: int) -> list[float]:
        """Runs the steps from `first` on, below `last`."""
        found = []
        with jax.set_mesh(self.mesh):
            for step in range(first, last):
                self.state, metrics = self.step.run(self.state, self.batch(step))
                found.append(float(metrics['loss']))
        return found

    def save(self, folder: str, step: int) -> None:
        """Saves what the next step reads."""
        checkpoints = checkpoint.Checkpoints(epath.Path(folder), keep=1)
        items = {name: tree for name, tree in _items(self.state).items() if tree}
        checkpoints.save(step, items, {}, None)
        checkpoints.close()

    def load(self, folder: str, step: int) -> None:
        """Goes on from what another one saved, on whichever devices it ran."""
        opened = checkpoint.open_step(epath.Path(folder), step)
        items = _items(self.setup.state)
        found = {name: opened.restore(name, tree) for name, tree in items.items() if tree}
        count = jax.device_put(np.int32(step), self.setup.state.step.sharding)
        self.state = self.state.replace(step=count, **found)


def _items(state: states.TrainState) -> dict[str, Any]:
    return {'params': state.params, 'optimizer': state.optimizer, 'router': state.router}


def losses_of_meshes(names: Sequence[str]) -> list[dict[str, Any]]:
    """Trains on one device and on each mesh of all of them that they form; a row each.

    Args:
      names: of `cases.MESHES`.
    """
    cluster.start()
    cluster.enable_compilation_cache(config.Train().compilation_cache)
    num_devices = jax.device_count()
    alone: dict[bool, list[float]] = {}
    rows = []
    for name in names:
        experts = 'expert' in name
        try:
            cases.require_enough(name, num_devices)
        except UserError as error:
            rows.append({'mesh': name, 'skipped': str(error)})
            continue
        if experts not in alone:
            one = Training(small(experts, config.Mesh(), num_devices), 1)
            alone[experts] = one.losses(0, STEPS)
        many = Training(small(experts, cases.MESHES[name], num_devices), num_devices)
        rows.append(row_of(name, many.losses(0, STEPS), alone[experts]))
    if False in alone:
        rows.append(row_of('half', resumed_on_half(num_devices), alone[False]))
    return rows


def resumed_on_half(num_devices: int) -> list[float]:
    """Saves in the middle of a run, and goes on with half of the devices; the losses of both."""
    cfg = small(False, config.Mesh(), num_devices)
    whole, half = Training(cfg, num_devices), Training(cfg, num_devices // 2)
    with tempfile.TemporaryDirectory() as folder:
        before = whole.losses(0, STEPS // 2)
        whole.save(folder, STEPS // 2)
        half.load(folder, STEPS // 2)
        return before + half.losses(STEPS // 2, STEPS)


def row_of(name: str, losses: list[float], alone: list[float]) -> dict[str, Any]:
    """Compares the losses with one device's: the largest relative difference of a step."""
    worst = float(np.max(np.abs(np.divide(losses, alone) - 1)))
    row = {
        'mesh': name,
        'devices': jax.device_count(),
        'device': jax.devices()[0].device_kind,
        'first_loss': losses[0],
        'last_loss': losses[-1],
        'worst_difference': worst,
        'equal': worst <= TOLERANCE,
    }
    log.info(describe(row))  # as soon as it is there
    return row


def verify_meshes(*, as_json: bool, seconds: float | None) -> None:
    """Prints a row of each mesh.

    Args:
      seconds: after which the run is given up; None: never.
    Raises:
      UserError: a mesh whose losses differ by more than rounding.
    """
    rows = process.run(losses_of_meshes, list(cases.MESHES), seconds=seconds)
    for row in rows:
        print(options.to_json(row) if as_json else describe(row), flush=True)
    bad = [row['mesh'] for row in rows if not row.get('equal', True)]
    require(not bad, f'losses on {", ".join(bad)} differ from those of one device.')


def describe(row: dict[str, Any]) -> str:
    """Writes a row as a line."""
    if 'skipped' in row:
        return f'{row["mesh"]:12} skipped: {row["skipped"]}'
    verdict = 'equal' if row['equal'] else 'DIFFERENT'
    return (
        f'{row["mesh"]:12} {row["devices"]} devices: loss {row["first_loss"]:.6f} to '
        f'{row["last_loss"]:.6f}, worst difference {row["worst_difference"]:.1e}: {verdict}'
    )
