import hashlib
import json
import os

import pytest
from etils import epath

from helios_jax.checkpoint import manifest

SHA = hashlib.sha256(b'1234567').hexdigest()


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    """Two parts, one of them nested, and a file beside them."""
    folder = tmp_path / 'step'
    for name, content in {
        'a/x': b'1234567',
        'a/deep/y': b'',
        'b/z': bytes(100),
        'own': b'o',
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.write(epath.Path(folder))
    return epath.Path(folder)


def flip(path: epath.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def damage(folder: epath.Path, *parts: str) -> str:
    try:
        listed = manifest.read(folder)
    except manifest.DamageError as error:
        return str(error)
    return ''.join(manifest.fault(folder, listed, part) for part in parts or ('a', 'b'))


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
    listed = json.loads((folder / 'manifest.json').read_text())['files']
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
    assert damage(folder) == ''


@pytest.mark.parametrize('change', CHANGES)
def test_change_is_named(folder, change):
    apply, message = CHANGES[change]
    apply(folder)
    assert message in damage(folder)


def test_part_is_checked_alone(folder):
    flip(folder / 'b/z')
    assert damage(folder, 'a') == ''
    assert 'b/z' in damage(folder, 'b')
    assert 'not in its manifest' in damage(folder, 'c')


def test_every_flipped_bit_of_the_manifest_is_damage(folder):
    path = folder / 'manifest.json'
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(bytes(changed))
            with pytest.raises(manifest.DamageError):
                manifest.read(folder)
    path.write_bytes(whole)
    assert damage(folder) == ''


@pytest.mark.parametrize(
    'content',
    [
        '{}', 'null', '[1, 2]', '3', '"a/x"', '', '{"files": {}, "sha256": ""}', '{"files": {}}',
        '[' * 100_000, '{"a/x": ' * 100_000,
        '{"a/x": 3}', '{"a/x": [7]}', '{"a/x": ["7", "' + SHA + '"]}', '{"a/x": [7, 9]}',
        '{"a/x": [true, "' + SHA + '"]}', '{"a/x": [-7, "' + SHA + '"]}',
        '{"a/x": [7, "' + SHA.upper() + '"]}', '{"a/x": [7, "' + SHA + '", 1]}',
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_manifest_that_is_not_as_one_is_written_is_damage(folder, content):
    (folder / 'manifest.json').write_text(content)
    with pytest.raises(manifest.DamageError, match=r'manifest\.json'):
        manifest.read(folder)


@pytest.mark.parametrize(
    'name',
    ['../out/x', '/etc/hostname', 'a/../../out/x', 'a/./x', 'a//x', '.', '', 'a', 'a/x/', 'a/\0'],
)
def test_name_that_leaves_the_folder_or_is_no_files_is_damage(folder, name):
    text = json.dumps({name: [7, SHA]}, indent=0)
    (folder / 'manifest.json').write_text(text)
    with pytest.raises(manifest.DamageError, match='that no checkpoint has'):
        manifest.read(folder)


@pytest.mark.parametrize('link', ['file', 'folder'])
def test_nothing_outside_the_folder_is_opened_through_a_link(folder, link, monkeypatch):
    outside = epath.Path(folder.parent / 'out')
    outside.mkdir()
    (outside / 'z').write_bytes(bytes(100))
    if link == 'file':
        (folder / 'b/z').unlink()
        os.symlink(outside / 'z', folder / 'b/z')
    else:
        (folder / 'b').rename(folder / 'moved')
        os.symlink(outside, folder / 'b')
    monkeypatch.setattr(manifest, 'sha256', lambda path: pytest.fail(f'{path} was opened'))
    assert 'b/z is a link that leaves the checkpoint' in damage(folder, 'b')


def test_what_is_no_plain_file_is_not_opened(folder):
    (folder / 'b/z').unlink()
    os.mkfifo(folder / 'b/z')
    assert 'b/z is missing' in damage(folder, 'b')


def test_folder_reached_through_a_link_is_as_good_as_any(folder):
    os.symlink(folder, folder.parent / 'link')
    assert damage(folder.parent / 'link') == ''


def test_manifests_of_format_1_are_read(folder):
    listed = json.loads((folder / 'manifest.json').read_text())['files']
    (folder / 'manifest.json').write_text(json.dumps(listed, indent=0))
    assert damage(folder) == ''
    flip(folder / 'b/z')
    assert 'b/z has changed' in damage(folder)
