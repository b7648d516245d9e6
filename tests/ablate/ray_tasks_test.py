"""A study on a Ray cluster: divided, refused, and with the results that local processes give."""

import contextlib
import fcntl
import importlib.util
import os
import re
import signal
import threading
import time
from pathlib import Path

import made_up_study
import pytest
import small_run
from refusals import refused

from helios_jax import config
from helios_jax.ablate import conduct, ray_tasks, report, runs, variants
from helios_jax.ablate.design import sized_arms
from helios_jax.errors import UserError
from helios_jax.parallel import cluster

GPUS, CPUS = {'CPU': 24.0, 'GPU': 8.0, 'memory': 1e11}, {'CPU': 6.0}


def test_a_run_has_the_gpus_of_its_mesh_or_a_share_of_the_cpus():
    divided = ray_tasks.divided
    assert divided([GPUS, CPUS, {'CPU': 5.0, 'GPU': 3.0}], None, 1) == (11, 1, 1)
    assert divided([GPUS, CPUS, {'CPU': 5.0, 'GPU': 3.0}], None, 2) == (5, 1, 2)
    assert divided([GPUS], 3, 2) == (3, 1, 2)
    assert divided([CPUS, {'CPU': 10.0}, {}], None, 4) == (2, 6, 0)  # a node each
    assert divided([CPUS, {'CPU': 10.0}], 5, 4) == (5, 2, 0)
    assert divided([CPUS], 7, 1) == (7, 1, 0)  # what finds no room waits in Ray's queue
    with pytest.raises(UserError, match=r'asks for 9 GPUs, and no node .* more than 8'):
        divided([GPUS, CPUS], None, 9)
    with pytest.raises(UserError, match='no node of the Ray cluster has CPUs'):
        divided([{'memory': 1e9}], None, 1)


def test_a_mesh_asks_for_the_axes_that_it_numbers():
    of = lambda **sizes: config.Config(mesh=config.Mesh(**sizes))
    assert ray_tasks.mesh_devices([of()]) == 1
    assert ray_tasks.mesh_devices([of(), of(fsdp=3, tensor=2), of(data=4)]) == 6


def test_a_node_must_see_the_workdir_and_its_locks(tmp_path):
    path, here = tmp_path / 'probe', str(tmp_path)
    assert 'does not see what is written in' in ray_tasks.sees_lock(str(path), here)
    with path.open('w') as file:
        assert ray_tasks.sees_lock(str(path), here).endswith('but not its locks')
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ray_tasks.sees_lock(str(path), here) == ''
        assert 'has no directory' in ray_tasks.sees_lock(str(path), str(tmp_path / 'none'))


REFUSED = {
    'launcher': (['--launcher=slurm'], "--launcher='slurm' is not one of 'local', 'ray'"),
    'address': (['--ray_address=auto'], '--ray_address=auto has no effect; say --launcher=ray'),
    'workdir': (['--launcher=ray', '--workdir=gs://b/w'], 'a study is kept on a local disk'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_has_no_meaning_is_refused(case, tmp_path, capsys):
    more, line = REFUSED[case]
    flags = ['--study=smoke', f'--workdir={tmp_path}/w', *more]
    assert line in refused(capsys, 'ablate', *flags, alone=True)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    absent = lambda name: None if name == 'ray' else find(name)
    monkeypatch.setattr(ray_tasks.importlib.util, 'find_spec', absent)
    place = ('local', 'tiny', [config.Config()], tmp_path / 'w', 0)
    with pytest.raises(UserError, match=r"pip install 'helios_jax\[ray\]'"):
        ray_tasks.cluster(*place).__enter__()


class RayStarter(made_up_study.Starter):
    """Starts made-up runs as tasks."""

    def launch(self, arguments, log):
        return ray_tasks.submit(ray_tasks.Share(2, 1, 0), arguments, log.name)


@pytest.fixture(scope='module')
def two_workers(tmp_path_factory):
    """A cluster of this machine, as the command starts it; its processes end with the module."""
    ray = pytest.importorskip('ray', reason="needs Ray: pip install 'helios_jax[ray]'")
    workdir = tmp_path_factory.mktemp('ray') / 'w'
    with ray_tasks.cluster('local', 'tiny', [config.Config()], workdir, 2) as (_, workers):
        assert workers == 2 and list(workdir.parent.iterdir()) == []  # the probe is gone
        yield
    assert not ray.is_initialized()


def seeds(made, workdir):
    return variants.seed_variants(made, workdir, dict.fromkeys(made.configs, 1e-3))


def run(groups, starter, stop=None):
    stop = stop or cluster.StopRequest()
    return runs.run_groups(groups, starter, workers=2, budget=runs.Budget(0.0, 2), stop=stop)


def processes(text: str) -> list[int]:
    """Ids of the processes that have the text among their arguments."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if text.encode() in (process / 'cmdline').read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.slow
def test_the_report_is_that_of_local_processes(two_workers, tmp_path):
    base, texts = small_run.make_config(tmp_path), []
    made = made_up_study.make(base, learning_rates=(1e-3, 2e-3), equal=())
    arms = sized_arms(made, dict.fromkeys(made.configs, 256))
    for launcher in (made_up_study.Starter, RayStarter):
        workdir = tmp_path / launcher.__name__
        starter = launcher(tmp_path / f'{launcher.__name__}.journal', failing=('gated',))
        for _ in range(2):  # the second time nothing is left to run
            results = conduct.conduct(
                made, arms, workdir, starter=starter, command='helios ablate', workers=2
            )
        assert len(starter.events('start')) == len(set(starter.events('start'))) == 10
        line = (workdir / 'gated' / 'lr_0.001.failed').read_text()
        assert line == 'the loss is nan at step 3; lower the learning rate.\n'
        texts.append(report.write(results, workdir).read_text())
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_leaves_no_process(two_workers, tmp_path):
    groups, stop = seeds(made_up_study.make(), tmp_path / 'study'), cluster.StopRequest()
    starter = RayStarter(tmp_path / 'journal', seconds=60)
    timer = threading.Timer(2, stop, (15, None))
    timer.start()
    assert run(groups, starter, stop=stop) == []
    assert len(starter.events('start')) <= 2 and starter.events('end') == []
    assert processes(str(tmp_path)) == []
    assert not [v for group in groups for v in group if variants.failure(v)]
    starter.seconds = 0.01
    run(groups, starter)
    assert all(variants.finished(v) for group in groups for v in group)


@pytest.mark.slow
@pytest.mark.parametrize('lost', [False, True])
def test_a_killed_run_leaves_no_process_and_a_lost_one_is_named(lost, two_workers, tmp_path):
    variant = seeds(made_up_study.make(), tmp_path)[0][1]
    starter = RayStarter(tmp_path / 'journal', seconds=60)
    running = runs.Running(0, variant, starter)
    while starter.events('start') == []:
        time.sleep(0.02)
    if lost:
        (process,) = processes(str(tmp_path))
        status = Path(f'/proc/{process}/status').read_text()
        os.kill(int(re.search(r'PPid:\t(\d+)', status)[1]), signal.SIGKILL)  # the node's worker
    else:
        running.process.kill()
    while running.process.poll() is None:
        time.sleep(0.02)
    if lost:  # what outlives its task is left behind, as of a killed study
        os.kill(process, signal.SIGKILL)
    while processes(str(tmp_path)):
        time.sleep(0.02)
    running.end(stopped=not lost)
    assert re.match('Ray lost the run: ' if lost else '$', variants.failure(variant))
