"""Messages to the person who runs a program: phases, steps of a run, lines that stay whole.

On a terminal through rich, elsewhere as plain lines. Of several processes the first one speaks.
Phases go to stderr, as logs do, so that stdout holds results alone.
"""

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import rich.console
import rich.progress
import rich.text

LINE_SECONDS = 30.0  # between two lines about a phase that goes on, where there is no bar


def speaks() -> bool:
    """True if this process speaks for its run; asks no device."""
    jax = sys.modules.get('jax')  # a program that has not loaded it is one process
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line to stderr."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Formats seconds as people write them, such as '3 min 20 s'."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02} s'
    return f'{minutes // 60} h {minutes % 60:02} min'


@contextlib.contextmanager
def phase(
    description: str, total: int | None = None, unit: str = ''
) -> Iterator[Callable[[int], None]]:
    """Shows that a phase goes on, and leaves one line that says what it did and how long it took.

    Args:
      total: how much there is to do, in units; None if nobody knows.
      unit: what is counted, in the plural; '' for a phase that cannot say how far it is.
    Yields:
      A function that adds a number of units to the count.
    """
    if not speaks():
        yield lambda amount: None
        return
    console = rich.console.Console(file=sys.stderr)
    live, start = console.is_terminal, time.perf_counter()
    done, told = 0, start

    def advance(amount: int) -> None:
        nonlocal done, told
        done += amount
        bar.advance(task, amount)
        if not live and time.perf_counter() - told > LINE_SECONDS:
            told = time.perf_counter()
            say(f'{description}: {_count(done, unit, total)}')

    if not live and not unit:
        say(f'{description} …')
    with above(console), _phase_bar(console, total, unit) as bar:
        task = bar.add_task(description, total=total)
        yield advance
    counted = f'{_count(done, unit)} in ' if unit else ''
    say(f'{description}: {counted}{duration(time.perf_counter() - start)}')


class Steps:
    """Shows a run's steps on stdout: a bar with the latest figures on a terminal, or a line each.

    Use as a context. Meanwhile what anyone prints or logs to the terminal appears above the bar.

    Args:
      num_steps: where the run ends; 0 if that is not known.
      done: steps that were made before.
    """

    def __init__(self, num_steps: int, done: int) -> None:
        self._console = rich.console.Console(file=sys.stdout)
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn('{task.description}', markup=False),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=3600.0,  # a bar moves with each line, which may take minutes
            disable=not self._console.is_terminal,
        )
        begun = f'step {done:,}/{num_steps:,}' if num_steps else ''
        self._task = self._bar.add_task(begun, total=num_steps or None, completed=done)
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> 'Steps':
        self._closing.enter_context(above(self._console))
        self._closing.enter_context(self._bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def update(self, step: int, line: str) -> None:
        """Shows the run at this step, with its figures."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=line, refresh=True)
        else:
            print(line, flush=True)

    def keep(self, line: str) -> None:
        """Prints a line that stays."""
        _print(self._console, line)


def table(rows: Sequence[tuple[str, str, str]]) -> None:
    """Prints label, number and unit of each row, in columns."""
    console = rich.console.Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for label, number, unit in rows:
        line = rich.text.Text(label.ljust(widths[0]) + '  ')
        line.append(number.rjust(widths[1]), style='bold')
        console.print(line.append(f'  {unit}'.rstrip()), soft_wrap=True)


@contextlib.contextmanager
def above(console: rich.console.Console) -> Iterator[None]:
    """Prints whole lines above the live bar on a terminal, whoever writes them.

    It catches what goes through sys.stdout, sys.stderr and `logging` handlers, third parties'
    too; not what compiled code writes by itself. Does nothing for a console that is no terminal.
    """
    if not console.is_terminal:
        yield
        return
    with contextlib.ExitStack() as stack:
        lines = _Lines(console)
        stack.callback(lines.finish)
        for handler in _stream_handlers():
            if _is_terminal(handler.stream):
                stack.callback(handler.setStream, handler.setStream(lines))
        if _is_terminal(sys.stdout):
            stack.enter_context(contextlib.redirect_stdout(lines))
        if _is_terminal(sys.stderr):
            stack.enter_context(contextlib.redirect_stderr(lines))
        yield


class _Lines(io.TextIOBase):
    """A file that prints each line to a console once it is complete."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._rest = ''
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._console.file.fileno()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split('\n')
            for line in lines:
                _print(self._console, line)
        return len(text)

    def finish(self) -> None:
        """Prints the text that has no newline yet."""
        if self._rest:
            self.write('\n')


def _print(console: rich.console.Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _phase_bar(
    console: rich.console.Console, total: int | None, unit: str
) -> rich.progress.Progress:
    text = lambda template: rich.progress.TextColumn(template, markup=False)
    columns: list[rich.progress.ProgressColumn] = [text('{task.description}')]
    if unit:
        of_total = '/{task.total:,.0f}' if total is not None else ''
        columns += [
            rich.progress.BarColumn(),
            text('{task.completed:,.0f}' + of_total + f' {unit}'),
        ]
    return rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        *columns,
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )


def _count(done: int, unit: str, total: int | None = None) -> str:
    if total is not None:
        return f'{done:,} of {total:,} {unit}'
    return f'{done:,} {unit.removesuffix("s") if done == 1 else unit}'


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    """Yields every handler of any logger that writes to a stream of its own."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, 'handlers', []):  # a name without a logger has none
            handler = getattr(handler, 'python_handler', handler)  # absl's wraps one
            # Those like logging.lastResort follow sys.stderr, and cannot be given a stream.
            follows = isinstance(handler, type(logging.lastResort))
            if isinstance(handler, logging.StreamHandler) and not follows:
                yield handler


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, 'isatty', lambda: False)
    with contextlib.suppress(ValueError):  # closed
        return bool(isatty())
    return False
