"""Every setting of Helios: frozen dataclasses are the schema, a ConfigDict is the surface.

A config file returns `to_dict(Config(...))`; the command line overrides its fields; `from_dict`
rebuilds the dataclasses, which validate themselves before any device is touched. No field is None:
off is '' or 0. The comment behind a field is what `helios explain FIELD` prints.
"""

import dataclasses
import inspect
import math
import re
from typing import Any

import ml_collections

from helios_jax.config.model import GMU, Model, MoE, Rope
from helios_jax.config.run import Actions, Data, Memory, Mesh, Optimizer, Train
from helios_jax.errors import UserError, nearest, require

__all__ = [
    'GMU',
    'Actions',
    'Config',
    'Data',
    'Memory',
    'Mesh',
    'MoE',
    'Model',
    'Optimizer',
    'Rope',
    'Train',
    'UserError',
    'describe',
    'from_dict',
    'nearest',
    'require',
    'to_dict',
]


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        rope = self.model.rope
        require(
            rope.scaling != 'dynamic' or self.data.row_length <= (rope.trained_length or math.inf),
            f'model.rope.scaling=dynamic cannot train rows of {self.data.row_length} tokens, more '
            f'than trained_length={rope.trained_length}; use static to train at this length.',
        )

    def resolve(self, vocab_size: int) -> 'Config':
        """Fills what depends on other settings: V from the tokenizer, L_train from the rows."""
        model = self.model
        require(
            model.vocab_size in (0, vocab_size),
            f'model.vocab_size={model.vocab_size} differs from the {vocab_size} tokens of '
            f'data.tokenizer={self.data.tokenizer!r}; set it to 0 or to {vocab_size}.',
        )
        length = model.rope.trained_length or self.data.row_length
        rope = dataclasses.replace(model.rope, trained_length=length)
        model = dataclasses.replace(model, vocab_size=vocab_size, rope=rope)
        return dataclasses.replace(self, model=model)


def to_dict(config: Any) -> ml_collections.ConfigDict:
    """The ConfigDict (locked, type-safe) of a config dataclass."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_dict(values: Any, cls: Any = Config, path: str = 'config') -> Any:
    """Rebuilds and validates the dataclass `cls` from nested mappings.

    Raises:
      UserError: a key that `cls` lacks (with the nearest name), or a value that it refuses.
    """
    require(hasattr(values, 'items'), f'{path} must be a mapping, got {values!r}.')
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        require(key in fields, f'{path}.{key}: no such setting.{nearest(key, fields)}')
        kind: Any = fields[key].type
        if dataclasses.is_dataclass(kind):
            built[key] = from_dict(value, kind, f'{path}.{key}')
        elif kind is float and type(value) is int:
            built[key] = float(value)
        else:
            require(type(value) is kind, f'{path}.{key}={value!r} must be of type {kind.__name__}.')
            built[key] = value
    return cls(**built)


def describe(cls: Any = Config, prefix: str = '') -> dict[str, tuple[str, str]]:
    """Each setting's dotted name → (default, one-line comment), read from this file's source."""
    source = inspect.getsource(cls)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.+)$', source, re.M))
    described: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            described |= describe(field.type, f'{prefix}{field.name}.')
        else:
            described[prefix + field.name] = (repr(field.default), comments[field.name])
    return described
