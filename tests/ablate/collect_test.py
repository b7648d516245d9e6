"""Figures of a run as its metrics.jsonl has them, and how a run stands."""

import json
import math

import made_up_study
import pytest
from made_up_layers import gated

from helios_jax.ablate import collect, variants
from helios_jax.ablate.design import sized_arms
from helios_jax.ablate.records import Point
from helios_jax.train import layers

METRIC = 'eval/bits_per_byte'


@pytest.fixture
def variant(tmp_path):
    made = made_up_study.make(seeds=1)
    ((variant,),) = variants.seed_variants(made, tmp_path, {'deep': 3e-3})
    return variant


def read(variant, **changes):
    made = made_up_study.make(seeds=1, **changes)
    arms = {arm.name: arm for arm in sized_arms(made, dict.fromkeys(made.configs, 256))}
    return collect.read_run(variant, made, arms[variant.arm]), arms[variant.arm]


def write(variant, lines):
    variant.directory.mkdir(parents=True)
    text = ''.join(f'{json.dumps(line)}\n' for line in lines)
    (variant.directory / 'metrics.jsonl').write_text(text)
    (variant.directory / 'config.json').write_text(made_up_study.saved_config(variant))
    (variant.directory / 'report.md').write_text('done')


def test_a_point_has_what_its_run_had_cost_by_then():
    lines = [
        {'step': 2, 'tokens': 10, 'time/step_seconds': 3.0},
        {'step': 3, METRIC: 7.0},
        {'step': 6, 'tokens': 20, 'time/step_seconds': 0.5},
        {'step': 6, METRIC: 5.0},
    ]
    # Two steps of 10 tokens and 3 s, then four of 20 tokens and half a second.
    assert collect.read_points(lines, METRIC, 11.0) == (
        Point(3, 40, 440.0, 6.5, 7.0),
        Point(6, 100, 1100.0, 8.0, 5.0),
    )


def test_costs_without_a_clock_or_a_token_are_nothing():
    assert collect.read_points([{'step': 4, METRIC: 2.5}], METRIC, 3.0)[0].seconds == 0.0
    assert collect.read_points([], METRIC, 3.0) == ()


def test_a_finished_run_is_read_whole(variant):
    gib = [{'step': 5, 'device/peak_gib': 1.5}, {'step': 6, 'device/peak_gib': 1.25}]
    write(variant, [*made_up_study.lines(variant), *gib])
    run, arm = read(variant)
    assert (run.arm, run.seed, run.learning_rate, run.state) == ('deep', 0, 3e-3, 'done')
    assert run.value == run.points[-1].value == pytest.approx(2.0 + 0.05 + 1e-3 + 1)
    assert (run.tokens, run.seconds) == (300 * 3 + 600 * 3, 0.5 * 6)
    assert run.flops == run.tokens * arm.flops_per_token
    assert run.peak_bytes == 3 * 2**29
    assert run.series['loss'] == ((3.0, 3.0), (6.0, 1.5))
    assert not run.swept and run.reason == ''


def test_figures_of_layers_are_read_where_a_run_left_them(variant):
    write(variant, made_up_study.lines(variant))
    assert read(variant)[0].sublayers == ()
    layers.write(variant.directory, {'tokens': 9, 'sublayers': gated()})
    assert read(variant)[0].sublayers == gated()


def test_what_has_not_finished_is_missing_and_says_how_far_it_is(variant):
    assert [read(variant)[0].state, read(variant)[0].reason] == ['missing', 'not run']
    variant.directory.mkdir(parents=True)
    assert read(variant)[0].reason == 'stopped before its end'
    variant.beside('.failed').write_text('out of memory\n')
    assert [read(variant)[0].state, read(variant)[0].reason] == ['failed', 'out of memory']


def test_a_run_that_ended_with_no_number_has_failed(variant):
    lines = made_up_study.lines(variant)
    lines[-1][METRIC] = None  # as NaN is written
    write(variant, lines)
    run, _ = read(variant)
    assert (run.state, math.isnan(run.value)) == ('failed', True)
    assert run.reason == f'{METRIC} is no finite number at the last step'


def test_a_run_at_another_rate_than_it_is_compared_at_is_not_taken_for_it(variant):
    write(variant, made_up_study.lines(variant))
    (variant.directory / 'config.json').write_text('{"optimizer": {"learning_rate": 0.004}}')
    run, _ = read(variant)
    assert run.state == 'failed'
    assert run.reason.startswith('it was trained at a learning rate of 0.004, which is not the')


def test_every_run_of_the_study_is_there_whatever_has_run(tmp_path):
    made = made_up_study.make(learning_rates=(1e-3, 2e-3))
    arms = sized_arms(made, dict.fromkeys(made.configs, 256))
    runs = collect.results(made, arms, tmp_path, 'helios ablate', []).runs
    assert len(runs) == 3 * 2 + 3 * 2
    assert {run.state for run in runs} == {'missing'}
    for variant in variants.search_variants(made, tmp_path)[1]:
        variant.directory.parent.mkdir(exist_ok=True)
        variant.beside('.failed').write_text('diverged')
    runs = collect.results(made, arms, tmp_path, 'helios ablate', []).runs
    reasons = {(run.swept, run.state, run.reason) for run in runs if run.arm == 'gated'}
    assert reasons == {(True, 'failed', 'diverged'), (False, 'failed', collect.NO_RATE)}
    assert {run.state for run in runs if run.arm == 'deep'} == {'missing'}
