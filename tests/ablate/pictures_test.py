import math

import numpy as np
import studies
from drawings import drawn
from made_up_layers import gated, rows

from helios_jax.ablate import pictures


def test_effects_are_the_differences_of_the_arms():
    values = {'base': [2.0, 2.5], 'good': [1.5, 2.1], 'bad': [2.5, 2.9], 'short': [1.0]}
    figure = pictures.effects(studies.of_values(values))
    (axes,) = figure.axes
    points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == 'o']
    assert [[round(x, 9), y] for x, y in points] == [[-0.45, 0], [0.45, 1], [-1.0, 2]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['good', 'bad', 'short']
    assert 'base (bits/byte)' in axes.get_xlabel()
    drawn(figure)


def test_curves_lie_against_what_each_arm_spent():
    runs = [
        studies.run('residual', 1, 2.0, points=studies.curve(4.0, 2.0)),
        studies.run('convex', 1, 1.5, points=studies.curve(3.0, 1.5)),
        studies.run('convex', 2, 1.0, points=studies.curve(2.0, 1.0)),
        studies.run('convex', 3, math.nan, state='failed', points=studies.curve(9.0)),
    ]
    figure = pictures.curves(studies.results(runs))
    for axes, whole in zip(figure.axes, (7000, 3e12, 50.0), strict=True):
        base, convex = axes.lines
        assert base.get_xydata().tolist() == [[whole / 2, 4.0], [whole, 2.0]]
        assert convex.get_xydata().tolist() == [[whole / 2, 2.5], [whole, 1.25]]
        assert axes.get_ylabel() == 'held-out bits/byte'
    drawn(figure)


def test_bowls_are_those_of_the_searches_alone():
    runs = [studies.run('residual', 1, 9.0)]
    runs += [
        studies.run('convex', 1, v, rate=r, swept=True) for r, v in {0.1: 3.0, 0.3: 2.0}.items()
    ]
    figure = pictures.bowls(studies.results(runs))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.1, 3.0], [0.3, 2.0]]
    drawn(figure)


def test_training_has_a_panel_for_each_figure_that_was_logged():
    norms = {'gradient_norm': ((10.0, 0.5), (20.0, 0.25))}
    results = studies.results([studies.run('residual', series=norms), studies.run('convex')])
    figure = pictures.training(results)
    assert [axes.get_ylabel() for axes in figure.axes] == ['norm of the gradient']
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.25]]
    drawn(figure)
    assert pictures.logged(results, list(pictures.EXPERTS)) == []
    loads = {'router/load_max_over_mean': ((10.0, 1.5), (20.0, 1.25))}
    figure = pictures.experts(studies.results([studies.run('residual', series=loads)]))
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1.5, 1.25]


def test_gates_are_means_over_seeds_by_layer():
    runs = [
        studies.run('residual', 1, sublayers=rows()),
        studies.run('convex', 1, sublayers=gated(5)),
        studies.run('convex', 2, sublayers=gated(5, shift=0.2)),
        studies.run('convex', 3),  # of a release without these figures
        studies.run('convex', 4, math.nan, state='failed', sublayers=gated(5, shift=9)),
    ]
    figure = pictures.gates(studies.results(runs))
    attention, mlp, stream = figure.axes
    for axes, start in ((attention, 0.2), (mlp, 0.45)):
        (line,), (band,) = axes.lines, axes.collections
        expected = start + np.arange(5) / 10
        np.testing.assert_allclose(line.get_ydata(), expected)
        heights = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose(
            [heights.min(), heights.max()], [expected[0] - 0.1, expected[-1] + 0.1]
        )
    residual, convex = stream.lines
    assert residual.get_ydata().tolist() == [1, 2, 3, 4]
    more = rows(stream_gradient=lambda layer, place: 3 * layer + place)
    *_, gradient = pictures.gates(studies.results([studies.run('residual', sublayers=more)])).axes
    assert gradient.lines[0].get_ydata().tolist() == [3, 6, 9, 12]
    assert convex.get_color() == attention.lines[0].get_color() != residual.get_color()
    drawn(figure)


def test_units_are_those_of_the_metric():
    units = ['eval/bits_per_byte', 'eval/loss', 'eval/perplexity']
    assert [*map(pictures.unit, units)] == ['bits/byte', 'nats/token', 'perplexity']
