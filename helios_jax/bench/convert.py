"""Times the import of a random checkpoint beside what its bytes cost alone, and its host memory.

    helios bench convert --config=helios_1b

Reading takes turns with loading the model onto the devices, with reading and writing (a copy to the
same disk, which waits until it is there) and with `helios convert`, so that other work of the
machine falls on all four alike. Each is a process of its own. Memory is anonymous memory: pages of
a file that is read can be dropped. What is loaded onto a CPU is not counted, as it is the result.
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (or safetensors knows no bfloat16)
from safetensors import safe_open

from helios_jax import config, display, options, process
from helios_jax.bench import random_checkpoint
from helios_jax.convert.importing import load, open_directory
from helios_jax.convert.workdir import save
from helios_jax.errors import one_of, require

GB = 10**9
TIMED = ('read', 'load', 'read_and_write', 'import')
PAUSE = 0.002  # seconds between two looks at the memory
TINY = config.Config(model=config.Model(vocab_size=260, num_layers=2, embed_dim=24, mlp_dim=40))


def compare_imports(
    cfg: config.Config, *, dtypes: Sequence[str], directory: str, repeats: int, as_json: bool
) -> list[dict[str, Any]]:
    """Measures a checkpoint of the config's shape in each dtype; prints a row each.

    Args:
      directory: on the disk to measure; '' takes that of temporary files.
      repeats: rounds, of which the median is reported.
    """
    require(repeats > 0, f'--repeats={repeats} must be above 0.')
    for dtype in dtypes:
        one_of('--dtypes', dtype, ('bfloat16', 'float32'))
    require(not directory or Path(directory).is_dir(), f'--directory={directory}: not there.')
    rows = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(dir=directory or None, prefix='helios_convert_') as place:
            rows.append(measured(cfg, dtype, Path(place), repeats))
        if as_json:
            print(options.to_json(rows[-1]), flush=True)
        else:
            display.table(described(rows[-1]))
    return rows


def measured(cfg: config.Config, dtype: str, place: Path, repeats: int) -> dict[str, Any]:
    """Returns seconds of each of the four, and memory of two, of one checkpoint."""
    source, tiny, copy = (place / name for name in ('source', 'tiny', 'copy'))
    random_checkpoint.write(cfg, source, dtype)
    random_checkpoint.write(TINY, tiny, dtype)
    runs: dict[str, list[float]] = {name: [] for name in TIMED}
    found: dict[str, Any] = {}
    peaks = dict.fromkeys(('load', 'import'), 0)
    for number in range(repeats):
        turns: dict[str, tuple[Callable[..., Any], list[Path]]] = {
            'read': (read, [source]),
            'load': (loaded, [source, tiny]),
            'read_and_write': (read, [source, copy]),
            'import': (imported, [source, tiny, place / f'run{number}']),
        }
        for name, (turn, paths) in turns.items():
            done = process.run(turn, *map(str, paths), quiet=name in peaks)
            runs[name].append(done.pop('seconds'))
            if name in peaks:
                peaks[name] = max(peaks[name], done.pop('peak_bytes'))
            found |= done
    medians = {f'{name}_seconds': statistics.median(taken) for name, taken in runs.items()}
    bytes_at_most = {f'{name}_peak_bytes': peak for name, peak in peaks.items()}
    return {'dtype': dtype, **found, **medians, **bytes_at_most, 'runs': runs}


def read(source: str, copy: str = '') -> dict[str, Any]:
    """Reads every tensor of a directory with safetensors, and may write its bytes to a file."""
    begin, total, largest = time.perf_counter(), 0, 0
    with open(copy or os.devnull, 'wb') as file:
        for path in sorted(Path(source).glob('*.safetensors')):
            with safe_open(path, 'np') as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    tensor = tensors.get_tensor(name)
                    total, largest = total + tensor.nbytes, max(largest, tensor.nbytes)
                    if copy:
                        file.write(tensor.view('uint8').data)
        if copy:
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    return {'seconds': seconds, 'bytes': total, 'largest_tensor_bytes': largest}


def imported(source: str, tiny: str, to: str) -> dict[str, Any]:
    """Imports a directory as `helios convert` does, once a tiny one has loaded all libraries."""
    save(open_directory(tiny), f'{to}_tiny')
    return watched(lambda: save(open_directory(source), to))


def loaded(source: str, tiny: str) -> dict[str, Any]:
    """Loads a directory's weights onto the devices, once a tiny one has loaded all libraries."""

    def onto_devices(directory: str) -> Any:
        return jax.block_until_ready(load(open_directory(directory)).variables)

    onto_devices(tiny)
    figures = watched(lambda: onto_devices(source))
    return figures | {'device': jax.devices()[0].device_kind}


def watched(work: Callable[[], Any]) -> dict[str, Any]:
    """Returns the seconds of some work, and what memory of the host it took beside its result."""
    before = anonymous_bytes()
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(PAUSE):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        result = work()
    finally:
        seconds = time.perf_counter() - begin
        over.set()
        watcher.join()
    on_host = jax.default_backend() == 'cpu'
    size = sum(array.nbytes for array in jax.tree.leaves(result)) if on_host else 0
    return {'seconds': seconds, 'peak_bytes': peak[0] - before - size}


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, as Linux says."""
    lines = Path('/proc/self/status').read_text().splitlines()
    said = dict(line.split(':', 1) for line in lines)
    return 1024 * sum(int(said[name].split()[0]) for name in ('RssAnon', 'RssShmem'))


def described(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    seconds = {name: row[f'{name}_seconds'] for name in TIMED}
    times = [
        (f'{row["dtype"]}: {name.replace("_", " ")}', f'{value:.1f}', 's')
        for name, value in seconds.items()
    ]
    return [
        *times,
        (f'load / read ({row["device"]})', f'{seconds["load"] / seconds["read"]:.2f}', ''),
        ('import / read', f'{seconds["import"] / seconds["read"]:.2f}', ''),
        ('import / read and write', f'{seconds["import"] / seconds["read_and_write"]:.2f}', ''),
        ('bytes', f'{row["bytes"] / GB:.2f}', 'GB'),
        ('largest tensor', f'{row["largest_tensor_bytes"] / GB:.3f}', 'GB'),
        ('peak host memory, load', f'{row["load_peak_bytes"] / GB:.3f}', 'GB'),
        ('peak host memory, import', f'{row["import_peak_bytes"] / GB:.3f}', 'GB'),
    ]
