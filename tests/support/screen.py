"""A terminal that tests can look at."""

import io
import sys

import pyte
import pytest


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and shows what one would show."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, rows)
        self.screen.set_mode(pyte.modes.LNM)  # a newline returns to the left, as a tty's does
        self._stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return len(text)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, without the empty lines at its end."""
        return '\n'.join(line.rstrip() for line in self.screen.display).rstrip().split('\n')


def attach(monkeypatch: pytest.MonkeyPatch, *streams: str, columns: int = 90) -> Terminal:
    """Replaces sys.stdout and sys.stderr, or those of them that are named, by one terminal."""
    terminal = Terminal(columns, 40)
    for name in streams or ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, terminal)
    for name, value in (('TERM', 'xterm'), ('COLUMNS', str(columns)), ('LINES', '40')):
        monkeypatch.setenv(name, value)
    for name in ('NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE', 'TTY_INTERACTIVE'):
        monkeypatch.delenv(name, raising=False)
    return terminal
