"""Compares how runs read rows longer than those that they learnt from, by arm and by method.

Lower values are better: they are held-out bits per byte in sliding windows (`evaluate.sliding`),
over the same text at every length.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from helios_jax import plot
from helios_jax.ablate import statistics
from helios_jax.ablate.page import Grid, Picture, Section
from helios_jax.ablate.records import StudyResults
from helios_jax.ablate.statistics import Finding
from helios_jax.ablate.study import BARE
from helios_jax.ablate.wording import NONE, digits, plus_minus, with_ends

UNIT = 'bits/byte'


class Place(NamedTuple):
    """Place of a value in the table."""

    arm: str
    length: int  # tokens of a row
    method: str


Values = Mapping[Place, Mapping[int, float]]  # place → seed → bits per byte


def values(results: StudyResults) -> Values:
    """Returns the values of the runs that are compared, arm by arm and from the shortest row on.

    An arm's own length, that of its training, has the method `none` alone. Values that are no
    finite number are left out.
    """
    found: dict[Place, dict[int, float]] = {}
    for arm, runs in statistics.compared(results).items():
        own: dict[Place, dict[int, float]] = {}
        for seed, run in runs.items():
            for (method, length), value in run.longer.items():
                seeds = own.setdefault(Place(arm, length, method), {})
                if math.isfinite(value):
                    seeds[seed] = value
        found |= dict(sorted(own.items(), key=lambda item: item[0].length))
    return found


def against(found: Values, other: Callable[[Place], Place]) -> dict[Place, Finding]:
    """Tests the values of each place against those of another one, over the seeds of both.

    Places whose other one is they themselves, or has no value, are left out.
    """
    pairs = {}
    for place, own in found.items():
        base = found.get(other(place), {})
        if base and other(place) != place:
            pairs[place] = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    return statistics.findings(pairs)


def sections(results: StudyResults) -> Iterator[Section]:
    """Yields the report's section, if the study asks for longer rows."""
    found, lost = values(results), [run for run in results.runs if run.unscored]
    blocks: list[str | Grid | Picture] = []
    if found:
        caption = 'Means; bands reach from the lowest seed to the highest.'
        blocks = [
            Picture('long_rows.png', plot.png(curves(found)), caption),
            table(results, found),
            'Held-out bits per byte in sliding windows, over the first documents that are as long '
            'as the longest row: the same text at every length. Means ± half of their 95% interval '
            f'by Student’s t. Differences are paired by seed: those to {BARE}, positions as they '
            f'were trained, are the method’s in rows of one length, those to {results.baseline} '
            'the arm’s by one method. p is that of the paired t test, corrected by Holm’s method '
            'for all differences of its kind in this table. The shortest rows of an arm are as '
            'long as those of its training, in which no method changes anything.',
        ]
    if lost:
        rows = [[run.arm, str(run.seed), run.unscored] for run in lost]
        blocks.append(Grid(['arm', 'seed', 'why the trained run was not scored'], rows))
    if blocks:
        yield Section('Longer rows', blocks)


def table(results: StudyResults, found: Values) -> Grid:
    """Makes the table of all values, beside `none` and beside the baseline."""
    compared = [
        (BARE, against(found, lambda place: place._replace(method=BARE))),
        (results.baseline, against(found, lambda place: place._replace(arm=results.baseline))),
    ]
    head = ['arm', 'tokens of a row', 'method', 'seeds', f'held-out {UNIT}']
    for name, _ in compared:
        head += [f'difference to {name}', 'corrected p', 'verdict']
    rows = []
    for place, seeds in found.items():
        row = [place.arm, f'{place.length:,}', place.method, str(len(seeds))]
        row.append(plus_minus(statistics.estimate([*seeds.values()])))
        for _, tested in compared:
            row += _cells(tested[place]) if place in tested else [NONE] * 3
        rows.append(row)
    return Grid(head, rows)


def curves(found: Values) -> Figure:
    """Draws each arm's values by length, a line a method, all on one scale."""
    arms = dict.fromkeys(place.arm for place in found)
    methods = dict.fromkeys(place.method for place in found)
    lengths = sorted({place.length for place in found})
    figure, panels = plot.panels(len(arms))
    for axes, arm in zip(panels, arms, strict=True):
        if axes is not panels[0]:
            axes.sharey(panels[0])
        lines = {method: _by_seed(found, arm, method) for method in methods}
        plot.curves(axes, lines, xlabel='tokens of a row', ylabel=f'held-out {UNIT}')
        axes.set_title(arm)
        axes.set_xscale('log', base=2)
        axes.set_xticks(lengths, [f'{length:,}' for length in lengths])
        axes.minorticks_off()
    return figure


def _by_seed(found: Values, arm: str, method: str) -> list[tuple[list[int], list[float]]]:
    """Lengths and values of each seed; every method's line begins at the rows of training."""
    places = [place for place in found if place.arm == arm]
    shortest = min(place.length for place in places)
    of_method = [place for place in places if method == place.method or place.length == shortest]
    seeds = sorted({seed for place in of_method for seed in found[place]})
    return [
        (
            [place.length for place in of_method if seed in found[place]],
            [found[place][seed] for place in of_method if seed in found[place]],
        )
        for seed in seeds
    ]


def _cells(found: Finding) -> list[str]:
    return [with_ends(found.difference), digits(found.corrected_p), found.verdict]
