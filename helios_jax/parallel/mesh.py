"""Device meshes: real, simulated, or a named TPU topology without devices."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from helios_jax import config

AXES = ('slice', 'data', 'fsdp', 'expert', 'context', 'tensor')


def make(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges `devices` (all of the run's by default) as the mesh that `sizes` describes.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _fill([getattr(sizes, axis) for axis in AXES], len(devices))
    if shape[0] > 1 and hasattr(devices[0], 'slice_index'):
        grid = mesh_utils.create_hybrid_device_mesh(
            [1, *shape[1:]], [shape[0], *[1] * (len(shape) - 1)], devices
        )
    elif devices[0].platform == 'tpu':
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def abstract(sizes: config.Mesh, num_devices: int) -> jax.sharding.AbstractMesh:
    """The same mesh without devices, to lay out arrays that are never made."""
    shape = _fill([getattr(sizes, axis) for axis in AXES], num_devices)
    return jax.sharding.AbstractMesh(
        tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def _fill(shape: list[int], num_devices: int) -> list[int]:
    known = math.prod(size for size in shape if size != -1)
    named = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, shape, strict=True))
    config.require(
        num_devices % known == 0 and (-1 in shape or known == num_devices),
        f'mesh ({named}) does not fit {num_devices} devices: the sizes must multiply to '
        f'{num_devices}; set one axis, such as mesh.fsdp, to -1 to take what is left.',
    )
    return [num_devices // known if size == -1 else size for size in shape]


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as 'v5p:2x2x4', to compile for on any machine.

    Needs libtpu (the extra `aot`), but no TPU.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    # libtpu asks the cloud's metadata server who it is unless the environment answers.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_WORKER_ID', '0')
    try:
        description = topologies.get_topology_desc(platform='tpu', topology_name=name)
    except Exception as error:  # libtpu raises whatever its C API returned
        raise config.UserError(
            f'topology {name!r} cannot be described ({str(error).splitlines()[0]}); install '
            "libtpu (pip install 'helios_jax[aot]') and name one such as 'v5p:2x2x4'."
        ) from error
    return list(description.devices)
