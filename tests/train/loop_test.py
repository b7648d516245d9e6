"""Whole runs of a very small model, in this process on eight devices."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import chats
import jax
import numpy as np
import pytest
import small_run
from etils import epath
from folders import entries, files
from small_run import recorded, saved

from helios_jax import checkpoint, config, restoring
from helios_jax.checkpoint import manifest
from helios_jax.data import pipeline
from helios_jax.errors import UserError
from helios_jax.evaluate.held_out import held_out
from helios_jax.train import lock, loop, resume
from helios_jax.train import step as steps

pytestmark = pytest.mark.usefixtures('quick_runs')


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr('helios_jax.train.finish.SAMPLE_TOKENS', 3)


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> config.Config:
    return small_run.make_config(tmp_path_factory.mktemp('small'))


@pytest.fixture(scope='module')
def finished(small, tmp_path_factory) -> tuple[config.Config, Path, dict]:
    """A run of ten steps in this process, on eight devices."""
    workdir = tmp_path_factory.mktemp('run')
    cfg = config.replace(
        small,
        {
            'train.num_steps': 10,
            'train.tensorboard': True,
            'train.log_every': 2,
            'train.compiler_options': 'xla_cpu_enable_fast_min_max=false',
        },
    )
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
    metadata = checkpoint.open_step(workdir / 'checkpoints', 10).metadata
    assert metadata['samples'] == 80
    assert metadata['config'] == dataclasses.asdict(cfg.resolve(256))
    assert metadata.keys() >= {'fingerprint', 'tokenizer', 'format_version'}
    assert set(metadata['arrays']) == {'params', 'optimizer'}

    report = (workdir / 'report.md').read_text()
    assert '| xla_cpu_enable_fast_min_max | False |' in report
    assert f'| held-out text | {held_out["bits_per_byte"]:.4f} bits/byte |' in report
    assert re.search(r'\| speed \| [\d,]+ tokens/s \|', report)
    assert '⟦generated from here⟧' in report and 'gzip' in report
    for picture in ('curves', 'layers'):
        assert f']({picture}.png)' in report
        assert (workdir / f'{picture}.png').read_bytes().startswith(b'\x89PNG')
    looked_at = json.loads((workdir / 'layers.json').read_text())
    assert 0 < looked_at['tokens'] <= 8 * 32  # a row a device
    assert [row['layer'] for row in looked_at['sublayers']] == [1, 1, 2, 2]
    # Ten steps from 1/(l + 1).
    gates = [row['gate_mean'] for row in looked_at['sublayers']]
    np.testing.assert_allclose(gates, 1 / np.arange(2, 6), atol=0.05)
    assert list((workdir / 'tensorboard').iterdir())


def test_starting_a_finished_run_again_changes_nothing_but_the_report_it_may_lack(
    finished, tmp_path
):
    cfg, workdir, held_out = finished
    report = (workdir / 'report.md').read_text()
    assert '| xla_cpu_enable_fast_min_max | False |' in report
    before = {p: c for p, c in files(workdir).items() if 'tensorboard' not in p}
    (workdir / 'report.md').unlink()
    assert loop.train(cfg, workdir) == held_out
    assert (workdir / 'report.md').read_text() == report
    assert {p: c for p, c in files(workdir).items() if 'tensorboard' not in p} == before


@pytest.mark.parametrize(
    ('settings', 'named'),
    [
        ({'optimizer.learning_rate': 2e-2}, r'optimizer\.learning_rate=0\.02.*0\.01'),
        ({'model.mlp_dim': 32}, r'model\.mlp_dim=32.*24'),
        ({'train.seed': 1}, r'train\.seed=1.*0'),
        ({'train.num_steps': 9}, r'train\.num_steps=9.*step 10'),
    ],
    ids=str,
)
def test_resuming_with_another_setting_is_refused_before_data_is_prepared_and_writes_nothing(
    finished, settings, named, monkeypatch
):
    cfg, workdir, _ = finished
    before = entries(workdir)
    monkeypatch.setattr(pipeline, 'prepare', lambda *_: pytest.fail('data is prepared'))
    with pytest.raises(UserError, match=named):
        loop.train(config.replace(cfg, {'train.num_steps': 20} | settings), workdir)
    assert entries(workdir) == before


def test_second_run_in_a_workdir_is_refused_before_data_is_prepared_and_writes_nothing(
    finished, monkeypatch
):
    cfg, workdir, _ = finished
    monkeypatch.setattr(pipeline, 'prepare', lambda *_: pytest.fail('data is prepared'))
    with lock.hold(epath.Path(workdir)):
        before = entries(workdir)
        with pytest.raises(UserError, match=f'by process {os.getpid()} on host .*, since'):
            loop.train(config.replace(cfg, {'train.num_steps': 20}), workdir)
        assert entries(workdir) == before


@pytest.fixture
def copied(finished, tmp_path) -> tuple[config.Config, Path]:
    """A copy of the finished run, to be broken."""
    cfg, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / 'run')
    return cfg, tmp_path / 'run'


@pytest.mark.parametrize('which', [(5, 7, 10), (10,)], ids=str)
def test_steps_copied_without_manifests_are_named_and_nothing_is_written_over(
    copied, which, monkeypatch
):
    cfg, workdir = copied
    for step in which:
        (workdir / f'checkpoints/{step}/manifest.json').unlink()
    before = entries(workdir)
    monkeypatch.setattr(pipeline, 'prepare', lambda *_: pytest.fail('data is prepared'))
    begin = 0 if 7 in which else 7
    message = rf'{which[0]} is in the way .*no manifest.json.* would begin at step {begin}\.'
    with pytest.raises(UserError, match=message):
        loop.train(cfg, workdir)
    assert entries(workdir) == before


def test_renamed_step_is_not_gone_on_from(copied, monkeypatch, caplog):
    cfg, workdir = copied
    (workdir / 'checkpoints/10').rename(workdir / 'checkpoints/9')
    state = resume.own_step(epath.Path(workdir), cfg.resolve(256), resume.ITEMS)
    assert state.step == 7
    assert '9 IS DAMAGED: it is step 10 by its metadata' in caplog.text


def test_samples_that_are_not_the_steps_are_refused(copied):
    cfg, workdir = copied
    path = workdir / 'checkpoints/10/metadata/metadata'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'samples': 72}))
    manifest.write(epath.Path(workdir / 'checkpoints/10'))
    with pytest.raises(UserError, match=r'consumed 72 samples.* 10 steps of 8 rows make 80'):
        loop.train(cfg, workdir)


@pytest.mark.slow
def test_run_falls_back_where_only_the_optimizer_is_damaged(copied, caplog):
    cfg, workdir = copied
    files = (workdir / 'checkpoints/10/optimizer/d').iterdir()
    path = max(files, key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b'!')
    loop.train(config.replace(cfg, {'train.num_steps': 10}), workdir)
    assert '10 IS DAMAGED: optimizer' in caplog.text
    names = {p.name for p in (workdir / 'checkpoints').iterdir()}
    assert names >= {'7', '10', '10.damaged'}
    assert not any(row['damage'] for row in checkpoint.list_steps(workdir / 'checkpoints'))


def test_setting_that_a_checkpoint_is_too_old_to_have_counts_as_its_default(copied):
    cfg, workdir = copied
    path = workdir / 'checkpoints/10/metadata/metadata'
    metadata = json.loads(path.read_text())
    del metadata['config']['model']['rope'], metadata['config']['train']['seed']
    path.write_text(json.dumps(metadata))
    manifest.write(epath.Path(workdir / 'checkpoints/10'))
    own = resume.own_step(epath.Path(workdir), config.replace(cfg, {'model.vocab_size': 256}))
    assert own.step == 10


@pytest.mark.parametrize('broken', ['metrics', 'memory'])
def test_what_is_refused_after_preparing_data_writes_nothing_either(copied, broken, monkeypatch):
    cfg, workdir = copied
    if broken == 'metrics':
        (workdir / 'metrics.jsonl').write_text('no json\n{}\n')
    else:

        def refuse(*_):
            raise UserError('no json: memory.actions did not take effect')

        monkeypatch.setattr(loop, 'verified_step', refuse)
    before = entries(workdir)
    with pytest.raises(UserError, match='no json'):
        loop.train(config.replace(cfg, {'train.num_steps': 20}), workdir)
    assert entries(workdir) == before


def test_refused_first_run_leaves_no_workdir(small, tmp_path):
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text/a.txt').write_text('one document cannot be split')
    cfg = config.replace(small, {'data.corpus': str(tmp_path / 'text/*.txt')})
    with pytest.raises(UserError, match='split'):
        loop.train(cfg, tmp_path / 'runs/new')
    assert [path.name for path in tmp_path.iterdir()] == ['text']


@pytest.mark.slow
def test_notebook_may_train_twice_in_one_workdir(small, tmp_path):
    loop.train(config.replace(small, {'train.num_steps': 1}), tmp_path)
    assert loop.train(config.replace(small, {'train.num_steps': 2}), tmp_path)
    assert [line['step'] for line in recorded(tmp_path) if 'loss' in line] == [1, 2]
    assert (tmp_path / lock.NAME).read_text() == ''


def test_resuming_with_changed_data_is_refused_and_writes_nothing(finished):
    cfg, workdir, _ = finished
    before = entries(workdir)
    changed = Path(cfg.data.corpus).parent / '00.txt'
    text = changed.read_text()
    try:
        changed.write_text(text + ' and more')
        with pytest.raises(UserError, match=r'the data of corpus=.* has changed'):
            loop.train(config.replace(cfg, {'train.num_steps': 20}), workdir)
    finally:
        changed.write_text(text)
    assert entries(workdir) == before


@pytest.mark.slow
def test_a_batch_of_many_documents_has_a_program_of_its_own(small, tmp_path, monkeypatch):
    kinds, made, compiled, ran = iter([True, True, False, True]), [], [], []

    def compile_step(setup, state, batch, *, few):
        compiled.append(few)
        if not made:  # on a CPU the two programs are one
            made.append(steps.compile_step(setup, state, batch, few=few))
        run = made[0].run
        return made[0]._replace(run=lambda *arguments: ran.append(few) or run(*arguments))

    monkeypatch.setattr(loop, 'few_documents', lambda data, own: next(kinds))
    monkeypatch.setattr(loop, 'compile_step', compile_step)
    loop.train(config.replace(small, {'train.num_steps': 4}), tmp_path)
    assert (compiled, ran) == ([True, False], [True, True, False, True])


@pytest.mark.slow
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
    cfg = config.replace(small, {'train.log_every': 100})  # the checkpoint at 10 is first to look
    with pytest.raises(UserError, match=f'{figure} is nan at step 10.*since step 7'):
        loop.train(cfg, tmp_path)
    rows = checkpoint.list_steps(tmp_path / 'checkpoints')
    assert [row['step'] for row in rows] == [5, 7]
    assert not any(row['damage'] for row in rows)
    parameters = jax.tree.leaves(saved(cfg, tmp_path, 7))
    assert all(np.isfinite(x).all() for x in parameters)
    assert not (tmp_path / 'report.md').exists()


@pytest.mark.slow
def test_fine_tuning_starts_from_another_runs_parameters(small, finished, tmp_path):
    cfg, workdir, _ = finished
    parent = files(workdir)
    # Steps too small to move: what the checkpoint holds is what the run began with.
    tuned = config.replace(
        small,
        {
            'train.init_from': str(workdir),
            'train.num_steps': 1,
            'train.seed': 5,
            'optimizer.learning_rate': 1e-30,
        },
    )
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
    tuned = config.replace(small, {'train.init_from': str(workdir), 'data.tokenizer': path})
    with pytest.raises(UserError, match=r'another tokenizer \(256 tokens\).*300'):
        loop.train(tuned, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_a_run_ends_with_its_report_on_a_mesh_that_splits_the_sequence(small, tmp_path):
    mesh = config.Mesh(fsdp=2, context=2, tensor=1, expert=2)
    cfg = config.replace(small, {'train.num_steps': 2, 'mesh': mesh})
    held_out = loop.train(cfg, tmp_path)
    assert (tmp_path / 'report.md').exists()
    assert 0 < held_out['bits_per_byte'] < 16


@pytest.mark.slow
def test_the_chat_template_of_a_run_travels_with_it_and_must_not_change(small, tmp_path):
    template, talks = tmp_path / 'my.jinja', tmp_path / 'talks.jsonl'
    template.write_text(chats.CHATML)
    numbered = [[{'role': 'user', 'content': f'{i}'}, *chats.MESSAGES[1:]] for i in range(40)]
    talks.write_text('\n'.join(json.dumps({'messages': messages}) for messages in numbered))
    settings = {
        'data.corpus': str(talks), 'data.chat_template': str(template), 'train.num_steps': 2,
        'data.cache_dir': str(tmp_path / 'cache'),
    }  # fmt: skip
    cfg, workdir = config.replace(small, settings), tmp_path / 'run'
    figures = loop.train(cfg, workdir)
    template.write_text(chats.CHATML_BLOCKS)
    before = entries(workdir)
    longer = config.replace(cfg, {'train.num_steps': 3})
    with pytest.raises(UserError, match=r'has changed since .* another chat template'):
        loop.train(longer, workdir)
    assert entries(workdir) == before
    template.unlink()
    restored = restoring.restore(workdir)
    assert restored.tokenizer.chat_template.source == chats.CHATML
    data = restoring.read_metadata(workdir)['data']
    assert data['train']['chat_template'] == restored.tokenizer.chat_template.fingerprint
    again = held_out(restored, num_rows=cfg.train.eval_rows, trained_on=data)
    assert again['bytes'] == figures['bytes']
    # Its contents are what matters: the file itself may lie elsewhere.
    moved = config.replace(longer, {'data.chat_template': 'moved.jinja'}).resolve(256)
    resume.require_resumable(
        epath.Path(workdir), moved, checkpoint.open_step(workdir / 'checkpoints')
    )


@pytest.mark.slow
def test_a_run_ends_with_the_gradients_of_its_layers(tmp_path, small):
    """Of the running average, with rows and weights over all devices, by the run's own policy."""
    settings = {'train.num_steps': 2, 'train.ema': 0.5, 'memory.policy': 'fp8'}
    loop.train(config.replace(small, settings), tmp_path, layer_gradients=True)
    rows = json.loads((tmp_path / 'layers.json').read_text())['sublayers']
    assert [row['sublayer'] for row in rows] == ['attention', 'mlp'] * small.model.num_layers
    for name in ('stream_rms', 'stream_gradient', 'weights_gradient'):
        assert all(row[name] > 0 for row in rows)
