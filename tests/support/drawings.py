"""What a picture shows."""

import io

import matplotlib.image
import numpy as np

from helios_jax import plot


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format='png')


def drawn(figure) -> np.ndarray:
    """The picture; all that is drawn, labels too, lies inside, and each panel holds its data."""
    image = pixels(plot.png(figure))
    inches = figure.get_size_inches()
    assert image.shape[:2] == tuple(round(plot.DOTS_PER_INCH * size) for size in inches[::-1])
    box = figure.get_tightbbox()
    assert box.x0 > -0.01 and box.y0 > -0.01
    assert box.x1 < inches[0] + 0.01 and box.y1 < inches[1] + 0.01
    for axes in figure.axes:
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        data = axes.dataLim
        assert left <= data.x0 <= data.x1 <= right and bottom <= data.y0 <= data.y1 <= top
    assert image[..., :3].std() > 0.02
    return image
