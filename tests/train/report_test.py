import importlib.metadata
import io
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from helios_jax.errors import UserError
from helios_jax.train import report


def lines(evaluations: bool = True) -> list[dict]:
    training = [{'step': n, 'loss': 6.0 - n / 10} for n in range(1, 31)]
    return training + [{'step': n, 'eval/bits_per_byte': 3.0} for n in (10, 20)] * evaluations


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


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format='png')


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


@pytest.mark.parametrize('run', [3, 4, 7])
def test_backticks_in_the_sample_do_not_close_its_block(tmp_path, run):
    sample = f'before\n{"`" * run}\n# not a heading\n'
    text = write(tmp_path, sample)
    fence = '`' * (run + 1)
    assert f'\n{fence}text\n{sample}\n{fence}\n' in text
    assert text.count(fence) == 2


def test_curves_are_an_image_with_a_panel_for_each_curve(tmp_path):
    write(tmp_path)
    image = pixels((tmp_path / 'curves.png').read_bytes())
    assert image.ndim == 3 and image.std() > 0.01
    single = pixels(report.curves(lines(evaluations=False)))
    assert (image.shape[0], image.shape[1]) == (single.shape[0], 2 * single.shape[1])


def test_curves_show_the_figures():
    changed = lines()
    changed[12]['loss'] = 40.0
    assert not np.array_equal(pixels(report.curves(lines())), pixels(report.curves(changed)))


def test_curves_of_a_run_without_a_line_are_empty_but_an_image():
    assert pixels(report.curves([])).ndim == 3


def test_report_without_metrics_is_an_error(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        report.write(tmp_path, config_dict={}, environment={}, data={}, final={}, sample='')


def test_environment_names_versions_and_devices():
    found = report.environment()
    assert found['versions']['optax'] == importlib.metadata.version('optax')
    assert found['hardware']['platform'] == jax.default_backend()
    assert json.loads(json.dumps(found)) == found
