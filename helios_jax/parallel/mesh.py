"""Device meshes: real, simulated, or a named TPU topology without devices."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from helios_jax import config
from helios_jax.arch import rules
from helios_jax.arch.rules import MESH_AXES
from helios_jax.errors import UserError

# Linen's constraints fail under explicit axes, the default of jax.make_mesh.
AXIS_TYPES = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)


def make(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges `devices` (all of the run's by default) as the mesh that `sizes` describes.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = rules.sizes(sizes, len(devices))
    if shape[0] > 1 and hasattr(devices[0], 'slice_index'):
        grid = mesh_utils.create_hybrid_device_mesh(
            [1, *shape[1:]], [shape[0], *[1] * (len(shape) - 1)], devices
        )
    elif devices[0].platform == 'tpu':
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=AXIS_TYPES)


def abstract(sizes: config.Mesh, num_devices: int) -> jax.sharding.AbstractMesh:
    """Returns the same mesh without devices, to lay out arrays that are never made."""
    shape = rules.sizes(sizes, num_devices)
    return jax.sharding.AbstractMesh(tuple(shape), MESH_AXES, axis_types=AXIS_TYPES)


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a TPU topology such as 'v5p:2x2x4', to compile for on any machine.

    Needs libtpu (the extra `tpu`), but no TPU.

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
        raise UserError(
            f'topology {name!r} cannot be described ({str(error).splitlines()[0]}); install '
            "libtpu (pip install 'helios_jax[tpu]') and name one such as 'v5p:2x2x4'."
        ) from error
    return list(description.devices)
