"""Predicts a train step on a TPU: ours beside MaxText's of the same shape, in one run.

    helios bench tpu-step --config=helios_8b --topology=v5p:2x2x4 --peer=maxtext/bin/python

Needs libtpu (the extra `tpu`), no TPU, and a Python that has MaxText and a libtpu of its own; each
compiles with its own jax. Both programs are played as `helios plan --compile` plays them
(plan/compiler/predicted.py), on the same links; MaxText's attention is timed in its favour
(peer.kernel_clock). Compiling takes 5 to 25 minutes a step on two cores.
"""

from collections.abc import Sequence
from typing import Any

import jax

from helios_jax import config, display, options
from helios_jax.bench.tpu_step import peer
from helios_jax.chips import GIB, topology
from helios_jax.errors import require
from helios_jax.plan.compiler import compiled, predicted, step
from helios_jax.plan.compiler.timeline import HOST, NETWORK

Row = dict[str, Any]


def compare_steps(
    cfg: config.Config, name: str, *, python: str, forms: Sequence[str], as_json: bool
) -> list[Row]:
    """Compiles both and prints a row of each.

    Args:
      name: the topology.
      python: the Python that has MaxText; '' compiles ours alone.
      forms: options that MaxText is compiled with (`peer.FORMS`).
    Raises:
      UserError: a config that MaxText would not train the same way, before anything is compiled;
        a step that its compiler refuses.
    """
    where = topology(name)
    arguments: dict[str, list[str]] = {}
    if python:
        for form in forms:
            require(form in peer.FORMS, f'--forms={form}: there are {", ".join(peer.FORMS)}.')
            wanted = peer.options_of(form, where.chip.name)
            arguments[form] = peer.settings(cfg, where.num_devices, wanted)
    found = compiled.compiled_figures(cfg, name, timed=True)
    rows = [
        row_of('helios', 'ours', found)
        | {'temp_gib': found['temp_gib'], 'peak_gib': found['peak_gib']}
        | {'versions': {'jax': jax.__version__}}
    ]
    report(rows[0], rows[0], as_json)
    for form, given in arguments.items():
        rows.append(peer_row(cfg, name, python, form, given))
        report(rows[-1], rows[0], as_json)
    return rows


def peer_row(cfg: config.Config, name: str, python: str, form: str, arguments: list[str]) -> Row:
    """Compiles MaxText's step and predicts it."""
    where = topology(name)
    hlo, made = peer.compile_peer(python, name, arguments)
    rows = cfg.train.batch_rows // where.num_devices
    clock = peer.kernel_clock(hlo, cfg, where.chip.name, rows)
    found = step.figures(hlo) | predicted.figures(hlo, cfg, name, made['coordinates'], clock)
    return row_of('maxtext', form, found) | {
        'temp_gib': made['temp_bytes'] / GIB,
        'peak_gib': made['peak_bytes'] / GIB,
        'versions': made['versions'],
    }


def row_of(implementation: str, form: str, found: dict[str, Any]) -> Row:
    by_kind = found['step_by_kind']
    return {
        'implementation': implementation,
        'options': form,
        'cycles': found['cycles'],
        'step_seconds': found['step_seconds'],
        'step_mfu': found['step_mfu'],
        'waiting': sum(by_kind.get(link, 0.0) for link in (NETWORK, HOST)) / found['step_seconds'],
        'step_by_kind': by_kind,
        'kernels': found['kernels'],
        'left_out': found['left_out'],
    }


def report(row: Row, ours: Row, as_json: bool) -> None:
    """Prints a row; its ratio is our seconds divided by its own."""
    if as_json:
        print(options.to_json(row), flush=True)
        return
    title = f'{row["implementation"]}, options: {row["options"]}'
    least = 'more than ' if row['left_out'] else ''
    lines = [
        ('a step', f'{least}{row["step_seconds"]:.3f}', 's'),
        ('ours ÷ this', f'{ours["step_seconds"] / row["step_seconds"]:.3f}', ''),
        ('MFU', f'{100 * row["step_mfu"]:.1f}', '%'),
        ('waiting for links', f'{100 * row["waiting"]:.1f}', '%'),
        ('cycles outside kernels', f'{row["cycles"] / 1e6:,.0f}', 'M'),
        ('temporary', f'{row["temp_gib"]:.1f}', 'GiB'),
        ('peak', f'{row["peak_gib"]:.1f}', 'GiB'),
    ]
    print(title)
    display.table(lines)
