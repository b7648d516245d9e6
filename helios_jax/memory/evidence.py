"""Evidence of what a compiled step saves between forward and backward.

An action can fail without a word: a name may match nothing, the backward pass may never read the
tensor, XLA may keep a tensor on the device that was to be moved, a tensor may be saved that nobody
named. So the stored arrays are read from the traced step (memory/traced.py) and looked for in the
compiled program (memory/hlo.py). Those of scanned layers must be among what a loop carries, each in
its dtype, its size and its place, as many as there are; of one on the host, no copy may be on the
device. An array of a layer outside the scan, or of a scan so short that XLA writes it out, has no
loop to be found in: the program must hold one of that dtype, size and place.
"""

from collections import Counter
from typing import Any

import jax

from helios_jax import config
from helios_jax.errors import require
from helios_jax.memory import hlo, policy
from helios_jax.memory.hlo import HloArray
from helios_jax.memory.traced import SavedArray, saved

UNNAMED_BYTES = 64 * 2**10  # what may be saved without a name
WRITTEN_OUT = 2  # layers of a scan of which XLA may make no loop


def verified(
    memory: config.Memory,
    traced: jax.stages.Traced,
    compiled: jax.stages.Compiled,
    *,
    host: bool,
) -> list[SavedArray]:
    """The arrays that a step saves for its backward pass, found in the compiled program.

    Args:
      host: True if the platform has a host memory space.
    Raises:
      UserError: an action that did not take effect, or an array saved that nobody named, with the
        tensor and the reason.
    """
    arrays = saved(traced.jaxpr)
    if memory.policy != 'none':
        check_traced(memory, arrays)
        check_compiled(arrays, hlo.text(compiled), host=host)
    return arrays


def check_traced(memory: config.Memory, arrays: list[SavedArray]) -> None:
    """Refuses an action that names nothing, and a large array without a name."""
    there = {array.name for array in arrays if array.name}
    for name, action in policy.chosen_actions(memory).items():
        require(
            action == 'remat' or name in there,
            f'memory.actions.{name}={action!r} has no effect: this model has no such tensor, or '
            'its backward pass never reads it; leave it out. There are: '
            f'{", ".join(sorted(there))}.',
        )
    for array in arrays:
        require(
            bool(array.name) or array.num_bytes <= UNNAMED_BYTES,
            f'memory: {array.dtype} {array.shape} × {max(1, array.layers)} layers, '
            f'{array.num_bytes} bytes a device, is saved for the backward pass without a name; '
            'name it by checkpoint_name and give it a row in config.Actions.',
        )


def check_compiled(arrays: list[SavedArray], program: str, *, host: bool) -> None:
    """Refuses an array that the program lacks where it should be, or has where it should not."""
    anywhere = Counter({array.size: 1 for array in hlo.arrays(program)})
    carried = hlo.loops(program)
    looped = [array for array in arrays if array.layers > WRITTEN_OUT]
    wanted = Counter(_expected(array, host).size for array in looped)
    for array in arrays:
        expected = _expected(array, host)
        number, found = 1, anywhere
        if array.layers > WRITTEN_OUT:
            number = wanted[expected.size]
            found = _most([Counter(_sizes(loop)) for loop in carried])
        elsewhere = expected.size._replace(host=not expected.host)
        require(
            found[expected.size] >= number or not array.elements,
            f'memory: {array.name!r} was to be kept as {array.action!r}, {_described(array)} on '
            f'the {"host" if expected.host else "device"}, but of {number} such arrays the '
            f'compiled step has {found[expected.size]} there'
            f'{", only on the other side" if found[elsewhere] else ""}; choose another action.',
        )
    _check_left_behind(arrays, carried, host=host)


def _check_left_behind(
    arrays: list[SavedArray], carried: list[Counter[HloArray]], *, host: bool
) -> None:
    """Refuses an array of scanned layers that is on the host and on the device as well."""
    wanted = Counter(_expected(array, host) for array in arrays if array.layers > 1)
    for array in arrays:
        there = _expected(array, host)
        if array.layers < 2 or not there.host:
            continue
        here = there._replace(host=False)
        number = max((loop[here] for loop in carried if loop[there]), default=0)
        require(
            number <= wanted[here],
            f'memory: {array.name!r} was to be moved to the host by {array.action!r}, but '
            f'{_described(array)} stay on the device too; choose another action.',
        )


def _expected(array: SavedArray, host: bool) -> HloArray:
    dims = (array.layers, *array.local) if array.layers else array.local
    return HloArray(hlo.DTYPES[array.dtype], dims, array.host and host)


def _described(array: SavedArray) -> str:
    return f'{array.dtype} {array.shape} × {max(1, array.layers)} layers'


def _sizes(loop: Counter[HloArray]) -> Counter[HloArray]:
    total: Counter[HloArray] = Counter()
    for array, number in loop.items():
        total[array.size] += number
    return total


def _most(loops: list[Counter[HloArray]]) -> Counter[HloArray]:
    """Number of each array in the loop that has most of them."""
    most: Counter[HloArray] = Counter()
    for loop in loops:
        most |= loop
    return most


def rows(arrays: list[SavedArray], *, host: bool) -> list[dict[str, Any]]:
    """A row for each name: action, dtypes, and one device's bytes on the device and on the host."""
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


def line(arrays: list[SavedArray], *, host: bool) -> str:
    """Sentence for the log: what one device saves for its backward pass."""
    table = rows(arrays, host=host)
    total = {place: sum(row[f'{place}_bytes'] for row in table) for place in ('device', 'host')}
    names = ', '.join(f'{row["name"]} {row["action"]}' for row in table)
    text = f'saved for backward: {total["device"] / 2**20:.1f} MiB on the device'
    if total['host']:
        text += f', {total["host"] / 2**20:.1f} MiB on the host'
    elif not host and any(array.host for array in arrays):
        text += ' (this platform has no host memory of its own: nothing is offloaded)'
    return f'{text}: {names}'
