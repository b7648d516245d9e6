"""Compares meshes of this machine's devices: a row a mesh, each beside one device and PyTorch.

    helios bench mesh --rows=helios_1b:fsdp,helios_1b:data --peer

Each measurement runs in a process of its own, one after the other; one that fails or takes too long
is a row that says so. Beside what was measured stands the planner's figure (`helios plan`).
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helios_jax import chips, config, options, process
from helios_jax.arch import rules
from helios_jax.bench import torch_peer
from helios_jax.bench.mesh import cases, measure, plot, torch_fsdp
from helios_jax.bench.mesh.cases import MeshCase
from helios_jax.errors import UserError, require
from helios_jax.parallel import compiler_options

Row = dict[str, Any]

SECONDS = 150.0  # of one measurement, its compilation included
OURS, NONE = 'ours', 'none'


@dataclasses.dataclass(frozen=True)
class MeshBench:
    """Flags of `helios bench mesh`."""

    rows: Sequence[str] = ()  # none: all of cases.ROWS that the devices form
    topology: str = ''  # '': the devices that there are
    options: Sequence[str] = (OURS,)
    kind: str = 'residual'
    layers: int = 0
    peer: bool = False
    one: bool = True  # measure one device too
    minutes: float = 0.0  # after which nothing is begun; 0: no end
    plan: bool = False  # predict alone
    json: bool = False
    plot: str = ''


def compare_meshes(wanted: MeshBench) -> list[Row]:
    """Measures and prints every row, and draws them if asked to.

    Raises:
      UserError: a row, an option or a flag that cannot be used, before anything is measured.
    """
    require(wanted.minutes >= 0, f'--minutes={wanted.minutes} must be 0 (no end) or more.')
    topology = chips.topology(wanted.topology) if wanted.topology else devices()
    read = [
        cases.read(name, topology, kind=wanted.kind, most_layers=wanted.layers)
        for name in wanted.rows or cases.rows_of(topology.num_devices)
    ]
    forms = {form: words(form, topology.chip) for form in wanted.options}
    if wanted.peer:
        for case in read:
            peer_of(case)
    if wanted.plan:
        return [report(predict(case, topology), wanted) for case in read]
    return measured(wanted, topology, read, forms)


def measured(
    wanted: MeshBench, topology: chips.Topology, read: list[MeshCase], forms: dict[str, str]
) -> list[Row]:
    """Measures row by row what belongs together, each shape on one device and in PyTorch once."""
    end = time.monotonic() + 60 * wanted.minutes if wanted.minutes else float('inf')
    once: dict[str, Row] = {}
    rows = []

    def measured_once(function: Any, *given: Any) -> Row:
        key = repr((function, given))
        if key not in once:
            once[key] = attempt(end, function, *given)
        return once[key]

    for case in read:
        start = facts(case, case.config, case.num_devices)
        start |= cases.predicted(case.config, topology)
        for form, changes in forms.items():
            row = start | {'options': form}
            cfg = config.replace(case.config, {'train.compiler_options': changes})
            rows.append(
                row | attempt(end, measure.measure_step, dataclasses.asdict(cfg), case.num_devices)
            )
            report(rows[-1], wanted)
        beside = []
        if wanted.one and case.on_one is not None:
            alone = measured_once(measure.measure_step, dataclasses.asdict(case.on_one), 1)
            planned = cases.predicted(case.on_one, topology._replace(num_devices=1))
            one = facts(case, case.on_one, 1) | {'options': 'one device'}
            beside.append(one | planned | alone)
        if wanted.peer:
            given = dataclasses.asdict(peer_of(case)), case.num_devices, SECONDS
            torch = measured_once(torch_fsdp.measure_fsdp, *given)
            whole = facts(case, case.config, case.num_devices)
            beside.append(whole | {'options': 'FSDP2'} | torch)
        for row in beside:
            report(row, wanted)
        rows += beside
    compared(rows)
    if wanted.json:
        for row in rows:
            ratios = {name: row[name] for name in ('kept', 'times_fsdp2') if name in row}
            if ratios:
                print(options.to_json({n: row[n] for n in ('row', 'options')} | ratios), flush=True)
    else:
        print('\n' + table(rows))
    if wanted.plot:
        plot.draw(rows, Path(wanted.plot))
    return rows


def devices() -> chips.Topology:
    """Describes this machine's devices, which stay free.

    Raises:
      UserError: devices that no table has.
    """
    found = process.run(measure.device_facts)
    chip = chips.cpu() if found['kind'] == 'cpu' else chips.find(found['kind'])
    if chip is None:
        raise UserError(f'helios_jax/chips.py does not know {found["kind"]!r}; name --topology.')
    return chips.Topology(f'{chip.name}:{found["count"]}', chip, found['count'])


def words(form: str, chip: chips.Chip) -> str:
    """Spells a form of the compiler's options as train.compiler_options does.

    Args:
      form: 'ours', 'none' of those for several devices, or changes to ours: '-xla_a xla_b=1'.
    Raises:
      UserError: changes that cannot be understood.
    """
    where = chip.name, chip.platform
    if form == OURS:
        return ''
    if form == NONE:
        several = compiler_options.of_table(*where, compiler_options.SEVERAL)
        return ' '.join(f'-{name}' for name in several)
    every = compiler_options.STEP, compiler_options.SEVERAL
    compiler_options.changed(compiler_options.of_table(*where, *every), form)
    return form


def peer_of(case: MeshCase) -> torch_peer.Peer:
    """Describes PyTorch's training of a row's shape, with one device's rows.

    Raises:
      UserError: experts, which FSDP2 does not shard here, or a model that PyTorch lacks.
    """
    peer = torch_peer.same_shape(case.config)
    require(
        not peer.experts, f'--peer: {case.name} has experts; FSDP2 is compared with dense models.'
    )
    rows = max(1, case.config.train.batch_rows // case.num_devices)
    full = case.config.memory.policy == 'full'
    return dataclasses.replace(peer, batch=rows, steps=10, warmup=3, checkpointing=full)


def attempt(end: float, function: Any, *given: Any) -> Row:
    """Measures in a process; says why where that fails."""
    if time.monotonic() > end:
        return {'failed': '--minutes were over'}
    try:
        found: Row = process.run(function, *given, seconds=SECONDS + 30)
        return found
    except UserError as error:
        return {'failed': str(error)[:300]}


def facts(case: MeshCase, cfg: config.Config, num_devices: int) -> Row:
    """Says what is measured of a row: its config on so many devices."""
    sizes = zip(rules.MESH_AXES, rules.sizes(cfg.mesh, num_devices), strict=True)
    return {
        'row': case.name,
        'devices': num_devices,
        'mesh': {axis: size for axis, size in sizes if size > 1},
        'kind': cfg.model.gmu.kind,
        'layers': cfg.model.num_layers,
        'of_layers': case.layers,
        'batch_rows': cfg.train.batch_rows,
        'row_length': cfg.data.row_length,
        'policy': cfg.memory.policy,
    }


def predict(case: MeshCase, topology: chips.Topology) -> Row:
    """Returns the planner's figures of a row, and those of one device where it fits."""
    row = facts(case, case.config, case.num_devices) | cases.predicted(case.config, topology)
    if case.on_one is not None:
        one = cases.predicted(case.on_one, topology._replace(num_devices=1))
        row |= {f'one_{name}': value for name, value in one.items()}
    return row


def compared(rows: list[Row]) -> None:
    """Adds each row's tokens a second of a device by one device's, and by PyTorch's."""
    rate = 'card_tokens_per_second'
    for name, form in (('kept', 'one device'), ('times_fsdp2', 'FSDP2')):
        beside = {r['row']: r[rate] for r in rows if r['options'] == form and rate in r}
        for row in rows:
            ours = row['options'] not in ('one device', 'FSDP2')
            if ours and rate in row and row['row'] in beside:
                row[name] = row[rate] / beside[row['row']]


def report(row: Row, wanted: MeshBench) -> Row:
    """Prints a row as soon as it is there."""
    print(options.to_json(row) if wanted.json else describe(row), flush=True)
    return row


def describe(row: Row) -> str:
    """Writes a row as a line."""
    layers = f'{row["layers"]} layers'
    if row['layers'] < row['of_layers']:
        layers = f'{row["layers"]} of {row["of_layers"]} layers'
    line = f'{row["row"]:26} {row.get("options", "planned"):12} {layers:15}'
    if 'failed' in row:
        return f'{line} failed: {row["failed"]}'
    if 'step_ms' in row:
        line += (
            f' {row["card_tokens_per_second"]:9,.0f} tok/s a card  MFU {row["mfu"] or 0:.3f}  '
            f'step {row["step_ms"]:7.1f} ms  peak {row["peak_gib"]:6.1f} GiB'
        )
    if 'planned_ms' in row:
        line += f'  planned {row["planned_ms"]:7.1f} ms, {row["planned_gib"]:5.1f} GiB'
    if 'exposed_ms' in row:
        sent = ', '.join(
            f'{name} {ms["all"]:.1f} ({ms["exposed"]:.1f} exposed)'
            for name, ms in row['collective_ms'].items()
        )
        line += f'\n{"":56}idle {row["idle_ms"]:.1f} ms; {sent or "no collectives"}'
    return line


def table(rows: list[Row]) -> str:
    """Writes the ratios, a row a line."""
    head = f'{"row":26} {"options":12} {"tok/s a card":>12} {"of one":>7} {"× FSDP2":>8} {"MFU":>6}'
    lines = [head]
    for row in rows:
        if 'card_tokens_per_second' not in row:
            continue
        ratios = [f'{row[n]:.3f}' if n in row else '—' for n in ('kept', 'times_fsdp2')]
        lines.append(
            f'{row["row"]:26} {row["options"]:12} {row["card_tokens_per_second"]:12,.0f} '
            f'{ratios[0]:>7} {ratios[1]:>8} {row["mfu"] or 0:6.3f}'
        )
    return '\n'.join(lines)
