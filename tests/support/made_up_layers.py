"""Figures of sublayers of a network that nobody trained."""

from collections.abc import Callable
from typing import Any

Rows = tuple[dict[str, Any], ...]


def rows(num_layers: int = 4, **figures: Callable[[int, int], Any]) -> Rows:
    """A row a sublayer; each figure is made of the layer, from 1, and 0 for attention, 1 for mlp.

    What is made as None is left out.
    """
    found = []
    for layer in range(1, num_layers + 1):
        for place, name in enumerate(('attention', 'mlp')):
            row = {'layer': layer, 'sublayer': name, 'stream_rms': layer + place / 2}
            made = {figure: of(layer, place) for figure, of in figures.items()}
            found.append(row | {name: value for name, value in made.items() if value is not None})
    return tuple(found)


def gated(num_layers: int = 4, shift: float = 0.0) -> Rows:
    """Mean gates are layer / 10, and a quarter more in an MLP; `shift` is added to them."""
    return rows(
        num_layers,
        gate_mean=lambda layer, place: layer / 10 + place / 4 + shift,
        gate_low=lambda layer, place: layer / 20,
        gate_high=lambda layer, place: 0.5 + layer / 10,
        gate_saturated=lambda layer, place: (layer + 5 * place) / 100 + shift,
        gate_histogram=lambda layer, place: [0.25 + shift, 0.75 - shift, *[0.0] * 8],
    )
