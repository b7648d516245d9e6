"""Whole old steps go, and nothing else: neither the best nor the last intact one."""

import json

import pytest
import small_checkpoints
from folders import entries
from refusals import refused

from helios_jax import checkpoint, cli
from helios_jax.train import lock


def left(workdir) -> list[int]:
    return checkpoint.committed(checkpoint.absolute(workdir / 'checkpoints'))


def test_the_newest_and_the_best_are_kept(workdir, capsys):
    before = entries(workdir / 'checkpoints/60', workdir / 'checkpoints/20')
    untouched = entries(workdir)
    cli.main(['ckpt', 'prune', str(workdir), '--keep=1', '--dry_run'])
    said = capsys.readouterr().out
    assert said.startswith('Would remove step 40: ') and said.count('\n') == 1
    assert entries(workdir) == untouched
    cli.main(['ckpt', 'prune', str(workdir / 'checkpoints'), '--keep=1'])
    assert capsys.readouterr().out == said.replace('Would remove', 'Removed')
    assert left(workdir) == [20, 60]
    assert entries(workdir / 'checkpoints/60', workdir / 'checkpoints/20') == before
    names = {path.name for path in (workdir / 'checkpoints').iterdir()}
    assert names == {'20', '60', 'tokenizer', 'helios_checkpoints.json'}
    after = entries(workdir)
    cli.main(['ckpt', 'prune', str(workdir), '--keep=1'])
    assert 'nothing to remove' in capsys.readouterr().out
    assert {n: c for n, (_, c) in entries(workdir).items()} == {n: c for n, (_, c) in after.items()}


def test_the_best_goes_if_it_is_named(workdir, capsys):
    cli.main(['ckpt', 'prune', str(workdir), '--steps=20,40', '--json'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row['step'], row['removed'], row['bytes'] > 0) for row in rows] == [
        (20, True, True),
        (40, True, True),
    ]
    assert left(workdir) == [60]


def test_damaged_steps_count_as_none_of_those_to_keep(workdir, capsys):
    small_checkpoints.damage(workdir, 60, 'optimizer')
    small_checkpoints.damage(workdir, 20)  # and so it is the best no more
    cli.main(['ckpt', 'prune', str(workdir), '--keep=1'])
    assert left(workdir) == [40, 60]
    line = refused(capsys, 'ckpt', 'prune', str(workdir), '--steps=40')
    assert 'no intact checkpoint would be left' in line and left(workdir) == [40, 60]
    cli.main(['ckpt', 'prune', str(workdir), '--steps=60'])
    assert left(workdir) == [40]


def test_a_run_that_writes_there_is_named_and_nothing_is_removed(workdir, capsys):
    with lock.hold(checkpoint.absolute(workdir)):
        for path in (workdir, workdir / 'checkpoints'):
            line = refused(capsys, 'ckpt', 'prune', str(path), '--keep=1')
            assert 'is being written by process' in line
        cli.main(['ckpt', 'prune', str(workdir), '--keep=1', '--dry_run'])
    assert left(workdir) == [20, 40, 60]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give one of the two'),
        (['--keep=0'], 'give one of the two'),
        (['--keep=2', '--steps=20'], 'give one of the two'),
        (['--steps=30'], 'step 30 is not in .* 20, 40, 60'.replace('.* ', '')),
        (['--steps=20,40,60'], 'no intact checkpoint would be left'),
    ],
    ids=str,
)
def test_what_cannot_be_leaves_everything_as_it_was(arguments, message, original, capsys):
    before = entries(original / 'checkpoints')
    line = refused(capsys, 'ckpt', 'prune', str(original), *arguments)
    assert message.split(' 20,')[0] in line
    assert entries(original / 'checkpoints') == before
    assert not (original / lock.NAME).exists()
