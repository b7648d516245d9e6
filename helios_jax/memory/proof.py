"""What a compiled step really saves between forward and backward, and whether it is what was asked.

An action can fail without a word: a name may match nothing, the backward pass may never read the
tensor, XLA may keep a tensor on the device that was to be moved. So the stored arrays are read from
the traced step, where memory/store.py has marked them, and looked for in the compiled program:
each by its dtype, its size on one device and the memory that it lies in.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from helios_jax import config
from helios_jax.memory import policy
from helios_jax.memory.linearized import inner_jaxprs
from helios_jax.memory.store import MARK

HLO_DTYPES = {
    'bfloat16': 'bf16', 'float32': 'f32', 'float16': 'f16', 'uint8': 'u8', 'int8': 's8',
    'int32': 's32', 'uint32': 'u32', 'bool': 'pred', 'float64': 'f64',
}  # fmt: skip
HOST_SPACE = 'S(5)'  # in a layout of XLA's


class Saved(NamedTuple):
    """One array that lives from forward to backward, of one name; sizes are of one device."""

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]  # of one layer, on all devices
    layers: int
    elements: int  # on one device, all layers

    @property
    def num_bytes(self) -> int:
        return self.elements * jnp.dtype(self.dtype).itemsize

    @property
    def host(self) -> bool:
        return policy.parse(self.action).host


def saved(jaxpr: Any, num_devices: int) -> list[Saved]:
    """The stored arrays of a traced step, in order.

    Args:
      jaxpr: of `jax.jit(step).trace(…)`.
      num_devices: of the mesh.
    """
    return list(_walk(getattr(jaxpr, 'jaxpr', jaxpr), num_devices, 1))


def _walk(jaxpr: Any, num_devices: int, layers: int) -> Iterator[Saved]:
    made_by = {id(v): equation for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        mark = equation.params.get('name', '') if equation.primitive.name == 'name' else ''
        if mark.startswith(f'{MARK}/'):
            _, name, action, where = mark.split('/')
            aval = equation.outvars[0].aval
            placed = made_by.get(id(equation.invars[0]))
            local = aval.shape
            if where == 'manual':
                local = (aval.shape[0] // num_devices, *aval.shape[1:])
            elif placed is not None and placed.primitive.name == 'sharding_constraint':
                local = placed.params['sharding'].shard_shape(aval.shape)
            elements = layers * math.prod(local)
            yield Saved(name, action, str(aval.dtype), aval.shape, layers, elements)
        # Only the scan that a mark lies in stacks it; a scan over microbatches uses it up.
        length = equation.params['length'] if equation.primitive.name == 'scan' else layers
        for inner in inner_jaxprs(equation):
            yield from _walk(inner, num_devices, length)


def program(compiled: jax.stages.Compiled) -> str:
    """Text of the compiled program, as the compiler left it.

    Raises:
      UserError: libtpu is newer than the jaxlib that reads what it made.
    """
    try:
        return compiled.as_text() or ''
    except jax.errors.JaxRuntimeError as error:
        raise config.UserError(
            f'jaxlib {jax.lib.__version__} cannot read the program that its plugin compiled '
            f'({str(error).splitlines()[0]}); install the libtpu that this jax names: '
            "pip install 'helios_jax[tpu]'."
        ) from error


def check(memory: config.Memory, arrays: list[Saved], hlo: str, *, host: bool) -> None:
    """Compares what was asked for with what was traced and compiled.

    Args:
      arrays: `saved` of the traced step.
      hlo: `program` of the compiled step.
      host: whether the platform has a host memory space.
    Raises:
      UserError: an action that did not take effect, with the tensor and the reason.
    """
    if memory.policy == 'none':
        return
    there = {array.name for array in arrays}
    for name, action in policy.chosen_actions(memory).items():
        config.require(
            action == 'remat' or name in there,
            f'memory.actions.{name}={action!r} has no effect: this model has no such tensor, or '
            'its backward pass never reads it; leave it out. There are: '
            f'{", ".join(sorted(there))}.',
        )
    found = _sizes(hlo)
    for array in arrays:
        space = HOST_SPACE if array.host and host else ''
        spaces = found.get((HLO_DTYPES[array.dtype], array.elements), set())
        config.require(
            space in spaces or not array.elements,
            f'memory: {array.name!r} was to be kept as {array.action!r}, {array.dtype} '
            f'{array.shape} × {array.layers} layers on the {"host" if space else "device"}, but '
            f'the compiled step has no such array{_elsewhere(spaces)}; choose another action.',
        )


def _elsewhere(spaces: set[str]) -> str:
    return ' there, only on the other side' if spaces else ''


def _sizes(hlo: str) -> Mapping[tuple[str, int], set[str]]:
    """(dtype, elements) of every array in the program → the memory spaces it lies in."""
    found: dict[tuple[str, int], set[str]] = {}
    for dtype, dims, layout in set(re.findall(r'\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?', hlo)):
        size = math.prod(int(d) for d in dims.split(',') if d)
        space = HOST_SPACE if HOST_SPACE in layout else ''
        found.setdefault((dtype, size), set()).add(space)
    return found


def rows(arrays: list[Saved], *, host: bool) -> list[dict[str, Any]]:
    """One row a name: what is saved of it, bytes of one device on the device and on the host."""
    table: dict[str, dict[str, Any]] = {}
    for array in arrays:
        row = table.setdefault(
            array.name or '(unnamed)',
            {'name': array.name or '(unnamed)', 'action': array.action, 'dtypes': [],
             'device_bytes': 0, 'host_bytes': 0},
        )  # fmt: skip
        if array.dtype not in row['dtypes']:
            row['dtypes'].append(array.dtype)
        row['host_bytes' if array.host and host else 'device_bytes'] += array.num_bytes
    return list(table.values())


def line(arrays: list[Saved], *, host: bool) -> str:
    """A line for the log: what one device saves for its backward pass."""
    table = rows(arrays, host=host)
    total = {place: sum(row[f'{place}_bytes'] for row in table) for place in ('device', 'host')}
    names = ', '.join(f'{row["name"]} {row["action"]}' for row in table)
    text = f'saved for backward: {total["device"] / 2**20:.1f} MiB on the device'
    if total['host']:
        text += f', {total["host"] / 2**20:.1f} MiB on the host'
    elif not host and any(array.host for array in arrays):
        text += ' (this platform has no host memory of its own: nothing is offloaded)'
    return f'{text}: {names}'


def has_host_memory(platform: str) -> bool:
    """Whether offloading moves anything: a CPU's memory is the host's already."""
    return (platform or jax.default_backend()) != 'cpu'
