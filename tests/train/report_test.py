import importlib.metadata
import json

import jax
import pytest
from drawings import pixels
from etils import epath
from made_up_layers import gated

from helios_jax import plot
from helios_jax.errors import UserError
from helios_jax.train import layers, report


def lines() -> list[dict]:
    training = [{'step': n, 'loss': 6.0 - n / 10} for n in range(1, 31)]
    return training + [{'step': n, 'eval/bits_per_byte': 3.0} for n in (10, 20)]


def write(workdir, sample='def f():\n    return 1') -> str:
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines()))
    path = report.write(
        workdir,
        config_dict={'model': {'num_layers': 4, 'rope': {'base': 1e4}}, 'data': {'corpus': 'a|b'}},
        environment=report.environment(),
        data={'corpus': 'two\nlines', 'training tokens': 1234567},
        final={'bytes': 65177.0, 'bits_per_byte': 2.123456789, 'time/mfu': 0.4123},
        sample=sample,
    )
    assert str(path) == str(workdir / 'report.md')
    return path.read_text()


def test_report_holds_every_figure_and_setting(tmp_path):
    text = write(tmp_path)
    rows = [
        '| held-out text | 2.1235 bits/byte |',
        '| held-out bytes | 65,177 |',
        '| MFU | 41.2% |',
        '| corpus | two lines |',
        '| training tokens | 1,234,567 |',
        '| model.num_layers | 4 |',
        '| model.rope.base | 10000 |',
        r'| data.corpus | a\|b |',
        f'| jax | {importlib.metadata.version("jax")} |',
        f'| devices | {jax.device_count()} |',
    ]
    assert [row for row in rows if row not in text.splitlines()] == []
    assert '```text\ndef f():\n    return 1\n```\n' in text
    assert '](curves.png)' in text


def test_a_report_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(epath.Path(tmp_path)), 'replace', killed)
        write(tmp_path)
    assert not (tmp_path / 'report.md').exists()


def test_layers_are_shown_where_a_run_left_their_figures(tmp_path):
    assert '## Layers' not in write(tmp_path) and not (tmp_path / 'layers.png').exists()
    layers.write(tmp_path, {'tokens': 9, 'sublayers': gated()})
    shown = write(tmp_path).split('\n## Layers\n')[1].split('\n## ')[0]
    assert '](layers.png)' in shown and 'saturated' in shown
    assert pixels((tmp_path / 'layers.png').read_bytes()).std() > 0.01


@pytest.mark.parametrize('run', [3, 4, 7])
def test_backticks_in_the_sample_do_not_close_its_block(tmp_path, run):
    sample = f'before\n{"`" * run}\n# not a heading\n'
    text = write(tmp_path, sample)
    fence = '`' * (run + 1)
    assert f'\n{fence}text\n{sample}\n{fence}\n' in text
    assert text.count(fence) == 2


def test_curves_are_an_image_with_a_panel_for_each_figure(tmp_path):
    write(tmp_path)
    image = pixels((tmp_path / 'curves.png').read_bytes())
    assert image.ndim == 3 and image.std() > 0.01
    figure = report.curves(lines())
    assert [axes.get_ylabel() for axes in figure.axes] == [
        'loss (nats per token)', 'held-out bits per byte',
    ]  # fmt: skip
    every = {name: 1.0 for own in report.PANELS.values() for name in own.values()}
    assert len(report.curves([{'step': 1} | every]).axes) == len(report.PANELS)


def test_held_out_figures_lie_where_their_tokens_are():
    logged = [{'step': n, 'loss': 6.0 - n / 10, 'tokens': 100 + n} for n in (2, 6, 10)]
    scores = [{'step': n, 'eval/loss': 7.0 - n, 'eval/bits_per_byte': 3.0} for n in (4, 10)]
    losses, held_out = report.curves(sorted(logged + scores, key=lambda line: line['step'])).axes
    training, scored = losses.lines
    # Two steps of 102 tokens, four of 106, four of 110; the step 4 lies within the second ones.
    assert training.get_xydata().tolist() == [[204, 5.8], [628, 5.4], [1068, 5.0]]
    assert scored.get_xydata().tolist() == [[416, 3.0], [1068, -3.0]]
    assert held_out.lines[0].get_xdata().tolist() == [416, 1068]
    assert held_out.get_xlabel() == 'training tokens' and held_out.get_xlim() == losses.get_xlim()


def test_curves_of_lines_without_tokens_lie_at_their_steps():
    (axes, _) = report.curves(lines()).axes
    assert axes.get_xlabel() == 'step'
    assert axes.lines[0].get_xydata().tolist() == [[n, 6.0 - n / 10] for n in range(1, 31)]


def test_bits_of_a_lossy_tokenizer_say_so():
    lossy = [{'step': 1, 'eval/bits_per_byte': 2.0, 'eval/lost_fraction': 0.1}]
    assert [axes.get_ylabel() for axes in report.curves(lossy).axes][1].endswith('tokenizer keeps')


def test_curves_of_a_run_without_a_line_are_empty_but_an_image():
    assert pixels(plot.png(report.curves([]))).ndim == 3


def test_report_without_metrics_is_an_error(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        report.write(tmp_path, config_dict={}, environment={}, data={}, final={}, sample='')


def test_environment_names_versions_and_devices():
    found = report.environment()
    assert found['versions']['optax'] == importlib.metadata.version('optax')
    assert found['hardware']['platform'] == jax.default_backend()
    assert json.loads(json.dumps(found)) == found
