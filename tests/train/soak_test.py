"""A run that is killed a hundred times, with other commands thrown in, ends as one that was not.

Each command is a fork of a process that has imported everything, so that it starts in a second.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

from helios_jax import checkpoint, config
from helios_jax.parallel import mesh as meshes
from helios_jax.train import resume
from helios_jax.train import state as states

KILLS, STEPS, KEEP, SEED = 100, 600, 4, 11
STEP_SECONDS, LATE_SECONDS = 0.02, 0.2
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}


def helios(output: str, *arguments: str) -> None:
    """A command in a process of its own, its output appended to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from helios_jax import cli
    from helios_jax.train import finish, metrics

    finish.SAMPLE_TOKENS = 3
    write = metrics.MetricWriter.write

    def write_and_wait(writer, step, values):
        write(writer, step, values)
        time.sleep(STEP_SECONDS)  # or a run would be through after a few kills

    metrics.MetricWriter.write = write_and_wait
    cli.main(arguments)


class Commands:
    """`helios train` of one config below a root, forked."""

    def __init__(self, root: Path):
        cfg = small_run.make_config(root)
        self.root = root
        self.config = config.replace(
            cfg,
            {
                'train.num_steps': STEPS,
                'train.eval_every': 40,
                'train.eval_rows': 3,
                'train.checkpoint_every': 3,
                'train.keep_checkpoints': KEEP,
                'train.compilation_cache': str(root / 'xla'),
            },
        )
        small_run.write_config(self.config, root / 'small.py')
        self.forks = multiprocessing.get_context('forkserver')
        self.forks.set_forkserver_preload(['helios_jax.cli', 'helios_jax.train.loop'])

    def start(self, workdir: str, *flags: str, output: str = 'output'):
        arguments = ['train', f'--config={self.root}/small.py', f'--workdir={self.root / workdir}']
        process = self.forks.Process(
            target=helios, args=(str(self.root / output), *arguments, *flags)
        )
        process.start()
        return process

    def state(self, workdir: str) -> dict:
        setup = states.create(
            self.config.resolve(256), meshes.make(config.Mesh(), jax.devices()[:1])
        )
        opened = checkpoint.open_step(self.root / workdir / 'checkpoints', STEPS)
        return jax.device_get(resume.load(setup, opened, *resume.ITEMS))

    def lines(self, workdir: str) -> list[dict]:
        text = (self.root / workdir / 'metrics.jsonl').read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        return [{n: v for n, v in line.items() if not n.startswith('time/')} for line in lines]


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.is_alive() and not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def printed(output: Path) -> int:
    """How many steps the runs have reported by now."""
    return output.read_bytes().count(b'\nstep ')


class Reported:
    """What `ckpt ls` ever listed must be there, intact, unless `keep` has let it go."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.scores: dict[int, float] = {}

    def look(self) -> None:
        if not self.directory.exists():
            return
        rows = checkpoint.list_steps(self.directory)
        assert not any(row['damage'] for row in rows), rows
        there = [row['step'] for row in rows]
        for row in rows:
            self.scores[row['step']] = row['metrics'].get('bits_per_byte', np.inf)
        scored = [(score, -step) for step, score in self.scores.items() if score < np.inf]
        assert not scored or -min(scored)[1] in there, (scored, there)
        for step in self.scores:
            assert step in there or sum(other > step for other in there) >= KEEP, (step, there)
        extra = {p.name for p in self.directory.iterdir()} - {str(step) for step in there}
        allowed = ('.orbax-checkpoint-tmp', '.unfinished', 'helios_checkpoints.json', 'tokenizer')
        assert all(any(part in name for part in allowed) for name in extra), extra


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_hundred_random_kills_change_nothing(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    draw = random.Random(SEED)
    commands = Commands(tmp_path)
    straight = commands.start('straight')
    straight.join()
    assert straight.exitcode == 0, (tmp_path / 'output').read_text()
    output, reported = tmp_path / 'output', Reported(tmp_path / 'killed/checkpoints')
    begin, seconds, refusals = time.monotonic(), 30.0, 0
    for kill in range(KILLS):
        target = printed(output) + draw.randint(1, 14)
        started = time.monotonic()
        run, second = commands.start('killed'), None
        late = draw.random() < 0.6  # while it trains or saves; else anywhere from the start on
        if late:
            wait_for(lambda n=target: printed(output) >= n, run)
            seconds = min(seconds, time.monotonic() - started)
        if kill % 7 in (3, 5):  # to be refused for its settings, or for the lock
            flags = ('--config.train.seed=7',) if kill % 7 == 3 else ()
            second = commands.start('killed', *flags, output='second')
        if late and second and run.is_alive():
            os.kill(run.pid, signal.SIGSTOP)  # it lives, and does not run ahead
            second.join(300)
            assert second.exitcode == 2, (tmp_path / 'second').read_text()[-2000:]
            os.kill(run.pid, signal.SIGCONT)
            refusals += 1
        time.sleep(draw.uniform(0, LATE_SECONDS if late else 1.1 * seconds))
        for process in (run, second):
            if process:
                process.kill()
                process.join()
        reported.look()
    last = commands.start('killed')
    last.join()
    assert last.exitcode == 0, output.read_text()[-2000:]
    reported.look()
    said = output.read_text() + (tmp_path / 'second').read_text()
    print(
        f'{KILLS} kills, {refusals} refusals, {said.count("Taking over")} locks taken over, '
        f'{said.count("Removing ")} leftovers removed, {len(reported.scores)} steps reported, '
        f'{time.monotonic() - begin:.0f} s'
    )
    assert refusals > 5 and 'Taking over' in said and 'Traceback' not in said
    assert commands.lines('killed') == commands.lines('straight')
    jax.tree.map(
        np.testing.assert_array_equal, commands.state('killed'), commands.state('straight')
    )
