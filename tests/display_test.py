"""What is told to people, on a terminal that is emulated and through a pipe."""

import io
import logging
import re
import sys
import time

import absl.logging
import jax
import pytest
import screen

from helios_jax import display

LONG = 'x' * 130  # wider than the terminal
STEP = 'step 20/50  loss 1.5000'


@pytest.fixture
def third_party():
    """A logger with a handler of its own for this test's stderr, which it has from the start."""
    log = logging.getLogger('third.party')
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('%(name)s: %(message)s'))

    def begin(stream):
        handler.setStream(stream)
        log.addHandler(handler)
        log.propagate = False
        return log

    yield begin
    log.removeHandler(handler)
    log.propagate = True


def noise(log: logging.Logger) -> list[str]:
    """Lines from everywhere, and what they are."""
    print('printed', flush=True)
    print('in pieces, ', end='', flush=True)
    print('to stderr', file=sys.stderr)
    log.error('an error [bold]with brackets[/bold] :warning:')
    log.warning(LONG)
    return [
        'printed',
        'in pieces, to stderr',
        'third.party: an error [bold]with brackets[/bold] :warning:',
        *(f'third.party: {LONG}'[at : at + 90] for at in (0, 90)),
    ]


def test_whatever_is_printed_or_logged_appears_above_the_bar(monkeypatch, third_party):
    terminal = screen.attach(monkeypatch)
    log = third_party(terminal)
    with display.Steps(50, 10) as steps:
        assert terminal.lines[-1].endswith('step 10/50')
        steps.update(20, STEP)
        expected = noise(log)
        steps.keep('step 20/50  2.2500 bits/byte')
        expected.append('step 20/50  2.2500 bits/byte')
        expected += noise(log)
        steps.update(30, STEP.replace('20', '30'))
        *lines, bar = terminal.lines
        assert lines == expected
        assert bar.startswith('━') and bar.endswith('step 30/50  loss 1.5000')
    assert terminal.lines[:-1] == expected
    assert log.handlers[0].stream is terminal and sys.stdout is sys.stderr is terminal
    log.warning('afterwards')
    assert terminal.lines[-1] == 'third.party: afterwards'


@pytest.mark.parametrize('kind', ['absl', 'root', 'last resort'])
def test_lines_of_every_origin_appear_above_the_bar(monkeypatch, kind):
    terminal = screen.attach(monkeypatch)
    monkeypatch.setattr(logging.root, 'handlers', [])
    absl_handler = absl.logging.ABSLHandler(logging.Formatter('%(message)s'))
    absl_handler.python_handler.setStream(terminal)
    if kind == 'absl':
        logging.root.addHandler(absl_handler)
    if kind == 'root':
        logging.basicConfig(format='%(message)s')
    with display.Steps(50, 0) as steps:
        steps.update(20, STEP)
        logging.getLogger('somewhere').error('a message')
        *lines, bar = terminal.lines
    assert lines[-1].endswith('a message') and bar.endswith(STEP)


def test_logs_that_go_to_a_file_stay_there(monkeypatch, third_party, tmp_path):
    terminal = screen.attach(monkeypatch, 'stdout')
    errors = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', errors)
    log = third_party(errors)
    with display.Steps(50, 0) as steps:
        steps.update(20, STEP)
        log.error('to the file')
        print('to stderr', file=sys.stderr)
        print('to stdout')
    assert errors.getvalue() == 'third.party: to the file\nto stderr\n'
    assert terminal.lines[0] == 'to stdout' and len(terminal.lines) == 2


def test_an_error_leaves_the_terminal_as_it_was(monkeypatch, third_party):
    terminal = screen.attach(monkeypatch)
    log = third_party(terminal)
    with pytest.raises(ZeroDivisionError), display.Steps(50, 0) as steps:
        steps.update(20, STEP)
        print('unfinished', end='')
        raise ZeroDivisionError
    assert sys.stdout is sys.stderr is terminal and log.handlers[0].stream is terminal
    assert 'unfinished' in terminal.lines and terminal.lines[0].endswith(STEP)
    assert not terminal.screen.cursor.hidden


def test_a_subprocess_may_be_given_the_stream_that_stands_in(monkeypatch):
    terminal = screen.attach(monkeypatch)
    monkeypatch.setattr(terminal, 'fileno', lambda: 77, raising=False)
    with display.Steps(50, 0):
        assert sys.stdout is not terminal and sys.stdout.fileno() == sys.stderr.fileno() == 77


def test_without_a_terminal_each_step_is_a_line(capsys):
    before = sys.stdout
    with display.Steps(50, 0) as steps:
        assert sys.stdout is before
        steps.update(20, STEP)
        steps.keep(LONG)
    assert capsys.readouterr().out == f'{STEP}\n{LONG}\n'


@pytest.mark.parametrize(
    ('total', 'unit', 'live', 'left'),
    [
        (None, 'documents', '2,001 documents', '2,001 documents in '),
        (3, 'shards', '2,001/3 shards', '2,001 shards in '),
        (None, '', 'Doing [b]it[/b] 0:00:00', ''),
    ],
)
def test_a_phase_is_live_and_leaves_a_line(monkeypatch, third_party, total, unit, live, left):
    terminal = screen.attach(monkeypatch)
    log = third_party(terminal)
    with display.phase('Doing [b]it[/b]', total, unit) as advance:
        advance(2000)
        advance(1)
        expected = noise(log)
        *lines, bar = terminal.lines
        assert lines == expected and 'Doing [b]it[/b]' in bar
        time.sleep(0.3)  # the bar is drawn ten times a second
        assert live in terminal.lines[-1]
    assert terminal.lines[:-1] == expected
    assert re.fullmatch(rf'Doing \[b\]it\[/b\]: {left}\d+\.\d s', terminal.lines[-1])
    assert not terminal.screen.cursor.hidden


def test_a_phase_without_a_terminal_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(display.time, 'perf_counter', lambda: now)
    with display.phase('Packing text', 4000, 'shards') as advance:
        for _ in range(70):
            advance(1)
            now += 1.0
    assert capsys.readouterr() == (
        '',
        'Packing text: 32 of 4,000 shards\nPacking text: 63 of 4,000 shards\n'
        'Packing text: 70 shards in 1 min 10 s\n',
    )
    with display.phase('Compiling'):
        now += 0.25
    assert capsys.readouterr().err == 'Compiling …\nCompiling: 0.2 s\n'
    with display.phase('Packing text', 1, 'shards') as advance:
        advance(1)
    assert capsys.readouterr().err == 'Packing text: 1 shard in 0.0 s\n'


def test_a_phase_that_fails_leaves_no_line(monkeypatch):
    terminal = screen.attach(monkeypatch)
    with pytest.raises(ZeroDivisionError), display.phase('Reading', unit='documents'):
        raise ZeroDivisionError
    assert terminal.lines == ['']


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    for index, heard in ((0, True), (1, False)):
        monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
        display.say('a line')
        with display.phase('Reading', unit='documents') as advance:
            advance(1)
        assert bool(capsys.readouterr().err) == heard


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.04, '0.0 s'), (59.94, '59.9 s'), (60.0, '1 min 00 s'), (200.4, '3 min 20 s'),
     (3599.7, '1 h 00 min'), (7500.0, '2 h 05 min')],
)  # fmt: skip
def test_durations_are_written_as_people_do(seconds, text):
    assert display.duration(seconds) == text
