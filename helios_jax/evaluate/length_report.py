"""Makes the table and the plot of what a model makes of long rows (lengths.py)."""

import io
import itertools
from collections.abc import Mapping
from typing import Any

from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from helios_jax import display, options, paths
from helios_jax.evaluate.ruler import TASKS

PANELS = {
    'perplexity': 'perplexity, sliding windows',
    'positions': 'bits per byte of the longest rows',
    'passkey': 'passkeys found, mean of all depths',
    'ruler': "answers found in RULER's tasks, mean",
}
MOST_LINEAR = 4  # between the ends of an axis: beyond, it is logarithmic


def write(directory: epath.PathLike, results: Mapping[str, Any]) -> None:
    """Writes lengths.json, lengths.md and lengths.png; of several processes the first one does."""
    folder = epath.Path(directory).expanduser()
    if display.speaks():
        paths.write_whole(folder / 'lengths.json', (options.to_json(results) + '\n').encode())
        paths.write_whole(folder / 'lengths.md', (table(results) + '\n').encode())
        paths.write_whole(folder / 'lengths.png', plot(results))


def table(results: Mapping[str, Any]) -> str:
    """Formats the results as Markdown, a row a method and length; accuracies are percentages."""
    names = ['method', 'length', 'perplexity', 'bits/byte', 'passkey', *TASKS]
    lines = ['| ' + ' | '.join(names) + ' |', '|---' + '|---:' * (len(names) - 1) + '|']
    for row in results['rows']:
        found = [
            f'{row["perplexity"]:,.2f}',
            f'{row["bits_per_byte"]:.4f}',
            _percent(row, 'passkey'),
        ]
        found += [f'{row["ruler"][task]:.0%}' if task in row['ruler'] else '–' for task in TASKS]
        lines.append('| ' + ' | '.join([row['method'], f'{row["length"]:,}', *found]) + ' |')
    return '\n'.join(lines)


def plot(results: Mapping[str, Any]) -> bytes:
    """Draws a PNG: each figure that was measured against the length, a line a method.

    A dotted line stands at the trained length.
    """
    measured = {
        name: label for name, label in PANELS.items() if any(row[name] for row in results['rows'])
    }
    num_rows = (len(measured) + 1) // 2
    figure = Figure(figsize=(10, 3.7 * num_rows), layout='constrained')
    trained, lengths = results['trained_length'], sorted(results['lengths'])
    for number, (name, label) in enumerate(measured.items(), 1):
        axes = figure.add_subplot(num_rows, 2, number)
        positions = name == 'positions'
        for method, marker in zip(results['methods'], itertools.cycle('osv^Dx')):
            rows = [row for row in results['rows'] if row['method'] == method]
            points = [(row['length'], value(row, name)) for row in rows]
            if positions:
                (longest,) = [row for row in rows if row['length'] == lengths[-1]]
                points = [(one['end'], one['bits_per_byte']) for one in longest['positions']]
            points = sorted((x, y) for x, y in points if y is not None)
            if points:
                # Methods may agree: a line through another one's markers shows both.
                axes.plot(*zip(*points, strict=True), marker=marker, mfc='none', label=method)
        axes.axvline(trained, color='gray', linestyle=':', label=f'trained length, {trained:,}')
        axes.set_xscale('log', base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel='position in the row' if positions else 'tokens of a row', ylabel=label)
        if name in ('passkey', 'ruler'):
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if name == 'perplexity':
            low, high = axes.get_ylim()
            axes.set_yscale('log' if high > MOST_LINEAR * low else 'linear')
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper center', ncols=9)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=120)
    return file.getvalue()


def value(row: Mapping[str, Any], name: str) -> float | None:
    """One number of a row: a figure, or the mean of its accuracies; None where there are none."""
    found = row[name]
    if isinstance(found, Mapping):
        return sum(found.values()) / len(found) if found else None
    return None if name == 'positions' else found


def _percent(row: Mapping[str, Any], name: str) -> str:
    mean = value(row, name)
    return '–' if mean is None else f'{mean:.0%}'
