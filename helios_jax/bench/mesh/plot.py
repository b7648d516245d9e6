"""Draws the rows of `helios bench mesh`: where each step's time went."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Colour-blind-safe (Okabe and Ito).
COLOURS = {
    'matmul': '#0072b2',
    'attention': '#56b4e9',
    'other kernels': '#999999',
    'exposed collectives': '#d55e00',
    'idle': '#f0e442',
}


def parts(row: dict[str, Any]) -> dict[str, float]:
    """Divides a step's milliseconds as its profile does; overlapped collectives take no time."""
    kernels = row['kernel_ms']
    named = {name: kernels.get(name, 0.0) for name in ('matmul', 'attention')}
    others = sum(ms for name, ms in kernels.items() if name not in (*named, 'collective'))
    waited = {'exposed collectives': row['exposed_ms'], 'idle': row['idle_ms']}
    return named | {'other kernels': others} | waited


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture of the rows that have a profile, a bar each, into a file."""
    shown = [row for row in rows if 'kernel_ms' in row]
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(shown)), layout='constrained')
    axes = figure.subplots()
    names = [f'{row["row"]}, {row["options"]}' for row in shown]
    left = [0.0] * len(shown)
    for part, colour in COLOURS.items():
        widths = [parts(row)[part] for row in shown]
        axes.barh(range(len(shown)), widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlabel('milliseconds of a step, mean of the cards')
    figure.legend(loc='outside upper center', ncols=len(COLOURS))
    figure.savefig(path)
