"""Every figure that was read off says when, and by what."""

import datetime

import pytest

from helios_jax.plan import measured


@pytest.mark.parametrize('name', measured.figures())
def test_a_figure_has_a_meaning_a_source_and_a_day(name):
    row = measured.figures()[name]
    assert row.value >= 0
    assert row.meaning
    assert row.source
    assert datetime.date.fromisoformat(row.seen) <= datetime.date.today()


def test_the_ages_name_every_figure_of_the_planner_and_of_the_chips():
    lines = list(measured.ages())
    for name, row in measured.figures().items():
        assert any(line.startswith(f'{name} ') and row.seen in line for line in lines)
    assert any('tpu: hbm_bytes_per_second' in line for line in lines)
