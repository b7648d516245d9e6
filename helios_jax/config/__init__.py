"""Every setting of Helios: frozen dataclasses are the schema, a ConfigDict is the surface.

A config file returns `to_dict(Config(...))`; the command line overrides its fields; `from_dict`
rebuilds the dataclasses, which validate themselves before any device is touched. No field is None:
off is '' or 0. The comment behind a field is what `helios explain FIELD` prints: one text for
readers of the schema and for users who ask, where `field(metadata=…)` would be a second one.
"""

import ast
import dataclasses
import functools
import inspect
import io
import math
import textwrap
import tokenize
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

from helios_jax.config.gmu import GMU
from helios_jax.config.model import Model, MoE, Rope
from helios_jax.config.run import Actions, Data, Memory, Mesh, Optimizer, Train
from helios_jax.errors import UserError, nearest, require, within_int32

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
    'describe',
    'from_dict',
    'replace',
    'settings',
    'to_dict',
]

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        for name, value in settings(self).items():
            if isinstance(value, float):
                require(math.isfinite(value), f'{name}={value} must be a finite number.')
            elif isinstance(value, int):
                within_int32(name, value)
        rope = self.model.rope
        require(
            not rope.grows or self.data.row_length <= (rope.trained_length or math.inf),
            f'model.rope.scaling={rope.scaling} cannot train rows of {self.data.row_length} '
            f'tokens, more than trained_length={rope.trained_length}; use static to train at this '
            'length.',
        )

    def resolve(self, vocab_size: int) -> 'Config':
        """Fills what depends on other settings: V from the tokenizer, L_train from the rows."""
        model = self.model
        spare = f' and model.spare_vocab={model.spare_vocab}' if model.spare_vocab else ''
        expected = vocab_size + model.spare_vocab
        require(
            model.vocab_size in (0, expected),
            f'model.vocab_size={model.vocab_size} differs from the {vocab_size} tokens of '
            f'data.tokenizer={self.data.tokenizer!r}{spare}; set it to 0 or to {expected}.',
        )
        length = model.rope.trained_length or self.data.row_length
        return replace(self, {'model.vocab_size': expected, 'model.rope.trained_length': length})


def settings(config: Any, prefix: str = '') -> dict[str, Any]:
    """Maps each setting's dotted name to its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= settings(value, f'{prefix}{field.name}.')
        else:
            found[prefix + field.name] = value
    return found


def replace(config: T, changes: Mapping[str, Any], prefix: str = '') -> T:
    """Returns a copy with some settings changed: `replace(cfg, {'train.num_steps': 3})`.

    Args:
      config: a `Config`, or one of its sections.
      changes: dotted name of a setting, or of a whole section → its new value.
      prefix: dotted name of the section that `config` is, for messages.
    Raises:
      UserError: a name that `config` lacks (with the nearest one), or a value that it refuses.
    """
    section: Any = config
    names = [field.name for field in dataclasses.fields(section)]
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, _, rest = name.partition('.')
        is_section = head in names and dataclasses.is_dataclass(getattr(section, head))
        known = head in names and (is_section or not rest)
        require(known, f'{prefix}{name}: no such setting.{nearest(head, names)}')
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    for head, inner in nested.items():
        start = values.get(head, getattr(section, head))
        values[head] = replace(start, inner, f'{prefix}{head}.')
    return dataclasses.replace(section, **values)


def to_dict(config: Any) -> ml_collections.ConfigDict:
    """Returns the ConfigDict (locked, type-safe) of a config dataclass."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_dict(values: Any, cls: Any = Config, path: str = 'config') -> Any:
    """Rebuilds and validates the dataclass `cls` from nested mappings.

    Raises:
      UserError: a key that `cls` lacks (with the nearest name), or a value that it refuses.
    """
    if not hasattr(values, 'items'):  # a ConfigDict takes long to write
        raise UserError(f'{path} must be a mapping, got {values!r}.')
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
    """Maps each setting's dotted name to (default, one-line comment), read from the source."""
    comments = _comments(cls)
    described: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            described |= describe(field.type, f'{prefix}{field.name}.')
        else:
            described[prefix + field.name] = (repr(field.default), comments[field.name])
    return described


@functools.cache
def _comments(cls: Any) -> dict[str, str]:
    """Reads the comment at the end of each field's last line."""
    source = textwrap.dedent(inspect.getsource(cls))
    by_line = {
        token.start[0]: token.string.removeprefix('#').strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        node.target.id: by_line[node.end_lineno]
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.end_lineno in by_line
    }
