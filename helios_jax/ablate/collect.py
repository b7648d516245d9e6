"""Reads what the runs of a study left in their workdirs."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from helios_jax import checkpoint
from helios_jax.ablate import statistics
from helios_jax.ablate.design import Design
from helios_jax.ablate.records import Arm, Point, StudyResults, StudyRun
from helios_jax.ablate.study import BARE
from helios_jax.ablate.variants import (
    Variant,
    failure,
    finished,
    scored,
    scores,
    search_variants,
    seed_variants,
)
from helios_jax.train import layers, metrics
from helios_jax.train.run import CONFIG_FILE

GIB = 2**30
NOT_RUN = 'not run'
RETRAIN = 'it was trained at a learning rate of {}, which is not the best one now; remove {}'
UNSCORED = 'stopped before its end, or not begun'
NO_RATE = 'no learning rate of the search gave a finished run'


def results(
    design: Design, arms: tuple[Arm, ...], workdir: Path, command: str, notes: Sequence[str]
) -> StudyResults:
    """Collects the results of a study, whatever of it has run so far.

    Args:
      arms: those of the design, counted.
      command: that makes these results again.
      notes: what a reader must know beside.
    """
    rates = best_rates(design, workdir, arms)
    groups = search_variants(design, workdir) + seed_variants(design, workdir, rates)
    variants = [variant for group in groups for variant in group]
    sized = {arm.name: arm for arm in arms}
    runs = [read_run(variant, design, sized[variant.arm]) for variant in variants]
    made_on, remarks = environment(variants)
    return StudyResults(
        study=design.name,
        question=design.study.question,
        metric=design.study.metric,
        baseline=design.study.baseline,
        arms=arms,
        runs=(*runs, *unsearched(design, runs, rates)),
        config=dataclasses.asdict(design.base),
        environment=made_on,
        command=command,
        notes=(*notes, *remarks),
    )


def unsearched(
    design: Design, runs: Sequence[StudyRun], rates: Mapping[str, float]
) -> list[StudyRun]:
    """Lists the runs of the comparison whose arm has no learning rate, as no search finished."""
    found = []
    for name in [name for name in design.configs if name not in rates]:
        owner = name if design.study.search == 'each' else design.study.baseline
        failed = any(run.state == 'failed' for run in runs if run.swept and run.arm == owner)
        state, reason = ('failed', NO_RATE) if failed else ('missing', NOT_RUN)
        first = design.base.train.seed
        for seed in range(first, first + design.seeds):
            found.append(_without_result(name, seed, math.nan, state, reason, swept=False))
    return found


def best_rates(design: Design, workdir: Path, arms: Sequence[Arm]) -> dict[str, float]:
    """Maps each arm to the learning rate that it is compared at.

    That is the one of its config, or the best one of its search, or of the baseline's. An arm
    whose search has no finished run is left out.
    """
    study = design.study
    if not study.learning_rates:
        return {name: cfg.optimizer.learning_rate for name, cfg in design.configs.items()}
    sized, best = {arm.name: arm for arm in arms}, {}
    for variants in search_variants(design, workdir):
        name = variants[0].arm
        runs = [read_run(variant, design, sized[name]) for variant in variants]
        if any(run.state == 'done' for run in runs):
            best[name] = statistics.best_rate(runs).rate
    if study.search == 'baseline' and best:
        best = dict.fromkeys(design.configs, best[study.baseline])
    return best


def read_run(variant: Variant, design: Design, arm: Arm) -> StudyRun:
    """Reads one run.

    Steps between two lines of metrics.jsonl are taken to be like the later one's: each line has
    the mean time of a step since the line before, and the tokens of its own step.
    """
    rate, seed = variant.config.optimizer.learning_rate, variant.config.train.seed
    without = lambda state, reason: _without_result(
        variant.arm, seed, rate, state, reason, swept=variant.swept
    )
    if not finished(variant):
        if reason := failure(variant):
            return without('failed', reason)
        begun = variant.directory.exists()
        return without('missing', 'stopped before its end' if begun else NOT_RUN)
    trained = json.loads((variant.directory / CONFIG_FILE).read_text())['optimizer']
    if trained['learning_rate'] != rate:  # a run of the search was tried again, and won
        return without('failed', RETRAIN.format(trained['learning_rate'], variant.directory))
    lines = metrics.read(variant.directory / metrics.FILE)
    points = read_points(lines, design.study.metric, arm.flops_per_token)
    if not points or points[-1].step != variant.config.train.num_steps:
        return without('failed', f'{design.study.metric} is no finite number at the last step')
    last = points[-1]
    series = series_of(lines)
    peak = max((value for _, value in series.get('device/peak_gib', ())), default=0.0)
    return StudyRun(
        arm=variant.arm,
        seed=seed,
        learning_rate=rate,
        state='done',
        reason='',
        value=last.value,
        seconds=last.seconds,
        tokens=last.tokens,
        flops=last.flops,
        peak_bytes=round(peak * GIB),
        points=points,
        series=series,
        sublayers=tuple(layers.read(variant.directory)),
        swept=variant.swept,
        longer=read_longer(variant),
        unscored='' if scored(variant) else failure(variant) or UNSCORED,
    )


def read_longer(variant: Variant) -> dict[tuple[str, int], float]:
    """Maps method and length to the bits per byte of a run's sliding windows.

    Rows of the run's own length are in it once: there, no method changes anything.
    """
    own = variant.config.data.row_length
    return {
        (row['method'], row['length']): math.nan if value is None else float(value)
        for row in scores(variant)
        for value in [row['sliding_bits_per_byte']]
        if row['length'] > own or row['method'] == BARE
    }


def read_points(
    lines: Sequence[Mapping[str, Any]], metric: str, flops_per_token: float
) -> tuple[Point, ...]:
    """Lists the evaluations of a run, with what it had cost by then."""
    logged = [line for line in lines if 'tokens' in line]
    steps = np.array([0, *(line['step'] for line in logged)])
    seconds = _totals(steps, [line.get('time/step_seconds') or 0.0 for line in logged])
    tokens = _totals(steps, [line['tokens'] for line in logged])
    points = []
    for line in lines:
        if line.get(metric) is not None:
            step = line['step']
            count = round(float(np.interp(step, steps, tokens)))
            elapsed = float(np.interp(step, steps, seconds))
            flops = count * flops_per_token
            points.append(Point(step, count, flops, elapsed, float(line[metric])))
    return tuple(points)


def series_of(
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Maps each figure of metrics.jsonl to its (step, value), where that is a number."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != 'step' and value is not None:
                found.setdefault(name, []).append((float(line['step']), float(value)))
    return {name: tuple(pairs) for name, pairs in found.items()}


def environment(variants: Sequence[Variant]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Returns versions and hardware of the runs by their checkpoints, and notes on differences."""
    found: dict[str, dict[str, Any]] = {}
    others = []
    for variant in variants:
        directory = epath.Path(variant.directory) / 'checkpoints'
        if finished(variant) and checkpoint.committed(directory):
            made_by = checkpoint.open_step(directory).metadata['environment']
            found = found or made_by
            others += [variant.label] if made_by != found else []
    note = f'{", ".join(others)}: other versions or hardware than the first run had.'
    return found, ((note,) if others else ())


def _totals(steps: np.ndarray, per_step: Sequence[int | float]) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.diff(steps) * np.asarray(per_step, float))])


def _without_result(
    arm: str, seed: int, rate: float, state: str, reason: str, *, swept: bool
) -> StudyRun:
    return StudyRun(
        arm, seed, rate, state, reason, math.nan, 0.0, 0, 0.0, 0, (), {}, (), swept, {}, ''
    )  # fmt: skip
