"""Saves, and what becomes of steps that are unfinished, foreign or too many."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from small_steps import abstract, contents, files, flip_bit, params, refuse, same, write

from helios_jax import checkpoint
from helios_jax.checkpoint import manifest
from helios_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_donating_the_arrays_during_a_save_does_not_change_it(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    arrays = {'w': jnp.arange(1 << 20, dtype=jnp.float32).reshape(1024, 1024)}
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': arrays}, {})
    for _ in range(3):
        arrays = step(arrays)
    writer.close()
    restored = checkpoint.open_step(tmp_path, 1).restore('params', abstract(arrays))
    assert np.array_equal(restored['w'].reshape(-1), np.arange(1 << 20))


def test_run_that_fell_back_writes_the_damaged_step_again_and_keeps_the_old_one(tmp_path):
    write(tmp_path, [1, 2])
    for number in ('', '.2'):
        name = flip_bit(epath.Path(tmp_path) / '2')
        damaged = files(tmp_path / '2')
        write(tmp_path, [2])
        assert name and files(tmp_path / f'2.damaged{number}') == damaged
    assert same(checkpoint.open_step(tmp_path, 2).restore('params', abstract(params())), params(2))


def test_step_that_exists_is_not_written_over(tmp_path):
    write(tmp_path, [1, 4])
    writer = checkpoint.Checkpoints(tmp_path, keep=9)
    for step in (3, 4):
        with pytest.raises(UserError, match='exists already'):
            writer.save(step, {'params': params(9)}, {})
    assert writer.steps() == [1, 4]
    assert same(checkpoint.open_step(tmp_path, 4).restore('params', abstract(params())), params(4))


def test_what_a_killed_save_or_deletion_left_is_not_listed_and_is_removed_by_the_next_save(
    tmp_path, caplog
):
    caplog.set_level('INFO', 'helios_jax')
    write(tmp_path, [1])
    left = ['3.orbax-checkpoint-tmp', '40.orbax-checkpoint-tmp-1764000000', '2.unfinished']
    for name in left:
        (tmp_path / name / 'params').mkdir(parents=True)
    assert checkpoint.open_step(tmp_path, 'latest').step == 1
    assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [1]
    before = contents(tmp_path)
    writer = checkpoint.Checkpoints(tmp_path, keep=9)
    writer.close()
    assert contents(tmp_path) == before
    write(tmp_path, [5])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '5', 'helios_checkpoints.json']
    for name in left:
        assert name.split('.')[0] in caplog.text


@pytest.mark.parametrize('name', ['3', '7'])
def test_a_save_where_something_else_lies_is_refused_and_changes_nothing(tmp_path, name):
    write(tmp_path, [1, 3])
    (tmp_path / '3/manifest.json').unlink()
    (tmp_path / '7').write_text('a plain file')
    before = contents(tmp_path)
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match=f'{name} is in the way.*no manifest.json.*move it away'):
        writer.save(int(name), {'params': params()}, {})
    writer.close()
    assert contents(tmp_path) == before


def test_step_is_listed_only_once_it_is_committed(tmp_path, monkeypatch):
    release = threading.Event()
    sha256 = manifest.sha256
    monkeypatch.setattr(manifest, 'sha256', lambda path: release.wait(60) and sha256(path))
    writer = checkpoint.Checkpoints(tmp_path, keep=9)
    writer.save(1, {'params': params()}, {})
    assert writer.steps() == []
    release.set()
    writer.wait()
    assert writer.steps() == [1]


@pytest.mark.parametrize('when', ['arrays', 'manifest'])
@pytest.mark.parametrize('met', ['wait', 'save', 'close'])
def test_failed_save_is_raised_once_and_leaves_the_last_one_intact(
    tmp_path, monkeypatch, when, met
):
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': params(1)}, {})
    writer.wait()
    with monkeypatch.context() as patch:
        if when == 'arrays':
            patch.setattr(ocp.CompositeCheckpointHandler, 'finalize', refuse)
        else:
            patch.setattr(manifest, 'sha256', refuse)
        writer.save(2, {'params': params(2)}, {})
        with pytest.raises(UserError, match='No space left'):
            writer.save(3, {'params': params(3)}, {}) if met == 'save' else getattr(writer, met)()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', 'helios_checkpoints.json']
    assert writer.steps() == [1]
    assert same(checkpoint.open_step(tmp_path, 1).restore('params', abstract(params())), params(1))
    if met != 'close':
        writer.save(2, {'params': params(2)}, {})
        writer.close()
        assert writer.steps() == [2]


def test_newest_and_best_are_kept(tmp_path):
    write(tmp_path, range(1, 8), keep=2, scores={2: 1.9, 3: 1.2, 5: float('nan'), 6: 1.4})
    rows = checkpoint.list_steps(tmp_path)
    assert [row['step'] for row in rows] == [3, 6, 7]
    assert [row['metrics'] for row in rows] == [{'bits_per_byte': 1.2}, {'bits_per_byte': 1.4}, {}]
    assert all(row['bytes'] > 8 * 16 * 3 * 4 // 2 and not row['damage'] for row in rows)
    assert checkpoint.open_step(tmp_path, 'best').step == 3
    assert checkpoint.open_step(tmp_path, 'latest').step == 7


def test_foreign_numbered_folders_are_never_taken_over(tmp_path):
    (tmp_path / '7').mkdir()
    (tmp_path / '7/thesis.txt').write_text('precious')
    with pytest.raises(UserError, match='7'):
        checkpoint.Checkpoints(tmp_path, keep=1)
    assert (tmp_path / '7/thesis.txt').read_text() == 'precious'


@pytest.fixture
def object_store(monkeypatch):
    """Local folders taken for an object store, where nothing can be renamed at once."""
    monkeypatch.setattr(manifest, 'is_remote', lambda path: True)


def test_on_an_object_store_a_mark_tells_what_is_unfinished(tmp_path, object_store, monkeypatch):
    release, sha256 = threading.Event(), manifest.sha256
    write(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(manifest, 'sha256', lambda path: release.wait(60) and sha256(path))
        writer = checkpoint.Checkpoints(tmp_path, keep=9)
        writer.save(2, {'params': params()}, {})
        assert (tmp_path / '2.unfinished').is_file()
        release.set()
        writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2', 'helios_checkpoints.json']


def test_on_an_object_store_half_a_step_is_removed_if_it_is_marked_as_ours(
    tmp_path, object_store, caplog
):
    write(tmp_path, [1, 2, 3, 4])
    for step in (2, 3):
        (tmp_path / f'{step}/manifest.json').unlink()
    for step in (1, 3, 8):  # finished but for the mark, half deleted, not begun
        (tmp_path / f'{step}.unfinished').write_text('')
    assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [1, 4]
    assert f'{tmp_path}/2 has no manifest' in caplog.text
    assert f'{tmp_path}/3 has no manifest' not in caplog.text
    write(tmp_path, [5])
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ['1', '2', '4', '5', 'helios_checkpoints.json']


@pytest.mark.parametrize('remote', [False, True])
def test_deletion_that_fails_stops_no_save_and_is_made_up_for(tmp_path, monkeypatch, remote):
    if remote:
        monkeypatch.setattr(manifest, 'is_remote', lambda path: True)
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': params()}, {})
    with monkeypatch.context() as patch:
        patch.setattr(type(writer.directory), 'rmtree', refuse)
        writer.save(2, {'params': params()}, {})
        writer.wait()
        assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [2]
        assert (tmp_path / '1.unfinished').exists()
    writer.save(3, {'params': params()}, {})
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['3', 'helios_checkpoints.json']
