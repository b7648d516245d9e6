"""Writes a plan as aligned lines for people, or as one JSON object."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from helios_jax.chips import GIB, Topology
from helios_jax.plan import planning
from helios_jax.plan.changes import Change
from helios_jax.plan.planning import Plan


def as_dict(made: Plan, topology: Topology) -> dict[str, Any]:
    """Returns everything that the text says; bytes are one device's."""
    counted, memory, cfg = made.memory, made.config.memory, made.config
    given = counted.arguments
    saved: dict[str, dict[str, Any]] = {}
    for s in counted.saved:
        row = saved.setdefault(s.name, {'dtype': s.dtype, 'place': s.place, 'bytes': 0})
        row['bytes'] += s.num_bytes
    return {
        'topology': topology.name,
        'num_devices': topology.num_devices,
        'mesh': dict(counted.placement.shape),
        'policy': memory.policy,
        'backward_parts': memory.backward_parts,
        'batch_rows': cfg.train.batch_rows,
        'microbatches': cfg.train.microbatches,
        'row_length': cfg.data.row_length,
        'fits': made.fits,
        'available_bytes': made.available,
        'peak_bytes': counted.peak,
        'peak_phase': counted.peak_phase,
        'arguments_bytes': counted.arguments_device,
        'temporary_bytes': counted.temporary,
        'host_bytes': counted.host,
        'host_available_bytes': made.chip.host_bytes,
        'parameters': {'bytes': given.parameters, 'place': memory.parameters},
        'optimizer': {'bytes': given.optimizer, 'place': memory.optimizer},
        'ema': {'bytes': given.ema, 'place': memory.optimizer},
        'router_and_batch_bytes': given.router + given.batch,
        'gradients_bytes': counted.gradients + counted.accumulated,
        'weights_copy_bytes': counted.weights_copy,
        'saved': saved,
        'working_bytes': counted.working,
        'gathered_bytes': counted.gathered,
        'loss_bytes': counted.loss,
        'prefetched_bytes': counted.prefetched,
        'fetched_early_bytes': counted.fetched_early,
        'streamed_bytes': counted.streamed,
        'phases_bytes': counted.phases,
        'seconds': dataclasses.asdict(made.seconds)
        | {'step': made.seconds.step, 'bound': made.seconds.bound},
    }


def limits(made: Plan, topology: Topology) -> dict[str, int]:
    """Finds the most rows and the longest row that fit with all else as it is."""
    arguments = (made.config, topology.chip, topology.num_devices)
    return {
        'largest_rows_per_device': planning.largest_rows(*arguments),
        'longest_row': planning.longest_row(*arguments),
    }


def text(made: Plan, topology: Topology, most: dict[str, int]) -> str:
    memory, counted, seconds = made.config.memory, made.memory, made.seconds
    shape = ' '.join(f'{axis}={n}' for axis, n in counted.placement.shape.items() if n > 1)
    rows = f'{counted.placement.local_rows} rows × {counted.placement.local_length} tokens'
    microbatches, parts = made.config.train.microbatches, memory.backward_parts
    lines = [
        f'{topology.name}: {topology.num_devices} devices{", " + shape if shape else ""}; '
        f'memory.policy={memory.policy}{f" in {parts} parts" if parts > 1 else ""}; {rows} a device'
        + (f', {microbatches} microbatches' if microbatches > 1 else ''),
        '',
        f'{"GiB a device":38} {"device":>9} {"host":>9}',
        *_memory(made),
        '',
        *_seconds(made),
        '',
        f'most rows a device       {most["largest_rows_per_device"]:,}',
        f'longest row, tokens      {most["longest_row"]:,}',
        f'bound by                 {seconds.bound}',
    ]
    return '\n'.join(lines)


