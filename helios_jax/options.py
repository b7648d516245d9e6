"""Commands and their flags, the settings of a config among them, and their help.

A command is a function of the arguments behind its name; its docstring is its help. Commands that
belong together are a `Group`.
"""

import importlib.resources
import inspect
import json
import math
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union

from absl import flags
from ml_collections import config_flags

from helios_jax import config
from helios_jax.errors import UserError, nearest, require

HELP = ('--help', '-h', 'help')
CONFIG_HELP = """\
  --config=NAME|FILE.py (default: tiny)
      The settings to start from: one of {names}; or a file of your own.
  --config.SECTION.FIELD=VALUE
      Replaces one setting, as in --config.model.num_layers=12. `helios explain` lists them all."""

T = TypeVar('T')
Command = Callable[[Sequence[str]], None]


class Group(NamedTuple):
    """Commands under one name, such as `helios data`."""

    summary: str  # a sentence of help
    commands: dict[str, Union[Command, 'Group']]


def dispatch(name: str, command: Command | Group, argv: Sequence[str]) -> None:
    """Calls the command that the first words of `argv` name, or prints help.

    Args:
      name: what was typed so far, such as 'helios data'.
    Raises:
      UserError: no such command; whatever the command raises.
      SystemExit: code 0, after the help of a single command.
    """
    if not isinstance(command, Group):
        if wants_help(argv):
            print(f'{name}: {inspect.getdoc(command)}')
        command(argv)
        return
    word, *rest = argv or ['']
    if word in HELP:
        print(group_help(name, command))
        return
    listed = f'There are: {", ".join(command.commands)}.'
    require(bool(word), f'{name} does nothing by itself; name what to do. {listed}')
    require(
        word in command.commands,
        f'{name} {word}: no such command.{nearest(word, command.commands)} {listed}',
    )
    dispatch(f'{name} {word}', command.commands[word], rest)


def group_help(name: str, group: Group) -> str:
    """Returns a group's sentence, and one for each of its commands."""
    width = max(map(len, group.commands)) + 2
    lines = [f'{name}: {group.summary}', '']
    for word, command in group.commands.items():
        text = command.summary if isinstance(command, Group) else inspect.getdoc(command) or ''
        lines.append(f'  {word:{width}}{text.splitlines()[0]}')
    return '\n'.join([*lines, '', f'`{name} COMMAND --help` lists what a command takes.'])


def wants_help(argv: Sequence[str]) -> bool:
    return '--help' in argv or '-h' in argv


def parse(
    flag_values: flags.FlagValues, argv: Sequence[str], *, positional: bool = False
) -> list[str]:
    """Parses a command's flags; returns its positional arguments.

    Raises:
      UserError: an unknown flag, a value of another type, or an argument where there are none.
      SystemExit: code 0, after help.
    """
    if wants_help(argv):
        print_flags(flag_values)
    try:
        arguments = flag_values(['helios', *argv])[1:]
    except flags.CantOpenFlagFileError as error:
        raise UserError(unreadable(error)) from error
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(str(error.args[0] if error.args else error)) from error
    require(positional or not arguments, f'{"".join(arguments[:1])}: flags are --name=value.')
    return arguments


def parse_config(flag_values: flags.FlagValues, argv: Sequence[str]) -> config.Config:
    """Parses a command's flags, --config and the settings that it overrides; returns the config.

    Raises:
      UserError: as `parse` and `load_config`; a setting that does not exist, or a value that it
        refuses.
      SystemExit: code 0, after help.
    """
    if wants_help(argv):
        print_flags(flag_values, CONFIG_HELP.format(names=', '.join(shipped_configs())))
    argv, name = split_flag(argv, 'config', 'tiny')
    return parse_overrides(flag_values, argv, load_config(name))


def parse_overrides(
    flag_values: flags.FlagValues, argv: Sequence[str], base: config.Config
) -> config.Config:
    """Parses a command's flags and --config.SECTION.FIELD=VALUE; returns `base` with these.

    Raises:
      UserError: as `parse`; a setting that does not exist, or a value that it refuses.
    """
    described = config.describe()
    for argument in argv:
        override = re.match(r'--?(?:no)?config\.([^=]*)', argument)
        require(
            not override or override[1] in described,
            f'{argument}: no such setting.{nearest(override[1], described) if override else ""}',
        )
    config_flags.DEFINE_config_dict(
        'config',
        config.to_dict(base),
        flag_values=flag_values,
        sys_argv=['helios', *argv],
    )
    parse(flag_values, argv)
    return config.from_dict(flag_values.config)


def overrides(before: config.Config, after: config.Config) -> list[str]:
    """Writes the flags that make `after` of `before`."""
    old = config.settings(before)
    changed = {name: v for name, v in config.settings(after).items() if v != old[name]}
    return [f'--config.{name}={value}' for name, value in changed.items()]


def unreadable(error: flags.CantOpenFlagFileError) -> str:
    return f'--flagfile: {error}; name a file that can be read.'.replace('ERROR:: ', '')


