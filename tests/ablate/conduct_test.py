"""A whole study: from its design to its results, begun, gone on with, grown and refused."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import made_up_study
import pytest
import small_run
from etils import epath
from folders import files
from refusals import refused

from helios_jax import config
from helios_jax.ablate import conduct, definition, runs, variants
from helios_jax.ablate.design import sized_arms
from helios_jax.errors import UserError
from helios_jax.train import lock


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> config.Config:
    return small_run.make_config(tmp_path_factory.mktemp('base'))


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(runs, 'POLL_SECONDS', 0.005)


def conducted(made, workdir: Path, starter, **changes):
    arms = sized_arms(made, dict.fromkeys(made.configs, 256))
    settings = {'starter': starter, 'command': 'helios ablate', 'workers': 2} | changes
    return conduct.conduct(made, arms, workdir, **settings)


def test_a_study_is_searched_run_and_collected(base, tmp_path):
    made = made_up_study.make(base, learning_rates=(1e-3, 2e-3), equal=())
    starter = made_up_study.Starter(tmp_path / 'journal', failing=('gated',))
    results = conducted(made, tmp_path / 'w', starter)
    assert [arm.name for arm in results.arms] == ['plain', 'gated', 'deep']
    compared = [run for run in results.runs if not run.swept]
    assert {(r.arm, r.seed, r.learning_rate) for r in compared if r.state == 'done'} == {
        (arm, seed, 2e-3) for arm in ('plain', 'deep') for seed in (0, 1)
    }
    assert {run.reason for run in compared if run.arm == 'gated'} == {
        'no learning rate of the search gave a finished run'
    }
    assert len([run for run in results.runs if run.swept]) == 6
    assert results.config['model']['embed_dim'] == 16
    assert results.notes[0].startswith('Equal in all arms: nothing; not held equal: tokens, ')
    # Once more: nothing is left to run, and the results are the same.
    again = conducted(made, tmp_path / 'w', starter)
    assert len(starter.events('start')) == 10
    assert repr(again) == repr(results)


def test_a_study_may_grow_and_not_change(base, tmp_path):
    workdir, starter = tmp_path / 'w', made_up_study.Starter(tmp_path / 'journal')
    fewer = {name: made_up_study.ARMS[name] for name in ('plain', 'gated')}
    conducted(made_up_study.make(base, arms=fewer), workdir, starter)
    conducted(made_up_study.make(base, seeds=3), workdir, starter)
    assert len(starter.events('start')) == 9
    before = files(workdir)
    deeper = made_up_study.ARMS | {'deep': {'model.num_layers': 3}}
    wider = config.replace(base, {'model.mlp_dim': 32})
    for made, line in (
        (made_up_study.make(base), '--seeds=2, but .* begun with 3; it may have more'),
        (made_up_study.make(base, seeds=3, arms=fewer), r'arms.deep.*was begun with'),
        (made_up_study.make(base, seeds=3, arms=deeper), 'arms.deep.model.num_layers=3.* with 5'),
        (made_up_study.make(wider, seeds=3), 'config.model.mlp_dim=32, .* with 24; set it back'),
        (made_up_study.make(base, seeds=3, metric='eval/loss'), "metric='eval/loss'"),
    ):
        with pytest.raises(UserError, match=line):
            conducted(made, workdir, starter)
    assert files(workdir) == before
    moved = config.replace(base, {'train.compilation_cache': 'elsewhere'})
    definition.require_same(made_up_study.make(moved, seeds=3), workdir)
    # A setting that there was not when the study began has the value that it would have had.
    begun = json.loads((workdir / definition.FILE).read_text())
    assert begun['config']['model'].pop('norm_scale') == 'plain'
    (workdir / definition.FILE).write_text(json.dumps(begun))
    definition.require_same(made_up_study.make(base, seeds=3), workdir)


def test_a_budget_says_what_it_dropped(base, tmp_path):
    starter = made_up_study.Starter(tmp_path / 'journal', seconds=0.3)
    made = made_up_study.make(base, seeds=9)
    results = conducted(made, tmp_path / 'w', starter, budget_minutes=0.5 / 60)
    shared, line = results.notes[1:]
    assert shared.startswith('2 runs at a time')
    assert re.search('Dropped from the seeds: .*seed_8.*budget_minutes=0.00833', line)
    states = {(run.seed, run.state) for run in results.runs}
    assert {state for seed, state in states if seed == 8} == {'missing'}
    assert len(states) == 9  # no seed was run in part


def test_one_process_conducts_a_study(base, tmp_path):
    made, starter = made_up_study.make(base), made_up_study.Starter(tmp_path / 'journal')
    with (
        lock.hold(epath.Path(tmp_path) / 'w'),
        pytest.raises(UserError, match='w is being written by process'),
    ):
        conducted(made, tmp_path / 'w', starter)
    assert starter.events('start') == []
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    with pytest.raises(UserError, match='holds a run of helios train'):
        conducted(made, tmp_path / 'run', starter)


def test_text_that_is_too_short_for_the_longest_row_is_refused_before_anything_runs(base, tmp_path):
    starter = made_up_study.Starter(tmp_path / 'journal')
    made = made_up_study.make(base, lengths=(64, 5000), methods=('none',))
    with pytest.raises(
        UserError, match=r'no document of the held-out split of .* has the 5000 tok'
    ):
        conducted(made, tmp_path / 'w', starter)
    assert starter.started == [] and not (tmp_path / 'w').exists()


def test_finished_runs_are_scored_once_also_when_a_study_asks_for_it_later(base, tmp_path):
    starter = made_up_study.Starter(tmp_path / 'journal', failing=('deep',))
    conducted(made_up_study.make(base), tmp_path / 'w', starter)
    assert len(starter.events('start')) == 6 and starter.events('score') == []
    assert 'lengths' not in json.loads((tmp_path / 'w' / definition.FILE).read_text())
    starter.unscored = ('gated',)
    longer = {'lengths': (64,), 'methods': ('none', 'pi')}
    results = conducted(made_up_study.make(base, **longer), tmp_path / 'w', starter)
    assert len(starter.events('start')) == 6 and len(starter.events('score')) == 4
    states = {(run.arm, run.state, run.unscored, len(run.longer)) for run in results.runs}
    line = 'the loss is nan at step 3; lower the learning rate.'
    assert states == {
        ('plain', 'done', '', 3), ('gated', 'done', 'the GPU has no room.', 0),
        ('deep', 'failed', '', 0),
    }  # fmt: skip
    assert {run.reason for run in results.runs if run.arm == 'deep'} == {line}
    conducted(made_up_study.make(base, **longer), tmp_path / 'w', starter)
    assert len(starter.events('score')) == 4
    # Other lengths are scored in the place of these.
    longer['lengths'] = (64, 96)
    results = conducted(made_up_study.make(base, **longer), tmp_path / 'w', starter)
    assert len(starter.events('score')) == 6  # what failed waits for somebody to remove its line
    plain = [run.longer for run in results.runs if run.arm == 'plain']
    assert [*plain[0]] == [('none', 32), ('none', 64), ('none', 96), ('pi', 64), ('pi', 96)]
    assert plain[0]['pi', 96] == pytest.approx(2 + 2 / 2)


def test_a_corpus_that_is_not_there_is_refused_before_anything_runs(base, tmp_path):
    gone = config.replace(base, {'data.corpus': str(tmp_path / 'none' / '*.txt')})
    starter = made_up_study.Starter(tmp_path / 'journal')
    with pytest.raises(UserError, match='none'):
        conducted(made_up_study.make(gone), tmp_path / 'w', starter)
    assert files(tmp_path) == {}


def test_the_command_says_how_to_repeat_itself(base, tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')

    def note(design, arms, workdir, **settings):
        seen.update(settings, design=design, arms=arms, workdir=workdir)
        raise UserError('enough')

    monkeypatch.setattr(conduct, 'conduct', note)
    small_run.write_config(base, tmp_path / 'small.py')
    arms = {'a': {}, 'b': {'model.num_layers': 3}, 'c': {'model.num_layers': 4}}
    config = str(tmp_path / 'small.py')
    path = made_up_study.write_study(tmp_path / 'mine.py', config=config, arms=arms)
    flags = [f'--study={path}', f'--workdir={tmp_path}/w', '--workers=2', '--seeds=4', '--arms=b']
    refused(capsys, 'ablate', *flags, '--config.train.num_steps=7', '--config.train.seed=3')
    repeat = f'helios ablate --study={path} --workdir={tmp_path}/w --seeds=4 --arms=a,b'
    assert seen['command'] == f'{repeat} --config.train.num_steps=7 --config.train.seed=3'
    groups = variants.seed_variants(seen['design'], tmp_path, dict.fromkeys('ab', 1e-2))
    assert [v.config.train.seed for v in groups[0]] == [3, 3]
    assert (len(groups), seen['workers']) == (4, 2)
    definition.write(seen['design'], tmp_path / 'w')
    # An arm that has run stays in the study.
    refused(capsys, 'ablate', *flags[:2], '--arms=c', '--config.train.num_steps=7')
    assert list(seen['design'].configs) == ['a', 'b', 'c']


@pytest.mark.slow
def test_a_killed_study_of_real_trainings_goes_on_after_the_run_that_it_left(base, tmp_path):
    small_run.write_config(base, tmp_path / 'small.py')
    diverges = {'optimizer.learning_rate': 1e9, 'optimizer.clip_norm': 0.0}
    study = made_up_study.write_study(
        tmp_path / 'mine.py', config=str(tmp_path / 'small.py'), arms={'a': {}, 'b': diverges},
        lengths=(80,), methods=('none', 'dynamic'),
    )  # fmt: skip
    flags = [f'--study={study}', f'--workdir={tmp_path}/w', '--seeds=1', '--nointerval']
    command = [sys.executable, '-m', 'helios_jax', 'ablate', *flags]
    environment = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    metrics = tmp_path / 'w/a/seed_0/metrics.jsonl'
    with subprocess.Popen(command, env=environment) as process:
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.05)
        process.kill()  # its run goes on
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search('^a +[0-9.]+', done.stdout, re.M) and 'Report: ' in done.stdout
    steps = [line['step'] for line in small_run.recorded(metrics.parent) if 'loss' in line]
    assert steps == list(range(1, 31))
    assert (tmp_path / 'w/a/seed_0.log').read_text().count('Training ') == 1
    assert re.match('the loss is (nan|inf) at step', (tmp_path / 'w/b/seed_0.failed').read_text())
    report = (tmp_path / 'w/report.md').read_text()
    assert 'the loss is' in report
    scores = json.loads((tmp_path / 'w/a/seed_0/lengths/lengths.json').read_text())['rows']
    own, bare, _, dynamic = (row['sliding_bits_per_byte'] for row in scores)
    assert f'| a | 32 | none | 1 | {own:.4f} |' in report and 1 < own < bare
    assert f'| a | 80 | dynamic | 1 | {dynamic:.4f} | {dynamic - bare:+.4f} |' in report
