"""Times how soon `helios generate` answers: from the start of its process to the end.

Each run is a process of its own. Cold, no program has been compiled before; warm, the run before it
left its compiled programs. Several source trees take turns, so that a change is compared with what
was before it on one machine.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helios_jax import display, process
from helios_jax.errors import require

PROMPT, TOKENS = 'def main(', 2  # of which the second shows that decoding is compiled
THIS = Path(__file__).parents[2]


def device_kind() -> str:
    """Names the device that JAX finds; in a process of its own, for it holds a GPU's memory."""
    import jax

    return jax.devices()[0].device_kind


def compare_starts(
    checkpoint: str, trees: Sequence[str], *, repeats: int, as_json: bool
) -> list[dict[str, Any]]:
    """Times cold and warm starts of this source tree and of others; prints a row of each.

    Args:
      checkpoint: a run's workdir.
      trees: folders of other checkouts, which hold helios_jax/.
      repeats: runs of each kind; the median is reported.
    Raises:
      UserError: a folder without helios_jax, or a run that fails.
    """
    require(repeats > 0, f'--repeats={repeats} must be above 0.')
    for tree in trees:
        there = Path(tree) / 'helios_jax' / '__main__.py'
        require(there.is_file(), f'--against={tree} is no checkout: there is no {there}.')
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for tree in ('this', *trees):
            folder = THIS if tree == 'this' else Path(tree)
            with tempfile.TemporaryDirectory(prefix='helios_start_') as home:
                for state in ('cold', 'warm'):
                    taken = timed(folder, checkpoint, home)
                    seconds.setdefault((tree, state), []).append(taken)
    facts = {'device': process.run(device_kind), 'jax': importlib.metadata.version('jax')}
    rows = [
        {'tree': tree, 'start': state, 'seconds': statistics.median(all_), 'runs': all_} | facts
        for (tree, state), all_ in seconds.items()
    ]
    if as_json:
        print(*map(json.dumps, rows), sep='\n')
    else:
        print(f'{facts["device"]}, jax {facts["jax"]}, median of {repeats}')
        display.table([(f'{r["tree"]}, {r["start"]}', f'{r["seconds"]:.1f}', 's') for r in rows])
    return rows


def timed(tree: Path, checkpoint: str, home: str) -> float:
    """Seconds of a whole process that continues a prompt.

    Args:
      tree: its source.
      home: where it keeps compiled programs.
    """
    if '://' not in checkpoint:
        checkpoint = str(Path(checkpoint).resolve())
    flags = [f'--checkpoint={checkpoint}', f'--prompt={PROMPT}', f'--max_tokens={TOKENS}']
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, '-m', 'helios_jax', 'generate', *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=tree,  # where Python looks for helios_jax first
        env=os.environ | {'HOME': home},
    )
    taken = time.perf_counter() - begin
    last = (done.stderr.strip().splitlines() or ['it wrote no reason'])[-1]
    require(done.returncode == 0, f'{tree}: generate ended with code {done.returncode}: {last}')
    return taken
