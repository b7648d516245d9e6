"""Draws what a study found: effects, held-out curves, learning-rate searches, training."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from helios_jax import plot
from helios_jax.ablate import statistics
from helios_jax.ablate.records import StudyResults, StudyRun
from helios_jax.evaluate import figures
from helios_jax.train import layers

AXES = {
    'tokens': 'training tokens',
    'flops': 'training FLOPs',
    'seconds': 'seconds of training steps',
}
TRAINING = {'loss': 'training loss (nats per token)', 'gradient_norm': 'norm of the gradient'}
GATES = {
    'mean gate of attention': ('attention', 'gate_mean'),
    'mean gate of mlp': ('mlp', 'gate_mean'),
    'root mean square of the stream': ('attention', 'stream_rms'),
    'gradient in the stream': ('attention', 'stream_gradient'),
    'gradient norm of weights of attention': ('attention', 'weights_gradient'),
    'gradient norm of weights of mlp': ('mlp', 'weights_gradient'),
}
EXPERTS = {
    'router/load_max_over_mean': 'largest load of an expert ÷ mean load',
    'router/drop_fraction': "share of experts' tokens dropped",
}


def unit(metric: str) -> str:
    """Names what the metric of a study is measured in, such as bits/byte."""
    name = metric.removeprefix('eval/')
    style = figures.FINAL.get(name)
    return style.unit if style and style.unit else name


def effects(results: StudyResults) -> Figure:
    """Draws each arm's difference to the baseline with its interval."""
    found = {c.arm: c.difference for c in statistics.compare(results)}
    figure, (axes,) = plot.panels(1, width=7.0, height=1.2 + 0.3 * len(found))
    label = f'difference to {results.baseline} ({unit(results.metric)}); left of 0 is better'
    plot.intervals(axes, found, xlabel=label)
    return figure


def curves(results: StudyResults) -> Figure:
    """Draws the held-out curves of every arm against tokens, FLOPs and seconds."""
    figure, panels = plot.panels(len(AXES))
    for axes, (budget, label) in zip(panels, AXES.items(), strict=True):
        lines = {
            arm: [
                ([getattr(p, budget) for p in run.points], [p.value for p in run.points])
                for run in runs.values()
            ]
            for arm, runs in statistics.compared(results).items()
        }
        plot.curves(axes, lines, xlabel=label, ylabel=f'held-out {unit(results.metric)}')
    return figure


def bowls(results: StudyResults) -> Figure:
    """Draws the values of every arm's learning-rate search."""
    figure, (axes,) = plot.panels(1, width=6.0, height=4.0)
    tried = {arm: statistics.rates(runs) for arm, runs in statistics.searches(results).items()}
    plot.bowls(axes, tried, ylabel=f'held-out {unit(results.metric)}')
    return figure


def training(results: StudyResults) -> Figure:
    """Draws loss and gradient norm of the compared runs, or those of them that runs logged."""
    return _series(results, TRAINING)


def experts(results: StudyResults) -> Figure:
    """Draws the routers' figures of the compared runs, or those of them that runs logged."""
    return _series(results, EXPERTS)


def gates(results: StudyResults) -> Figure:
    """Draws each arm's gates, stream and gradients by layer, over the seeds of its runs."""
    runs = [run for own in statistics.compared(results).values() for run in own.values()]
    known = {
        label: (name, of)
        for label, (name, of) in GATES.items()
        if any(layers.known(run.sublayers, of) for run in runs)
    }
    figure, panels = plot.panels(len(known))
    for axes, (label, (name, of)) in zip(panels, known.items(), strict=True):
        means, ends = {}, {}
        for arm in statistics.compared(results):
            seeds = by_layer(results, arm, name, of)
            means[arm] = seeds.mean(axis=0) if len(seeds) else []
            if len(seeds) > 1:
                ends[arm] = seeds.min(axis=0), seeds.max(axis=0)
        plot.per_layer(axes, means, ylabel=label, bands=ends)
    return figure


def by_layer(results: StudyResults, arm: str, name: str, figure: str) -> np.ndarray:
    """Returns a figure of the sublayer `name` in an arm's compared runs: [seeds, layers, …].

    Runs without the figure are left out.
    """
    runs = statistics.compared(results)[arm].values()
    found = [layers.by_layer(run.sublayers, name, figure) for run in runs]
    return np.array([values for values in found if len(values)])


def logged(results: StudyResults, names: Sequence[str]) -> list[str]:
    """Returns those of the names that are figures of a compared run."""
    runs = [run for own in statistics.compared(results).values() for run in own.values()]
    return [name for name in names if any(run.series.get(name) for run in runs)]


def _series(results: StudyResults, labels: dict[str, str]) -> Figure:
    names = logged(results, list(labels))
    figure, panels = plot.panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        lines = {
            arm: [_xy(run, name) for run in runs.values()]
            for arm, runs in statistics.compared(results).items()
        }
        plot.curves(axes, lines, xlabel='step', ylabel=labels[name])
    return figure


def _xy(run: StudyRun, name: str) -> tuple[list[float], list[float]]:
    points = run.series.get(name, ())
    return [step for step, _ in points], [value for _, value in points]
