"""Longer rows: values beside `none` and beside the baseline, in numbers, a table and a picture."""

import math

import numpy as np
import pytest
import studies
from drawings import drawn

from helios_jax.ablate import long_rows, report, statistics
from helios_jax.ablate.long_rows import Place

SEEDS = {1: 0.0, 2: 0.003, 3: -0.002}


def made():
    """`convex` reads rows of 64 as `residual` does, and longer ones better by some methods."""
    runs = []
    for arm, gain in (('residual', 0.0), ('convex', 0.5)):
        for seed, noise in SEEDS.items():
            longer = {
                ('none', 32): 2 + 3 * noise, ('none', 64): 3 + noise, ('none', 96): 5 + noise,
                ('yarn', 64): 2.5 + 2 * noise, ('yarn', 96): 2.75 - gain + 2 * noise,
            }  # fmt: skip
            runs.append(studies.run(arm, seed, 2 + noise, longer=longer))
    runs.append(studies.run('convex', 4, 2.0, unscored='the GPU has <no> room.'))
    runs.append(studies.run('residual', 4, math.nan, state='failed', longer={('none', 32): 9.0}))
    return studies.results(runs)


def test_values_are_those_of_compared_runs_by_arm_and_from_the_shortest_row_on():
    found = long_rows.values(made())
    assert [*found][:5] == [
        Place('residual', 32, 'none'), Place('residual', 64, 'none'),
        Place('residual', 64, 'yarn'), Place('residual', 96, 'none'), Place('residual', 96, 'yarn'),
    ]  # fmt: skip
    assert found[Place('convex', 96, 'yarn')] == pytest.approx({1: 2.25, 2: 2.256, 3: 2.246})
    lost = studies.run('convex', 1, longer={('none', 32): math.inf, ('none', 64): 3.0})
    assert [*long_rows.values(studies.results([lost])).values()] == [{}, {1: 3.0}]


def test_differences_are_paired_by_seed_and_corrected_for_all_of_their_kind():
    found = long_rows.values(made())
    to_none = long_rows.against(found, lambda place: place._replace(method='none'))
    assert len(to_none) == 4 and {place.method for place in to_none} == {'yarn'}
    one = to_none[Place('convex', 64, 'yarn')]
    expected = statistics.estimate([-0.5 + noise for noise in SEEDS.values()])
    assert one.difference == pytest.approx(expected) and one.verdict == 'better'
    p = {place: finding.p for place, finding in to_none.items()}
    corrected = statistics.holm(np.array([*p.values()]))
    assert [finding.corrected_p for finding in to_none.values()] == pytest.approx(corrected)
    to_baseline = long_rows.against(found, lambda place: place._replace(arm='residual'))
    assert [place.length for place in to_baseline] == [32, 64, 64, 96, 96]
    assert to_baseline[Place('convex', 64, 'none')].difference.mean == 0
    assert to_baseline[Place('convex', 64, 'none')].verdict == 'no difference found'
    assert to_baseline[Place('convex', 96, 'yarn')].difference.mean == pytest.approx(-0.5)


def test_the_report_has_a_section_where_runs_were_scored_or_were_to_be(tmp_path):
    text = report.write(made(), tmp_path).read_text()
    section = text.split('\n## Longer rows\n')[1].split('\n## ')[0]
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in section.splitlines()]
    rows = {tuple(row[:3]): row[3:] for row in cells if row}
    assert rows['convex', '96', 'yarn'][:2] == ['3', '2.2507 ± 0.0125']
    assert rows['convex', '96', 'yarn'][2].startswith('-2.7497 (-2.7')
    assert rows['convex', '96', 'yarn'][4::3] == ['better', 'better']
    assert rows['convex', '64', 'none'][4::3] == ['–', 'no difference found']
    assert rows['residual', '32', 'none'][2:] == ['–'] * 6
    assert rows['convex', '4', 'the GPU has &lt;no&gt; room.'] == []
    assert '](long_rows.png)' in section and (tmp_path / 'long_rows.png').exists()
    only_lost = studies.results([studies.run('residual', unscored='stopped')])
    (section,) = long_rows.sections(only_lost)
    assert len(section.blocks) == 1
    assert list(long_rows.sections(studies.results([studies.run('residual')]))) == []


def test_lines_begin_at_the_rows_of_training_and_panels_share_a_scale():
    figure = long_rows.curves(long_rows.values(made()))
    residual, convex = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ['residual', 'convex']
    assert residual.get_ylim() == convex.get_ylim()
    none, yarn = convex.lines
    assert none.get_xdata().tolist() == yarn.get_xdata().tolist() == [32, 64, 96]
    assert none.get_ydata()[0] == yarn.get_ydata()[0] == pytest.approx(2.001)
    assert yarn.get_ydata()[2] == pytest.approx(2.25 + 2e-3 / 3)
    assert [label.get_text() for label in convex.get_xticklabels()] == ['32', '64', '96']
    drawn(figure)
