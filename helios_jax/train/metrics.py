"""Writes a run's figures: metrics.jsonl, TensorBoard beside it, and a line or a bar for people.

One JSON object a line, each with its `step`. What depends on the clock is named `time/…`, and what
depends on the machine's memory `device/…`, so that two runs can be compared without them. Process 0
writes; the others' writers do nothing.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from helios_jax import display, options
from helios_jax.errors import require
from helios_jax.evaluate import figures

FILE = 'metrics.jsonl'
REMOTE_SECONDS = 30  # object stores cannot append: between two rewrites of the whole file


class MetricWriter:
    """Writes the metrics of a run. Use it as a context: leaving it writes what is left.

    Args:
      workdir: holds metrics.jsonl and tensorboard/.
      resume_step: lines of later steps are dropped, as the run computes them again.
      num_steps: where the run ends, to be shown.
    Raises:
      UserError: as `read` says of lines.
    """

    def __init__(
        self, workdir: epath.PathLike, *, tensorboard: bool, resume_step: int, num_steps: int = 0
    ) -> None:
        self._path = epath.Path(workdir) / FILE
        self._num_steps = num_steps
        self._active = jax.process_index() == 0
        self._closing = contextlib.ExitStack()
        if not self._active:
            return
        kept = [line for line in _existing(self._path) if line['step'] <= resume_step]
        self._text = ''.join(map(_dump, kept))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._replace()
        self._remote = _is_remote(self._path)
        if not self._remote:
            self._file = self._closing.enter_context(self._path.open('a'))
        self._board: Any = None
        if tensorboard:
            import tensorboardX  # on demand: it imports torch where that is installed

            self._board = self._closing.enter_context(
                tensorboardX.SummaryWriter(
                    str(self._path.parent / 'tensorboard'), purge_step=resume_step + 1
                )
            )
        self._steps = self._closing.enter_context(display.Steps(num_steps, resume_step))

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(self, *error: object) -> None:
        if self._active and self._remote:
            self._replace()
        self._closing.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records scalars (numbers, or arrays of one element) of a step."""
        if not self._active:
            return
        scalars = {name: _number(value) for name, value in values.items()}
        text = _dump({'step': step} | scalars)
        if self._remote:
            self._text += text
            if time.monotonic() - self._replaced > REMOTE_SECONDS:
                self._replace()
        else:
            self._file.write(text)
            self._file.flush()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        self._show(step, scalars)

    def _show(self, step: int, scalars: dict[str, float]) -> None:
        line = figures.format_line(step, self._num_steps, scalars)
        if any(name.startswith('eval/') for name in scalars):
            self._steps.keep(line)
        else:
            self._steps.update(step, line)

    def _replace(self) -> None:
        temporary = self._path.parent / f'{self._path.name}.tmp'
        temporary.write_text(self._text)
        temporary.replace(self._path)
        self._replaced = time.monotonic()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the objects of a metrics.jsonl; a torn last line is left out.

    Raises:
      UserError: no such file, or another line that is no JSON object with its step.
    """
    path = epath.Path(path)
    require(path.exists(), f'{path} does not exist; give the metrics.jsonl of a run.')
    return _existing(path)


def _existing(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b'\n')
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(_parsed(line))
        except (ValueError, RecursionError):  # the latter from deeply nested lists
            # A whole line ends with a newline, so that what follows the last one is torn or empty.
            require(
                number == len(lines),
                f'{path}, line {number} is no JSON object with its step: '
                f'{line[:60].decode(errors="backslashreplace")!r}; mend or remove the file.',
            )
    return objects


def _parsed(line: bytes) -> dict[str, Any]:
    value = json.loads(line.decode())
    if not isinstance(value, dict) or type(value.get('step')) is not int:
        raise ValueError('no object with its step')
    return value


def _is_remote(path: epath.Path) -> bool:
    return '://' in str(path)


def _dump(line: dict[str, Any]) -> str:
    return options.to_json(line) + '\n'


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
