import json

import pytest
from etils import epath

from helios_jax.checkpoint import manifest


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    """Two parts, one of them nested, and a file beside them."""
    for name, content in {
        'a/x': b'1234567',
        'a/deep/y': b'',
        'b/z': bytes(100),
        'own': b'o',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.write(epath.Path(tmp_path))
    return epath.Path(tmp_path)


def flip(path: epath.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


CHANGES = {
    'changed': (lambda f: flip(f / 'b/z'), 'b/z has changed'),
    'missing': (lambda f: (f / 'b/z').unlink(), 'b/z is missing'),
    'short': (lambda f: (f / 'b/z').write_bytes(bytes(99)), 'b/z has 99 bytes instead of 100'),
    'long': (lambda f: (f / 'a/deep/y').write_bytes(b'!'), 'a/deep/y has 1 bytes instead of 0'),
    'manifest': (
        lambda f: (f / 'manifest.json').write_text('{"b/'),
        'manifest.json cannot be read',
    ),
}


def test_manifest_lists_what_lies_below_and_leaves_nothing_else(folder):
    listed = json.loads((folder / 'manifest.json').read_text())
    assert {name: size for name, (size, _) in listed.items()} == {
        'a/x': 7,
        'a/deep/y': 0,
        'b/z': 100,
    }
    # printf 1234567 | sha256sum
    assert listed['a/x'][1] == '8bb0cf6eb9b17d0f7d22b456f121257dc1254e1f01665370476383ea776df414'
    assert sorted(path.name for path in folder.iterdir()) == ['a', 'b', 'manifest.json', 'own']


def test_untouched_folder_is_intact_whatever_lies_directly_in_it(folder):
    (folder / 'own').write_bytes(b'other')
    (folder / 'new').write_bytes(b'')
    assert manifest.damage(folder) == '' and manifest.damage(folder, 'a') == ''


@pytest.mark.parametrize('change', CHANGES)
def test_change_is_named(folder, change):
    apply, message = CHANGES[change]
    apply(folder)
    assert message in manifest.damage(folder)


def test_part_is_checked_alone(folder):
    flip(folder / 'b/z')
    assert manifest.damage(folder, 'a') == ''
    assert 'b/z' in manifest.damage(folder, 'b')
    assert 'not in its manifest' in manifest.damage(folder, 'c')


def test_intact_part_is_hashed_once_and_again_when_written_again(folder, monkeypatch):
    sha256, hashed = manifest.sha256, []
    monkeypatch.setattr(manifest, 'sha256', lambda path: hashed.append(path.name) or sha256(path))
    for part in ('a', '', 'b', ''):
        assert manifest.damage(folder, part) == ''
    assert sorted(hashed) == ['x', 'y', 'z']
    (folder / 'b/z').write_bytes(bytes(50))
    manifest.write(folder)
    hashed.clear()
    assert manifest.damage(folder) == ''
    assert sorted(hashed) == ['x', 'y', 'z']
