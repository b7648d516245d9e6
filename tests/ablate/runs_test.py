"""Runs of a study: paired, each once, whatever fails, stops or is killed in between."""

import collections
import fcntl
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import made_up_study
import pytest

from helios_jax import config
from helios_jax.ablate import collect, runs, variants
from helios_jax.ablate.design import sized_arms
from helios_jax.parallel import cluster
from helios_jax.train import lock

RATES = (1e-3, 2e-3, 3e-3)
REFUSED = ['-S', '-E', '-c', 'raise SystemExit(2)']  # as a run whose workdir another one writes


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(runs, 'POLL_SECONDS', 0.005)


def run(groups, starter, workers=2, minutes=0.0, stop=None):
    budget = runs.Budget(minutes, workers)
    stop = stop or cluster.StopRequest()
    return runs.run_groups(groups, starter, workers=workers, budget=budget, stop=stop)


def seeds(tmp_path: Path, **changes):
    made = made_up_study.make(**changes)
    rates = dict.fromkeys(made.configs, 1e-3)
    return variants.seed_variants(made, tmp_path / 'study', rates)


def test_runs_of_a_seed_differ_in_their_arm_alone(tmp_path):
    groups = seeds(tmp_path, seeds=3)
    assert [[v.label for v in group] for group in groups][1] == [
        'plain/seed_1', 'gated/seed_1', 'deep/seed_1'
    ]  # fmt: skip
    for number, group in enumerate(groups):
        assert {v.config.train.seed for v in group} == {number}
        assert len({v.config.data for v in group}) == 1
    searched = variants.search_variants(made_up_study.make(learning_rates=RATES), tmp_path)
    assert {v.config.train.seed for group in searched for v in group} == {1000}
    assert [v.directory.name for v in searched[1]] == ['lr_0.001', 'lr_0.002', 'lr_0.003']


def test_a_run_is_trained_by_what_differs_from_its_config():
    made = made_up_study.make(seeds=2)
    variant = variants.seed_variants(made, Path('w'), {'deep': 2e-3})[1][0]
    command = variants.command(variant, 'tiny')
    assert command[:3] == ['train', '--config=tiny', '--workdir=w/deep/seed_1']
    for setting in ('train.seed=1', 'model.num_layers=5', 'optimizer.learning_rate=0.002'):
        assert f'--config.{setting}' in command
    assert not [argument for argument in command if 'data.corpus' in argument]  # as in tiny


@pytest.mark.parametrize('workers', [1, 3])
def test_each_run_is_started_once_and_no_more_than_the_workers_at_a_time(workers, tmp_path):
    groups = seeds(tmp_path, seeds=3)
    starter = made_up_study.Starter(tmp_path / 'journal')
    assert run(groups, starter, workers) == []
    expected = sorted(str(v.directory) for group in groups for v in group)
    assert sorted(starter.events('start')) == sorted(starter.events('end')) == expected
    open_runs, most = 0, 0
    for line in starter.journal.read_text().splitlines():
        open_runs += 1 if line.startswith('start') else -1
        most = max(most, open_runs)
    assert most <= workers
    run(groups, starter, workers)
    assert len(starter.events('start')) == len(expected)


def test_a_failed_run_is_kept_with_its_line_and_stops_no_other(tmp_path):
    groups = seeds(tmp_path)
    starter = made_up_study.Starter(tmp_path / 'journal', failing=('gated',))
    run(groups, starter)
    by_state = collections.Counter(variants.told(v) for group in groups for v in group)
    line = 'failed: the loss is nan at step 3; lower the learning rate.'
    assert by_state == {'done': 4, line: 2}
    run(groups, starter)
    assert len(starter.events('start')) == 6
    groups[0][1].beside('.failed').unlink()  # tried again, by hand
    run(groups, made_up_study.Starter(tmp_path / 'journal'))
    assert variants.told(groups[0][1]) == 'done'


def test_a_study_killed_at_any_moment_repeats_no_finished_run(tmp_path, monkeypatch):
    groups = seeds(tmp_path, seeds=3)
    starter = made_up_study.Starter(tmp_path / 'journal', seconds=0.03)
    rng, sleep, kills = random.Random(0), time.sleep, 0

    def killed(seconds):
        sleep(seconds)
        if not next(countdown, 0):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.time, 'sleep', killed)
        for _ in range(20):
            countdown = iter(range(rng.randrange(1, 14), 0, -1))
            try:
                run(groups, starter)
            except KeyboardInterrupt:
                kills += 1
    assert kills >= 5
    run(groups, starter)
    events = starter.journal.read_text().splitlines()
    for variant in [v for group in groups for v in group]:
        own = [line.split()[0] for line in events if line.endswith(str(variant.directory))]
        done = own.index('end')
        # A run killed between its last line and its report has only the report left to do.
        assert own[done:].count('end') <= 2 and variants.finished(variant)
        assert variants.failure(variant) == ''
    assert len(starter.started) > 9


