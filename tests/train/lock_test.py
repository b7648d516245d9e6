"""A workdir has one writer: what a second one is told, and what becomes of a dead one's lock."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest
from etils import epath
from folders import entries

from helios_jax.errors import UserError
from helios_jax.train import lock, remote_lock

HOLDS = """
import sys, time
from etils import epath
from helios_jax.train import lock
with lock.hold(epath.Path(sys.argv[1])) as held:
    held.begin()
    print('held', flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    program = subprocess.Popen(
        [sys.executable, '-c', HOLDS, str(tmp_path / 'run')],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    try:
        assert program.stdout.readline() == 'held\n'
        yield program
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def test_second_writer_is_told_who_writes_and_changes_nothing(tmp_path, writer):
    before = entries(tmp_path)
    message = rf'run is being written by process {writer.pid} on host .+, since 20\d\d-.*workdir\.$'
    with pytest.raises(UserError, match=message), lock.hold(epath.Path(tmp_path / 'run')):
        pass
    assert entries(tmp_path) == before


def test_lock_of_a_killed_writer_is_taken_over_and_said(tmp_path, writer, caplog):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    path = tmp_path / 'run' / lock.NAME
    assert json.loads(path.read_text())['pid'] == writer.pid
    with lock.hold(epath.Path(tmp_path / 'run')) as held:
        held.begin()
        assert json.loads(path.read_text())['pid'] == os.getpid()
    assert f'Taking over {path} from process {writer.pid} on host' in caplog.text
    assert path.read_text() == ''
    caplog.clear()
    with lock.hold(epath.Path(tmp_path / 'run')):
        pass
    assert caplog.text == ''


@pytest.mark.parametrize('was', ['absent', 'nested and absent', 'empty', 'released', 'killed'])
def test_command_that_is_refused_before_it_begins_leaves_everything_as_it_was(tmp_path, was):
    workdir = tmp_path / 'a/b/run' if was == 'nested and absent' else tmp_path / 'run'
    if 'absent' not in was:
        workdir.mkdir(parents=True)
        (workdir / 'notes').write_text('mine')
    if was in ('released', 'killed'):
        content = '{"host": "h", "pid": 7}' if was == 'killed' else ''
        (workdir / lock.NAME).write_text(content)
        os.utime(workdir / lock.NAME, ns=(10**18, 10**18 + 7))
    before = {p: e for p, e in entries(tmp_path).items() if p != str(tmp_path)}
    if was == 'empty':  # where there was no lock, the folder's own time of change moves
        before.pop(str(workdir))
    with pytest.raises(UserError, match='other data'), lock.hold(epath.Path(workdir)):
        assert json.loads((workdir / lock.NAME).read_text())['pid'] == os.getpid()
        raise UserError('other data')
    after = {p: e for p, e in entries(tmp_path).items() if p != str(tmp_path)}
    if was == 'empty':
        after.pop(str(workdir))
    assert after == before


@pytest.mark.parametrize('error', [UserError, RuntimeError, KeyboardInterrupt, SystemExit])
def test_lock_is_released_by_whatever_ends_the_run(tmp_path, error):
    for _ in range(2):
        with pytest.raises(error), lock.hold(epath.Path(tmp_path / 'run')) as held:
            held.begin()
            raise error('broken')
    assert (tmp_path / 'run' / lock.NAME).read_text() == ''


def test_one_process_cannot_hold_a_lock_twice_at_a_time(tmp_path):
    os.symlink(tmp_path / 'run', tmp_path / 'link')
    with lock.hold(epath.Path(tmp_path / 'run')):
        for name in ('run', 'link'):
            with (
                pytest.raises(UserError, match=f'by process {os.getpid()} on'),
                lock.hold(epath.Path(tmp_path / name)),
            ):
                pass


def test_forked_child_does_not_keep_the_lock(tmp_path):
    started, go_on = (multiprocessing.get_context('fork').Event() for _ in range(2))
    with lock.hold(epath.Path(tmp_path / 'run')):
        child = multiprocessing.get_context('fork').Process(
            target=lambda: (started.set(), go_on.wait(60))
        )
        child.start()
        assert started.wait(60)
    with lock.hold(epath.Path(tmp_path / 'run')):
        assert child.is_alive()
    go_on.set()
    child.join()


def test_file_system_without_locks_is_refused_in_one_line(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr('fcntl.flock', no_locks)
    with (
        pytest.raises(UserError, match=r'cannot lock files .Function not implemented.; mount it'),
        lock.hold(epath.Path(tmp_path / 'run')),
    ):
        pass
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def store(monkeypatch):
    """An object store of this test's own, and a heart that beats fast."""
    monkeypatch.setattr(remote_lock, 'BEAT_SECONDS', 0.05)
    monkeypatch.setattr(remote_lock, 'DEAD_SECONDS', 0.6)
    store = fsspec.filesystem('memory', global_store=False, skip_instance_cache=True)
    monkeypatch.setattr(lock.fsspec.core, 'url_to_fs', lambda url: (store, url[4:]))
    return store


OBJECT, WORKDIR = '/bucket/run/writer.lock', epath.Path('gs://bucket/run')


def test_object_says_who_writes_beats_and_goes_with_the_run(store):
    with lock.hold(WORKDIR) as held:
        held.begin()
        first = json.loads(store.cat_file(OBJECT))
        time.sleep(0.4)
        second = json.loads(store.cat_file(OBJECT))
        held.check()
    assert first['pid'] == os.getpid() and first.keys() >= {'host', 'since'}
    assert second['beat'] > first['beat'] and second['token'] == first['token']
    assert not store.exists(OBJECT)


def test_second_writer_on_an_object_store_is_told_who_writes(store):
    with lock.hold(WORKDIR):
        token = json.loads(store.cat_file(OBJECT))['token']
        message = f'gs://bucket/run is being written by process {os.getpid()} on host .+, since 20'
        with pytest.raises(UserError, match=message), lock.hold(WORKDIR):
            pass
        assert json.loads(store.cat_file(OBJECT))['token'] == token
        time.sleep(0.3)
        assert json.loads(store.cat_file(OBJECT))['token'] == token


@pytest.mark.parametrize('content', ['{"host": "h", "pid": 7, "beat": 3}', '', '[1]', '{'])
def test_object_without_a_heartbeat_is_taken_over_and_said(store, content, caplog):
    store.pipe_file(OBJECT, content.encode())
    begin = time.monotonic()
    with lock.hold(WORKDIR) as held:
        assert time.monotonic() - begin >= 0.6
        assert 'whose writer is gone' in caplog.text
        held.check()
        assert json.loads(store.cat_file(OBJECT))['pid'] == os.getpid()


def test_of_many_who_take_over_a_dead_writers_object_one_wins(store, monkeypatch):
    """The store compares generations, as gs:// does; `pipe_file` makes an object atomically."""
    generations, one_at_a_time = {}, threading.RLock()
    pipe, remove = store.pipe_file, store.rm_file

    def pipe_file(path, value, mode='overwrite'):
        with one_at_a_time:
            pipe(path, value, mode=mode)
            generations[path] = generations.get(path, 0) + 1

    def call(method, template, bucket, key, ifGenerationMatch):
        with one_at_a_time:
            path = f'/{bucket}/{key}'
            if not store.exists(path):
                raise FileNotFoundError(path)
            if str(generations[path]) != ifGenerationMatch:
                raise FileExistsError(path)
            assert method == 'DELETE'
            remove(path)

    info = store.info
    monkeypatch.setattr(store, 'pipe_file', pipe_file)
    monkeypatch.setattr(store, 'call', call, raising=False)
    monkeypatch.setattr(store, 'info', lambda p: info(p) | {'generation': generations[p]})
    monkeypatch.setattr(store, 'split_path', lambda p: (*p[1:].split('/', 1), None), raising=False)
    pipe_file(OBJECT, b'{"host": "h", "pid": 7, "beat": 3}')
    outcomes, ended = [], threading.Event()

    def contend():
        try:
            with contextlib.closing(_Held(store)):
                outcomes.append('won')
                ended.wait(30)
        except remote_lock.HeldError:
            outcomes.append('refused')

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 6 and any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        if outcomes.count('refused') == 5:
            break
    ended.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ['refused'] * 5 + ['won']


class _Held:
    def __init__(self, store):
        self.lock = remote_lock.RemoteLock(store, OBJECT, {'host': 'h', 'pid': 1})
        self.lock.acquire()

    def close(self):
        self.lock.release()


@pytest.mark.parametrize('event', ['taken over', 'deleted', 'cut off'])
def test_writer_that_lost_its_object_is_stopped_and_leaves_the_others_alone(
    store, event, monkeypatch
):
    with (
        pytest.raises(UserError, match=r'was lost.*two runs do not write'),
        lock.hold(WORKDIR) as held,
    ):
        other = b'{"token": "other", "pid": 7}'
        if event == 'taken over':
            store.pipe_file(OBJECT, other)
        elif event == 'deleted':
            store.rm_file(OBJECT)
        else:

            def cut_off(*_, **__):
                raise OSError('no route to host')

            monkeypatch.setattr(store, 'pipe_file', cut_off)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            held.check()
            time.sleep(0.05)
    if event == 'taken over':
        assert store.cat_file(OBJECT) == other
