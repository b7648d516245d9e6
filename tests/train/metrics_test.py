import json
import math
import sys

import jax.numpy as jnp
import pytest
import screen
from etils import epath
from tensorboardX.proto import event_pb2

from helios_jax.errors import UserError
from helios_jax.train import metrics


def write(workdir, steps, *, resume_step=0, tensorboard=False) -> None:
    with metrics.MetricWriter(
        workdir, tensorboard=tensorboard, resume_step=resume_step, num_steps=50
    ) as writer:
        for step in steps:
            writer.write(step, {'loss': jnp.float32(step / 2), 'tokens': step * 10})


def events(directory) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar in a directory of event files."""
    found = []
    for path in sorted(directory.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], 'little')
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 16 + length
    return found


def test_each_line_is_an_object_with_its_step(tmp_path):
    write(tmp_path, [1, 2])
    text = (tmp_path / 'metrics.jsonl').read_text()
    lines = [{'step': 1, 'loss': 0.5, 'tokens': 10}, {'step': 2, 'loss': 1.0, 'tokens': 20}]
    assert [json.loads(line) for line in text.splitlines()] == lines
    assert metrics.read(tmp_path / 'metrics.jsonl') == lines


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    with metrics.MetricWriter(tmp_path, tensorboard=False, resume_step=0) as writer:
        writer.write(1, {'loss': 3.0})
        assert metrics.read(tmp_path / 'metrics.jsonl') == [{'step': 1, 'loss': 3.0}]


@pytest.mark.parametrize('torn', ['', '{"step": 40, "lo', '{"step": 40}'])
def test_resuming_drops_later_lines_and_a_torn_one(tmp_path, torn):
    write(tmp_path, [10, 20, 30])
    path = tmp_path / 'metrics.jsonl'
    path.write_text(path.read_text() + torn)
    write(tmp_path, [30, 40], resume_step=20)
    straight = tmp_path / 'straight'
    write(straight, [10, 20, 30, 40])
    assert path.read_text() == (straight / 'metrics.jsonl').read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.jsonl', 'straight']


def test_only_the_last_line_may_be_torn(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"ste')
    assert metrics.read(path) == [{'step': 1}]
    path.write_text('{"ste\n{"step": 2}\n')
    for attempt in (lambda: metrics.read(path), lambda: write(tmp_path, [3])):
        with pytest.raises(UserError, match='line 1'):
            attempt()
    assert path.read_text() == '{"ste\n{"step": 2}\n'


@pytest.mark.parametrize(
    'line',
    [
        b'', b'3', b'[]', b'null', b'{"a": 1}', b'{"step": "1"}', b'{"step": true}',
        b'{"step": \xff}', b'[' * 100_000, b'{"step": ' + b'7' * 5000 + b'}',
    ],
    ids=lambda line: str(line[:16]),
)  # fmt: skip
def test_a_line_that_no_run_wrote_is_named_and_the_file_left_alone(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    whole = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(whole)
    for attempt in (lambda: metrics.read(path), lambda: write(tmp_path, [4], resume_step=3)):
        with pytest.raises(UserError, match=r'metrics\.jsonl, line 2 is no JSON object') as caught:
            attempt()
        assert '\n' not in str(caught.value)
    assert path.read_bytes() == whole


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        metrics.read(tmp_path / 'metrics.jsonl')


def test_tensorboard_gets_the_same_figures_and_resumes(tmp_path):
    write(tmp_path, [1, 2], tensorboard=True)
    assert events(tmp_path / 'tensorboard') == [
        (1, 'loss', 0.5), (1, 'tokens', 10.0), (2, 'loss', 1.0), (2, 'tokens', 20.0),
    ]  # fmt: skip
    assert not (tmp_path / 'absent').exists()
    write(tmp_path / 'absent', [1], tensorboard=False)
    assert not (tmp_path / 'absent/tensorboard').exists()


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
    write(tmp_path, [1, 2], tensorboard=True)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ''


def test_store_that_cannot_append_gets_the_whole_file(tmp_path, monkeypatch):
    write(tmp_path, [10, 20])
    assert metrics._is_remote(epath.Path('gs://bucket/run'))
    assert not metrics._is_remote(epath.Path(tmp_path))
    monkeypatch.setattr(metrics, '_is_remote', lambda path: True)
    monkeypatch.setattr(metrics, 'REMOTE_SECONDS', 0)
    path = tmp_path / 'metrics.jsonl'
    with metrics.MetricWriter(tmp_path, tensorboard=False, resume_step=10) as writer:
        assert not hasattr(writer, '_file')
        writer.write(20, {'loss': 7.0})
        assert [line['step'] for line in metrics.read(path)] == [10, 20]
        monkeypatch.setattr(metrics, 'REMOTE_SECONDS', math.inf)
        writer.write(30, {'loss': 6.0})
        assert len(metrics.read(path)) == 2
    assert [line.get('loss') for line in metrics.read(path)] == [5.0, 7.0, 6.0]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    write(tmp_path, [1, 2])
    assert capsys.readouterr().out.splitlines() == [
        'step 1/50  loss 0.5000',
        'step 2/50  loss 1.0000',
    ]


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    terminal = screen.attach(monkeypatch)
    with metrics.MetricWriter(tmp_path, tensorboard=False, resume_step=10, num_steps=50) as writer:
        assert terminal.lines[-1].endswith('step 10/50')
        writer.write(25, {'loss': 1.5})
        writer.write(25, {'eval/bits_per_byte': 2.25})
        print('a warning', file=sys.stderr)
        writer.write(30, {'loss': 1.25})
    *kept, bar = terminal.lines
    assert kept == ['step 25/50  2.2500 bits/byte', 'a warning']
    assert bar.startswith('━') and bar.endswith('step 30/50  loss 1.2500')
