import math

import matplotlib.text
import pytest
from drawings import drawn

from helios_jax import plot

STEPS = [10, 20, 30]


def said(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def test_curves_are_the_mean_and_the_range_of_the_seeds():
    figure, (axes,) = plot.panels(1)
    seeds = [(STEPS, [5.0, 4.0, 3.0]), (STEPS, [7.0, 5.0, 3.5])]
    plot.curves(axes, {'convex': seeds, 'none': []}, xlabel='step', ylabel='loss (nats)')
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[10, 6.0], [20, 4.5], [30, 3.25]]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(10, 5), (10, 7), (20, 4), (20, 5), (30, 3), (30, 3.5)} == corners
    drawn(figure)
    assert {'step', 'loss (nats)', 'convex'} <= said(figure) and 'none' not in said(figure)


def test_seeds_measured_elsewhere_meet_where_all_of_them_are():
    figure, (axes,) = plot.panels(1)
    seeds = [([0, 10], [0.0, 10.0]), ([4, 12], [5.0, 13.0])]
    plot.curves(axes, {'convex': seeds}, xlabel='seconds', ylabel='loss')
    assert axes.lines[0].get_xydata().tolist() == [[4, 4.5], [10, 10.5]]
    apart = [([1], [2.0]), ([3], [4.0])]
    figure, (axes,) = plot.panels(1)
    plot.curves(axes, {'convex': apart}, xlabel='seconds', ylabel='loss')
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 2]], [[3, 4]]]
    drawn(figure)


def test_a_bowl_circles_its_lowest_point_and_crosses_what_diverged():
    figure, (axes,) = plot.panels(1)
    bowl = {1e-4: 3.0, 1e-3: 2.5, 1e-2: math.nan}
    plot.bowls(axes, {'convex': bowl}, ylabel='bits per byte')
    line, circle, cross = axes.lines
    assert line.get_xydata().tolist() == [[1e-4, 3.0], [1e-3, 2.5]]
    assert circle.get_xydata().tolist() == [[1e-3, 2.5]]
    assert cross.get_xdata().tolist() == [1e-2]
    assert axes.get_xlim()[1] > 1e-2 and axes.get_xscale() == 'log'
    drawn(figure)
    assert {'0.0001', '0.001', '0.01'} <= said(figure)


def test_intervals_stand_from_top_to_bottom_beside_zero():
    figure, (axes,) = plot.panels(1)
    estimates = {'long_name_of_an_arm': (-0.2, -0.3, -0.1), 'single': (0.4, math.nan, math.nan)}
    plot.intervals(axes, estimates, xlabel='difference (bits per byte)')
    zero, first, bar, second = axes.lines
    assert zero.get_xdata()[0] == 0
    assert first.get_xydata().tolist() == [[-0.2, 0]] and second.get_xydata().tolist() == [[0.4, 1]]
    assert bar.get_xydata().tolist() == [[-0.3, 0], [-0.1, 0]]
    assert second.get_markerfacecolor() == 'none' != first.get_markerfacecolor()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    drawn(figure)
    assert {'long_name_of_an_arm', 'single', 'difference (bits per byte)'} <= said(figure)


def test_layers_count_from_one_and_bars_have_their_lengths():
    figure, (left, right) = plot.panels(2)
    plot.per_layer(left, {'attention': [0.1, 0.2, 0.4], 'mlp': [0.3, 0.5]}, ylabel='mean gate')
    plot.bars(right, {'convex': 3.5, 'residual': 5.25}, xlabel='memory (GiB)')
    assert left.lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2], [3, 0.4]]
    assert [bar.get_width() for bar in right.patches] == [3.5, 5.25]
    drawn(figure)
    assert {'layer', 'mean gate', 'attention', 'mlp', 'convex', 'residual'} <= said(figure)


def test_a_band_lies_about_its_line_and_a_name_without_values_keeps_its_look():
    figure, (axes,) = plot.panels(1)
    bands = {'convex': ([0.1, 0.2], [0.5, 0.4])}
    lines = {'residual': [], 'convex': [0.25, 0.3]}
    plot.per_layer(axes, lines, ylabel='mean gate', bands=bands)
    (line,), (band,) = axes.lines, axes.collections
    assert (line.get_label(), line.get_color()) == ('convex', plot.COLOURS[1])
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 0.1), (1, 0.5), (2, 0.2), (2, 0.4)}
    drawn(figure)


def test_shades_are_a_column_a_layer():
    figure, (gates, experts) = plot.panels(2)
    shares = [[0.5, 0.5, 0], [math.nan] * 3]
    plot.shades(gates, shares, ylabel='gate', top=1.0)
    plot.shades(experts, shares, ylabel='expert')
    (shaded,) = gates.collections
    assert shaded.get_array()[:, 0].tolist() == [0.5, 0.5, 0] and shaded.get_clim() == (0, 0.5)
    assert shaded.get_array().mask[:, 1].all()
    assert gates.get_xlim() == (0.5, 2.5) and gates.get_ylim() == (0, 1)
    assert experts.get_ylim() == (-0.5, 2.5)
    drawn(figure)


def test_many_names_look_different_and_their_legend_stays_inside():
    figure, panels = plot.panels(3)
    lines = {f'an_arm_with_a_name_{n}': [(STEPS, [n, n + 1.0, n + 2.0])] for n in range(20)}
    for axes in panels:
        plot.curves(axes, lines, xlabel='step', ylabel='loss')
    looks = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines}
    assert len(looks) == 20
    drawn(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*lines]


@pytest.mark.parametrize(('count', 'shape'), [(1, (1, 1)), (2, (1, 2)), (5, (2, 3))])
def test_panels_fill_rows(count, shape):
    figure, panels = plot.panels(count)
    assert len(panels) == len(figure.axes) == count
    assert tuple(figure.get_size_inches()) == pytest.approx((4.6 * shape[1], 3.4 * shape[0]))


def test_large_numbers_are_short_and_the_same_picture_the_same_bytes():
    def picture() -> bytes:
        figure, (axes,) = plot.panels(1)
        plot.curves(axes, {'a': [([0, 2e6], [1.0, 3e4])]}, xlabel='tokens', ylabel='tokens/s')
        first = plot.png(figure)
        assert {'1M', '2M', '30k'} & said(figure) == {'1M', '2M', '30k'}
        return first

    assert picture() == picture()
