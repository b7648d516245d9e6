"""helios ablate: runs a study and reports on it."""

import contextlib
import dataclasses
import functools
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from helios_jax import display, options
from helios_jax.ablate import definition, ray_tasks
from helios_jax.ablate import design as designs
from helios_jax.ablate import study as studies
from helios_jax.errors import one_of, require

if TYPE_CHECKING:
    from helios_jax.ablate.runs import Starter

LAUNCHERS = ('local', 'ray')
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
    text = "Arms to run beside the baseline, by commas; '': all of the study's."
    flags.DEFINE_list('arms', [], text, flag_values=values)
    flags.DEFINE_bool('interval', True, 'Intervals, which need two seeds.', flag_values=values)
    text = 'Runs at a time; without it one, with ray all that the cluster holds.'
    flags.DEFINE_integer('workers', None, text, flag_values=values)
    text = 'What runs are: local processes; or ray, tasks on a Ray cluster.'
    flags.DEFINE_string('launcher', 'local', text, flag_values=values)
    text = 'Cluster for ray: HOST:PORT; auto: one here; local: one of its own.'
    flags.DEFINE_string('ray_address', ray_tasks.LOCAL, text, flag_values=values)
    text = 'Time for it; whole seeds are dropped; 0: no end.'
    flags.DEFINE_float('budget_minutes', 0.0, text, flag_values=values)
    if options.wants_help(argv):
        names = ', '.join(studies.shipped_studies())
        options.print_flags(values, STUDY_HELP.format(names=names))
    design, command = asked(values, argv)
    arms = designs.sized_arms(design, designs.vocab_sizes(design))
    workdir = Path(values.workdir).expanduser()
    with launched(values, design, workdir) as (starter, workers):
        from helios_jax.ablate import conduct

        results = conduct.conduct(
            design,
            arms,
            workdir,
            workers=workers,
            budget_minutes=values.budget_minutes,
            starter=starter,
            command=command,
        )
    from helios_jax.ablate import report

    display.table(report.table(results))
    print(f'Report: {report.write(results, workdir)}')


@contextlib.contextmanager
def launched(
    values: flags.FlagValues, design: designs.Design, workdir: Path
) -> Iterator[tuple['Starter', int]]:
    """Gives what starts a run, and how many run at a time, by the launcher that was asked for.

    The devices are for the runs, which are other processes: this one has the CPU from here on.
    """
    environment, base = dict(os.environ), design.study.config
    with contextlib.ExitStack() as stack:
        if values.launcher == 'ray':
            configs = list(design.configs.values())
            place = (values.ray_address, base, configs, workdir.absolute(), values.workers)
            starter, workers = stack.enter_context(ray_tasks.cluster(*place))
        os.environ['JAX_PLATFORMS'] = 'cpu'
        from helios_jax.ablate import runs

        if values.launcher == 'local':
            workers = values.workers or 1
            environments = runs.environments(environment, workers)
            starter = functools.partial(runs.start, base, environments)
        yield starter, workers


def asked(values: flags.FlagValues, argv: Sequence[str]) -> tuple[designs.Design, str]:
    """Parses the flags; returns what is to be run, and the command that runs it again.

    Raises:
      UserError: a study, an arm, a setting or a flag that cannot be used.
    """
    argv, name = options.split_flag(argv, 'study', '')
    require(bool(name), f'--study is missing; name one: {", ".join(studies.shipped_studies())}.')
    study = studies.load_study(name)
    argv, base_name = options.split_flag(argv, 'config', study.config)
    begun = designs.changed(options.load_config(base_name), study.overrides)
    base = options.parse_overrides(values, argv, begun)
    check(values, study)
    saved = definition.read(Path(values.workdir).expanduser())
    seeds = values.seeds or max(study.seeds, saved.get('seeds', 0))
    if values.arms:
        study = studies.narrowed(study, [*values.arms, *saved.get('arms', ())])
    arguments = [f'--study={name}', f'--workdir={values.workdir}', f'--seeds={seeds}']
    arguments += [f'--config={base_name}'] if base_name != study.config else []
    arguments += [f'--arms={",".join(study.arms)}'] if values.arms else []
    arguments += [] if values.interval else ['--nointerval']
    arguments += options.overrides(begun, base)
    study = dataclasses.replace(study, config=base_name)
    design = designs.design(Path(name).stem, study, base, seeds)
    return design, f'helios ablate {shlex.join(arguments)}'


def check(values: flags.FlagValues, study: studies.Study) -> None:
    """Refuses flags that make no sense."""
    workdir, seeds = values.workdir, values.seeds
    require(bool(workdir), '--workdir is missing; name a directory for the study.')
    require(
        '://' not in workdir,
        f'--workdir={workdir}: a study is kept on a local disk; name a directory there.',
    )
    workers: int | None = values.workers
    require(workers is None or workers > 0, f'--workers={workers} must be above 0.')
    one_of('--launcher', values.launcher, LAUNCHERS)
    require(
        values.launcher == 'ray' or values.ray_address == ray_tasks.LOCAL,
        f'--ray_address={values.ray_address} has no effect; say --launcher=ray as well.',
    )
    require(seeds >= 0, f'--seeds={seeds} must be 0 or more.')
    require(
        values.budget_minutes >= 0,
        f'--budget_minutes={values.budget_minutes} must be 0 or more.',
    )
    require(
        (seeds or study.seeds) > 1 or not values.interval,
        f'--seeds={seeds or study.seeds} gives no interval; take 2 or more, or say --nointerval.',
    )
