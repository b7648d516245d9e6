"""The runs that a study is made of, where they lie, and how each stands.

    WORKDIR/study.json        what is run; a study that has changed is refused
    WORKDIR/ARM/lr_RATE/      a run of the learning-rate search
    WORKDIR/ARM/seed_N/       a run of the comparison; seed N reads the same rows in every arm
    WORKDIR/ARM/seed_N.log    what the run wrote
    WORKDIR/ARM/seed_N.failed the line with which it failed; remove it to try again

Each workdir is one of `helios train`, and these files are all that a study knows of its runs. Where
the study asks for longer rows, `helios eval` adds to the workdir of a run of the comparison:

    lengths/                  its scores
    lengths.log               what the scoring wrote
    lengths.failed            the line with which it failed; remove it to try again
"""

import dataclasses
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_jax import config, options
from helios_jax.ablate.design import Design
from helios_jax.ablate.study import RATE, SEARCH_SEED, rate_name
from helios_jax.evaluate.length_settings import Lengths
from helios_jax.train import lock

SCORES = 'lengths'  # directory of scores on longer rows, in a run's workdir


@dataclasses.dataclass(frozen=True)
class Variant:
    """One run of a study, before or after it has run."""

    arm: str
    config: config.Config
    directory: Path  # its workdir
    swept: bool  # of the learning-rate search
    lengths: Lengths | None = None  # scored on these rows once it is trained

    @property
    def label(self) -> str:
        return f'{self.arm}/{self.directory.name}'

    def beside(self, suffix: str) -> Path:
        """Path of a file beside the workdir, which need not exist yet."""
        return self.directory.with_name(self.directory.name + suffix)


def search_variants(design: Design, workdir: Path) -> list[list[Variant]]:
    """Lists the runs of the learning-rate search, arm by arm; they share a seed of their own."""
    study, seed = design.study, design.base.train.seed + SEARCH_SEED
    names = [study.baseline] if study.search == 'baseline' else list(design.configs)
    return [
        [
            Variant(
                name,
                config.replace(design.configs[name], {RATE: rate, 'train.seed': seed}),
                workdir / name / rate_name(rate),
                swept=True,
            )
            for rate in study.learning_rates
        ]
        for name in (names if study.learning_rates else [])
    ]


def seed_variants(design: Design, workdir: Path, rates: Mapping[str, float]) -> list[list[Variant]]:
    """Lists the runs of the comparison, seed by seed.

    Args:
      rates: arm → its learning rate; an arm that is not there is left out.
    """
    first = design.base.train.seed
    return [
        [
            Variant(
                name,
                config.replace(cfg, {RATE: rates[name], 'train.seed': seed}),
                workdir / name / f'seed_{seed}',
                swept=False,
                lengths=design.lengths(name),
            )
            for name, cfg in design.configs.items()
            if name in rates
        ]
        for seed in range(first, first + design.seeds)
    ]


def finished(variant: Variant) -> bool:
    """True once the run has reached its last step and written its report."""
    return (variant.directory / 'report.md').exists()


def scores(variant: Variant) -> list[dict[str, Any]]:
    """Reads the run's scores on longer rows, as `lengths.measure` has them, if it has them all."""
    path = variant.directory / SCORES / 'lengths.json'
    if variant.lengths is None or not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
    except ValueError:  # it is made again from the scores of single rows, which are kept too
        return []
    asked = {name: getattr(variant.lengths, name) for name in ('lengths', 'methods', 'stride')}
    same = json.loads(json.dumps(asked)).items() <= found.items()
    return found['rows'] if same else []


def scored(variant: Variant) -> bool:
    """True once the run has the scores on longer rows that the study asks for, if it does."""
    return variant.lengths is None or bool(scores(variant))


def failure_file(variant: Variant) -> Path:
    """Path of the line with which a run's training fails, or once that is done its scoring."""
    return _file(variant, '.failed')


def log_file(variant: Variant) -> Path:
    """Path of what a run's training writes, or once that is done its scoring."""
    return _file(variant, '.log')


def _file(variant: Variant, suffix: str) -> Path:
    return variant.directory / (SCORES + suffix) if finished(variant) else variant.beside(suffix)


def failure(variant: Variant) -> str:
    """The line with which a run, or the scoring of a finished one, failed; '' if it has not."""
    path = failure_file(variant)
    return path.read_text().strip() if path.exists() else ''


def command(variant: Variant, base: str) -> list[str]:
    """Arguments of `helios` that train the variant, or score it once it is trained.

    Args:
      base: a config; what differs from it is set.
    """
    if finished(variant):
        return scoring(variant)
    changes = options.overrides(options.load_config(base), variant.config)
    return [
        'train',
        f'--config={base}',
        f'--workdir={variant.directory}',
        '--layer_gradients',
        *changes,
    ]


def scoring(variant: Variant) -> list[str]:
    """Arguments of `helios` that score a trained variant on the study's longer rows."""
    wanted = variant.lengths
    assert wanted is not None
    return [
        'eval',
        f'--checkpoint={variant.directory}',
        f'--lengths={",".join(map(str, wanted.lengths))}',
        f'--methods={",".join(wanted.methods)}',
        *(f'--{name}={getattr(wanted, name)}' for name in ('trials', 'stride', 'batch_rows')),
        f'--output={variant.directory / SCORES}',
    ]


def is_open(variant: Variant) -> bool:
    """True while something of the run is to be done: its training, or its scoring."""
    return not (finished(variant) and scored(variant)) and not failure(variant)


def told(variant: Variant) -> str:
    """Says in words how a run stands."""
    if finished(variant) and scored(variant):
        return 'done'
    what, reason = 'trained, but its scoring ' if finished(variant) else '', failure(variant)
    return f'{what}failed: {reason}' if reason else f'{what}stopped before its end'


def held(variant: Variant) -> bool:
    """True while another process trains the run, or scores it.

    A training locks its workdir. The log of a scoring is locked by what starts it, and remains so
    for as long as its process lives, whatever becomes of the study.
    """
    return any(_locked(variant.directory / name) for name in (lock.NAME, f'{SCORES}.log'))


def _locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open('rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
