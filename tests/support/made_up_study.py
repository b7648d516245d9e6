"""A study whose runs are very small programs that write what a training would."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from helios_jax import config
from helios_jax.ablate import runs, variants
from helios_jax.ablate.design import Design, design
from helios_jax.ablate.study import Study
from helios_jax.ablate.variants import Variant

ARMS = {'plain': {'model.gmu.kind': 'residual'}, 'gated': {}, 'deep': {'model.num_layers': 5}}
STEPS = 6

# Both write events to a journal: a start, and the end if it comes to that.
BEGIN = """
import os, sys, time
directory, journal, fails, seconds, config, *lines = sys.argv[1:]
def tell(event):
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f'{event} {directory}\\n'.encode())
    os.close(file)
"""
PROGRAM = f"""{BEGIN}
tell('start')
time.sleep(float(seconds))
os.makedirs(directory, exist_ok=True)
if fails == 'True':
    print('helios: the loss is nan at step 3; lower the learning rate.', file=sys.stderr)
    sys.exit(2)
open(f'{{directory}}/metrics.jsonl', 'w').write('\\n'.join(lines) + '\\n')
open(f'{{directory}}/config.json', 'w').write(config)
tell('end')
open(f'{{directory}}/report.md', 'w').write('done')
"""
SCORING = f"""{BEGIN}
tell('score')
time.sleep(float(seconds))
if fails == 'True':
    print('helios: the GPU has no room.', file=sys.stderr)
    sys.exit(2)
os.makedirs(f'{{directory}}/lengths', exist_ok=True)
open(f'{{directory}}/lengths/lengths.json', 'w').write(lines[0])
tell('scored')
"""


def make(base: config.Config | None = None, seeds: int = 2, **changes: Any) -> Design:
    """A design of three arms over `base`, which has STEPS steps."""
    base = config.replace(base or config.Config(), {'train.num_steps': STEPS})
    given = {'question': 'Which is best?', 'arms': ARMS, 'baseline': 'plain'} | changes
    return design('made_up', Study(**given), base, seeds)


def lines(variant: Variant) -> list[dict[str, Any]]:
    """What a run logs: at its last step a score that depends on depth, rate and seed."""
    cfg = variant.config
    score = 2.0 + cfg.model.num_layers / 100 + cfg.train.seed / 1000
    score += abs(cfg.optimizer.learning_rate - 2e-3)
    found: list[dict[str, Any]] = []
    for step in (3, STEPS):
        figures = {'loss': 9 / step, 'tokens': 100 * step, 'time/step_seconds': 0.5}
        found += [{'step': step, **figures}, {'step': step, 'eval/bits_per_byte': score + 6 / step}]
    return found


def scores(variant: Variant) -> str:
    """What a scoring leaves: worse in longer rows, but less so by other methods than `none`."""
    wanted = variant.lengths
    assert wanted is not None
    own, seed = variant.config.data.row_length, variant.config.train.seed
    rows = [
        {'method': method, 'length': length, 'sliding_bits_per_byte': 2 + seed / 100 + worse}
        for number, method in enumerate(wanted.methods, 1)
        for length in wanted.lengths
        for worse in [(length / own - 1) / number + seed / 1000 / number]
    ]
    return json.dumps(dataclasses.asdict(wanted) | {'documents': 3, 'rows': rows})


def saved_config(variant: Variant) -> str:
    """What of a run's config.json is read."""
    rate = variant.config.optimizer.learning_rate
    return json.dumps({'optimizer': {'learning_rate': rate}})


class Starter:
    """Starts made-up runs.

    Args:
      journal: file that runs write their starts and ends to.
      failing: arms that fail.
      seconds: that each run takes, and each scoring.
      unscored: arms whose scoring fails.
    """

    def __init__(
        self,
        journal: Path,
        failing: tuple[str, ...] = (),
        seconds: float = 0.02,
        unscored: tuple[str, ...] = (),
    ):
        self.journal, self.failing, self.seconds = journal, failing, seconds
        self.unscored = unscored
        self.started: list[str] = []  # labels of runs, whatever became of them

    def __call__(self, worker: int, variant: Variant, log: BinaryIO) -> runs.Process:
        self.started.append(variant.label)
        trained = variants.finished(variant)
        fails = str(variant.arm in (self.unscored if trained else self.failing))
        arguments = [str(variant.directory), str(self.journal), fails, str(self.seconds)]
        arguments.append(saved_config(variant))
        left = [scores(variant)] if trained else map(json.dumps, lines(variant))
        program = SCORING if trained else PROGRAM
        return self.launch(['-S', '-E', '-c', program, *arguments, *left], log)

    def launch(self, arguments: list[str], log: BinaryIO) -> runs.Process:
        """Starts Python; another launcher does it elsewhere."""
        return subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)

    def events(self, event: str) -> list[str]:
        """The runs that had the event, in its order."""
        told = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [line.split()[1] for line in told if line.split()[0] == event]


def write_study(path: Path, **changes: Any) -> Path:
    """A study as a file for --study; a change to None drops the field."""
    given: Mapping[str, Any] = {
        'question': 'Which is best?', 'arms': {'a': {}, 'b': {'model.num_layers': 3}},
        'baseline': 'a',
    } | changes  # fmt: skip
    arguments = ', '.join(f'{name}={value!r}' for name, value in given.items() if value is not None)
    path.write_text(
        'from helios_jax.ablate.study import Study\n\n\ndef get_study():\n'
        f'    return Study({arguments})\n'
    )
    return path
