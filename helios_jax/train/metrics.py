"""A run's figures: metrics.jsonl always, TensorBoard beside it, and a line or a bar for people.

One JSON object a line, each with its `step`. What depends on the clock is named `time/…`, so that
two runs can be compared without it. Process 0 writes; the others' writers do nothing.
"""

import collections
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import rich.console
import rich.progress
from etils import epath

from helios_jax.config import require

REMOTE_SECONDS = 30  # object stores cannot append: between two rewrites of the whole file


class MetricWriter:
    """Use as a context: leaving it writes what is left.

    Args:
      workdir: holds metrics.jsonl and tensorboard/.
      resume_step: lines of later steps are dropped, as the run computes them again.
      num_steps: where the run ends, for the progress bar.
    Raises:
      UserError: metrics.jsonl has a line that is no JSON, other than a torn last one.
    """

    def __init__(
        self, workdir: epath.PathLike, *, tensorboard: bool, resume_step: int, num_steps: int = 0
    ) -> None:
        self._path = epath.Path(workdir) / 'metrics.jsonl'
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
        self._bar: rich.progress.Progress | None = None
        console = rich.console.Console()
        if console.is_terminal:
            self._bar = self._closing.enter_context(_progress(console))
            self._task = self._bar.add_task('', total=num_steps or None, completed=resume_step)

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
        line = format_line(step, self._num_steps, scalars)
        if not self._bar:
            print(line, flush=True)
        elif any(name.startswith('eval/') for name in scalars):
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def _replace(self) -> None:
        temporary = self._path.parent / f'{self._path.name}.tmp'
        temporary.write_text(self._text)
        temporary.replace(self._path)
        self._replaced = time.monotonic()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a torn last line is left out.

    Raises:
      UserError: no such file, or another line is no JSON.
    """
    path = epath.Path(path)
    require(path.exists(), f'{path} does not exist; give the metrics.jsonl of a run.')
    return _existing(path)


def format_line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    """A line for people, of those figures that are there."""
    parts = [f'step {step}/{num_steps}' if num_steps else f'step {step}']
    for name, show in _SHOWN.items():
        if name in values:
            parts.append(show(values[name]))
    return '  '.join(parts)


_SHOWN = {
    'loss': 'loss {:.4f}'.format,
    'eval/loss': 'held-out loss {:.4f}'.format,
    'eval/bits_per_byte': '{:.4f} bits/byte'.format,
    'eval/lost_fraction': '(without the {:.2%} of bytes that the tokenizer loses)'.format,
    'learning_rate': 'lr {:.2e}'.format,
    'gradient_norm': 'grad {:.3g}'.format,
    'time/tokens_per_second': '{:,.0f} tok/s'.format,
    'time/mfu': 'MFU {:.1%}'.format,
    'time/data_wait_fraction': 'data wait {:.1%}'.format,
}


class Timer:
    """Wall clock of a training loop on this host, split by what it was spent on.

    `measure('data_wait')` goes around fetching each step's batch and counts the steps. Steps run
    asynchronously: call `figures` once the last one's metrics are on the host.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: Any = collections.Counter()  # of floats
        self._steps = 0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start
            self._steps += name == 'data_wait'

    def figures(
        self, batch_tokens: int | float, flops_per_token: int | float, peak_flops: float
    ) -> dict[str, float]:
        """Figures since the last call, and starts anew.

        A step's time is all that was not measured as something else, with its wait for data.

        Args:
          batch_tokens: of one step, padding left out.
          peak_flops: of all devices together, FLOP/s; NaN leaves `time/mfu` out.
        """
        now = time.perf_counter()
        total, steps, wait = now - self._start, self._steps, self._seconds['data_wait']
        stepping = total - self._seconds.total() + wait
        figures = {f'time/{name}_fraction': s / total for name, s in self._seconds.items()}
        figures['time/step_fraction'] = (stepping - wait) / total
        if steps:
            figures['time/step_seconds'] = stepping / steps
            rate = figures['time/tokens_per_second'] = batch_tokens * steps / stepping
            if peak_flops == peak_flops:
                figures['time/mfu'] = rate * flops_per_token / peak_flops
        self._start, self._steps = now, 0
        self._seconds.clear()
        return figures


def _existing(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split('\n')
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            # A whole line ends with a newline, so that what follows the last one is torn or empty.
            require(
                number == len(lines),
                f'{path}, line {number} is no JSON: {line[:60]!r}; mend or remove the file.',
            )
    return objects


def _is_remote(path: epath.Path) -> bool:
    return '://' in str(path)


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line) + '\n'


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TextColumn('{task.description}', markup=False),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )
