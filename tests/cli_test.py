"""The command line: what each command prints, and what ends it."""

import asyncio
import contextlib
import dataclasses
import errno
import gc
import importlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from etils import epath
from refusals import refused

from helios_jax import checkpoint, cli, config, options
from helios_jax.checkpoint import manifest
from helios_jax.data import pipeline

pytestmark = pytest.mark.usefixtures('quick_runs')


def test_a_tokenizer_of_another_vocabulary_than_the_checkpoints_is_refused(root, capsys, tmp_path):
    cfg = config.from_dict(json.loads((root / 'run' / 'config.json').read_text()))
    cfg = config.replace(cfg, {'model.vocab_size': 300})
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=1)) as writer:
        metadata = {'config': dataclasses.asdict(cfg), 'tokenizer': 'tokenizer.json'}
        writer.save(1, {'params': {'w': np.zeros(3)}}, metadata)
    directory = checkpoint.tokenizer_directory(tmp_path / 'checkpoints')
    directory.mkdir()
    corpus = str(root / 'text' / '*.txt')
    pipeline.train_tokenizer(corpus, 280, str(directory / 'tokenizer.json'))
    line = refused(capsys, 'eval', f'--checkpoint={tmp_path}')
    assert re.search(r'helios: tokenizer.*280 tokens.*300.*put back', line)


def run_json(capsys, *arguments) -> list[dict]:
    cli.main([*arguments, '--json'])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_eval_repeats_the_runs_own_figures(root, capsys):
    last = [json.loads(x) for x in (root / 'run' / 'metrics.jsonl').read_text().splitlines()][-1]
    (figures,) = run_json(capsys, 'eval', f'--checkpoint={root}/run', '--rows=11')
    for name, value in figures.items():
        np.testing.assert_allclose(value, last[f'eval/{name}'], rtol=1e-5, err_msg=name)
    (of_best,) = run_json(capsys, 'eval', f'--checkpoint={root}/run', '--rows=11', '--step=best')
    assert of_best['bits_per_byte'] <= figures['bits_per_byte'] * (1 + 1e-6)
    (of_text,) = run_json(
        capsys, 'eval', f'--checkpoint={root}/run', f'--text={root}/text/1*.txt', '--row_length=64',
        '--yarn=dynamic',
    )  # fmt: skip
    text = b''.join(path.read_bytes() for path in (root / 'text').glob('1*.txt'))
    assert of_text['bytes'] == len(text)
    cli.main(['eval', f'--checkpoint={root}/run', '--rows=11'])
    first, *_, last_line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf'held-out text +{figures["bits_per_byte"]:.4f}  bits/byte', first)
    assert re.fullmatch(rf'held-out bytes +{figures["bytes"]:,.0f}', last_line)
    cli.main(['eval', f'--checkpoint={root}/run', f'--text={root}/text/1*.txt', '--rows=1'])
    assert 'held-out' not in capsys.readouterr().out


def test_generate_continues_each_prompt(root, capsys):
    arguments = ['generate', f'--checkpoint={root}/run', '--max_tokens=5', '--seed=3']
    made = run_json(capsys, *arguments, '--prompt=alpha', '--prompt=beta ga')
    assert [row['prompt'] for row in made] == ['alpha', 'beta ga']
    assert run_json(capsys, *arguments, '--prompt=alpha', '--prompt=beta ga') == made
    cli.main([*arguments, '--prompt=alpha', '--temperature=0'])
    assert capsys.readouterr().out.startswith('alpha')


@pytest.mark.parametrize('command', ['eval', 'generate'])
def test_a_checkpoint_of_another_machines_attention_is_read_with_what_there_is(
    command, root, capsys, tmp_path
):
    shutil.copytree(root / 'run', tmp_path / 'run')
    folder = tmp_path / 'run/checkpoints/10'
    metadata = json.loads((folder / 'metadata/metadata').read_text())
    metadata['config']['model']['attention'] = 'tpu'
    (folder / 'metadata/metadata').write_text(json.dumps(metadata))
    manifest.write(epath.Path(folder))
    arguments = [] if command == 'eval' else ['--prompt=alpha', '--max_tokens=3', '--temperature=0']
    found = [
        run_json(capsys, command, f'--checkpoint={directory}/run', *arguments)
        for directory in (root, tmp_path)
    ]
    assert found[0] == found[1]


def test_ckpt_lists_the_steps(root, capsys):
    rows = run_json(capsys, 'ckpt', 'ls', f'{root}/run')
    assert [row['step'] for row in rows] == [5, 10]
    assert all(row['bytes'] > 0 and row['metrics']['bits_per_byte'] > 0 for row in rows)
    # The directory of the checkpoints themselves will do.
    assert run_json(capsys, 'ckpt', 'ls', f'{root}/run/checkpoints') == rows


def test_damaged_data_is_one_line_until_it_is_rebuilt(root, capsys, tmp_path):
    prepare = ['data', 'prepare', f'--config={root}/small.py']
    prepare += [f'--config.data.cache_dir={tmp_path}', '--config.data.row_length=37']
    before = run_json(capsys, *prepare)
    assert all(row['lost_bytes'] == 0 for row in before)
    next((tmp_path / 'rows').glob('*/*array_record*')).unlink()
    line = refused(capsys, *prepare)
    assert re.search(r'helios: .*/rows/.* is damaged \(missing.*data prepare --rebuild', line)
    assert run_json(capsys, *prepare, '--rebuild') == before == run_json(capsys, *prepare)


def test_explain_prints_every_setting_or_those_that_are_named(capsys):
    cli.main(['explain'])
    lines = capsys.readouterr().out.splitlines()
    described = config.describe()
    assert len(lines) == 2 * len(described) < 240
    assert lines[::2] == [f'{name} = {default}' for name, (default, _) in described.items()]
    assert all(line.startswith('    ') and line.strip() for line in lines[1::2])
    cli.main(['explain', 'model.gmu'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(dataclasses.fields(config.GMU))
    assert all(line.startswith('model.gmu.') for line in lines[::2])
    cli.main(['explain', 'config.train.seed'])
    assert capsys.readouterr().out.startswith('train.seed = 0\n')


def test_a_dry_run_prints_the_plan_and_touches_nothing(root, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.chdir(tmp_path)
    cli.main([
        'train', '--config=tiny', '--dry_run', '--num_devices=4', '--config.model.num_layers=6',
        f'--config.data.cache_dir={tmp_path}/cache', f'--workdir={tmp_path}/run',
        f'--config.train.compilation_cache={tmp_path}/xla',
        f'--config.data.corpus={tmp_path}/there_is_none/*.txt',
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert '"num_layers": 6' in printed and '"vocab_size": 256' in printed
    for part in ('# Config', '# Mesh of 4 devices', '# Sharding rules', '# Parameters'):
        assert part in printed
    for name in ('tokens per step', 'FLOPs per token', 'params GiB', 'optimizer GiB', '6×'):
        assert name in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'devices'),
    [('helios_1b', 1), ('helios_8b', 16), ('hydra_8x7b', 32), ('hydra_30b_a3b', 32)],
)
def test_large_configs_describe_themselves_on_the_machine_they_are_for(
    name, devices, capsys, tmp_path
):
    size = importlib.import_module(f'helios_jax.configs.{name}').get_config().model.vocab_size
    vocabulary = {'<|bos|>': 0, '<|eos|>': 1} | {str(i): i for i in range(2, size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='2'))
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    cli.main([
        'train', f'--config={name}', '--dry_run', f'--num_devices={devices}',
        f'--config.data.tokenizer={tmp_path}/tokenizer.json',
    ])  # fmt: skip
    assert f'# Mesh of {devices} devices' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (OSError(errno.ENOSPC, 'No space left on device', 'w/x'), 'w/x: No space left.*; free'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device; free'),
        (OSError(errno.EROFS, 'Read-only file system', 'w'), 'w: Read-only.*; choose'),
        (OSError(errno.EACCES, 'Permission denied', 'w'), 'w: Permission denied; allow'),
        (OSError(errno.ENOTDIR, 'Not a directory', 'w/x'), 'w/x: Not a directory; choose'),
        (OSError(errno.EISDIR, 'Is a directory', 'w'), 'w: Is a directory; name a file'),
        (OSError(errno.ELOOP, 'Too many levels of symbolic links', 'w'), 'w: Too many.*; remove'),
        (OSError(errno.ENAMETOOLONG, 'File name too long', 'w'), 'w: File name.*; choose a short'),
        (OSError(errno.EXDEV, 'Invalid cross-device link', 'a', None, 'b'), 'a → b: Invalid'),
        (OSError(errno.EIO, 'Input/output error', 'w'), r'w: Input/output error\.$'),
        (TimeoutError('the bucket\ndid not answer'), r'the bucket did not answer\.$'),
        (ConnectionResetError(), r'ConnectionResetError\.$'),
        (BrokenPipeError(errno.EPIPE, 'Broken pipe'), r'Broken pipe\.$'),  # of another process
    ],
    ids=repr,
)
def test_what_the_system_refuses_is_one_line(error, line, monkeypatch, capsys):
    def refuse(argv):
        raise error

    monkeypatch.setattr(options, 'explain_command', refuse)
    printed = refused(capsys, 'explain', alone=True)
    assert re.search(f'^helios: {line}', printed), printed


@pytest.mark.slow
def test_the_program_itself_exits_with_code_2_and_one_line():
    done = start(['train', '--config.model.num_heads=3', '--workdir=/nowhere/at/all'])
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('helios: ') and done.stderr.count('\n') == 1
    assert 'num_heads=3' in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_the_program_quietly():
    command = [sys.executable, '-m', 'helios_jax', 'explain']
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as program:
        program.stdout.close()
        assert program.stderr.read() == b''
    assert program.returncode == 0


def test_an_interrupt_anywhere_is_one_quiet_line(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(options, 'explain_command', interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main(['explain'])
    assert (caught.value.code, capsys.readouterr().err) == (130, 'helios: interrupted.\n')


def start(arguments, **settings) -> subprocess.CompletedProcess:
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'} | settings.pop('env', {})
    command = [sys.executable, '-m', 'helios_jax', *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, **settings
    )


def test_an_interrupt_while_importing_is_one_quiet_line(tmp_path):
    # In the place of a library that every command needs.
    (tmp_path / 'ml_collections.py').write_text(
        'import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n'
    )
    done = start(
        ['train', '--config=tiny', '--workdir=w'],
        env={'PYTHONPATH': str(tmp_path)},
        # Where the tests run in the background, a shell has switched it off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'helios: interrupted.\n')


def test_a_terminal_that_lacks_letters_gets_all_the_others():
    done = start(['explain', 'model.rope.base'], env={'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('model.rope.base = 10000.0\n    \\u03b8_i')


def test_what_asyncio_tells_of_a_failed_save_is_no_news_and_all_else_is():
    def task_that_nobody_awaits(path):
        code = compile('async def write():\n    raise OSError(28, "no space")', path, 'exec')
        names = {}
        exec(code, names)

        async def leave():
            await asyncio.wait([asyncio.create_task(names['write']())])

        asyncio.run(leave())
        gc.collect()

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger('asyncio')
    logger.addHandler(handler)
    logger.addFilter(cli.is_news)
    try:
        task_that_nobody_awaits('/x/orbax/checkpoint/serialization.py')
        assert told == []
        task_that_nobody_awaits('/x/mine.py')
        assert 'never retrieved' in told[0]
    finally:
        logger.removeHandler(handler)
        logger.removeFilter(cli.is_news)


def test_coroutines_that_a_failed_save_leaves_behind_are_no_news():
    script = (
        'from helios_jax import cli\n'
        'cli.quiet_failed_saves()\n'
        'async def write(): pass\n'
        'write()\n'
        'import warnings; warnings.warn("of another kind", RuntimeWarning)'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert 'never awaited' not in done.stderr and 'tracemalloc' not in done.stderr
    assert 'of another kind' in done.stderr


@pytest.mark.slow
def test_a_save_that_fails_is_one_line(root, tmp_path):
    limit = 20_000  # bytes of a file: less than the arrays take, more than all else
    done = start(
        ['train', f'--config={root}/small.py', f'--workdir={tmp_path}/run'],
        # Python 3.11 would leave compiled modules cut at the limit, and none could import them.
        env={'PYTHONDONTWRITEBYTECODE': '1'},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.search(r'^helios: checkpoint \S+ could not be saved .*; free some space', line)
