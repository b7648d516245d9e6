"""A study that is killed twenty times, alone or with all its runs, ends as one that was not."""

import collections
import contextlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import made_up_study
import pytest
import small_run
from killed_study import Place, Watch, wait_for, wait_for_none

from helios_jax import checkpoint, config

SEED, STEPS, SEEDS = 5, 120, 3
RUNS = [f'{arm}/seed_{seed}' for arm in ('residual', 'gated') for seed in range(SEEDS)]
# Whom a signal reaches: the command alone, or whatever it and the commands before it started.
HOWS = ['alone'] * 8 + ['all'] * 8 + ['SIGTERM'] * 2 + ['SIGINT'] * 2
FIRST, MIDDLE, LAST = ['packing'] * 3, ['training'] * 9 + ['between'] * 3, ['reporting'] * 3
MIDDLE += ['start'] * (len(HOWS) - len(FIRST + MIDDLE + LAST))
# A small text in several shards, which workers pack; steps that last, or runs would be through
# after a few kills; and a short sample.
SLOWED = """
import time
from helios_jax.data import documents
from helios_jax.train import finish, metrics

documents.SHARD_BYTES, finish.SAMPLE_TOKENS = 2**9, 3
write = metrics.MetricWriter.write

def write_and_wait(writer, step, values):
    write(writer, step, values)
    time.sleep(0.2)

if write.__name__ == 'write':
    metrics.MetricWriter.write = write_and_wait

"""
STEP = re.compile(r'steps (\d+) to \d+, each of|step (\d+)/\d+  loss')
TIMED = ('speed-up in seconds', 'step')  # columns of the report
NUMBER = re.compile(r'\d+(\.\d+)?(e-\d+)?(?= ×| to |\)| s$)')  # not of '1 of 3 seeds'


def ready(place: Place, pid: int, phase: str, how: str, draw: random.Random) -> Callable[[], bool]:
    """What is waited for before the moment of a kill is drawn."""
    begun = lambda: place.held_by(place.study) == pid
    steps, done = place.steps() + draw.randint(1, 60), len(place.done())
    due = {
        'start': lambda: True,
        'packing': begun,
        'training': lambda: place.steps() >= steps,
        'between': lambda: len(place.done()) > done,
        'reporting': lambda: len(place.done()) == len(RUNS) and begun(),
    }[phase]
    # Before it has loaded its own modules, Python answers signals, each time in another way.
    return due if how in ('alone', 'all') else lambda: due() and begun()


def straight(place: Place) -> dict[str, float]:
    """Runs a study to its end; returns for how long the moments of each phase are drawn from."""
    begin, process, at = time.monotonic(), place.start(), {}
    for name, condition in {
        'lock': (place.study / 'writer.lock').exists,
        'study': (place.study / 'study.json').exists,
        'step': lambda: place.steps() > 0,
        'done': lambda: len(place.done()) == len(RUNS),
        'end': lambda: False,
    }.items():
        wait_for(condition, process)
        at[name] = time.monotonic() - begin
    assert process.wait() == 0, place.output()
    return {
        'start': at['step'],
        'packing': at['study'] - at['lock'],
        'training': 0.5,
        'between': 1.0,
        'reporting': at['end'] - at['done'],
        'whole': at['end'],  # for people
    }


def kill(place: Place, process: subprocess.Popen, how: str, before: set[int]) -> None:
    """Ends a command, and with it what it should end or, for `all`, everything.

    Args:
      before: processes that lived before the command.
    """
    process.send_signal(getattr(signal, how, signal.SIGKILL))
    process.wait(120)
    if how == 'all':
        place.end()
    elif how != 'alone':  # it stops its runs, and waits for them
        assert process.returncode in (130, -signal.SIGINT, -signal.SIGTERM), process.returncode
        wait_for_none(lambda: place.alive() - before)


def require_one_writer_at_a_time(log: str) -> None:
    """Every process that trained began where a checkpoint was, and no other's step came between."""
    last, following = 0, 1
    for begin, step in STEP.findall(log):
        if begin:
            assert int(begin) <= last + 1, log
            following = int(begin)
        else:
            assert int(step) == following, log
            last, following = following, following + 1
    assert last == STEPS and log.count('Report: ') <= 1 and 'Traceback' not in log, log


def without_times(report: str) -> str:
    """The report of a study with a # for each figure that a clock gave, and for their picture."""
    picture = r'(base64,)[^"]*(" alt="Held-out curves")'
    lines, columns = [], []
    for line in re.sub(picture, r'\1#\2', report).splitlines():
        cells = re.split(r'( \| |</t[hd]><t[hd]>)', line)
        if set(TIMED) <= set(cells):
            columns = [cells.index(name) for name in TIMED]
        elif len(cells) == 1:
            columns = []
        elif columns:
            for column in columns:
                cells[column] = NUMBER.sub('#', cells[column])
        lines.append(''.join(cells))
    return '\n'.join(lines)