def _memory(made: Plan) -> list[str]:
    counted, memory = made.memory, made.config.memory
    given, phase = counted.arguments, counted.peak_phase
    line = lambda name, device, host=0: (
        f'{name:38} {device / GIB:9.3f}' + (f' {host / GIB:9.3f}' if host else '')
    )

    def placed(name: str, size: int, place: str) -> str:
        return line(name, *((0, size) if place == 'host' else (size, 0)))

    lines = [
        placed('parameters, float32', given.parameters, memory.parameters),
        placed('optimizer', given.optimizer, memory.optimizer),
        *([placed('average of the parameters', given.ema, memory.optimizer)] if given.ema else []),
        line('batch and router', given.batch + given.router),
    ]
    saved: dict[tuple[str, str, str], int] = collections.Counter()
    for s in counted.saved:
        saved[s.name, s.dtype, s.place] += s.num_bytes
    dtype = made.config.model.compute_dtype
    lines.append(line(f'weights of all layers, {dtype}', counted.weights_copy))
    lines += [placed(f'saved {n}, {d}', size, p) for (n, d, p), size in saved.items()]
    alive = {
        'backward': [
            ('gradients', counted.gradients + counted.accumulated),
            ("one layer's backward pass", counted.working),
            ("one layer's weights, gathered", counted.gathered),
            ('prefetched from the host', counted.prefetched),
            ('moments fetched early', counted.fetched_early),
        ],
        'loss': [('loss: logits of a chunk, head', counted.loss)],
        'update': [
            ('gradients', counted.accumulated or counted.gradients),
            ('state from the host', counted.streamed),
        ],
    }
    lines += [line(name, size) for name, size in alive[phase] if size]
    verdict = 'fits' if made.fits else 'DOES NOT FIT'
    total = line(f'peak ({phase})', counted.peak, counted.host)
    room = line('available', made.available, made.chip.host_bytes if counted.host else 0)
    return [*lines, total, f'{room}   {verdict}']


def _seconds(made: Plan) -> list[str]:
    s = made.seconds
    one = lambda name, amount, unit, seconds: (
        f'{name:12} {amount:12.4g} {unit:6} {1e3 * seconds:10.1f} ms'
    )
    return [
        one('compute', s.flops, 'FLOP', s.compute),
        one('memory', s.memory_bytes, 'bytes', s.memory),
        one('network', s.network_bytes, 'bytes', s.network),
        one('host link', s.host_bytes, 'bytes', s.host),
        f'{"step":31} {1e3 * s.step:10.1f} ms   {s.tokens_per_second:,.0f} tokens/s, '
        f'MFU {s.mfu:.3f}',
    ]


def changes_text(changes: Sequence[Change]) -> str:
    """Writes one line a change: its step time, its peak and the override."""
    if not changes:
        return 'No one or two changes would make it fit: take more devices or a smaller model.'
    lines = ['What would fit, fastest first:']
    for change in changes:
        step = 1e3 * change.plan.seconds.step
        peak = change.plan.memory.peak / GIB
        lines.append(f'  {step:9.1f} ms  {peak:7.2f} GiB  {" ".join(change.overrides)}')
    return '\n'.join(lines)


def ranking_text(found: Sequence[Change]) -> str:
    """Writes the lines of a search, by tokens/s."""
    lines = [f'{"tokens/s":>12} {"MFU":>6} {"GiB":>8} {"bound":8} overrides']
    for change in found:
        s = change.plan.seconds
        lines.append(
            f'{s.tokens_per_second:12,.0f} {s.mfu:6.3f} {change.plan.memory.peak / GIB:8.2f} '
            f'{s.bound:8} {" ".join(change.overrides) or "(as it is)"}'
        )
    return '\n'.join(lines)


def changes_as_list(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [
        {
            'overrides': list(change.overrides),
            'step_seconds': change.plan.seconds.step,
            'tokens_per_second': change.plan.seconds.tokens_per_second,
            'peak_bytes': change.plan.memory.peak,
        }
        for change in changes
    ]
