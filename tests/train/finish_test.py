"""What stands at a run's end, on a terminal and in a pipe."""

import pytest
import screen
from etils import epath

from helios_jax.train import finish

FINAL = {
    'loss': 1.26018, 'bits_per_byte': 1.8203456, 'targets': 65177.0,
    'time/tokens_per_second': 7654.3, 'device/peak_gib': 61.23456,
}  # fmt: skip
PATH = epath.Path('/runs') / ('long' * 30) / 'report.md'
LINES = [
    '',
    'held-out text            1.8203  bits/byte',
    'held-out loss            1.2602  nats/token',
    'held-out tokens          65,177',
    'speed                     7,654  tokens/s',
    'peak memory of a device   61.23  GiB',
    '',
    'def f(x):',
    '    return [b]x[/b] :smile: �[31m' + 80 * 'y',
    '',
    f'Report: {PATH}',
]


def show() -> None:
    sample = 'x):\n    return [b]x[/b] :smile: \x1b[31m' + 80 * 'y'
    finish.show(FINAL, 'def f(', sample, PATH)


def test_the_end_is_plain_lines_in_a_pipe(capsys):
    show()
    assert capsys.readouterr().out.splitlines() == LINES


def test_the_end_is_a_table_the_sample_and_one_line_for_the_report(monkeypatch):
    terminal = screen.attach(monkeypatch, columns=180)
    show()
    assert terminal.lines == LINES
    bold = terminal.screen.buffer[1]
    assert [bold[column].bold for column in (0, 25)] == [False, True]


@pytest.mark.parametrize(
    ('text', 'shown'),
    [('a\tb\n', 'a\tb\n'), ('\x1b[2J\r\x07', '�[2J��'), ('δ 漢 ☉', 'δ 漢 ☉')],
)
def test_what_would_steer_a_terminal_is_marked(text, shown):
    assert finish.printable(text) == shown