def test_a_signal_stops_what_runs_and_starts_no_more(tmp_path):
    groups = seeds(tmp_path, seeds=3)
    starter, stop = made_up_study.Starter(tmp_path / 'journal', seconds=60), cluster.StopRequest()
    threading.Timer(0.3, stop, (15, None)).start()
    begin = time.monotonic()
    assert run(groups, starter, stop=stop) == []
    assert time.monotonic() - begin < 30
    assert len(starter.events('start')) <= 2
    assert not [v for group in groups for v in group if variants.failure(v)]


def test_a_run_that_a_killed_study_left_behind_is_waited_for(tmp_path):
    groups = seeds(tmp_path)
    variant = groups[1][0]
    variant.directory.mkdir(parents=True)
    starter = made_up_study.Starter(tmp_path / 'journal')
    with (variant.directory / lock.NAME).open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert variants.held(variant)
        worker = threading.Thread(target=run, args=(groups, starter))
        worker.start()
        time.sleep(0.2)
        assert starter.started == []  # not beside it, either: its worker's device is taken
        (variant.directory / 'report.md').write_text('done')
    worker.join(30)
    assert not worker.is_alive()
    assert sorted(starter.started) == sorted(
        v.label for group in groups for v in group if v != variant
    )


def test_a_run_left_behind_that_locks_late_is_waited_for_too(tmp_path):
    group = seeds(tmp_path)[0]
    starter, refused = made_up_study.Starter(tmp_path / 'journal'), []
    group[0].directory.mkdir(parents=True)
    with (group[0].directory / lock.NAME).open('w') as file:

        def start(worker, variant, log):
            if refused:
                return starter(worker, variant, log)
            fcntl.flock(file, fcntl.LOCK_EX)
            refused.append(variant)
            return starter.launch(REFUSED, log)

        worker = threading.Thread(target=run, args=([group], start, 1))
        worker.start()
        time.sleep(0.5)
        assert refused == group[:1] and starter.started == []
        (group[0].directory / 'report.md').write_text('done')
    worker.join(30)
    assert not worker.is_alive() and variants.failure(group[0]) == ''
    assert starter.started == [variant.label for variant in group[1:]]


def test_a_run_that_ends_while_it_is_looked_at_is_not_repeated(tmp_path, monkeypatch):
    (variant,) = group = seeds(tmp_path)[0][:1]
    variant.directory.mkdir(parents=True)

    def ends(variant):  # its report is written just before its lock is let go
        (variant.directory / 'report.md').write_text('done')
        return False

    monkeypatch.setattr(runs, 'held', ends)
    starter = made_up_study.Starter(tmp_path / 'journal')
    assert run([group], starter) == [] and starter.started == []
    (variant.directory / 'report.md').unlink()
    with (tmp_path / 'output').open('wb') as log:
        running = runs.Running(0, variant, lambda *_: starter.launch(REFUSED, log))
    running.process.wait()
    running.end(stopped=False)
    assert variants.told(variant) == 'done' and variants.failure(variant) == ''


LONGER = {'lengths': (512,), 'methods': ('none', 'yarn')}


def test_a_worker_scores_a_run_that_it_has_trained_and_the_others_go_on(tmp_path):
    groups = seeds(tmp_path, **LONGER)
    starter = made_up_study.Starter(tmp_path / 'journal', failing=('gated',), unscored=('deep',))
    run(groups, starter)
    assert sorted(starter.events('score')) == sorted(
        str(v.directory) for group in groups for v in group if v.arm != 'gated'
    )
    told = {v.label: variants.told(v) for group in groups for v in group}
    assert told['plain/seed_1'] == 'done'
    assert told['deep/seed_1'] == 'trained, but its scoring failed: the GPU has no room.'
    assert told['gated/seed_1'].startswith('failed: the loss is nan')
    (groups[0][2].directory / 'lengths.failed').unlink()
    (groups[0][0].directory / 'lengths' / 'lengths.json').write_text('{"torn')
    run(groups, made_up_study.Starter(tmp_path / 'journal'))
    assert {variants.told(v) for v in groups[0] if v.arm != 'gated'} == {'done'}
    assert len(starter.events('start')) == 6 and len(starter.events('score')) == 4 + 2


