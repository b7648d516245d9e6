"""How soon an answer comes, of this tree and of another."""

import json
import os
from pathlib import Path

import pytest

import helios_jax
from helios_jax.bench import start
from helios_jax.errors import UserError

ROOT = Path(helios_jax.__file__).parent.parent


def checkout(folder: Path, code: str) -> str:
    (folder / 'helios_jax').mkdir(parents=True)
    (folder / 'helios_jax' / '__init__.py').touch()
    (folder / 'helios_jax' / '__main__.py').write_text(code)
    return str(folder)


KEEP = """
import os, pathlib, sys, time
mark = pathlib.Path.home() / 'program'
time.sleep(0 if mark.exists() else 2)
mark.touch()
assert sys.argv[1:3] == ['generate', f'--checkpoint={os.environ["EXPECTED"]}'], sys.argv
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> str:
    """Another checkout, whose program takes two seconds to compile."""
    monkeypatch.setenv('EXPECTED', str(tmp_path / 'run'))
    monkeypatch.setattr(start, 'THIS', Path(checkout(tmp_path / 'this', KEEP)))
    return str(tmp_path / 'run')


@pytest.mark.slow
def test_trees_take_turns_and_the_second_start_finds_what_the_first_left(here, tmp_path, capsys):
    other = checkout(tmp_path / 'other', KEEP)
    start.compare_starts(here, [other], repeats=1, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row['tree'], row['start']) for row in rows] == [
        (tree, state) for tree in ('this', other) for state in ('cold', 'warm')
    ]
    assert all(row['seconds'] > 2 for row in rows[::2])
    assert {row['device'] for row in rows} == {'cpu'}
    assert os.environ['HOME'] == str(Path.home())


def test_a_start_that_fails_says_why(here, tmp_path):
    broken = checkout(tmp_path / 'other', 'raise SystemExit("helios: no such step")')
    with pytest.raises(UserError, match='generate ended with code 1: helios: no such step'):
        start.compare_starts(here, [broken], repeats=1, as_json=False)
    with pytest.raises(UserError, match=f'--against={ROOT}/docs is no checkout'):
        start.compare_starts(here, [f'{ROOT}/docs'], repeats=1, as_json=False)
    with pytest.raises(UserError, match='--repeats=0 must be above 0'):
        start.compare_starts(here, [], repeats=0, as_json=False)
