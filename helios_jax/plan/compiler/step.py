"""Adds up what a compiled step does: cycles outside Pallas kernels, kernels, and collectives.

Cycles are the compiler's own estimates (`estimated_cycles`), by which it chooses. They compare two
programs for one chip; they are no times, and on v6e twice the schedule's for a plain matmul.
`waited for` counts the collectives that are not asynchronous.
"""

import re
from collections import Counter
from typing import Any

from helios_jax.chips import GIB
from helios_jax.plan.compiler.collectives import Collective, collectives
from helios_jax.plan.compiler.program import WINDOWED, instructions, split


def figures(hlo: str) -> dict[str, Any]:
    """Adds up an optimised module.

    Returns:
      `cycles`: number outside Pallas kernels in a step. `kernels`: name → number of runs in a step.
      `partial_sums`: loops of XLA's that add up a product piece by piece, rounded each time.
      `collectives`: rows with kind, place (layers and other loops, or outside), number, gib that a
      step moves of them, gib that it waits for, and the largest that it waits for, in MiB.
    """
    cycles, kernels = 0.0, Counter[str]()
    entry, computations = split(hlo)
    for instruction in instructions(entry, computations):
        if instruction.kernel:
            kernels[re.sub(r'[.\d]+$', '', instruction.name)] += round(instruction.times)
        else:
            cycles += instruction.times * instruction.cycles
    groups: dict[tuple[str, bool], list[Collective]] = {}
    for one in collectives(hlo):
        groups.setdefault((one.kind, one.looped), []).append(one)
    return {
        'cycles': cycles,
        'kernels': dict(kernels),
        'partial_sums': sum(WINDOWED in name for name in computations),
        'collectives': [_row(kind, looped, group) for (kind, looped), group in groups.items()],
    }


def _row(kind: str, looped: bool, group: list[Collective]) -> dict[str, Any]:
    waited = [one for one in group if not one.beside]
    total = lambda ones: sum(one.times * one.num_bytes for one in ones) / GIB
    return {
        'kind': kind,
        'place': 'loops' if looped else 'outside',
        'number': len(group),
        'gib': total(group),
        'waited_gib': total(waited),
        'largest_waited_mib': max((one.num_bytes for one in waited), default=0.0) / 2**20,
    }


def text(found: dict[str, Any]) -> str:
    """Writes the figures as lines."""
    kernels = ', '.join(f'{name} × {runs}' for name, runs in found['kernels'].items()) or 'none'
    lines = [
        f'{found["cycles"] / 1e6:,.0f} M cycles outside Pallas kernels, by the compiler; kernels: '
        f'{kernels}; loops of partial sums: {found["partial_sums"]}',
        f'{"collectives, GiB a step":24} {"where":8} {"number":>6} {"moved":>9} {"waited for":>10} '
        f'{"largest waited for, MiB":>24}',
    ]
    for row in found['collectives']:
        lines.append(
            f'{row["kind"]:24} {row["place"]:8} {row["number"]:6} {row["gib"]:9.3f} '
            f'{row["waited_gib"]:10.3f} {row["largest_waited_mib"]:24.1f}'
        )
    return '\n'.join(lines)
