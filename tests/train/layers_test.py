import json

import numpy as np
import pytest
from drawings import drawn
from made_up_layers import gated, rows

from helios_jax.errors import UserError
from helios_jax.train import layers

EXPERTS = {'expert_load': lambda layer, place: [0.5, 0.3, 0.2] if place and layer != 2 else None}


def test_what_is_written_is_read(tmp_path):
    given = gated()
    given[3]['gate_mean'] = float('nan')
    layers.write(tmp_path, {'tokens': 7, 'sublayers': given})
    text = (tmp_path / 'layers.json').read_text()
    assert json.loads(text)['tokens'] == 7 and 'NaN' not in text
    read = layers.read(tmp_path)
    assert read[3] == given[3] | {'gate_mean': None} and tuple(read[:3]) == given[:3]
    means = layers.by_layer(read, 'mlp', 'gate_mean')
    np.testing.assert_allclose(means, [0.35, np.nan, 0.55, 0.65])
    drawn(layers.drawn(read))


def test_an_older_run_has_no_figures(tmp_path):
    assert layers.read(tmp_path) == []


@pytest.mark.parametrize(
    'text', ['', '[]', '{"sublayers": 3}', '{"sublayers": [{"layer": 1}]}', '{"tokens": 1', '\x80']
)
def test_a_file_that_no_run_wrote_is_refused(tmp_path, text):
    (tmp_path / 'layers.json').write_text(text, encoding='latin-1')
    with pytest.raises(UserError, match=r'layers\.json has no figures of layers; remove it'):
        layers.read(tmp_path)


def test_gates_have_a_panel_for_each_figure():
    figure = layers.drawn(gated())
    mean, saturated, stream, attention, mlp = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == [
        'mean gate', 'share of saturated gates', 'root mean square of the stream',
        'gate of attention', 'gate of mlp',
    ]  # fmt: skip
    assert [line.get_label() for line in mean.lines] == ['attention', 'mlp']
    np.testing.assert_allclose(
        mean.lines[1].get_xydata(), [[1, 0.35], [2, 0.45], [3, 0.55], [4, 0.65]]
    )
    band = mean.collections[0].get_paths()[0].vertices
    assert {(1, 0.05), (4, 0.2), (4, 0.9), (1, 0.6)} <= {tuple(np.round(c, 9)) for c in band}
    assert mean.get_ylim()[0] == saturated.get_ylim()[0] == 0
    assert stream.lines[0].get_ydata().tolist() == [1, 2, 3, 4]
    (shades,) = attention.collections
    np.testing.assert_array_equal(shades.get_array().T, [[0.25, 0.75, *[0] * 8]] * 4)
    assert mlp.get_xlim() == (0.5, 4.5) and mlp.get_ylim() == (0, 1)
    drawn(figure)
    said = layers.caption(gated())
    assert 'below 0.01 or above 0.99' in said and '80%' in said and 'expert' not in said


def test_experts_are_shaded_where_layers_have_them():
    figure = layers.drawn(rows(**EXPERTS))
    _, experts = figure.axes
    shares = experts.collections[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(shares)[0], [False, True, False, False])
    np.testing.assert_allclose(shares[:, 3], [0.5, 0.3, 0.2])
    assert experts.get_ylim() == (-0.5, 2.5)
    drawn(figure)


def test_a_residual_network_shows_its_stream_alone():
    figure = layers.drawn(rows())
    assert [axes.get_ylabel() for axes in figure.axes] == ['root mean square of the stream']
    drawn(figure)
    assert 'Gates' not in layers.caption(rows())
    factors = layers.drawn(rows(factor_mean=lambda layer, place: -layer / 7)).axes[0]
    assert factors.get_ylabel() == 'mean factor of the update'
    assert factors.get_ylim()[0] < -4 / 7


def test_gradients_are_drawn_beside_the_stream():
    sizes = {'stream_gradient': 7, 'weights_gradient': 11}
    made = {name: lambda layer, place, n=n: n * layer + place for name, n in sizes.items()}
    figure = layers.drawn(rows(**made))
    _, gradient, norm = figure.axes
    assert gradient.get_ylabel() == 'gradient in the stream'
    assert gradient.lines[1].get_ydata().tolist() == [8, 15, 22, 29]
    assert norm.lines[0].get_ydata().tolist() == [11, 22, 33, 44]
    assert 'gradient' in layers.caption(rows(**made)) and 'gradient' not in layers.caption(rows())
    drawn(figure)
