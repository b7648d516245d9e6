"""One row for each accelerator: recognised exactly, sourced and dated, and read by nobody early."""

import dataclasses
import datetime
import logging
import math
import os
import subprocess
import sys
import types

import jax
import pytest

from helios_jax import chips
from helios_jax.chips import GIB
from helios_jax.errors import UserError
from helios_jax.kernels.attention.tpu import blocks

ROWS = pytest.mark.parametrize('chip', chips.CHIPS.values(), ids=lambda chip: chip.name)


@ROWS
def test_every_figure_has_a_source_and_the_day_it_was_checked(chip):
    defaults = {field.name: field.default for field in dataclasses.fields(chip)}
    given = {name for name, value in dataclasses.asdict(chip).items() if value != defaults[name]}
    for name in given - {'name', 'platform'}:
        source = chips.SOURCES[chip.platform, name]
        assert source.text
        assert datetime.date.fromisoformat(source.checked) <= datetime.date.today()


@ROWS
def test_a_device_is_known_by_every_name_that_jax_gives_it(chip):
    assert chip.device_kinds
    for kind in chip.device_kinds:
        assert chips.find(kind) is chip
        assert chips.peak_flops(kind) == chip.peak_flops


def test_no_two_chips_share_a_name():
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert [chip.name for chip in chips.CHIPS.values()] == list(chips.CHIPS)


@pytest.mark.parametrize(
    'kind',
    [
        'NVIDIA H100 PCIe',  # another card: fewer FLOP/s and bytes/s than the SXM module
        'NVIDIA H100 80GB HBM3 MIG 1g.10gb',
        'NVIDIA H200 NVL',
        'TPU v5 lite plus',
        'TPU v9',
        'H100',
    ],
)
def test_a_device_that_is_only_alike_is_unknown_and_warned_of_once(kind, caplog):
    chips.peak_flops.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert math.isnan(chips.peak_flops(kind))
        assert math.isnan(chips.peak_flops(kind))
    assert chips.find(kind) is None
    assert len(caplog.records) == 1
    assert repr(kind) in caplog.text


def test_a_cpu_has_no_peak_to_measure_against_and_needs_no_warning(caplog):
    chips.peak_flops.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert math.isnan(chips.peak_flops('cpu'))
    assert not caplog.records


def devices(monkeypatch, kind: str, platform: str) -> None:
    device = types.SimpleNamespace(device_kind=kind, platform=platform)
    monkeypatch.setattr(jax, 'devices', lambda: [device] * 3)
    monkeypatch.setattr(jax, 'device_count', lambda: 3)


@pytest.mark.parametrize(
    ('kind', 'platform', 'name'),
    [
        ('TPU v5 lite', 'tpu', 'v5e'),
        ('TPU v5', 'tpu', 'v5p'),
        ('TPU v6 lite', 'tpu', 'v6e'),
        ('TPU7x', 'tpu', 'tpu7x'),
        ('NVIDIA H100 80GB HBM3', 'gpu', 'h100'),
        ('NVIDIA H200', 'gpu', 'h200'),
        ('NVIDIA A100-SXM4-40GB', 'gpu', 'a100_40gb'),
        ('cpu', 'cpu', 'cpu'),
    ],
)
def test_the_devices_at_hand_are_a_topology(kind, platform, name, monkeypatch):
    devices(monkeypatch, kind, platform)
    found = chips.here()
    assert (found.chip.name, found.num_devices) == (name, 3)


@pytest.mark.parametrize(('kind', 'platform'), [('NVIDIA B900', 'gpu'), ('TPU v9', 'tpu')])
def test_a_device_at_hand_that_the_table_lacks_is_named(kind, platform, monkeypatch):
    devices(monkeypatch, kind, platform)
    with pytest.raises(UserError, match=rf'no {kind!r}.*memory\.policy=full'):
        chips.here()


def test_kernels_refuse_a_tpu_whose_vmem_is_unknown(monkeypatch):
    devices(monkeypatch, 'TPU v6 lite', 'tpu')
    assert blocks.generation() == 'v6e'
    devices(monkeypatch, 'TPU v9', 'tpu')
    with pytest.raises(NotImplementedError, match=r"VMEM of 'TPU v9'.*chips\.py"):
        blocks.generation()
    devices(monkeypatch, 'NVIDIA H200', 'gpu')
    assert blocks.generation() == blocks.INTERPRETED


@pytest.mark.parametrize(
    ('name', 'num_devices'),
    [
        ('v5e:2x4', 8),
        ('v5p:2x2x4', 16),
        ('v6e', 1),
        ('tpu7x:2x2x1', 8),
        ('h100', 1),
        ('h100:8', 8),
        ('cpu', 1),
        ('cpu:4', 4),
    ],
)
def test_a_topology_is_a_chip_and_a_number_of_devices(name, num_devices):
    where = chips.topology(name)
    assert where.num_devices == num_devices
    assert where.chip.peak_flops > 0
    assert where.chip.hbm_bytes > GIB


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v5q:2x2', "'v5q'.*Did you mean 'v5"),
        ('v5p:2x', "'2x' must be numbers"),
        ('v5p:0x2x2', 'must be numbers'),
        ('v5p:2x02x2', 'must be numbers'),
        ('v5p:2x²x2', 'must be numbers'),
        ('v5e:٢x٢', 'must be numbers'),
        ('h100:', 'must be numbers'),
        ('h100:+8', 'must be numbers'),
        ('h100:' + '9' * 5000, 'must be numbers'),
        ('v5e:2x2x2', "'2x2x2' must have 2 dimensions, such as v5e:2x2"),
        ('v6e:8', "'8' must have 2 dimensions, such as v6e:2x2"),
        ('v5p:2x2', "'2x2' must have 3 dimensions, such as v5p:2x2x1"),
        ('tpu7x:4x4', "'4x4' must have 3 dimensions"),
        ('h100:2x8', "'2x8' must have 1 number, such as h100:8"),
    ],
)
def test_a_topology_that_is_none_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as refused:
        chips.topology(name)
    assert '\n' not in str(refused.value)


@ROWS
def test_the_smallest_topology_of_a_tpu_is_one(chip):
    assert (chip.topology != '') == (chip.platform == 'tpu')
    if chip.topology:
        assert chips.topology(chip.topology).chip is chip
        assert 0 < chip.kernel_vmem_bytes < chip.vmem_bytes


def test_importing_the_table_reads_nothing_of_the_machine():
    code = (
        'import sys; opened = []; '
        'sys.addaudithook(lambda name, a: opened.append(str(a[0])) if name == "open" else None); '
        'import helios_jax.chips; '
        'print(*(path for path in opened if path.startswith(("/sys", "/proc")))); '
        'print("jax" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ['False'], done.stdout + done.stderr


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    one, other, missing = tmp_path / 'memory.max', tmp_path / 'limit_in_bytes', tmp_path / 'none'
    monkeypatch.setattr(chips, 'CONTAINER_LIMITS', (missing, one, other))
    one.write_text('max\n')
    other.write_text('9223372036854771712\n')
    physical = chips.host_memory()
    assert physical == os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    other.write_text('12345678\n')
    assert chips.host_memory() == 12345678
