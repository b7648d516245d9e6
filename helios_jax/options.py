"""Command-line flags, and those that override a config's settings."""

import importlib.resources
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from helios_jax import config
from helios_jax.errors import UserError, nearest, require


def parse(
    flag_values: flags.FlagValues, argv: Sequence[str], *, positional: bool = False
) -> list[str]:
    """Parses a command's flags; returns its positional arguments.

    Raises:
      UserError: an unknown flag, a value of another type, or an argument where there are none.
    """
    if '--help' in argv or '-h' in argv:
        print(flag_values.main_module_help() or flag_values.get_help())
        sys.exit(0)
    try:
        arguments = flag_values(['helios', *argv])[1:]
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(str(error.args[0] if error.args else error)) from error
    require(positional or not arguments, f'{"".join(arguments[:1])}: flags are --name=value.')
    return arguments


def config_flag(flag_values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines --config and, of each --config.section.field, those that `argv` has."""
    config_flags.DEFINE_config_file(
        'config',
        None,
        'A shipped config, or a file.',
        flag_values=flag_values,
        sys_argv=['helios', *argv],
    )


def config_file(argv: Sequence[str]) -> list[str]:
    """Replaces `--config=NAME` by the file that ships under that name.

    Raises:
      UserError: no such file, or one that is no config; a setting that does not exist.
    """
    shipped = Path(str(importlib.resources.files('helios_jax.configs')))
    names = sorted(path.stem for path in shipped.glob('*.py') if path.stem != '__init__')
    argv = list(argv)
    if '--config' in argv[:-1]:
        at = argv.index('--config')
        argv[at : at + 2] = [f'--config={argv[at + 1]}']
    resolved = [a for a in argv if not a.startswith('--config=')]
    values = [a.removeprefix('--config=') for a in argv if a.startswith('--config=')] or ['tiny']
    path = Path(values[-1])
    if values[-1] in names:
        path = shipped / f'{values[-1]}.py'
    require(
        path.is_file(),
        f'--config={values[-1]}: no such file, and no shipped config.{nearest(values[-1], names)} '
        f'There are: {", ".join(names)}.',
    )
    require(
        b'def get_config' in path.read_bytes(),
        f'--config={path} does not define get_config(), which returns the config.',
    )
    described = config.describe()
    for argument in resolved:
        name = argument.removeprefix('--config.').split('=')[0]
        require(
            not argument.startswith('--config.') or name in described,
            f'{argument}: no such setting.{nearest(name, described)}',
        )
    return [f'--config={path}', *resolved]
