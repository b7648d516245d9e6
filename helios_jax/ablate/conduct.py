"""Conducts a study, from its design to its results.

    compare with study.json → prepare text → search learning rates → run and score seeds → collect

Each step starts from what lies in the workdir, so that a study goes on by being started again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from helios_jax import display
from helios_jax.ablate import collect, definition, runs, variants
from helios_jax.ablate.design import CLOSE, Design, loaded
from helios_jax.ablate.records import Arm, StudyResults
from helios_jax.ablate.study import EQUAL
from helios_jax.data import pipeline
from helios_jax.evaluate.lengths import long_documents
from helios_jax.parallel import cluster
from helios_jax.train import lock

SHARED = '{} runs at a time: where they shared a device, their seconds and steps do not compare.'


def conduct(
    design: Design,
    arms: tuple[Arm, ...],
    workdir: Path,
    *,
    starter: runs.Starter,
    command: str,
    workers: int = 1,
    budget_minutes: float = 0.0,
) -> StudyResults:
    """Runs what of a study is not done yet; returns the results of all its runs.

    Args:
      arms: those of the design, counted.
      starter: starts the process of a run.
      command: that makes these results again.
      budget_minutes: time for it; searches and seeds that do not fit are left out. 0: no end.
    Raises:
      UserError: another study was begun in `workdir`, or this one with other settings; another
        process conducts it; text that cannot be used, or is shorter than the longest row. All
        before anything runs.
      KeyboardInterrupt: after SIGINT or SIGTERM, once every run has saved.
    """
    with lock.hold(epath.Path(workdir)) as held:
        definition.require_same(design, workdir)
        texts = ((cfg.data, design.lengths(arm)) for arm, cfg in design.configs.items())
        for data, longer in dict.fromkeys(texts):
            pipeline.prepare(data, loaded(data))
            if longer:
                long_documents(data, loaded(data), longer)
        held.begin()
        definition.write(design, workdir)
        budget = runs.Budget(budget_minutes, workers)
        with cluster.stop_on_signals() as stop:
            pool: dict[str, Any] = {'workers': workers, 'budget': budget, 'stop': stop}
            dropped = runs.run_groups(variants.search_variants(design, workdir), starter, **pool)
            if not dropped and not stop.signal:
                rates = collect.best_rates(design, workdir, arms)
                seeds = variants.seed_variants(design, workdir, rates)
                dropped = runs.run_groups(seeds, starter, **pool)
        if stop.signal:
            display.say('Stopped; the same command goes on.')
            raise KeyboardInterrupt
        notes = [equalities(design)]
        if workers > 1:
            notes.append(SHARED.format(workers))
        if dropped:
            notes.append(left_out(dropped, budget, budget_minutes))
            display.say(notes[-1])
        return collect.results(design, arms, workdir, command, notes)


def equalities(design: Design) -> str:
    """Says what the study holds equal, and what not."""
    held = design.study.equal
    free = [what for what in EQUAL if what not in held]
    text = f'Equal in all arms: {", ".join(held) or "nothing"}'
    text += f'; not held equal: {", ".join(free)}.' if free else '.'
    return f'{text} Parameters and FLOPs count as equal within {CLOSE:.0%}.'


def left_out(
    dropped: Sequence[Sequence[variants.Variant]], budget: runs.Budget, minutes: float
) -> str:
    """Says in one line what a budget dropped."""
    open_runs = [variant for group in dropped for variant in group if variants.is_open(variant)]
    what = 'learning-rate search, and so all seeds' if open_runs[0].swept else 'seeds'
    names = ', '.join(dict.fromkeys(variant.directory.name for variant in open_runs))
    return (
        f'Dropped from the {what}: {len(open_runs)} runs ({names}); a run takes '
        f'{display.duration(budget.longest)}, and --budget_minutes={minutes:g}. The same command '
        'goes on.'
    )