def test_a_finished_run_is_scored_by_what_the_study_asks_for():
    changes = {'data.row_length': 40, 'train.batch_rows': 24}
    made = made_up_study.make(base=config.replace(config.Config(), changes), **LONGER)
    variant = variants.seed_variants(made, Path('w'), {'deep': 2e-3})[1][0]
    assert variants.command(variant, 'tiny')[0] == 'train'
    assert variants.scoring(variant) == [
        'eval', '--checkpoint=w/deep/seed_1', '--lengths=40,512', '--methods=none,yarn',
        '--trials=0', '--stride=20', '--batch_rows=24', '--output=w/deep/seed_1/lengths',
    ]  # fmt: skip
    made = made_up_study.make(learning_rates=RATES, **LONGER)
    assert {v.lengths for v in variants.search_variants(made, Path('w'))[0]} == {None}


def test_a_scoring_that_a_killed_study_left_behind_is_waited_for(tmp_path):
    (variant,) = group = seeds(tmp_path, **LONGER)[0][:1]
    variant.directory.mkdir(parents=True)
    (variant.directory / 'report.md').write_text('done')
    assert not variants.held(variant)
    left = [sys.executable, '-S', '-c', 'input()']
    with variants.log_file(variant).open('ab') as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = subprocess.Popen(left, stdin=subprocess.PIPE, stdout=log)
    assert variants.held(variant)  # though who locked it has closed it
    starter = made_up_study.Starter(tmp_path / 'journal')
    worker = threading.Thread(target=run, args=([group], starter))
    worker.start()
    time.sleep(0.2)
    assert starter.started == []
    process.communicate()
    worker.join(10)
    assert starter.started == [variant.label] and variants.scored(variant)


def test_a_budget_drops_whole_seeds(tmp_path):
    groups = seeds(tmp_path, seeds=4)
    starter = made_up_study.Starter(tmp_path / 'journal', seconds=0.2)
    dropped = run(groups, starter, workers=3, minutes=0.7 / 60)
    done = [group for group in groups if all(map(variants.finished, group))]
    assert 1 <= len(done) < 4
    assert dropped == groups[len(done) :]
    assert len(starter.events('start')) == 3 * len(done)  # none half-trained


def test_a_budget_counts_runs_that_go_on_at_a_time():
    budget = runs.Budget(1.0, workers=2)
    assert budget.allows(10**6)  # nobody knows yet
    budget.longest = 14.0
    assert budget.allows(8) and not budget.allows(9)
    assert runs.Budget(0.0, 1).allows(10**6)


def test_each_arm_takes_the_best_rate_of_its_search_or_of_the_baselines(tmp_path):
    for search, gated in (('each', {'plain': 2e-3, 'deep': 2e-3}), ('baseline', None)):
        made = made_up_study.make(learning_rates=RATES, search=search)
        arms = sized_arms(made, dict.fromkeys(made.configs, 256))
        directory = tmp_path / search
        starter = made_up_study.Starter(tmp_path / f'{search}.journal', failing=('gated',))
        run(variants.search_variants(made, directory), starter)
        found = collect.best_rates(made, directory, arms)
        assert found == (gated or dict.fromkeys(made.configs, 2e-3))


def test_workers_have_gpus_of_their_own_or_share_the_memory_of_one():
    given = {'HOME': '/h', 'CUDA_VISIBLE_DEVICES': '4,5,6'}
    of = lambda name, workers: [
        environment.get(name) for environment in runs.environments(given, workers)
    ]
    assert of('CUDA_VISIBLE_DEVICES', 2) == ['4,6', '5']
    assert of('XLA_PYTHON_CLIENT_MEM_FRACTION', 2) == [None, None]
    assert of('XLA_PYTHON_CLIENT_MEM_FRACTION', 4) == ['0.225'] * 4
    given['XLA_PYTHON_CLIENT_MEM_FRACTION'] = '.3'
    assert of('XLA_PYTHON_CLIENT_MEM_FRACTION', 4) == ['.3'] * 4
    assert runs.environments({**given, 'FORCE_COLOR': '1'}, 1) == [given]
