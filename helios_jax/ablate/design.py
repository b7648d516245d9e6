"""A study whose every setting is known: the config of each arm, and what it holds equal."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

from helios_jax import config
from helios_jax.ablate.records import Arm
from helios_jax.ablate.study import Study
from helios_jax.arch import flops, weights
from helios_jax.errors import UserError, nearest, require
from helios_jax.evaluate.length_settings import Lengths

CLOSE = 0.05  # parameters and FLOPs that differ by this share at most count as equal


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
        longer = {'lengths': list(study.lengths), 'methods': list(study.methods)}
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
            **(longer if study.lengths else {}),
        }

    def lengths(self, arm: str) -> Lengths | None:
        """Returns how an arm's runs are scored on longer rows; None if the study has none.

        The arm's own rows are scored too, for comparison, and windows move on by half of one.
        """
        if not self.study.lengths:
            return None
        cfg = self.configs[arm]
        own = cfg.data.row_length
        return Lengths(
            (own, *self.study.lengths),
            self.study.methods,
            trials=0,
            stride=max(1, own // 2),
            batch_rows=cfg.train.batch_rows,
        )


def design(name: str, study: Study, base: config.Config, seeds: int) -> Design:
    """Makes the config of each arm.

    Args:
      base: the study's config, with every override.
    Raises:
      UserError: an arm that sets an unknown field or a value that is refused, naming the arm; one
        that sets the seed; two arms that are the same; an arm whose own rows are no shorter than
        one of the study's lengths, or that is trained with stretched positions beside them.
    """
    configs: dict[str, config.Config] = {}
    for arm, values in study.arms.items():
        require(
            'train.seed' not in values,
            f'arm {arm!r} sets train.seed, by which the study pairs its runs; drop it.',
        )
        try:
            made = changed(base, values)
            _check_lengths(study, made)
        except UserError as error:
            raise UserError(f'arm {arm!r}: {error}') from error
        like = next((other for other, cfg in configs.items() if cfg == made), '')
        require(
            not like,
            f'arms {like!r} and {arm!r} are the same config; change a setting, or drop one.',
        )
        configs[arm] = made
    return Design(name, study, base, seeds, configs)


def _check_lengths(study: Study, cfg: config.Config) -> None:
    own, scaling = cfg.data.row_length, cfg.model.rope.scaling
    for length in study.lengths:
        require(
            length > own,
            f'lengths has {length}, which must exceed data.row_length={own}, the rows of training; '
            'change one.',
        )
    require(
        not study.lengths or scaling == 'none',
        f'model.rope.scaling={scaling!r}, which the methods of longer rows would replace; set it '
        "to 'none', or drop lengths and methods.",
    )


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


def vocab_sizes(made: Design) -> dict[str, int]:
    """Maps each arm to the number of tokens of its tokenizer."""
    sizes = {data: loaded(data).vocab_size for data in {c.data for c in made.configs.values()}}
    return {name: sizes[cfg.data] for name, cfg in made.configs.items()}


def loaded(data: config.Data) -> Any:
    """Loads a tokenizer; help, which imports this module, needs none."""
    from helios_jax.data import tokenizer

    return tokenizer.load(data.tokenizer, chat_setting=data.chat_template)


def sized_arms(made: Design, vocab_sizes: Mapping[str, int]) -> tuple[Arm, ...]:
    """Counts the parameters and FLOPs of each arm.

    Args:
      vocab_sizes: arm → tokens of its tokenizer.
    Raises:
      UserError: a vocabulary that an arm's model does not have; something that the study holds
        equal, and that an arm has more or less of than the baseline.
    """
    arms: list[Arm] = []
    tokens: dict[str, float] = {}
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
    counts: dict[str, dict[str, float]] = {
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
