"""helios ablate: runs a study and reports on it."""

import dataclasses
import functools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from helios_jax import config, display, options
from helios_jax.ablate import definition
from helios_jax.ablate import design as designs
from helios_jax.ablate import study as studies
from helios_jax.errors import require

STUDY_HELP = """\
  --study=NAME|FILE.py
      The study: one of {names}; or a file of your own.
  --config=NAME|FILE.py (default: the study's)
      The config that the arms are variants of.
  --config.SECTION.FIELD=VALUE
      Replaces one setting in every arm that does not set it. `helios explain` lists them all."""


def ablate_command(argv: Sequence[str]) -> None:
    """Runs a study: variants of a config, paired by seed; reports what differs.

    helios ablate --study=smoke --workdir=runs/smoke
    """
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', '', 'Directory that the study is kept in.', flag_values=values)
    flags.DEFINE_integer('seeds', 0, "Runs of each arm; 0: the study's.", flag_values=values)
    flags.DEFINE_bool('interval', True, 'Intervals, which need two seeds.', flag_values=values)
    flags.DEFINE_integer('workers', 1, 'Runs at a time, a process each.', flag_values=values)
    text = 'Time for it; whole seeds are dropped; 0: no end.'
    flags.DEFINE_float('budget_minutes', 0.0, text, flag_values=values)
    if options.wants_help(argv):
        names = ', '.join(studies.shipped_studies())
        options.print_flags(values, STUDY_HELP.format(names=names))
    given, name = options.split_flag(argv, 'study', '')
    require(bool(name), f'--study is missing; name one: {", ".join(studies.shipped_studies())}.')
    study = studies.load_study(name)
    given, base_name = options.split_flag(given, 'config', study.config)
    study = dataclasses.replace(study, config=base_name)
    begun = designs.changed(options.load_config(base_name), study.overrides)
    base = options.parse_overrides(values, given, begun)
    check(values, study)
    workdir = Path(values.workdir).expanduser()
    seeds = values.seeds or max(study.seeds, definition.read(workdir).get('seeds', 0))
    design = designs.design(Path(name).stem, study, base, seeds)
    arms = designs.sized_arms(design, designs.vocab_sizes(design))
    given_environment = dict(os.environ)
    os.environ['JAX_PLATFORMS'] = 'cpu'  # the devices are for the runs, which are processes
    from helios_jax.ablate import conduct, report, runs

    environments = runs.environments(given_environment, values.workers)
    results = conduct.conduct(
        design,
        arms,
        workdir,
        workers=values.workers,
        budget_minutes=values.budget_minutes,
        starter=functools.partial(runs.start, base_name, environments),
        command=repeated(name, values.workdir, seeds, begun, base),
    )
    display.table(report.table(results))
    print(f'Report: {report.write(results, workdir)}')


def check(values: flags.FlagValues, study: studies.Study) -> None:
    """Refuses flags that make no sense."""
    workdir, seeds = values.workdir, values.seeds
    require(bool(workdir), '--workdir is missing; name a directory for the study.')
    require(
        '://' not in workdir,
        f'--workdir={workdir}: a study is kept on a local disk; name a directory there.',
    )
    require(values.workers > 0, f'--workers={values.workers} must be above 0.')
    require(seeds >= 0, f'--seeds={seeds} must be 0 or more.')
    require(
        values.budget_minutes >= 0,
        f'--budget_minutes={values.budget_minutes} must be 0 or more.',
    )
    require(
        (seeds or study.seeds) > 1 or not values.interval,
        f'--seeds={seeds or study.seeds} gives no interval; take 2 or more, or say --nointerval.',
    )


def repeated(name: str, workdir: str, seeds: int, begun: config.Config, base: config.Config) -> str:
    """Writes the command that makes these results again.

    Args:
      begun: the study's base before the command line changed it.
    """
    before = config.settings(begun)
    changes = [
        f'--config.{setting}={value}'
        for setting, value in config.settings(base).items()
        if value != before[setting]
    ]
    arguments = [f'--study={name}', f'--workdir={workdir}', f'--seeds={seeds}', *changes]
    return f'helios ablate {shlex.join(arguments)}'
