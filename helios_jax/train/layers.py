"""Keeps figures of a trained model's layers in layers.json, and draws them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from helios_jax import options, plot
from helios_jax.errors import require
from helios_jax.evaluate.sublayers import BAND, NAMES, OPEN, SHUT

FILE = 'layers.json'
Sublayers = Sequence[Mapping[str, Any]]  # as `evaluate.sublayers.figures` gives them

# What a panel of lines shows → the figure of each sublayer that it is of.
LINES = {
    'mean gate': 'gate_mean',
    'share of saturated gates': 'gate_saturated',
    'mean factor of the update': 'factor_mean',
    'root mean square of the stream': 'stream_rms',
    'gradient in the stream': 'stream_gradient',
    'gradient norm of the weights': 'weights_gradient',
}
# Figures with a number for each part → label of the parts' axis, and its end (`plot.shades`).
SHADES = {'gate_histogram': ('gate of {}', 1.0), 'expert_load': ('expert', 0.0)}
# A figure → what the caption says if it is drawn.
SAID = {
    'stream_rms': 'The trained model on held-out text; the stream is the one below a sublayer.',
    'stream_gradient': (
        'The gradient in the stream is the root mean square of that of the summed loss, behind a '
        'sublayer; the norm is that of the mean loss, in all weights of a sublayer.'
    ),
    'gate_mean': (
        f'Gates are those of all tokens and channels: {BAND[1] - BAND[0]:.0%} of them lie within '
        f'the band; one below {SHUT} or above {OPEN} is saturated.'
    ),
    'gate_histogram': 'A column is a layer: the darker, the more of its gates are that far open.',
    'expert_load': 'A column is a layer: the darker, the more tokens chose that expert.',
}


def write(workdir: epath.PathLike, figures: Mapping[str, Any]) -> None:
    """Writes layers.json; figures that are no finite number are null in it."""
    (epath.Path(workdir) / FILE).write_text(options.to_json(figures) + '\n')


def read(workdir: epath.PathLike) -> Sublayers:
    """Reads a run's sublayers from its layers.json; none where an older run left no such file.

    Raises:
      UserError: the file is not what a run writes.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return []
    try:
        sublayers = json.loads(path.read_text())['sublayers']
        whole = all(row['layer'] > 0 and row['sublayer'] in NAMES for row in sublayers)
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    require(whole, f'{path} has no figures of layers; remove it, and reports are made without it.')
    return sublayers


def by_layer(sublayers: Sublayers, name: str, figure: str) -> np.ndarray:
    """Returns a figure of the sublayer `name`, a row a layer from layer 1: NaN where it has none.

    Without a layer that has it there are no rows.
    """
    found = {
        row['layer']: row[figure] for row in sublayers if row['sublayer'] == name and figure in row
    }
    if not found:
        return np.zeros(0)
    nothing = np.full(np.shape(next(iter(found.values()))), np.nan)
    last = max(row['layer'] for row in sublayers)
    return np.array([found.get(layer, nothing) for layer in range(1, last + 1)], float)


def drawn(sublayers: Sublayers) -> Figure:
    """Draws the figures that the sublayers have, a panel each."""
    of = lambda figure: {name: by_layer(sublayers, name, figure) for name in NAMES}
    lines = {label: of(figure) for label, figure in LINES.items() if known(sublayers, figure)}
    bins = [
        (values, label.format(name), top)
        for figure, (label, top) in SHADES.items()
        for name, values in of(figure).items()
        if len(values)
    ]
    figure, panels = plot.panels(len(lines) + len(bins))
    low, high = of('gate_low'), of('gate_high')
    bands = {name: (low[name], high[name]) for name in NAMES}
    for axes, (label, values) in zip(panels, lines.items(), strict=False):
        within = bands if LINES[label] == 'gate_mean' else None
        plot.per_layer(axes, values, ylabel=label, bands=within)
        if LINES[label].startswith('gate'):
            axes.set_ylim(bottom=0)
    for axes, (shares, label, top) in zip(panels[len(lines) :], bins, strict=True):
        plot.shades(axes, shares, ylabel=label, top=top)
    return figure


def caption(sublayers: Sublayers) -> str:
    """Says how to read what is drawn."""
    return ' '.join(text for figure, text in SAID.items() if known(sublayers, figure))


def known(sublayers: Sublayers, figure: str) -> bool:
    """True if a sublayer has the figure."""
    return any(figure in row for row in sublayers)
