"""Writes report.md: what was run, on what, how it went, and a sample."""

import importlib.metadata
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from helios_jax import paths, plot
from helios_jax.evaluate import figures
from helios_jax.train import layers, metrics

PACKAGES = (
    'helios_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets',
    'grain', 'numpy',
)  # fmt: skip
LOSS, HELD_OUT, LOST = 'loss', 'eval/bits_per_byte', 'eval/lost_fraction'

# What a panel of curves shows → its curves and the figures that they are of.
PANELS = {
    'loss (nats per token)': {'training': LOSS, 'held out': 'eval/loss'},
    'held-out bits per byte': {'': HELD_OUT},
    'norm of the gradient': {'': 'gradient_norm'},
    'largest load of an expert ÷ mean load': {'': 'router/load_max_over_mean'},
    "share of experts' tokens dropped": {'': 'router/drop_fraction'},
    'tokens per second': {'': 'time/tokens_per_second'},
    'peak memory of a device (GiB)': {'': 'device/peak_gib'},
}


def environment() -> dict[str, dict[str, Any]]:
    """Returns `versions` of Python and the packages, and the `hardware` of this process."""
    device = jax.devices()[0]
    return {
        'versions': {'python': platform.python_version()} | {p: _version(p) for p in PACKAGES},
        'hardware': {
            'platform': device.platform,
            'device': device.device_kind,
            'devices': str(jax.device_count()),
            'processes': str(jax.process_count()),
            'machine': f'{platform.system()} {platform.machine()}',
        },
    }


def write(
    workdir: epath.PathLike,
    *,
    config_dict: Mapping[str, Any],
    environment: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any],
    final: Mapping[str, Any],
    sample: str,
) -> epath.Path:
    """Writes report.md and its pictures into `workdir`, from metrics.jsonl and layers.json there.

    Args:
      config_dict: the resolved config, nested.
      final: figures to put first, by the names of `figures.FINAL`.
      sample: text that the model made; shown as it is.
    Returns:
      The path of report.md.
    Raises:
      UserError: there is no metrics.jsonl, or one of the two cannot be read.
    """
    workdir = epath.Path(workdir)
    lines, sublayers = metrics.read(workdir / metrics.FILE), layers.read(workdir)
    (workdir / 'curves.png').write_bytes(plot.png(curves(lines)))
    sections = [
        '# Training report',
        _markdown(
            {label: f'{n} {unit}'.strip() for label, n, unit in figures.labelled(final)}, 'result'
        ),
        '## Curves\n\n![Loss, held-out bits per byte and other figures of the run](curves.png)',
        *_layers(workdir, sublayers),
        f'## Sample\n\n{fenced(sample)}',
        f'## Data\n\n{_markdown({name: figures.number(n) for name, n in data.items()}, "data")}',
        *(
            f'## {name.capitalize()}\n\n{_markdown(values, name)}'
            for name, values in environment.items()
        ),
        f'## Config\n\n{_markdown(flat(config_dict), "setting")}',
    ]
    path = workdir / 'report.md'
    paths.write_whole(path, ('\n\n'.join(sections) + '\n').encode())  # where it is, a run is done
    return path


def _layers(workdir: epath.Path, sublayers: layers.Sublayers) -> list[str]:
    if not sublayers:
        return []
    (workdir / 'layers.png').write_bytes(plot.png(layers.drawn(sublayers)))
    shown = '![Gates, stream and experts of each layer](layers.png)'
    return [f'## Layers\n\n{shown}\n\n{layers.caption(sublayers)}']


def curves(lines: list[dict[str, Any]]) -> Figure:
    """Draws the figures of PANELS that a run's lines have, on one axis of training tokens."""
    logged = {LOSS}.union(*lines)
    shown = {label: own for label, own in PANELS.items() if logged & {*own.values()}}
    xlabel, so_far = _tokens(lines)
    figure, panels = plot.panels(len(shown))
    for axes, (label, own) in zip(panels, shown.items(), strict=True):
        if axes is not panels[0]:
            axes.sharex(panels[0])
        seeds = {name: [_curve(lines, of, so_far)] for name, of in own.items()}
        keeps = ' that the tokenizer keeps' * (HELD_OUT in own.values() and LOST in logged)
        plot.curves(axes, seeds, xlabel=xlabel, ylabel=label + keeps)
    return figure


def fenced(text: str) -> str:
    """Makes a code block that no run of backticks within the text can close."""
    longest = max((len(run) for run in re.findall('`+', text)), default=0)
    fence = '`' * max(3, longest + 1)
    return f'{fence}text\n{text}\n{fence}'


def _tokens(lines: list[dict[str, Any]]) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Label of the axis, and what turns steps into tokens, or keeps them where none are logged.

    Steps between two lines count as many tokens as that of the second line.
    """
    logged = [(line['step'], line['tokens']) for line in lines if 'tokens' in line]
    if not logged:
        return 'step', lambda steps: steps
    steps, tokens = np.array([(0, 0), *logged], float).T
    total = np.cumsum(np.diff(steps, prepend=0) * tokens)
    return 'training tokens', lambda wanted: np.interp(wanted, steps, total)


def _curve(
    lines: list[dict[str, Any]], name: str, so_far: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    points = [(line['step'], line[name]) for line in lines if name in line]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return so_far(steps), values


def _markdown(values: Mapping[str, Any], heading: str) -> str:
    rows = [f'| {heading} | value |', '|---|---|']
    return '\n'.join(rows + [f'| {cell(name)} | {cell(value)} |' for name, value in values.items()])


def cell(value: Any) -> str:
    """Formats a value for a cell of a Markdown table."""
    if isinstance(value, float):
        return f'{value:.6g}'
    return ' '.join(str(value).split()).replace('|', r'\|')


def flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Maps the dotted names of nested settings to their values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f'{prefix}{name}.')
        else:
            found[prefix + name] = value
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'
