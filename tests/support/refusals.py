"""Commands that are refused in one line."""

import pytest

from helios_jax import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, alone: bool = False) -> str:
    """Runs a command that ends with code 2; returns the line that says why, the last on stderr.

    Args:
      alone: whether nothing else may be on stderr, such as a warning.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert [line for line in lines if line.startswith('helios: ')] == lines[-1:]
    assert error.endswith('\n') and 'Traceback' not in error
    assert len(lines) == 1 or not alone, error
    return lines[-1]
