"""What `helios bench mesh` measures, in which order, and what it says of it."""

import json
import re

import pytest
from refusals import refused

from helios_jax import chips, cli, config, process
from helios_jax.bench.mesh import compare, measure, torch_fsdp
from helios_jax.errors import UserError
from helios_jax.parallel import compiler_options

MESH = 'bench', 'mesh', '--topology=h200:2'
PROFILE = {
    'kernel_ms': {'matmul': 50.0, 'attention': 20.0, 'fusion': 11.0, 'collective': 30.0},
    'collective_ms': {'all_gather': {'all': 30.0, 'exposed': 4.0}},
    'exposed_ms': 4.0,
    'idle_ms': 3.0,
}


@pytest.fixture
def processes(monkeypatch):
    """Instead of processes: what they would measure, and figures."""
    calls = []

    def run(function, values, num_devices, *rest, **_):
        calls.append((function.__name__, values, num_devices))
        if function is torch_fsdp.measure_fsdp:
            return {'card_tokens_per_second': 500.0, 'mfu': 0.4, 'step_ms': 65.0, 'peak_gib': 9.0}
        rate = {1: 1000.0, 2: 900.0}[num_devices]
        if '-xla' in config.from_dict(values).train.compiler_options:
            raise UserError('out of memory')
        row = {'card_tokens_per_second': rate, 'mfu': 0.5, 'step_ms': 88.0, 'peak_gib': 7.0}
        return row | PROFILE

    monkeypatch.setattr(process, 'run', run)
    return calls


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_meshes_stand_beside_one_device_and_pytorch_of_their_shape(processes, capsys, tmp_path):
    picture = tmp_path / 'meshes.svg'
    rows = '--rows=helios_1b:fsdp,helios_1b:data'
    cli.main([*MESH, rows, '--options=ours,none', '--peer', '--layers=3', f'--plot={picture}'])
    out = capsys.readouterr().out
    names = [(name, num_devices) for name, _, num_devices in processes]
    # Of the same shape, one device and PyTorch are measured once.
    expected = [('measure_step', 2), ('measure_step', 2), ('measure_step', 1), ('measure_fsdp', 2)]
    assert names == [*expected, *expected[:2]]
    assert 'helios_1b:fsdp             ours                  900   0.900    1.800  0.500' in out
    assert 'helios_1b:data             one device          1,000       —        —' in out
    assert 'none         3 of 16 layers  failed: out of memory' in out
    assert 'all_gather 30.0 (4.0 exposed)' in out
    assert all(values.get('layers', 3) == 3 for _, values, _ in processes)
    assert 'helios_1b:fsdp, ours' in picture.read_text()


def test_rows_as_json_have_the_planners_figures(processes, capsys):
    cli.main([*MESH, '--rows=helios_1b:context:32768', '--layers=2', '--noone', '--json'])
    [row] = lines(capsys)
    assert row['mesh'] == {'context': 2}
    assert (row['layers'], row['of_layers'], row['batch_rows']) == (2, 16, 2)
    assert row['planned_ms'] > 0 and row['planned_gib'] > 0
    assert row['card_tokens_per_second'] == 900.0
    assert len(processes) == 1


def test_ratios_follow_as_json(processes, capsys):
    cli.main([*MESH, '--rows=helios_1b:fsdp', '--layers=2', '--peer', '--json'])
    ours, one, peer, ratios = lines(capsys)
    assert [row['options'] for row in (ours, one, peer)] == ['ours', 'one device', 'FSDP2']
    assert [row['devices'] for row in (ours, one, peer)] == [2, 1, 2]
    assert ours['batch_rows'] == 2 * one['batch_rows']
    same = {'row': 'helios_1b:fsdp', 'options': 'ours'}
    assert ratios == same | {'kept': 0.9, 'times_fsdp2': 1.8}


def test_predictions_alone_measure_nothing(processes, capsys):
    cli.main([*MESH, '--plan', '--rows=hydra_30b_a3b:expert', '--layers=4', '--json'])
    [row] = lines(capsys)
    assert row['planned_ms'] > 0 and row['one_planned_gib'] > row['planned_gib']
    assert not processes


def test_nothing_begins_when_the_minutes_are_over(processes, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(compare.time, 'monotonic', lambda: next(clock))
    cli.main([*MESH, '--rows=helios_1b:fsdp', '--minutes=1.5', '--options=ours,none', '--json'])
    rows = lines(capsys)
    assert len(processes) == 1
    assert [row.get('failed') for row in rows] == [None, *['--minutes were over'] * 2]


def test_each_form_of_options_is_words_of_a_setting():
    h200 = chips.CHIPS['h200']
    ours = compiler_options.of_table('', 'gpu', compiler_options.SEVERAL)
    assert compare.words('ours', h200) == ''
    assert compiler_options.changed(ours, compare.words('none', h200)) == {}
    assert compare.words('none', chips.cpu()) == ''
    dropped = '-xla_gpu_enable_latency_hiding_scheduler xla_a=3'
    assert compare.words(dropped, h200) == dropped


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--rows=helios_1b:ring'], "'ring' is no mesh"),
        (['--options=mine'], "'mine' is neither"),
        (['--options=-xla_nothing'], 'drops what is not set'),
        (['--kind=convicts'], "'convicts'"),
        (['--layers=-1'], 'layers=-1'),
        (['--minutes=-1'], 'minutes=-1'),
        (['--rows=hydra_30b_a3b:fsdp', '--peer'], 'has experts'),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_measured(flags, message, processes, capsys):
    line = refused(capsys, *MESH, '--rows=helios_1b:fsdp', *flags, alone=True)
    assert re.search(message, line), line
    assert not processes


def test_a_measurement_that_fails_is_a_row(monkeypatch):
    def run(*_, **__):
        raise UserError('x' * 999)

    monkeypatch.setattr(process, 'run', run)
    assert compare.attempt(float('inf'), measure.measure_step, {}, 1) == {'failed': 'x' * 300}