def left(place: Place) -> dict[str, object]:
    """All that a study leaves, without what a clock gave and what its processes said."""
    found: dict[str, object] = {}
    for path in sorted(place.study.rglob('*')):
        name, inside = str(path.relative_to(place.study)), path.parent != place.study
        if path.is_dir() or 'checkpoints' in name or path.suffix in ('.log', '.lock'):
            continue
        found[name] = path.read_bytes()
        if name.startswith('report.'):
            found[name] = without_times(path.read_text())
        elif path.name == 'curves.png':  # a panel is of times, whose labels move the others
            found[name] = b''
        elif inside and path.name == 'report.md':
            found[name] = re.sub(r'\| speed \| [\d,.]+ tokens/s', '#', path.read_text())
        elif path.name == 'metrics.jsonl':
            found[name] = small_run.recorded(path.parent)
    for run in RUNS:
        rows = checkpoint.list_steps(place.study / run / 'checkpoints')
        # A run that was told to stop saved there, too: of the last ones it has others.
        found[run] = rows[-1]['step'], {row['damage'] for row in rows}
    return found


def make(root: Path) -> tuple[Place, Place]:
    """Writes the study, and says where it is made twice."""
    changes = {
        'data.cache_dir': 'cache',
        'data.num_workers': 2,
        'train.num_steps': STEPS,
        'train.eval_every': 40,
        'train.compilation_cache': str(root / 'xla'),
    }
    cfg = config.replace(small_run.make_config(root), changes)
    path = small_run.write_config(cfg, root / 'small.py')
    path.write_text(SLOWED + path.read_text())
    arms = {'residual': {'model.gmu.kind': 'residual'}, 'gated': {}}
    given = {'arms': arms, 'baseline': 'residual', 'seeds': SEEDS}
    made_up_study.write_study(root / 'mine.py', config=str(path), **given)
    return Place(root, 'killed', RUNS), Place(root, 'straight', RUNS)


def kill_again_and_again(
    place: Place, seconds: dict[str, float], draw: random.Random
) -> tuple[collections.Counter, dict[str, dict]]:
    """Starts and kills the command; returns the kills of each phase, and the runs done by then."""
    hows, middle = draw.sample(HOWS, len(HOWS)), draw.sample(MIDDLE, len(MIDDLE))
    plan = collections.deque(zip([*FIRST, *middle, *LAST], hows, strict=True))
    rest, kills = {}, collections.Counter()
    while plan:
        (phase, how), before = plan[0], place.alive()
        started, process = time.monotonic(), place.start()
        wait_for(ready(place, process.pid, phase, how, draw), process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, seconds[phase]))
        took = time.monotonic() - started
        if process.poll() is not None:  # it was done before: another time, at any moment
            assert process.returncode == 0, place.output()
            seconds, plan[0] = seconds | {'start': took}, ('start', how)
            continue
        kill(place, process, how, before)
        plan.popleft()
        kills[phase] += 1
        now = place.at_rest()
        print(f'{phase}, {how}, after {took:.1f} s: {len(now)} runs done, {place.steps()} steps')
        assert [run for run in rest if now.get(run) != rest[run]] == []  # none starts again
        rest = now
    return kills, rest


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_random_kills_change_nothing(tmp_path):
    # Where a shell starts pytest in the background, its children would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    killed, whole = make(tmp_path)
    with contextlib.ExitStack() as stack:
        for place in (killed, whole):
            stack.callback(place.end)
        seconds = straight(whole)
        print(f'seed {SEED}; seconds of an uninterrupted study: {seconds}')
        begin, watch = time.monotonic(), stack.enter_context(Watch(killed))
        kills, rest = kill_again_and_again(killed, seconds, random.Random(SEED))
        assert killed.start().wait() == 0, killed.output()
        for place in (killed, whole):
            wait_for_none(place.alive)
    print(
        f'{dict(kills)} kills, {time.monotonic() - begin:.0f} s; processes that wrote a run: '
        f'{sorted(map(len, watch.writers.values()))}; runs at a time: {watch.most_runs}'
    )
    now = killed.at_rest()
    assert len(now) == len(RUNS) and [run for run in rest if now[run] != rest[run]] == []
    assert watch.most_writers == 1 and len(watch.writers) == len(RUNS) and watch.most_runs <= 2
    for log in killed.study.glob('*/*.log'):
        require_one_writer_at_a_time(log.read_text())
    assert 'Traceback' not in killed.output()
    assert set(kills) == set(FIRST + MIDDLE + LAST)
    found, expected = left(killed), left(whole)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == set()
