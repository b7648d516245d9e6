"""What the compiler makes of a whole train step for a TPU topology, on any machine.

    helios bench compile --config=helios_8b --topology=v5p:2x2x4

Needs libtpu (the extra `aot`), but no TPU. Bytes are per device, as the compiler assigns them.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.train import state as states
from helios_jax.train.step import make_train_step

GIB = 2**30


def lower(cfg: config.Config, topology: str) -> jax.stages.Lowered:
    """The train step of `cfg` for the devices of `topology`, lowered but not compiled."""
    mesh = meshes.make(cfg.mesh, meshes.topology_devices(topology))
    setup = states.create(cfg.resolve(cfg.model.vocab_size), mesh, platform='tpu')
    batch = abstract_batch(cfg, mesh)
    step = jax.jit(make_train_step(setup), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(setup.state, batch)


def abstract_batch(cfg: config.Config, mesh: jax.sharding.Mesh) -> Batch:
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


def measure(cfg: config.Config, topology: str) -> dict[str, Any]:
    """GiB per device of the compiled step, and the seconds it took to compile here."""
    lowered = lower(cfg, topology)
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    memory: Any = compiled.memory_analysis()
    return {
        'topology': topology,
        'kind': cfg.model.gmu.kind,
        'policy': cfg.memory.policy,
        'optimizer': cfg.memory.optimizer,
        'parameters': cfg.memory.parameters,
        'arguments_gib': memory.argument_size_in_bytes / GIB,
        'temp_gib': memory.temp_size_in_bytes / GIB,
        'peak_gib': memory.peak_memory_in_bytes / GIB,
        'host_arguments_gib': memory.host_argument_size_in_bytes / GIB,
        'host_output_gib': memory.host_output_size_in_bytes / GIB,
        'host_alias_gib': memory.host_alias_size_in_bytes / GIB,
        'host_temp_gib': memory.host_temp_size_in_bytes / GIB,
        'compile_seconds': seconds,
        'jax': jax.__version__,
    }
