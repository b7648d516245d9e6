"""A study: one base config, its named variants (arms), and how they are compared.

A study is a Python file with a function `get_study` that returns a `Study`; those that ship lie in
configs/studies. Whatever is wrong with it is said before anything runs.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from helios_jax import options
from helios_jax.errors import nearest, one_of, require
from helios_jax.evaluate.length_settings import METHODS

METRICS = ('eval/bits_per_byte', 'eval/loss', 'eval/perplexity')  # of every run; lower is better
EQUAL = ('tokens', 'parameters', 'flops')
BARE = 'none'  # of METHODS: positions as they were trained
RATE = 'optimizer.learning_rate'
SEARCH_SEED = 1000  # added to the first seed: the search's run is none of the comparison's


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the variants of one config that answer it.

    Raises:
      UserError: a value that cannot be used.
    """

    question: str  # a sentence, which the report opens with
    arms: Mapping[str, Mapping[str, Any]]  # name of a variant → setting → value
    baseline: str  # the arm that the others are compared with
    config: str = 'tiny'  # the config that arms are variants of: a shipped one, or a file
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of every arm
    metric: str = METRICS[0]
    seeds: int = 3  # runs of each arm, paired: run n of every arm reads the same rows
    learning_rates: tuple[float, ...] = ()  # grid of a search; empty: those of the configs
    search: str = 'each'  # each arm takes its own best rate, or all the one of the baseline
    equal: tuple[str, ...] = ('tokens',)  # what arms have in common: EQUAL
    lengths: tuple[int, ...] = ()  # longer rows that finished runs are scored on, tokens
    methods: tuple[str, ...] = ()  # of stretching positions to them: METHODS, `none` among them

    def __post_init__(self) -> None:
        require(bool(self.question), 'question is empty; say in a sentence what the study asks.')
        for name in self.arms:
            require(
                re.fullmatch(r'\w[\w-]*', name, re.ASCII) is not None,
                f'arm {name!r} names a directory; use letters, digits, _ and -.',
            )
        require(
            self.baseline in self.arms,
            f'baseline={self.baseline!r} is no arm.{nearest(self.baseline, self.arms)} There are: '
            f'{", ".join(self.arms)}.',
        )
        require(len(self.arms) > 1, f'the only arm is {self.baseline!r}; name one to compare it.')
        one_of('metric', self.metric, METRICS)
        one_of('search', self.search, ('each', 'baseline'))
        for name in self.equal:
            one_of('equal', name, EQUAL)
        require(self.seeds > 0, f'seeds={self.seeds} must be 1 or more.')
        self._check_rates()
        self._check_lengths()

    def _check_rates(self) -> None:
        rates = self.learning_rates
        require(
            len(rates) != 1,
            f'learning_rates={rates} has nothing to choose from; name two or more, or none and set '
            f'{RATE}.',
        )
        require(
            all(0 < rate < math.inf for rate in rates),
            f'learning_rates={rates} must be numbers above 0.',
        )
        directories = {rate_name(rate) for rate in rates}
        require(
            len(directories) == len(rates),
            f'learning_rates={rates} must differ, in their first six digits.',
        )
        setting = [name for name, values in self.arms.items() if rates and RATE in values]
        require(
            not setting,
            f'arm {"".join(setting[:1])!r} sets {RATE}, which learning_rates searches; drop one.',
        )

    def _check_lengths(self) -> None:
        for name, other in (('lengths', 'methods'), ('methods', 'lengths')):
            given = getattr(self, name)
            require(
                not given or bool(getattr(self, other)),
                f'{name}={given} means nothing without {other}; name some, or drop {name}.',
            )
            require(len(set(given)) == len(given), f'{name}={given} names one twice; name it once.')
        for method in self.methods:
            one_of('methods', method, METHODS)
        require(
            not self.methods or BARE in self.methods,
            f'methods={self.methods} lacks {BARE!r}, which the others are compared with; add it.',
        )


def narrowed(study: Study, arms: Collection[str]) -> Study:
    """Returns a study of some arms and the baseline.

    Raises:
      UserError: an arm that the study lacks; none beside the baseline.
    """
    for name in arms:
        one_of('--arms', name, tuple(study.arms))
    kept = {name: v for name, v in study.arms.items() if name in {study.baseline, *arms}}
    return dataclasses.replace(study, arms=kept)


def rate_name(rate: float) -> str:
    """Name of the directory of a learning rate's run."""
    return f'lr_{rate:g}'


def shipped_studies() -> dict[str, Path]:
    """Maps the names of the studies that come with the package to their files."""
    return options.shipped_configs('helios_jax.configs.studies')


def load_study(name: str) -> Study:
    """Runs get_study() of a shipped study or of a file.

    Raises:
      UserError: no such file, or one that is no study; an error inside it, with its line.
    """

    def built(study: Any) -> Study:
        require(
            isinstance(study, Study), f'get_study() must return a Study, not {type(study).__name__}'
        )
        return study

    return options.load('study', name, shipped_studies(), built)
