import numpy as np
import pytest
from small_checkpoints import flat, numbers

from helios_jax import cli
from helios_jax.ckpt import diff, places

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_each_weight_is_told_with_its_largest_and_its_relative_difference(original):
    a, b = (places.opened_at(original, step) for step in ('20', '60'))
    rows = {row['name']: row for row in diff.weights(a, b)}
    first, second = numbers(20), numbers(60)
    expected = {f'{item}/{name}' for item in diff.ITEMS for name in flat(first[item])}
    assert rows.keys() == expected
    for item in diff.ITEMS:
        other = flat(second[item])
        for name, x in flat(first[item]).items():
            apart = x.astype(np.float64) - other[name]
            row = rows[f'{item}/{name}']
            assert row['max'] == np.abs(apart).max()
            relative = np.linalg.norm(apart) / np.linalg.norm(x.astype(np.float64))
            assert row['relative'] == pytest.approx(relative, rel=1e-12)
    assert diff.settings(a, b) == {'step': (20, 60)}


def test_a_copy_is_told_apart_by_what_it_lacks_and_what_was_rounded(original, tmp_path, capsys):
    new = tmp_path / 'export'
    cli.main(['ckpt', 'export', str(original), '--weights=trained', f'--to={new}'])
    capsys.readouterr()
    cli.main(['ckpt', 'diff', str(original), str(new)])
    out = capsys.readouterr().out
    assert "items: ['ema', 'optimizer', 'params', 'router'] → ['params', 'router']" in out
    assert '1 weights are equal' in out  # the balance biases
    relative = [float(line.split()[-1]) for line in out.splitlines() if 'relative' in line]
    assert len(relative) > 20 and max(relative) < 2**-8


def test_a_step_with_itself_differs_in_nothing(original, capsys):
    cli.main(['ckpt', 'diff', f'{original}/checkpoints/40', f'{original}/checkpoints/40'])
    assert capsys.readouterr().out == f'{len(list(names()))} weights are equal\n'


def names():
    return (name for item in diff.ITEMS for name in flat(numbers(20)[item]))


def test_names_and_shapes_that_only_one_has(original, monkeypatch):
    a, b = (places.opened_at(original, step) for step in ('20', '40'))
    shape = b.metadata['arrays']['params'].pop('embed.w')
    b.metadata['arrays']['params'] |= {'more': shape, 'unembedding.w': 'float32[3, 5]'}
    rows = {row['name']: row for row in diff.weights(a, b)}
    assert rows['params/embed.w']['difference'] == 'missing'
    assert rows['params/more']['difference'] == 'extra'
    assert rows['params/unembedding.w']['shapes'].endswith('and [3, 5]')


@pytest.mark.parametrize('piece', [3, 100])
def test_pieces_add_up_and_no_number_hides(piece, monkeypatch):
    monkeypatch.setattr(diff, 'PIECE', piece)
    a, b = np.arange(1, 12, dtype=np.float32), np.arange(1, 12, dtype=np.float32)
    assert diff.difference(a, b) == {'difference': 'none'}
    b[7] = 0
    expected = {'difference': 'values', 'max': 8, 'relative': 8 / np.sqrt((a * a).sum())}
    assert diff.difference(a, b) == expected
    b[1] = a[2] = np.nan
    assert np.isnan(diff.difference(a, b)['max'])
    assert diff.difference(b, b) == {'difference': 'none'}
    assert diff.difference(0 * a[:2], a[:2])['relative'] == np.inf
    assert diff.difference(a[:0], a[:0]) == {'difference': 'none'}
