"""What is no checkpoint is refused by every command, and stays as it is."""

import pytest
from folders import entries
from refusals import refused

COMMANDS = {
    'ls': ['ls', '{}'],
    'verify': ['verify', '{}'],
    'diff': ['diff', '{}', '{}'],
    'prune': ['prune', '{}', '--keep=1'],
    'prune steps': ['prune', '{}', '--steps=40'],
    'average': ['average', '{}', '--last=1', '--to={}_new'],
    'export': ['export', '{}', '--to={}_new'],
}


@pytest.mark.parametrize('case', COMMANDS)
def test_what_is_no_checkpoint_is_refused(case, tmp_path, capsys):
    folder = tmp_path / 'photos'
    (folder / '40').mkdir(parents=True)
    (folder / '40/manifest.json').write_text('{}')
    (tmp_path / 'a_file').write_text('mine')
    before = entries(tmp_path)
    for path, message in (
        (folder, 'is not a checkpoint directory of Helios'),
        (folder / '40', 'is not a checkpoint directory of Helios'),
        (tmp_path / 'a_file', 'is not a checkpoint directory of Helios'),
        (tmp_path / 'absent', 'does not exist'),
        ('s3://x/y', 's3:// is not supported'),
    ):
        filled = [argument.format(path) for argument in COMMANDS[case]]
        assert message in refused(capsys, 'ckpt', *filled)
        assert entries(tmp_path) == before


@pytest.mark.parametrize('case', COMMANDS)
def test_each_takes_its_directories_and_no_other_argument(case, capsys, tmp_path):
    word = COMMANDS[case][0]
    usage = 'A B, with two directories' if word == 'diff' else 'DIR, with one directory'
    flags = [argument for argument in COMMANDS[case][1:] if argument.startswith('--')]
    line = refused(capsys, 'ckpt', word, *flags, 'a', 'b', 'c')
    assert f'helios ckpt {word} a b c: write helios ckpt {word} {usage}' in line
