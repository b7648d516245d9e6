"""The runs that a study is made of, where they lie, and how each stands.

    WORKDIR/study.json        what is run; a study that has changed is refused
    WORKDIR/ARM/lr_RATE/      a run of the learning-rate search
    WORKDIR/ARM/seed_N/       a run of the comparison; seed N reads the same rows in every arm
    WORKDIR/ARM/seed_N.log    what the run wrote
    WORKDIR/ARM/seed_N.failed the line with which it failed; remove it to try again

Each workdir is one of `helios train`, and these files are all that a study knows of its runs.
"""

import dataclasses
import fcntl
from collections.abc import Mapping
from pathlib import Path

from helios_jax import config, options
from helios_jax.ablate.design import Design
from helios_jax.ablate.study import RATE, SEARCH_SEED, rate_name
from helios_jax.train import lock


@dataclasses.dataclass(frozen=True)
class Variant:
    """One run of a study, before or after it has run."""

    arm: str
    config: config.Config
    directory: Path  # its workdir
    swept: bool  # of the learning-rate search

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
            )
            for name, cfg in design.configs.items()
            if name in rates
        ]
        for seed in range(first, first + design.seeds)
    ]


def finished(variant: Variant) -> bool:
    """True once the run has reached its last step and written its report."""
    return (variant.directory / 'report.md').exists()


def failure(variant: Variant) -> str:
    """The line with which a run failed; '' if it has not."""
    path = variant.beside('.failed')
    return path.read_text().strip() if path.exists() else ''


def command(variant: Variant, base: str) -> list[str]:
    """Arguments of `helios` that train the variant: what differs from the config `base`."""
    changes = options.overrides(options.load_config(base), variant.config)
    return [
        'train',
        f'--config={base}',
        f'--workdir={variant.directory}',
        '--layer_gradients',
        *changes,
    ]


def is_open(variant: Variant) -> bool:
    return not finished(variant) and not failure(variant)


def told(variant: Variant) -> str:
    """Says in words how a run stands."""
    if finished(variant):
        return 'done'
    reason = failure(variant)
    return f'failed: {reason}' if reason else 'stopped before its end'


def held(variant: Variant) -> bool:
    """True while another process writes the run's workdir."""
    path = variant.directory / lock.NAME
    if not path.exists():
        return False
    with path.open('rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
