import hashlib
import math

import pytest
import studies
from made_up_layers import gated, rows

from helios_jax.ablate import report

STEADY = (0.0, 0.001, -0.001, 0.002)


def series(loss=3.0, **more):
    """A logged loss with one spike, and other figures."""
    losses = [loss + 0.01 * (n % 3) for n in range(40)]
    losses[30] += 1
    return {'loss': tuple((float(n), v) for n, v in enumerate(losses, 1)), **more}


def made(**fields):
    """`convex` beats `residual`, `static` may or may not, `highway` has failed once too often."""
    effects = {'residual': 0.0, 'convex': -0.5, 'static': 0.0005}
    runs = [
        studies.run(
            arm, seed, 2 + seed / 10 + effect + noise * (arm != 'residual'), peak_bytes=3 * 2**30,
            points=studies.curve(4.0, 2 + seed / 10 + effect + noise * (arm != 'residual')),
            series=series(**{'time/step_seconds': ((10.0, 0.25), (20.0, 0.75), (30.0, 0.5))}),
        )
        for arm, effect in effects.items()
        for seed, noise in enumerate(STEADY, 1)
    ]  # fmt: skip
    reason = 'the loss is <nan> at step 7'
    runs += [
        studies.run('highway', 1, 2.5),
        studies.run('highway', 2, math.nan, state='failed', reason=reason),
        studies.run('convex', 9, 1.7, rate=1e-3, swept=True),
        studies.run('convex', 9, 1.6, rate=3e-3, swept=True),
    ]
    overrides = {'convex': {'model.gmu.kind': 'convex'}, 'static': {'model.gmu.gate': 'static'}}
    return studies.results(runs, overrides=overrides, **fields)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp('study')
    (directory / 'study.json').write_text('{"study": "made_up"}')
    return report.write(made(notes=('Seed 5 was dropped: --budget_minutes=10.',)), directory)


def section(text, title):
    return text.split(f'\n## {title}\n')[1].split('\n## ')[0]


def row(text, arm):
    """The cells of an arm's row in the comparison."""
    lines = [line for line in text.splitlines() if line.startswith(f'| {arm} | ')]
    (line,) = [line for line in lines if line.count('|') == 15]
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_the_question_and_the_verdict_come_first(written):
    text = written.read_text()
    head = text.split('\n## ')[1]
    assert head.startswith('Verdict\n\nDo gates help?\n\nconvex is better than residual by 0.4995 ')
    assert 'No difference to residual was found for static.' in head
    assert 'best first: convex; residual, static. ' in head
    assert 'Fewer than two seeds are common to residual and highway: no interval' in head
    assert 'With 4 seeds and 2 arms compared' in head  # those that have an interval


def test_arms_within_the_noise_are_not_ranked():
    lines = report.verdict(studies.of_values({'base': [2.0, 2.1, 2.2], 'alike': [1.9, 2.2, 2.1]}))
    assert lines[0] == 'No difference to base was found for alike.'
    assert lines[1].startswith('The arms are not ranked')


def test_an_arms_row_holds_its_figures_beside_the_baselines(written):
    text = section(written.read_text(), 'Arms')
    name, seeds, rate, size, flops, value, difference, p, verdict, *rest = row(text, 'convex')
    assert (name, seeds, rate, size, flops) == ('convex', '4', '0.001', '1,234,567', '7.4e+06')
    assert value.startswith('1.7505 ± 0.2') and verdict == 'better' and float(p) < 1e-6
    # 0.4995 and t(3) of 97.5% times a standard error of 0.00129 / 2.
    assert difference == '-0.4995 (-0.5016 to -0.4974)'
    tokens, flops, seconds, step, memory = rest
    assert tokens == flops == seconds and ' × (' in tokens and float(tokens.split()[0]) > 1
    assert (step, memory) == ('0.5 s', '3.00 GiB')
    assert row(text, 'residual')[6:12] == ['–'] * 6
    highway = row(text, 'highway')
    assert highway[6] == '+0.4000' and highway[7:9] == ['–', 'fewer than two common seeds']
    assert highway[12:] == ['–', '–']


