"""One measurement in a fresh process, which inherits no memory and no loaded compiler.

    python -m helios_jax.process MODULE:FUNCTION ARGUMENTS

calls a function with the arguments of a JSON list, and prints what it returns as JSON on the last
line of its output: `run` by hand, where a debugger or a profiler can be attached.
"""

import importlib
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from helios_jax.errors import UserError


def run(
    function: Callable[..., Any], *arguments: Any, quiet: bool = False, seconds: float | None = None
) -> Any:
    """Calls a module's function in a process of its own; arguments and result pass as JSON.

    Args:
      quiet: keep what the process writes to stderr, and show only its last line, if it fails.
      seconds: after which the process is killed; None: never.
    Raises:
      UserError: the function raised one, or the process ended without a result, or not in time.
    """
    name = f'{function.__module__}:{function.__qualname__}'
    try:
        done = subprocess.run(
            [sys.executable, '-m', __name__, name, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            errors='replace',
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f'{name} took more than {seconds:.0f} seconds: it was killed.') from error
    lines = done.stdout.splitlines()
    if done.returncode in (0, 2) and lines:
        result = json.loads(lines[-1])
        if done.returncode:
            raise UserError(result)
        return result
    written = [line.strip() for line in (done.stderr or '').splitlines() if line.strip()]
    reason = written[-1] if written else 'it wrote no reason' if quiet else 'see above'
    raise UserError(f'{name} ended {ending(done.returncode)}: {reason}')


def ending(code: int) -> str:
    """Says how a process ended; memory that runs out ends it by SIGKILL."""
    return f'with code {code}' if code >= 0 else f'by {signal.Signals(-code).name}'


def main(name: str, arguments: str) -> None:
    """Calls the function, prints its result; a UserError's message instead, with exit code 2."""
    logging.basicConfig(format='%(message)s')
    logging.getLogger('helios_jax').setLevel(logging.INFO)
    module, function = name.split(':')
    try:
        result = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    except UserError as error:
        print(json.dumps(str(error)))
        sys.exit(2)
    print(json.dumps(result))


if __name__ == '__main__':
    main(*sys.argv[1:])
