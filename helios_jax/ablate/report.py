"""Writes the report of a study: its verdict first, then what it rests on.

The same results give the same bytes.
"""

import hashlib
import json
import math
import statistics as medians
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from helios_jax import plot
from helios_jax.ablate import long_rows, page, pictures, statistics
from helios_jax.ablate.page import Grid, Picture, Section, Verbatim
from helios_jax.ablate.records import Arm, StudyResults, StudyRun
from helios_jax.ablate.speedup import BUDGETS, speed_up
from helios_jax.ablate.statistics import ALIKE, BETTER, UNKNOWN, WORSE, Comparison
from helios_jax.ablate.wording import NONE, digits, ends, plus_minus, with_ends
from helios_jax.evaluate import figures
from helios_jax.evaluate.sublayers import BINS, NAMES, OPEN, SHUT
from helios_jax.train.report import flat

STUDY = 'study.json'  # a study's resolved definition, in its workdir
CHANCE = 0.8  # with which a difference that the verdict calls detectable is found
BANDS = 'bands reach from the lowest seed to the highest'
GIB = 2**30


def write(results: StudyResults, workdir: epath.PathLike) -> epath.Path:
    """Writes report.md with its pictures, and report.html, which needs no other file.

    Args:
      workdir: the study's; the report names the hash of the study.json there, if there is one.
    Returns:
      The path of report.md.
    """
    workdir = epath.Path(workdir)
    return page.write(workdir, f'Study {results.study}', list(_sections(results, workdir)))


def table(results: StudyResults) -> list[tuple[str, str, str]]:
    """Returns label, number and unit of each arm, for `display.table`."""
    found = {c.arm: c for c in statistics.compare(results)}
    rows = []
    for arm, runs in statistics.compared(results).items():
        said = _compared_in_words(found[arm]) if arm in found else 'the baseline'
        mean = statistics.estimate([run.value for run in runs.values()])
        rows.append((arm, plus_minus(mean), f'{pictures.unit(results.metric)}, {said}'))
    return rows


def verdict(results: StudyResults) -> list[str]:
    """Says in sentences what was found, and how small a difference could have been found."""
    base, unit = results.baseline, pictures.unit(results.metric)
    if not statistics.compared(results)[base]:
        return [f'The baseline, {base}, has no finished run: nothing is compared.']
    comparisons = statistics.compare(results)
    lines = [
        f'{c.arm} is {c.verdict} than {base} by {abs(c.difference.mean):.4f} {unit} (95% interval '
        f'of the difference: {ends(c.difference)}; corrected p {c.corrected_p:.2g}; '
        f'{len(c.seeds)} seeds).'
        for c in comparisons
        if c.verdict in (BETTER, WORSE)
    ]
    if alike := [c.arm for c in comparisons if c.verdict == ALIKE]:
        lines.append(f'No difference to {base} was found for {", ".join(alike)}.')
    if unknown := [c.arm for c in comparisons if c.verdict == UNKNOWN]:
        lines.append(
            f'Fewer than two seeds are common to {base} and {", ".join(unknown)}: no interval and '
            'no verdict.'
        )
    groups = [', '.join(group) for group in statistics.ranking(results)]
    if len(groups) > 1:
        lines.append(
            f'Order that the seeds support, best first: {"; ".join(groups)}. Arms within a group '
            f'are not ranked: those beside {base} lie within the noise, and others were compared '
            'with it alone.'
        )
    else:
        lines.append('The arms are not ranked: what differs lies within the noise.')
    return lines + _noise(results, [c for c in comparisons if c.verdict != UNKNOWN])


def _noise(results: StudyResults, tested: list[Comparison]) -> list[str]:
    if not tested:
        return []
    floor, seeds = statistics.noise_floor(results), max(len(c.seeds) for c in tested)
    least = statistics.detectable(floor.paired, seeds, len(tested), CHANCE)
    return [
        f'Noise floor, in {pictures.unit(results.metric)}: from seed to seed an arm varies by a '
        f'standard deviation of {floor.within:.4f}, and its difference to {results.baseline} by '
        f'one of {floor.paired:.4f}. With {seeds} seeds and {len(tested)} arms compared, a true '
        f'difference of {least:.4f} is found with a chance of {CHANCE:.0%}.'
    ]


