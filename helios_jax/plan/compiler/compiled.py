"""Compiles a whole train step for a TPU topology, on any machine, and reads its bytes.

    helios plan --config=helios_8b --topology=v5p:2x2x4 --compile

Needs libtpu (the extra `tpu`), but no TPU. Bytes are per device, as the compiler assigns them.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from helios_jax import config
from helios_jax.chips import GIB, topology
from helios_jax.data.pipeline import Batch
from helios_jax.errors import require
from helios_jax.memory import evidence, hlo
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.plan.compiler import predicted, step
from helios_jax.plan.planning import Plan
from helios_jax.train import state as states
from helios_jax.train.step import compiler_options_of, make_train_step


def trace(cfg: config.Config, name: str) -> jax.stages.Traced:
    """Traces the train step of `cfg` for the devices of a topology, without compiling it.

    Raises:
      UserError: not a TPU topology, or one that libtpu does not know; what a run would refuse.
    """
    require(
        topology(name).chip.platform == 'tpu',
        f'--topology={name}: only TPUs can be compiled for without one; leave out --compile, or '
        'name a topology such as v5p:2x2x4.',
    )
    mesh = meshes.make(cfg.mesh, meshes.topology_devices(name))
    setup = states.create(cfg.resolve(cfg.model.vocab_size), mesh, platform='tpu')
    run = jax.jit(make_train_step(setup), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run.trace(setup.state, abstract_batch(cfg, mesh))


def abstract_batch(
    cfg: config.Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> Batch:
    rows, length = cfg.train.batch_rows, cfg.data.row_length
    where = sharding.sharding(mesh, ('batch', 'length'))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
    return Batch(
        tokens=tokens,
        segment_ids=tokens,
        positions=tokens,
        loss_mask=jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=where),
        num_bytes=jax.ShapeDtypeStruct(
            (rows,), jnp.int32, sharding=sharding.sharding(mesh, ('batch',))
        ),
    )


def compiled_figures(cfg: config.Config, name: str, timed: bool = False) -> dict[str, Any]:
    """Compiles the step; returns GiB per device, and the seconds that compiling took here.

    `peak_gib` is what has to fit: arguments and what is alive beside them at the worst moment, that
    is `live_temp_gib`. `temp_gib` is more than that: a program whose arguments and temp together
    exceed the device's memory compiles all the same, if its peak does not. `saved` has a row for
    each tensor that is saved for the backward pass. What the step does is `step.figures`, and the
    time that it takes `predicted.figures`.

    Args:
      timed: predict the time too, which compiles our kernels once more, each alone.
    Raises:
      UserError: as `trace`; an action of memory.actions that did not take effect.
    """
    devices = meshes.topology_devices(name)
    traced = trace(cfg, name)
    start = time.monotonic()
    compiled = traced.lower().compile(compiler_options_of(cfg, devices[0], len(devices)))
    seconds = time.monotonic() - start
    saved = evidence.verified(cfg.memory, traced, compiled, host=True)
    memory: Any = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    # XLA's peak counts arguments that lie on the host, though not what is offloaded there.
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    text = hlo.text(compiled)
    times = {}
    if timed:
        places = [device.coords for device in meshes.make(cfg.mesh, devices).devices.flat]
        clock = predicted.own_kernels(cfg, topology(name).chip)
        times = predicted.figures(text, cfg, name, places, clock)
    return {
        'topology': name,
        'kind': cfg.model.gmu.kind,
        'policy': cfg.memory.policy,
        'optimizer': cfg.memory.optimizer,
        'parameters': cfg.memory.parameters,
        'arguments_gib': arguments / GIB,
        'live_temp_gib': (peak - arguments) / GIB,
        'peak_gib': peak / GIB,
        'temp_gib': memory.temp_size_in_bytes / GIB,
        'host_arguments_gib': memory.host_argument_size_in_bytes / GIB,
        'host_output_gib': memory.host_output_size_in_bytes / GIB,
        'host_alias_gib': memory.host_alias_size_in_bytes / GIB,
        'host_temp_gib': memory.host_temp_size_in_bytes / GIB,
        'compile_seconds': seconds,
        'jax': jax.__version__,
        'saved': evidence.rows(saved, host=True),
        **step.figures(text),
        **times,
    }


def closed_form(made: Plan) -> dict[str, float]:
    """Returns the closed form's figures under the names of `compiled_figures`."""
    counted = made.memory
    return {
        'arguments_gib': counted.arguments_device / GIB,
        'live_temp_gib': counted.temporary / GIB,
        'peak_gib': counted.peak / GIB,
        'host_arguments_gib': counted.arguments.on_host(counted.placement) / GIB,
        'host_temp_gib': counted.saved_host / GIB,
    }


def comparison(made: Plan, measured: dict[str, Any]) -> str:
    """Writes predicted beside compiled figures, line by line."""
    lines = [f'{"GiB a device":24} {"predicted":>10} {"compiled":>10} {"error":>8}']
    for name, value in closed_form(made).items():
        true = measured[name]
        error = f'{100 * (value / true - 1):+7.1f}%' if true > 1e-3 else ''
        lines.append(f'{name.removesuffix("_gib"):24} {value:10.3f} {true:10.3f} {error:>8}')
    lines.append(f'compiled in {measured["compile_seconds"]:.0f} s by jax {measured["jax"]}')
    timed = ['', predicted.text(measured)] if 'step_seconds' in measured else []
    return '\n'.join([*lines, '', step.text(measured), *timed])


def explanation(measured: dict[str, Any]) -> str:
    """Lists what the compiled step saves for its backward pass, a line a tensor."""
    lines = [f'{"saved for backward":20} {"action":14} {"as":16} {"GiB a device":>12} {"host":>9}']
    for row in measured['saved']:
        device, host = row['device_bytes'] / GIB, row['host_bytes'] / GIB
        dtypes = '+'.join(row['dtypes'])
        lines.append(f'{row["name"]:20} {row["action"]:14} {dtypes:16} {device:12.3f} {host:9.3f}')
    return '\n'.join(lines)
