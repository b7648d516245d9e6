"""Writes report.md: what was run, on what, how it went, and a sample."""

import importlib.metadata
import io
import platform
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from matplotlib.figure import Figure

from helios_jax.evaluate import figures
from helios_jax.train import metrics

PACKAGES = (
    'helios_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets',
    'grain', 'numpy',
)  # fmt: skip
LOSS, HELD_OUT, LOST = 'loss', 'eval/bits_per_byte', 'eval/lost_fraction'


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
    """Writes report.md and its curves into `workdir`, from the metrics.jsonl there.

    Args:
      config_dict: the resolved config, nested.
      final: figures to put first, by the names of `figures.FINAL`.
      sample: text that the model made; shown as it is.
    Returns:
      The path of report.md.
    Raises:
      UserError: there is no metrics.jsonl, or it cannot be read.
    """
    workdir = epath.Path(workdir)
    lines = metrics.read(workdir / metrics.FILE)
    (workdir / 'curves.png').write_bytes(curves(lines))
    sections = [
        '# Training report',
        _markdown(
            {label: f'{n} {unit}'.strip() for label, n, unit in figures.labelled(final)}, 'result'
        ),
        '## Curves\n\n![Loss and held-out bits per byte against the step](curves.png)',
        f'## Sample\n\n{fenced(sample)}',
        f'## Data\n\n{_markdown({name: figures.number(n) for name, n in data.items()}, "data")}',
        *(
            f'## {name.capitalize()}\n\n{_markdown(values, name)}'
            for name, values in environment.items()
        ),
        f'## Config\n\n{_markdown(_flat(config_dict), "setting")}',
    ]
    path = workdir / 'report.md'
    path.write_text('\n\n'.join(sections) + '\n')
    return path


def curves(lines: list[dict[str, Any]]) -> bytes:
    """Draws a PNG of the training loss and, if there are evaluations, of held-out bits per byte."""
    names = [LOSS] + [HELD_OUT] * any(HELD_OUT in line for line in lines)
    figure = Figure(figsize=(5 * len(names), 3.6), layout='constrained')
    lossy = any(LOST in line for line in lines)
    labels = {
        LOSS: 'training loss (nats per token)',
        HELD_OUT: 'held-out bits per byte' + ' that the tokenizer keeps' * lossy,
    }
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        points = [(line['step'], line[name]) for line in lines if name in line]
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()),
            marker='.' if len(points) < 40 else '',
        )
        axes.set(xlabel='step', ylabel=labels[name])
        axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=120)
    return file.getvalue()


def fenced(text: str) -> str:
    """Makes a code block that no run of backticks within the text can close."""
    longest = max((len(run) for run in re.findall('`+', text)), default=0)
    fence = '`' * max(3, longest + 1)
    return f'{fence}text\n{text}\n{fence}'


def _markdown(values: Mapping[str, Any], heading: str) -> str:
    rows = [f'| {heading} | value |', '|---|---|']
    return '\n'.join(
        rows + [f'| {_cell(name)} | {_cell(value)} |' for name, value in values.items()]
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.6g}'
    return ' '.join(str(value).split()).replace('|', r'\|')


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f'{prefix}{name}.')
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return flat


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'