def _sections(results: StudyResults, workdir: epath.Path) -> Iterator[Section]:
    yield Section('Verdict', [results.question, *verdict(results)])
    yield Section('Arms', list(_arms(results)))
    if any(statistics.compared(results).values()):
        drawn = plot.png(pictures.curves(results))
        caption = f'Means where all seeds were measured; {BANDS}.'
        yield Section('Held-out curves', [Picture('curves.png', drawn, caption)])
    yield from long_rows.sections(results)
    if statistics.searches(results):
        yield Section('Learning rates', _rates(results))
    yield from _training(results)
    yield from _gates(results)
    if lost := statistics.left_out(results):
        yield Section(
            'Runs left out',
            [Grid(['arm', 'seed', 'learning rate', 'state', 'reason'], [
                [run.arm, str(run.seed), f'{run.learning_rate:g}', run.state, reason]
                for run, reason in lost
            ])],
        )  # fmt: skip
    if results.notes:
        yield Section('Notes', results.notes)
    yield Section('To run it again', list(_origin(results, workdir)))
    yield Section('Config', [Grid(['setting', 'value'], _rows(flat(results.config)))])


def _arms(results: StudyResults) -> Iterator[str | Grid | Picture]:
    known = flat(results.config)
    rows = [
        [arm.name, name, figures.number(known.get(name, NONE)), figures.number(value)]
        for arm in results.arms
        for name, value in arm.overrides.items()
    ]
    yield Grid(['arm', 'setting', 'in the base config', 'in the arm'], rows)
    found = {c.arm: c for c in statistics.compare(results)}
    head = [
        'arm', 'seeds', 'learning rate', 'parameters', 'FLOPs a token',
        f'held-out {pictures.unit(results.metric)}', f'difference to {results.baseline}',
        'corrected p', 'verdict', *(f'speed-up in {unit}' for unit in BUDGETS.values()),
        'step', 'peak memory',
    ]  # fmt: skip
    yield Grid(head, [_row(results, arm, found.get(arm.name)) for arm in results.arms])
    yield (
        'Means ± half of their 95% interval by Student’s t. Differences are paired by seed; p is '
        'that of the paired t test, corrected by Holm’s method for all comparisons of the study. A '
        'speed-up is what the baseline spent ÷ what the arm spent when its held-out curve first '
        'reached the baseline’s final value, as a geometric mean over seeds with its 95% interval; '
        'the arm’s learning rate had not decayed there, which counts against it. Steps are medians.'
    )
    if any(comparison.seeds for comparison in found.values()):
        caption = 'Points are means over common seeds, lines their 95% intervals, uncorrected.'
        yield Picture('effects.png', plot.png(pictures.effects(results)), caption)


def _row(results: StudyResults, arm: Arm, found: Comparison | None) -> list[str]:
    runs = statistics.compared(results)
    own = runs[arm.name]
    steps = [seconds for run in own.values() for _, seconds in _series(run, 'time/step_seconds')]
    rates = sorted({f'{run.learning_rate:g}' for run in own.values()})
    peak = max((run.peak_bytes for run in own.values()), default=0)
    compared = [NONE] * 3
    if found:
        compared = [with_ends(found.difference), digits(found.corrected_p), found.verdict]
    return [
        arm.name, str(len(own)), ', '.join(rates) or NONE, f'{arm.parameters:,}',
        f'{arm.flops_per_token:.3g}',
        plus_minus(statistics.estimate([run.value for run in own.values()])), *compared,
        *(str(speed_up(own, runs[results.baseline], b)) if found else NONE for b in BUDGETS),
        f'{medians.median(steps):.3g} s' if steps else NONE,
        f'{peak / GIB:.2f} GiB' if peak else NONE,
    ]  # fmt: skip


def _rates(results: StudyResults) -> list[str | Grid | Picture]:
    rows = []
    for arm, runs in statistics.searches(results).items():
        tried = statistics.rates(runs)
        values = ', '.join(f'{rate:g}: {digits(value)}' for rate, value in tried.items())
        chosen, remark = NONE, 'no run finished'
        if any(map(math.isfinite, tried.values())):
            best = statistics.best_rate(runs)
            chosen = f'{best.rate:g}'
            remark = 'at an end of the grid: try beyond it' if best.at_end else 'inside the grid'
        rows.append([arm, values, chosen, remark])
    caption = 'The lowest of each arm is circled; a cross at the upper edge is a run that failed.'
    return [
        Grid(['arm', 'learning rate: value', 'lowest at', 'where it lies'], rows),
        Picture('bowls.png', plot.png(pictures.bowls(results)), caption),
    ]


