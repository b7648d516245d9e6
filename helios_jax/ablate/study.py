"""A study: one base config, its named variants (arms), and how they are compared.

A study is a Python file with a function `get_study` that returns a `Study`; those that ship lie in
configs/studies. Whatever is wrong with it is said before anything runs.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_jax import config, options
from helios_jax.ablate.records import Arm
from helios_jax.arch import flops, weights
from helios_jax.errors import UserError, nearest, one_of, require

METRICS = ('eval/bits_per_byte', 'eval/loss', 'eval/perplexity')  # of every run; lower is better
EQUAL = ('tokens', 'parameters', 'flops')
CLOSE = 0.05  # parameters and FLOPs that differ by this share at most count as equal
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

    def _check_rates(self) -> None:
        rates = self.learning_rates
        require(
            len(rates) != 1,
            f'learning_rates={rates} has nothing to choose from; name two or more, or none and set '
            f'{RATE}.',
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


@dataclasses.dataclass(frozen=True)
class Design:
    """A study whose every setting is known."""

    name: str
    study: Study
    base: config.Config  # with the overrides of the study and of the command line
    seeds: int
    configs: Mapping[str, config.Config]  # arm → its config

    def definition(self) -> dict[str, Any]:
        """Returns what study.json holds: all that decides what runs compute."""
        study = self.study
        return {
            'study': self.name,
            'question': study.question,
            'metric': study.metric,
            'baseline': study.baseline,
            'seeds': self.seeds,
            'learning_rates': list(study.learning_rates),
            'search': study.search,
            'equal': list(study.equal),
            'arms': {name: dict(values) for name, values in study.arms.items()},
            'config': dataclasses.asdict(self.base),
        }


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


def design(name: str, study: Study, base: config.Config, seeds: int) -> Design:
    """Makes the config of each arm.

    Args:
      base: the study's config, with every override.
    Raises:
      UserError: an arm that sets an unknown field or a value that is refused, naming the arm; one
        that sets the seed; two arms that are the same.
    """
    configs: dict[str, config.Config] = {}
    for arm, values in study.arms.items():
        require(
            'train.seed' not in values,
            f'arm {arm!r} sets train.seed, by which the study pairs its runs; drop it.',
        )
        try:
            made = changed(base, values)
        except UserError as error:
            raise UserError(f'arm {arm!r}: {error}') from error
        like = next((other for other, cfg in configs.items() if cfg == made), '')
        require(
            not like,
            f'arms {like!r} and {arm!r} are the same config; change a setting, or drop one.',
        )
        configs[arm] = made
    return Design(name, study, base, seeds, configs)


def changed(base: config.Config, values: Mapping[str, Any]) -> config.Config:
    """Returns a copy with some settings changed, and their types checked.

    Raises:
      UserError: a setting that does not exist, or a value that it refuses.
    """
    nested, known = dataclasses.asdict(base), config.settings(base)
    for name, value in values.items():
        require(name in known, f'{name}: no such setting.{nearest(name, known)}')
        *sections, field = name.split('.')
        functools.reduce(operator.getitem, sections, nested)[field] = value
    return config.from_dict(nested)


def sized_arms(made: Design, vocab_sizes: Mapping[str, int]) -> tuple[Arm, ...]:
    """Counts the parameters and FLOPs of each arm.

    Args:
      vocab_sizes: arm → tokens of its tokenizer.
    Raises:
      UserError: a vocabulary that an arm's model does not have; something that the study holds
        equal, and that an arm has more or less of than the baseline.
    """
    arms, tokens = [], {}
    for name, cfg in made.configs.items():
        try:
            resolved = cfg.resolve(vocab_sizes[name])
        except UserError as error:
            raise UserError(f'arm {name!r}: {error}') from error
        tokens[name] = cfg.train.num_steps * cfg.train.batch_rows * cfg.data.row_length
        per_token = flops.flops_per_token(resolved.model, cfg.data.row_length)
        arms.append(
            Arm(name, made.study.arms[name], weights.count(resolved.model), float(per_token))
        )
    counts = {
        'tokens': tokens,
        'parameters': {arm.name: arm.parameters for arm in arms},
        'flops': {arm.name: arm.flops_per_token for arm in arms},
    }
    for what in made.study.equal:
        ours = counts[what][made.study.baseline]
        for name, count in counts[what].items():
            require(
                abs(count - ours) <= CLOSE * ours * (what != 'tokens'),
                f'arm {name!r} has {count:,.6g} {what} where the baseline has {ours:,.6g}, but the '
                f'study holds {what} equal; change the arm, or leave {what} out of `equal`.',
            )
    return tuple(arms)
