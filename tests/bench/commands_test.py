"""Flags of the measurements."""

import re

import pytest

from helios_jax import cli


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--target=v5', 'target=v5.*v5e, v5p'),
        ('--implementations=splash', 'implementations=splash.*jax_splash, tokamax'),
        ('--lengths=2k', 'lengths=2k.*number'),
        ('--earlier=/nowhere/at/all', 'earlier=/nowhere/at/all.*no such file'),
        ('--kv_heads=5', 'kv_heads=5 must divide'),
    ],
)
def test_bad_flags_are_one_line(flag, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(['bench', 'attention', flag])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
