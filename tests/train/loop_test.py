"""Whole runs of a very small model: in this process on eight devices, and as programs."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

from helios_jax import checkpoint, config
from helios_jax.data import pipeline
from helios_jax.data import tokenizer as tokenizers
from helios_jax.parallel import mesh as meshes
from helios_jax.train import loop
from helios_jax.train import state as states
from helios_jax.train import step as steps

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


@pytest.fixture(autouse=True, scope='module')
def quick_compilation():
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr('helios_jax.train.finish.SAMPLE_TOKENS', 3)


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> config.Config:
    return small_run.make_config(tmp_path_factory.mktemp('small'))


def having(cfg: config.Config, **settings) -> config.Config:
    """The config with settings such as train__num_steps=3 replaced."""
    for name, value in settings.items():
        section, field = name.split('__')
        part = dataclasses.replace(getattr(cfg, section), **{field: value})
        cfg = dataclasses.replace(cfg, **{section: part})
    return cfg


def recorded(workdir: Path) -> list[dict]:
    """The metric lines without what the clock says."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith('time/')} for line in lines]


def saved(cfg: config.Config, workdir: Path, step: int) -> dict:
    """Parameters and optimizer state of a checkpoint, on the host."""
    cfg = cfg.resolve(256)
    setup = states.create(cfg, meshes.make(config.Mesh(), jax.devices()[:1]))
    items = {'params': setup.state.params, 'optimizer': setup.state.optimizer}
    directory = workdir / 'checkpoints'
    return {
        name: jax.device_get(checkpoint.restore(directory, step, name, tree))
        for name, tree in items.items()
    }