def _training(results: StudyResults) -> Iterator[Section]:
    if pictures.logged(results, list(pictures.TRAINING)):
        drawn = plot.png(pictures.training(results))
        shown = Picture('training.png', drawn, f'Steps that were logged; {BANDS}.')
        yield Section('Training', [shown, _spikes(results)])
    if pictures.logged(results, list(pictures.EXPERTS)):
        drawn = plot.png(pictures.experts(results))
        caption = f'Over all mixtures of experts of a model, at steps that were logged; {BANDS}.'
        yield Section('Experts', [Picture('experts.png', drawn, caption)])


def _gates(results: StudyResults) -> Iterator[Section]:
    known = lambda arm: pictures.by_layer(results, arm, NAMES[0], 'gate_mean').size
    arms = [arm for arm in statistics.compared(results) if known(arm)]
    if not arms:
        return
    caption = (
        'The trained models on the same held-out text, by layer; the stream is the one below a '
        'layer, the gradient in it that of the summed loss behind its attention, the norm that of '
        f'the mean loss. Lines are means over seeds; {BANDS}.'
    )
    tenths = [f'{n / BINS:g} to {(n + 1) / BINS:g}' for n in range(BINS)]
    head = ['arm', *(f'saturated in {name}' for name in NAMES), 'most in one sublayer', *tenths]
    said = (
        f'A gate below {SHUT} or above {OPEN} is saturated; the last columns are the shares of '
        'gates that are so far open. All are means over seeds, layers, tokens and channels.'
    )
    drawn = Picture('gates.png', plot.png(pictures.gates(results)), caption)
    yield Section('Gates', [drawn, Grid(head, [_gates_row(results, arm) for arm in arms]), said])


def _gates_row(results: StudyResults, arm: str) -> list[str]:
    of = lambda name, figure: pictures.by_layer(results, arm, name, figure).mean(axis=0)
    shut = {name: of(name, 'gate_saturated') for name in NAMES}
    most = max(NAMES, key=lambda name: shut[name].max())
    open_so_far = np.concatenate([of(name, 'gate_histogram') for name in NAMES]).mean(axis=0)
    return [
        arm, *(f'{values.mean():.1%}' for values in shut.values()),
        f'{shut[most].max():.1%}: {most} of layer {shut[most].argmax() + 1}',
        *(f'{share:.1%}' for share in open_so_far),
    ]  # fmt: skip


def _spikes(results: StudyResults) -> Grid:
    rows = []
    for arm, runs in statistics.compared(results).items():
        losses = [[loss for _, loss in _series(run, 'loss')] for run in runs.values()]
        norms = [norm for run in runs.values() for _, norm in _series(run, 'gradient_norm')]
        middle, most = (f'{f(norms):.3g}' if norms else NONE for f in (medians.median, max))
        spikes = sum(map(statistics.spikes, losses))
        rows.append([arm, f'{spikes} of {sum(map(len, losses)):,}', middle, most])
    window = f'{statistics.SPIKE_DEVIATIONS} × the MAD of the {statistics.SPIKE_WINDOW} before'
    spiked = f'logged steps whose loss exceeds the median by {window}'
    return Grid(['arm', spiked, 'median norm of the gradient', 'largest'], rows)


def _origin(results: StudyResults, workdir: epath.Path) -> Iterator[Grid | Verbatim]:
    yield Verbatim(results.command)
    for name, values in results.environment.items():
        yield Grid([name, 'value'], _rows(values))
    study, base = workdir / STUDY, flat(results.config)
    hashes = {STUDY: _sha256(study.read_bytes())} if study.exists() else {}
    for arm in results.arms:
        text = json.dumps(base | dict(arm.overrides), sort_keys=True, default=str)
        hashes[f'config of {arm.name}'] = _sha256(text.encode())
    yield Grid(['content', 'SHA-256'], _rows(hashes))


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [[name, figures.number(value)] for name, value in values.items()]


def _series(run: StudyRun, name: str) -> tuple[tuple[float, float], ...]:
    return run.series.get(name, ())


def _compared_in_words(found: Comparison) -> str:
    return f'{with_ends(found.difference)}: {found.verdict}'


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