def print_flags(flag_values: flags.FlagValues, config_help: str = '') -> None:
    """Prints each flag with its default and its meaning, and ends the program."""
    lines = [config_help] if config_help else []
    for name in flag_values:
        flag = flag_values[name]
        default = flag.default
        if isinstance(default, list):
            default = ','.join(default)
        default = '' if default in (None, '') else f' (default: {default})'
        value = '' if flag.boolean else f'={flag.flag_type().split()[-1].upper()}'
        lines.append(f'  --{name}{value}{default}\n      {flag.help}')
    print('\n'.join(['', 'Flags:', *lines]) if lines else '')
    sys.exit(0)


def split_flag(argv: Sequence[str], name: str, default: str) -> tuple[list[str], str]:
    """Returns the arguments without --NAME, those of each --flagfile among them, and its value.

    Raises:
      UserError: a flag file that cannot be read.
    """
    try:
        arguments = flags.FlagValues().read_flags_from_files(list(argv), force_gnu=False)
    except flags.CantOpenFlagFileError as error:
        raise UserError(unreadable(error)) from error
    value, rest = default, []
    following = iter(arguments)
    for argument in following:
        flag = re.fullmatch(f'--?{name}(?:=(.*))?', argument, re.S)
        if not flag:
            rest.append(argument)
        else:
            value = next(following, '') if flag[1] is None else flag[1]
    return rest, value


def shipped_configs(folder: str = 'helios_jax.configs') -> dict[str, Path]:
    """Maps the names of the files in a package that comes with this one to their paths."""
    path = Path(str(importlib.resources.files(folder)))
    return {file.stem: file for file in sorted(path.glob('*.py')) if file.stem != '__init__'}


def load_config(name: str) -> config.Config:
    """Runs get_config() of a shipped config or of a file.

    Raises:
      UserError: no such file, or one that is no config; an error inside it, with its line.
    """

    def built(values: Any) -> config.Config:
        require(
            hasattr(values, 'items'),
            f'get_config() must return to_dict(Config(…)), not a {type(values).__name__}.',
        )
        return config.from_dict(values)

    return load('config', name, shipped_configs(), built)


def load(flag: str, name: str, shipped: Mapping[str, Path], built: Callable[[Any], T]) -> T:
    """Runs get_FLAG() of a shipped file or of one that is named; returns what `built` makes of it.

    Raises:
      UserError: no such file; no such function in it; an error inside it or `built`, with its line.
    """
    path = shipped.get(name, Path(name))
    require(
        path.is_file(),
        f'--{flag}={name}: no such file, and no shipped {flag}.{nearest(name, shipped)} '
        f'There are: {", ".join(shipped)}.',
    )
    module = types.ModuleType(f'helios_{flag}')
    module.__file__ = str(path)
    source, search_path = path.read_bytes(), list(sys.path)
    sys.path.insert(0, str(path.parent))  # it may build on one beside it
    try:
        exec(compile(source, str(path), 'exec'), module.__dict__)
        defined = hasattr(module, f'get_{flag}')
        require(defined, f'it does not define get_{flag}(), which returns the {flag}.')
        return built(getattr(module, f'get_{flag}')())
    except (Exception, SystemExit) as error:
        raise UserError(f'{place(error, path)}: {cause(error)}') from error
    finally:
        sys.path[:] = search_path


def place(error: BaseException, path: Path) -> str:
    """Names the file, with the line that an error came from if there is one."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f'{path}:{error.lineno}'
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f'{path}:{lines[-1]}' if lines else str(path)


def cause(error: BaseException) -> str:
    """Text of an error: the message, and for errors that are not ours the kind too."""
    if isinstance(error, UserError):
        return str(error)
    text = traceback.format_exception_only(error)[-1].strip()
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    settings = {name.rpartition('.')[2] for name in config.describe()}
    return text + (f'.{nearest(unknown[1], settings)}' if unknown else '')


def explain_command(argv: Sequence[str]) -> None:
    """Says what settings mean, and their defaults.

    helios explain                       all of them
    helios explain model.gmu train.seed  a section, a setting
    """
    described = config.describe()
    for argument in parse(flags.FlagValues(), argv, positional=True) or ['']:
        name = argument.removeprefix('config.')
        chosen = {
            n: d for n, d in described.items() if n == name or n.startswith(f'{name}.') or not name
        }
        require(bool(chosen), f'{name}: no such setting.{nearest(name, described)}')
        for setting, (default, comment) in chosen.items():
            print(f'{setting} = {default}\n    {comment}')


def to_json(value: Any) -> str:
    """A line of JSON, which has no NaN and no infinity: they are null in it."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def show(values: dict[str, Any], as_json: bool) -> None:
    """Prints one line: a JSON object, or name=value pairs."""
    if as_json:
        print(to_json(values))
        return
    texts = (f'{v:.4f}' if isinstance(v, float) else str(v) for v in values.values())
    print('  '.join(f'{name}={text}' for name, text in zip(values, texts, strict=True)))
