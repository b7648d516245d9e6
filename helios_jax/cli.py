"""helios <command>: passes the arguments on, and turns every error into one line.

The commands live in their packages. Exit codes: 0, 2 for what the user can mend, 130 for Ctrl-C.
"""

import errno
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from helios_jax.errors import UserError, require

if TYPE_CHECKING:
    from helios_jax.options import Group

FIXES = {
    errno.ENOSPC: 'free some space, or choose another directory',
    errno.EDQUOT: 'free some space, or choose another directory',
    errno.EROFS: 'choose a directory that can be written to',
    errno.EACCES: 'allow it, or choose another directory',
    errno.EPERM: 'allow it, or choose another directory',
    errno.EISDIR: 'name a file, or move the directory away',
    errno.ENOTDIR: 'choose another directory',
    errno.EEXIST: 'choose another directory',
    errno.ENOENT: 'check the path',
    errno.ENAMETOOLONG: 'choose a shorter name',
    errno.ELOOP: 'remove one of them',
    errno.EMFILE: 'allow more open files (ulimit -n)',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command: the program's arguments, or those given.

    Raises:
      SystemExit: code 2 after an error and its line, 130 after Ctrl-C, 0 after help.
    """
    try:
        if argv is None:  # a process of its own
            argv = sys.argv[1:]
            quiet_failed_saves()
        run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail('interrupted.', code=130)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return
        fail(described(error))


def run(argv: Sequence[str]) -> None:
    for argument in argv:
        text = os.fsencode(argument).decode(errors='backslashreplace')
        require(text == argument, f'argument {text} is not UTF-8; write it in UTF-8.')
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a terminal need not know every letter
    logging.basicConfig(format='%(message)s')
    logging.getLogger('helios_jax').setLevel(logging.INFO)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # Only here, so that Ctrl-C while they are imported ends as any other does.
    from helios_jax import options

    options.dispatch('helios', commands(), argv or ['--help'])


def quiet_failed_saves() -> None:
    """Keeps the tracebacks of Orbax's threads off the terminal: a failed save is raised as well."""
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(is_news)
    logging.getLogger('asyncio').addFilter(is_news)
    sys.unraisablehook = report_unless_late
    # Coroutines are Orbax's alone: once one array has failed, it awaits none of the others.
    warnings.filterwarnings('ignore', "coroutine '.*' was never awaited", RuntimeWarning)


def is_news(record: logging.LogRecord) -> bool:
    # asyncio reports a task that nobody awaits any more, and names its coroutine's file.
    teller = record.getMessage() if record.name == 'asyncio' else record.pathname
    return not (record.exc_info and 'orbax' in teller)


def report_unless_late(unraisable: 'sys.UnraisableHookArgs') -> None:
    # Once one array has failed, what TensorStore writes of the others reports to a loop that is
    # gone.
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def commands() -> 'Group':
    """Lists all commands, in the order that help shows them."""
    import functools

    from helios_jax import options
    from helios_jax.ablate.command import ablate_command
    from helios_jax.bench.commands import BENCHMARKS
    from helios_jax.ckpt.command import CHECKPOINTS
    from helios_jax.convert.command import convert_command
    from helios_jax.data.command import DATA
    from helios_jax.evaluate import command as evaluate
    from helios_jax.plan import command as plan
    from helios_jax.train.command import train_command

    train = functools.partial(train_command, with_policy=plan.with_policy)
    return options.Group(
        'Trains gated decoder-only language models, and measures, plans and samples from them.',
        {
            'train': functools.update_wrapper(train, train_command),
            'eval': evaluate.eval_command,
            'generate': evaluate.generate_command,
            'data': DATA,
            'plan': plan.plan_command,
            'ablate': ablate_command,
            'ckpt': CHECKPOINTS,
            'convert': convert_command,
            'explain': options.explain_command,
            'bench': BENCHMARKS,
        },
    )


def described(error: OSError) -> str:
    """Describes an error of the system in one line: the path, the reason, and the fix."""
    reason = error.strerror or str(error) or type(error).__name__
    where = ' → '.join(str(name) for name in (error.filename, error.filename2) if name is not None)
    fix = FIXES.get(error.errno or 0, '')
    return (f'{where}: ' if where else '') + reason.rstrip('.') + (f'; {fix}.' if fix else '.')


def reader_left() -> bool:
    """True if the reader of our output has left (`| head`); the rest of the output is dropped."""
    try:
        poll, output = select.poll(), sys.stdout.fileno()
    except OSError:  # no file at all, in a test or a notebook
        return False
    poll.register(output, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return left


def fail(message: str, code: int = 2) -> NoReturn:
    print(f'helios: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)