def test_the_report_holds_what_differs_failed_was_dropped_and_reproduces_it(written):
    text = written.read_text()
    assert '| convex | model.gmu.kind | residual | convex |' in text
    assert '| static | model.gmu.gate | – | static |' in text
    lost = section(text, 'Runs left out')
    assert '| highway | 2 | 0.001 | failed | the loss is &lt;nan&gt; at step 7 |' in lost
    assert 'Seed 5 was dropped: --budget_minutes=10.' in section(text, 'Notes')
    origin = section(text, 'To run it again')
    assert 'helios ablate --study=made_up' in origin and '| device | cpu |' in origin
    assert hashlib.sha256(b'{"study": "made_up"}').hexdigest() in origin
    hashes = {line.split('|')[2] for line in origin.splitlines() if '| config of' in line}
    assert len(hashes) == 3  # highway's config is the baseline's here
    assert '| model.num_layers | 3 |' in section(text, 'Config')


def test_searches_and_spikes_have_their_tables(written):
    text = written.read_text()
    rates = section(text, 'Learning rates')
    assert '| convex | 0.001: 1.7, 0.003: 1.6 | 0.003 | at an end of the grid' in rates
    assert '| convex | 4 of 160 | – | – |' in section(text, 'Training')
    assert 'Experts' not in text


def test_html_says_what_markdown_says_with_its_pictures_inside(written):
    text, names = (written.parent / 'report.html').read_text(), ['effects', 'curves', 'bowls']
    assert text.count('data:image/png;base64,') == len(names) + 1
    assert all((written.parent / f'{name}.png').exists() for name in [*names, 'training'])
    assert 'the loss is &lt;nan&gt; at step 7' in text
    assert 'convex is better than residual' in text


def test_gates_have_their_table_where_an_arm_has_gates(written, tmp_path):
    assert 'Gates' not in written.read_text()
    runs = [
        studies.run('residual', 1, sublayers=rows()),
        studies.run('convex', 1, sublayers=gated(3)),
        studies.run('convex', 2, sublayers=gated(3, shift=0.1)),
    ]
    report.write(studies.results(runs[:1]), tmp_path)
    assert not (tmp_path / 'gates.png').exists()
    text = section(report.write(studies.results(runs), tmp_path).read_text(), 'Gates')
    head, _, *table = [line for line in text.splitlines() if line.startswith('|')]
    assert head.endswith('| 0.8 to 0.9 | 0.9 to 1 |')
    assert table == [
        '| convex | 7.0% | 12.0% | 13.0%: mlp of layer 3 | 30.0% | 70.0% |' + ' 0.0% |' * 8
    ]
    assert '](gates.png)' in text and 'below 0.01 or above 0.99' in text
    shown = (tmp_path / 'report.html').read_text()
    assert '<td>13.0%: mlp of layer 3</td>' in shown and 'alt="Gates"' in shown


def test_the_same_results_are_the_same_bytes(written, tmp_path):
    (tmp_path / 'study.json').write_text('{"study": "made_up"}')
    report.write(made(notes=('Seed 5 was dropped: --budget_minutes=10.',)), tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (written.parent / path.name).read_bytes(), path.name


def test_a_table_for_people_has_a_row_for_each_arm():
    rows = {label: (number, unit) for label, number, unit in report.table(made())}
    assert list(rows) == ['residual', 'convex', 'static', 'highway']
    assert rows['residual'] == ('2.2500 ± 0.2054', 'bits/byte, the baseline')
    assert rows['convex'][1].endswith('(-0.5016 to -0.4974): better')
    assert rows['highway'] == ('2.5000', 'bits/byte, +0.4000: fewer than two common seeds')


@pytest.mark.parametrize(
    ('runs', 'said'),
    [
        ([], 'nothing is compared'),
        ([studies.run('convex')], 'nothing is compared'),
        ([studies.run('residual'), studies.run('convex')], 'no interval and no verdict'),
    ],
)
def test_a_study_with_hardly_a_run_has_a_report_all_the_same(runs, said, tmp_path):
    results = studies.results(runs)
    assert said in section(report.write(results, tmp_path).read_text(), 'Verdict')
    assert report.table(results)[0][0] == 'residual'
