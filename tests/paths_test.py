import os
import time

import pytest
from etils import epath

from helios_jax import paths
from helios_jax.errors import UserError


@pytest.fixture
def file(tmp_path) -> epath.Path:
    path = epath.Path(tmp_path) / 'a.txt'
    path.write_text('one')
    return path


def copy_times(source: os.stat_result, path: epath.Path) -> None:
    """What `touch -r`, `cp -p` and `rsync -t` do."""
    os.utime(path, ns=(source.st_atime_ns, source.st_mtime_ns))


def test_identities_stay_where_nothing_changes(file):
    assert paths.identities([file]) == paths.identities([file])
    assert paths.identities([]) == []


@pytest.mark.parametrize('restore_times', [False, True])
def test_an_edit_of_the_same_size_at_once_is_seen(file, restore_times):
    for text in ('two', 'six', 'ten') * 3:
        before, times = paths.identities([file]), os.stat(file)
        file.write_text(text)
        if restore_times:
            copy_times(times, file)
        assert paths.identities([file]) != before


def test_a_file_in_the_place_of_another_is_seen(file):
    other = file.with_name('b.txt')
    other.write_text('two')
    copy_times(os.stat(file), other)
    before = paths.identities([file])
    other.replace(file)
    assert paths.identities([file]) != before


def test_a_link_to_another_file_is_seen(file):
    other, link = file.with_name('b.txt'), file.with_name('link')
    other.write_text('two')
    copy_times(os.stat(file), other)
    os.symlink(file, link)
    before = paths.identities([link])
    os.unlink(link)
    os.symlink(other, link)
    assert paths.identities([link]) != before


def test_equal_names_in_two_directories_differ(file, monkeypatch):
    elsewhere = file.parent / 'folder'
    elsewhere.mkdir()
    os.link(file, elsewhere / file.name)
    found = []
    for directory in (file.parent, elsewhere):
        monkeypatch.chdir(directory)
        found.append(paths.identities([epath.Path('a.txt')]))
    assert found[0] != found[1]


def test_a_file_that_is_always_being_written_is_named(file, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: file.write_text('more'))
    with pytest.raises(UserError, match=r'a\.txt is being written all the time'):
        paths.identities([file])


@pytest.mark.parametrize('path', ['a/b', 'python_stdlib', '~/x', 'gs:/x', 'a:b'])
def test_local_paths_pass(path):
    paths.check('x', path)


@pytest.mark.parametrize('path', ['s3://b', 'file:///a', '://', 'GS://b'])
def test_other_schemes_are_refused(path):
    with pytest.raises(UserError, match=r"--workdir='.*is not supported; name a local"):
        paths.check('--workdir', path)


@pytest.mark.parametrize('installed', [False, True])
def test_a_bucket_needs_its_package(monkeypatch, installed):
    monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: installed or None)
    if installed:
        paths.check('--workdir', 'gs://bucket/run')
        return
    with pytest.raises(UserError, match=r"pip install 'helios_jax\[gcs\]'"):
        paths.check('--workdir', 'gs://bucket/run')


def test_sizes_of_a_directory(file):
    (file.parent / 'folder').mkdir()
    assert paths.sizes(file.parent) == {'a.txt': 3}