def files(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def finished(small, tmp_path_factory) -> tuple[config.Config, Path, dict]:
    """A run of ten steps in this process, on eight devices."""
    workdir = tmp_path_factory.mktemp('run')
    cfg = having(small, train__num_steps=10, train__tensorboard=True, train__log_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('helios_jax.train.finish.SAMPLE_TOKENS', 3)
        return cfg, workdir, loop.train(cfg, workdir)


def test_a_run_leaves_metrics_checkpoints_config_and_a_report(finished):
    cfg, workdir, held_out = finished
    lines = recorded(workdir)
    assert [line['step'] for line in lines if 'loss' in line] == [2, 4, 6, 8, 10]
    assert [line['step'] for line in lines if 'eval/loss' in line] == [7, 10]
    assert {n: v for n, v in lines[-1].items() if n != 'step'} == {
        f'eval/{name}': value for name, value in held_out.items()
    }
    for line in lines[:1]:
        assert line.keys() >= {'loss', 'gradient_norm', 'learning_rate', 'tokens', 'targets'}
    timed = (workdir / 'metrics.jsonl').read_text()
    for name in ('tokens_per_second', 'step_seconds', 'step_fraction', 'data_wait_fraction'):
        assert f'time/{name}' in timed

    assert json.loads((workdir / 'config.json').read_text()) == dataclasses.asdict(cfg.resolve(256))
    steps = {row['step']: row for row in checkpoint.list_steps(workdir / 'checkpoints')}
    assert list(steps) == [5, 7, 10]  # every 5, and with each evaluation
    assert not any(row['damage'] for row in steps.values())
    assert steps[10]['metrics'] == held_out and steps[5]['metrics'] == {}
    metadata = checkpoint.read_metadata(workdir / 'checkpoints', 10)
    assert metadata['samples'] == 80
    assert metadata['config'] == dataclasses.asdict(cfg.resolve(256))
    assert metadata.keys() >= {'fingerprint', 'tokenizer', 'format_version'}
    assert set(metadata['arrays']) == {'params', 'optimizer'}

    report = (workdir / 'report.md').read_text()
    assert f'| held-out text | {held_out["bits_per_byte"]:.4f} bits/byte |' in report
    assert re.search(r'\| speed \| [\d,]+ tokens/s \|', report)
    assert '⟦generated from here⟧' in report and 'gzip' in report
    assert (workdir / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert list((workdir / 'tensorboard').iterdir())


def test_starting_a_finished_run_again_changes_nothing_but_the_report_it_may_lack(
    finished, tmp_path
):
    cfg, workdir, held_out = finished
    report = (workdir / 'report.md').read_text()
    before = {p: c for p, c in files(workdir).items() if 'tensorboard' not in p}
    (workdir / 'report.md').unlink()
    assert loop.train(cfg, workdir) == held_out
    assert (workdir / 'report.md').read_text() == report
    assert {p: c for p, c in files(workdir).items() if 'tensorboard' not in p} == before


@pytest.mark.parametrize(
    ('settings', 'named'),
    [
        ({'optimizer__learning_rate': 2e-2}, r'optimizer\.learning_rate=0\.02.*0\.01'),
        ({'model__mlp_dim': 32}, r'model\.mlp_dim=32.*24'),
        ({'train__seed': 1}, r'train\.seed=1.*0'),
        ({'train__num_steps': 9}, r'train\.num_steps=9.*step 10'),
    ],
    ids=str,
)
def test_resuming_with_another_setting_is_refused_and_writes_nothing(finished, settings, named):
    cfg, workdir, _ = finished
    before = files(workdir)
    with pytest.raises(config.UserError, match=named):
        loop.train(having(having(cfg, train__num_steps=20), **settings), workdir)
    assert files(workdir) == before


def test_resuming_with_changed_data_is_refused_and_writes_nothing(finished):
    cfg, workdir, _ = finished
    before = files(workdir)
    changed = Path(cfg.data.corpus).parent / '00.txt'
    text = changed.read_text()
    try:
        changed.write_text(text + ' and more')
        with pytest.raises(config.UserError, match=r'the data of corpus=.* has changed'):
            loop.train(having(cfg, train__num_steps=20), workdir)
    finally:
        changed.write_text(text)
    assert files(workdir) == before


# A gradient that breaks at the step to be saved leaves that step's loss as it was.
@pytest.mark.parametrize(('figure', 'first_bad'), [('loss', 8), ('gradient_norm', 10)])
def test_a_figure_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    small, tmp_path, monkeypatch, figure, first_bad
):
    make = steps.make_train_step

    def breaking(setup):
        step = make(setup)

        def train_step(state, batch):
            state, metrics = step(state, batch)
            bad = jax.numpy.where(state.step >= first_bad, jax.numpy.nan, 1.0)
            params = jax.tree.map(lambda x: x * bad, state.params)
            return state.replace(params=params), metrics | {figure: metrics[figure] * bad}

        return train_step

    monkeypatch.setattr(steps, 'make_train_step', breaking)
    cfg = having(small, train__log_every=100)  # the checkpoint at 10 is first to look
    with pytest.raises(config.UserError, match=f'{figure} is nan at step 10.*since step 7'):
        loop.train(cfg, tmp_path)
    rows = checkpoint.list_steps(tmp_path / 'checkpoints')
    assert [row['step'] for row in rows] == [5, 7]
    assert not any(row['damage'] for row in rows)
    parameters = jax.tree.leaves(saved(cfg, tmp_path, 7))
    assert all(np.isfinite(x).all() for x in parameters)
    assert not (tmp_path / 'report.md').exists()


def test_fine_tuning_starts_from_another_runs_parameters(small, finished, tmp_path):
    cfg, workdir, _ = finished
    parent = files(workdir)
    # Steps too small to move: what the checkpoint holds is what the run began with.
    tuned = having(
        small, train__init_from=str(workdir), train__num_steps=1, train__seed=5,
        optimizer__learning_rate=1e-30,
    )  # fmt: skip
    loop.train(tuned, tmp_path)
    theirs, ours = saved(cfg, workdir, 10), saved(tuned, tmp_path, 1)
    jax.tree.map(np.testing.assert_array_equal, ours['params'], theirs['params'])
    counts = [x for x in jax.tree.leaves(ours['optimizer']) if x.ndim == 0]
    assert counts and all(count == 1 for count in counts)
    assert files(workdir) == parent


def test_fine_tuning_with_another_tokenizer_is_refused(small, finished, tmp_path):
    _, workdir, _ = finished
    path = str(tmp_path / 'tokenizer.json')
    pipeline.train_tokenizer(small.data.corpus, 300, path)
    tuned = having(small, train__init_from=str(workdir), data__tokenizer=path)
    with pytest.raises(config.UserError, match=r'another tokenizer \(256 tokens\).*300'):
        loop.train(tuned, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_a_run_ends_with_its_report_on_a_mesh_that_splits_the_sequence(small, tmp_path):
    mesh = config.Mesh(fsdp=2, context=2, tensor=1, expert=2)
    cfg = dataclasses.replace(having(small, train__num_steps=2), mesh=mesh)
    held_out = loop.train(cfg, tmp_path)
    assert (tmp_path / 'report.md').exists()
    assert 0 < held_out['bits_per_byte'] < 16


class Programs:
    """`helios train` as processes of one device each."""

    def __init__(self, cfg: config.Config, root: Path):
        self.root = root
        cfg = having(cfg, train__compilation_cache=str(root / 'xla'))
        small_run.write_config(cfg, root / 'small.py')
        pipeline.prepare(cfg.data, tokenizers.load('bytes'))

    def start(self, workdir: str, signal: int = 0, at_step: int = -1, **environment: str):
        command = [sys.executable, '-c', TAKES_SIGNALS, str(signal), str(at_step), 'train']
        environment = {
            'JAX_PLATFORMS': 'cpu',
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            'JAX_NUM_CPU_DEVICES': '1',
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        } | environment
        return subprocess.Popen(
            [*command, f'--config={self.root}/small.py', f'--workdir={self.root / workdir}'],
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


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
