"""Draws the pictures that reports and notebooks share.

A picture is panels, what is drawn into them, and the PNG of all:

    figure, (left, right) = plot.panels(2)
    plot.curves(left, {'convex': [(tokens, losses)]}, xlabel='tokens', ylabel='loss (nats)')
    plot.bars(right, {'convex': 3.5, 'residual': 3.7}, xlabel='memory (GiB)')
    IPython.display.Image(plot.png(figure))

A name has the same look in every panel that draws the same names in the same order. The colours are
those that Okabe and Ito chose so that colour-blind people tell them apart; more names than colours
repeat them with other dashes and markers. Nothing here knows of pyplot or of a display.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
DASHES, MARKERS = ('-', '--', ':', '-.'), 'os^D'
DOTS_PER_INCH = 120
FEW_POINTS = 40  # that many are marked one by one

Seed = tuple[ArrayLike, ArrayLike]  # x and y of one seed's curve


def panels(
    count: int, *, columns: int = 3, width: float = 4.6, height: float = 3.4
) -> tuple[Figure, Any]:
    """Makes a figure of `count` empty panels, row by row.

    Args:
      width, height: of a panel, in inches.
    Returns:
      The figure, and a list of its axes.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def curves(
    axes: Axes,
    lines: Mapping[str, Sequence[Seed]],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draws name → curve of each seed: the mean as a line, smallest to largest as a band.

    Seeds that were measured at different x are interpolated, as far as all of them reach.
    """
    for n, (name, seeds) in enumerate(lines.items()):
        known = [(np.asarray(x, float), np.asarray(y, float)) for x, y in seeds if np.size(x)]
        if not known:
            continue
        x, ys = _common(known)
        if len(x):
            axes.plot(x, ys.mean(axis=0), label=name, **_look(n, marked=len(x) < FEW_POINTS))
        else:  # the seeds share no x
            for own_x, own_y in known:
                axes.plot(own_x, own_y, label=name, **_look(n, marked=len(own_x) < FEW_POINTS))
        if len(known) > 1 and len(x):
            axes.fill_between(x, ys.min(axis=0), ys.max(axis=0), color=_colour(n), alpha=0.2, lw=0)
    _finish(axes, xlabel, ylabel)


def bowls(axes: Axes, rates: Mapping[str, Mapping[float, float]], *, ylabel: str) -> None:
    """Draws name → learning rate → value, the lowest circled; NaN is a cross at the upper edge."""
    for n, (name, values) in enumerate(rates.items()):
        known = {rate: value for rate, value in values.items() if math.isfinite(value)}
        axes.plot([*known], [*known.values()], label=name, **_look(n, marked=True))
        if known:
            best = min(known, key=lambda rate: known[rate])
            axes.plot(
                best, known[best], 'o', markersize=11, markerfacecolor='none', color=_colour(n)
            )
        lost = [rate for rate in values if rate not in known]
        axes.plot(
            lost, [0.97] * len(lost), 'x', color=_colour(n), transform=axes.get_xaxis_transform()
        )
    tried = sorted({rate for values in rates.values() for rate in values})
    axes.set_xscale('log')
    axes.set_xticks(tried, [f'{rate:g}' for rate in tried])
    axes.minorticks_off()
    _finish(axes, 'peak learning rate', ylabel)


def intervals(
    axes: Axes,
    estimates: Mapping[str, tuple[float, float, float]],
    *,
    xlabel: str,
    reference: float = 0.0,
) -> None:
    """Draws name → mean and both ends of its interval, from top to bottom, beside a reference.

    A mean without ends (NaN) is a hollow point, and a NaN mean an empty line.
    """
    axes.axvline(reference, color='0.5', lw=1, ls='--')
    for row, (mean, low, high) in enumerate(estimates.values()):
        known = math.isfinite(low) and math.isfinite(high)
        face = COLOURS[0] if known else 'none'
        axes.plot(mean, row, 'o', color=COLOURS[0], markerfacecolor=face)
        if known:
            axes.plot([low, high], [row, row], '-', color=COLOURS[0])
    _name_rows(axes, [*estimates])
    _finish(axes, xlabel, '')


def per_layer(
    axes: Axes,
    lines: Mapping[str, ArrayLike],
    *,
    ylabel: str,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> None:
    """Draws name → a value of each layer, from the lowest layer, which is 1.

    Args:
      bands: name → lower and upper end of a band about its line, a value of each layer too.
    """
    for n, (name, values) in enumerate(lines.items()):
        if not np.size(values):
            continue
        layers = np.arange(1, np.size(values) + 1)
        axes.plot(layers, values, label=name, **_look(n, marked=len(layers) < FEW_POINTS))
        if bands and name in bands:
            low, high = bands[name]
            axes.fill_between(layers, low, high, color=_colour(n), alpha=0.2, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, 'layer', ylabel)


def shades(axes: Axes, shares: ArrayLike, *, ylabel: str, top: float = 0.0) -> None:
    """Draws how much of each layer is in each of equal parts: the darker, the more.

    Args:
      shares: [layers, parts]; NaN stays white.
      top: where the parts end that start at 0; 0: parts are numbered, from 0.
    """
    shares = np.asarray(shares, float)
    layers, parts = shares.shape
    edges = np.linspace(0, top, parts + 1) if top else np.arange(parts + 1) - 0.5
    axes.pcolormesh(np.arange(layers + 1) + 0.5, edges, shares.T, cmap='Blues', vmin=0)
    for axis in [axes.xaxis] + [axes.yaxis] * (not top):
        axis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, 'layer', ylabel)


def bars(axes: Axes, lengths: Mapping[str, float], *, xlabel: str) -> None:
    """Draws name → length of a bar, from top to bottom."""
    axes.barh(range(len(lengths)), [*lengths.values()], color=COLOURS[0])
    _name_rows(axes, [*lengths])
    _finish(axes, xlabel, '')


def png(figure: Figure) -> bytes:
    """Draws the figure with one legend of all names below its panels, and returns it as PNG.

    The same figure is the same bytes, with the same release of matplotlib.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        longest = max(map(len, handles))
        columns = max(1, int(figure.get_figwidth() * 11 / (longest + 8)))  # of 8-point characters
        figure.legend(
            handles.values(), handles, loc='outside lower center', fontsize=8, frameon=False,
            ncols=min(columns, len(handles)),
        )  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=DOTS_PER_INCH)
    return file.getvalue()


def _common(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Every x that all seeds reach, and [seeds, x] their values there."""
    x = np.unique(np.concatenate([own for own, _ in seeds]))
    x = x[(x >= max(own[0] for own, _ in seeds)) & (x <= min(own[-1] for own, _ in seeds))]
    return x, np.stack([np.interp(x, *seed) for seed in seeds])


def _colour(n: int) -> str:
    return COLOURS[n % len(COLOURS)]


def _look(n: int, *, marked: bool) -> dict[str, Any]:
    again = n // len(COLOURS) % len(DASHES)
    marker = MARKERS[again] if marked else ''
    return {
        'color': _colour(n), 'linestyle': DASHES[again], 'lw': 1.4,
        'marker': marker, 'markersize': 3.5,
    }  # fmt: skip


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        _shorten(axis, max(map(abs, ends)))


def _shorten(axis: Axis, largest: float) -> None:
    """Writes large numbers as 20k or 3M, where matplotlib would put a power of ten elsewhere."""
    if largest >= 1e4 and axis.get_scale() == 'linear':
        axis.set_major_formatter(EngFormatter(sep=''))
