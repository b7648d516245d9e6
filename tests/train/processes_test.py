"""Whole runs of a very small model as processes: stopped, killed, and several as one."""

import json
import os
import re
import shutil
import signal as signals
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from folders import entries
from refusals import refused
from small_run import recorded, saved

from helios_jax import checkpoint, cli, config
from helios_jax.data import pipeline
from helios_jax.data import tokenizer as tokenizers

pytestmark = pytest.mark.usefixtures('quick_compilation')

PROGRAM_SECONDS = 150
TAKES_SIGNALS = """
import os, signal, sys
from helios_jax import cli
from helios_jax.train import finish, metrics

finish.SAMPLE_TOKENS = 3
write, number, at_step = metrics.MetricWriter.write, int(sys.argv.pop(1)), int(sys.argv.pop(1))

def write_and_signal(self, step, values):
    write(self, step, values)
    if step == at_step and 'loss' in values:
        os.kill(os.getpid(), number)

metrics.MetricWriter.write = write_and_signal
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> config.Config:
    return small_run.make_config(tmp_path_factory.mktemp('small'))


class Programs:
    """`helios train` as processes of one device each."""

    def __init__(self, cfg: config.Config, root: Path):
        self.root = root
        cfg = config.replace(cfg, {'train.compilation_cache': str(root / 'xla')})
        small_run.write_config(cfg, root / 'small.py')
        pipeline.prepare(cfg.data, tokenizers.load('bytes'))

    def start(
        self,
        workdir: str,
        signal: int = 0,
        at_step: int = -1,
        flags: tuple[str, ...] = (),
        **environment: str,
    ):
        command = [sys.executable, '-c', TAKES_SIGNALS, str(signal), str(at_step), 'train']
        environment = {
            'JAX_PLATFORMS': 'cpu',
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            'JAX_NUM_CPU_DEVICES': '1',
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        } | environment
        return subprocess.Popen(
            [
                *command,
                f'--config={self.root}/small.py',
                f'--workdir={self.root / workdir}',
                *flags,
            ],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=PROGRAM_SECONDS)
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope='module')
def programs(small, tmp_path_factory) -> Programs:
    return Programs(small, tmp_path_factory.mktemp('programs'))


@pytest.fixture(scope='module')
def straight(programs) -> Path:
    """30 steps without a stop."""
    code, output = finish(programs.start('straight'))
    assert code == 0, output
    return programs.root / 'straight'


@pytest.mark.slow
@pytest.mark.parametrize(('signal', 'code'), [(15, 0), (9, -9)], ids=['SIGTERM', 'SIGKILL'])
def test_a_run_that_was_interrupted_ends_bit_identical(small, programs, straight, signal, code):
    workdir = programs.root / f'interrupted_{signal}'
    first, output = finish(programs.start(workdir.name, signal, at_step=19))
    assert first == code, output
    assert not (workdir / 'report.md').exists()
    (latest,) = [row['step'] for row in checkpoint.list_steps(workdir / 'checkpoints')][-1:]
    if signal == 15:
        assert 19 <= latest <= 20
        assert 'SIGTERM: finishing this step' in output
    else:
        assert 10 <= latest <= 15
        assert recorded(workdir)[-1]['step'] == 19  # to be dropped and written again
    second, output = finish(programs.start(workdir.name))
    assert second == 0, output
    assert f'from step {latest}' in output

    assert recorded(workdir) == recorded(straight)
    jax.tree.map(
        np.testing.assert_array_equal, saved(small, workdir, 30), saved(small, straight, 30)
    )
    of_clock = re.compile(r'.*(seconds|fraction|tokens/s|interrupted|straight).*\n')
    reports = [of_clock.sub('', (d / 'report.md').read_text()) for d in (workdir, straight)]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_live_run_is_untouched_by_second_commands_and_can_be_read(
    small, programs, straight, capsys
):
    workdir = programs.root / 'live'
    process = programs.start('live', signals.SIGSTOP, at_step=12)
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        before = entries(workdir)
        train = 'train', f'--config={programs.root}/small.py', f'--workdir={workdir}'
        for _ in range(3):
            assert 'train.seed=7, but' in refused(capsys, *train, '--config.train.seed=7')
        line = refused(capsys, *train)
        assert f'{workdir} is being written by process {process.pid} on host ' in line
        # Readers need no lock.
        assert entries(workdir) == before
        cli.main(['ckpt', 'ls', str(workdir), '--json'])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])['step'] in (7, 10)
        cli.main(['eval', f'--checkpoint={workdir}', '--rows=2', '--json'])
        assert json.loads(capsys.readouterr().out)['bits_per_byte'] > 0
        assert entries(workdir) == before
    finally:
        process.send_signal(signals.SIGCONT)
        code, output = finish(process)
    assert code == 0, output
    assert recorded(workdir) == recorded(straight)
    jax.tree.map(
        np.testing.assert_array_equal, saved(small, workdir, 30), saved(small, straight, 30)
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def run_two(programs: Programs, *flags: tuple[str, ...], workdir: str) -> list[tuple[int, str]]:
    """Two processes as one run, each with flags of its own."""
    address = f'127.0.0.1:{free_port()}'
    processes = [
        programs.start(
            workdir, flags=own, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES='2',
            JAX_PROCESS_ID=str(number),
        )
        for number, own in enumerate(flags)
    ]  # fmt: skip
    return [finish(process) for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flag', 'named'),
    [
        ('--config.train.seed=7', r'train\.seed is 7 and not 0'),
        ('--config.optimizer.learning_rate=0.5', r'optimizer\.learning_rate is 0\.5 and not 0\.01'),
        ('--config.model.mlp_dim=32', r'model\.mlp_dim is 32 and not 24'),
        ('--config.data.corpus={root}/other/*.txt', r'training data is \'\w+\' and not \'\w+\''),
        ('--config.data.corpus={root}/none/*.txt', r'none/\*\.txt.*no file'),
    ],
)
def test_processes_that_differ_all_end_with_code_2_and_one_line(
    small, programs, tmp_path, flag, named
):
    other = programs.root / 'other'
    if not other.exists():
        shutil.copytree(Path(small.data.corpus).parent, other)
        (other / '03.txt').write_text('another text than that of process 0')
    flags = flag.format(root=programs.root)
    for code, output in run_two(programs, (), (flags,), workdir='differing'):
        assert code == 2, output
        (line,) = [line for line in output.splitlines() if line.startswith('helios: ')]
        assert re.search(named, line), line
        assert 'Traceback' not in output
    assert not (programs.root / 'differing').exists()


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(small, programs, straight):
    def run(first_signal: int) -> list[tuple[int, str]]:
        address = f'127.0.0.1:{free_port()}'
        processes = [
            programs.start(
                'two', signal if number else 0, at_step=8,
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES='2', JAX_PROCESS_ID=str(number),
            )
            for number, signal in ((0, 0), (1, first_signal))
        ]  # fmt: skip
        return [finish(process) for process in processes]

    workdir = programs.root / 'two'
    # Only one of them is told to stop.
    for code, output in run(15):
        assert code == 0, output
    (latest,) = [row['step'] for row in checkpoint.list_steps(workdir / 'checkpoints')][-1:]
    assert 8 <= latest <= 9
    for code, output in run(0):
        assert code == 0, output
    lines, expected = recorded(workdir), recorded(straight)
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        np.testing.assert_allclose(
            list(line.values()), [other[name] for name in line], rtol=1e-3, err_msg=str(line)
        )
    assert (workdir / 'report.md').exists()
