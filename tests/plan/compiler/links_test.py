"""Collectives on the links of a slice, against counts by hand."""

import itertools

import pytest

from helios_jax.chips import CHIPS
from helios_jax.plan.compiler import links
from helios_jax.plan.compiler.collectives import Collective
from helios_jax.plan.compiler.links import Slice
from helios_jax.plan.measured import HOP_SECONDS

HOP = HOP_SECONDS.value
BYTES = 48e6


def whole(name: str, *sizes: int) -> Slice:
    return Slice(CHIPS[name], sizes, tuple(itertools.product(*map(range, sizes))))


def one(kind: str, *group: int) -> Collective:
    return Collective(kind, BYTES, 1.0, True, True, '', group)


def test_a_torus_has_two_links_a_dimension_and_a_smaller_slice_one_at_its_ends():
    cube, half = whole('v5p', 4, 4, 8), whole('v5p', 2, 4, 4)
    assert cube.torus and not half.torus
    for where, links_used, hops in ((cube, 6, 2 + 2 + 4), (half, 3, 1 + 3 + 3)):
        count = len(where.places)
        moved = BYTES * (count - 1) / count / (links_used * where.link)
        found = links.seconds(one('all-gather', *range(count)), where)
        assert found == pytest.approx(moved + hops * HOP)
    assert CHIPS['v5p'].network_bytes_per_second == 6 * cube.link


def test_a_sum_passes_twice_and_a_scattered_sum_once():
    where = whole('v5e', 16, 16)
    group = range(256)
    gathered = links.seconds(one('all-gather', *group), where)
    assert links.seconds(one('reduce-scatter', *group), where) == gathered
    assert links.seconds(one('all-reduce', *group), where) == 2 * gathered


def test_a_group_uses_the_links_of_the_dimensions_that_it_spans():
    where = whole('v6e', 16, 16)
    column = tuple(16 * row for row in range(16))
    assert [where.places[device][1] for device in column] == [0] * 16
    found = links.seconds(one('all-gather', *column), where)
    assert found == pytest.approx(BYTES * 15 / 16 / (2 * where.link) + 8 * HOP)


def test_what_is_sent_to_a_neighbour_takes_one_link_and_one_hop():
    where = whole('v5e', 4, 4)
    found = links.seconds(one('collective-permute', 5, 6), where)
    assert found == pytest.approx(BYTES / where.link + HOP)


def test_an_exchange_goes_a_mean_way():
    where = whole('v5e', 16, 16)
    found = links.seconds(one('all-to-all', *range(256)), where)
    assert found == pytest.approx(BYTES * (4 + 4) / (4 * where.link) + 16 * HOP)


def test_a_device_alone_and_the_devices_of_a_chip_use_no_link():
    assert links.seconds(one('all-reduce', 0), whole('v5e', 4, 4)) == 0
    chip = CHIPS['tpu7x']
    pair = Slice(chip, (2, 2, 1), ((0, 0, 0), (0, 0, 0)))
    assert links.seconds(one('all-gather', 0, 1), pair) == BYTES / chip.hbm_bytes_per_second
