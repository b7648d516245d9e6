"""Table of accelerators: what one JAX device holds, and how fast it computes, reads and sends.

The planner, MFU, the attention kernels, the benchmarks and memory.policy=auto read these rows.
`SOURCES` says where each figure comes from and when it was last checked. Nothing is read from the
machine, and no JAX is loaded, until a function is called.

A topology is a chip and a number of devices: 'v5p:2x2x4', 'h100:8', 'cpu'.
"""

import dataclasses
import functools
import logging
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from helios_jax.errors import UserError, nearest, require

log = logging.getLogger(__name__)

MIB, GIB = 2**20, 2**30
# Where Linux keeps a control group's limit, version 2 and version 1: a number of bytes, or 'max'.
CONTAINER_LIMITS = (
    Path('/sys/fs/cgroup/memory.max'),
    Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts devices (tpu7x shows each of its two cores)."""

    name: str  # name in --topology
    platform: str  # tpu | gpu | cpu
    device_kinds: tuple[str, ...]  # every name that JAX gives it, exactly
    peak_flops: float  # dense bfloat16, FLOP/s
    hbm_bytes: float  # memory that a program may use
    hbm_bytes_per_second: float
    network_bytes_per_second: float  # sent by a device to its peers, over all links
    host_bytes_per_second: float  # sent to or from the host's memory, one way
    host_bytes: float  # a device's share of its host's memory
    devices_per_chip: int = 1
    capability: str = ''  # a GPU's compute capability: 9.0 is Hopper
    # What the largest operations reach of the two peaks; 0: nobody measured.
    matmul_flops: float = 0.0  # a bfloat16 product, FLOP/s
    copy_bytes_per_second: float = 0.0  # a copy within HBM, read and written
    # TPUs alone:
    dimensions: int = 1  # dimensions of a topology; GPUs are just counted
    topology: str = ''  # the smallest to compile for
    torus: int = 0  # a slice whose dimensions are multiples of this has links around its ends
    num_cores: int = 0  # TensorCores that one kernel can be split over
    num_mxus: int = 0  # MXUs of a core
    macs: int = 0  # multiply-adds of an MXU a cycle
    vmem_bytes: int = 0  # VMEM of a core
    kernel_vmem_bytes: int = 0  # the share of vmem_bytes that our kernels take
    delay_slots: int = 0  # bundles after a branch that run whether or not it is taken

    @property
    def clock(self) -> float:
        """Cycles per second of a TPU, from its peak FLOP/s."""
        return self.peak_flops / (2 * self.num_cores * self.num_mxus * self.macs)

    @property
    def ceilings(self) -> tuple[float, float]:
        """FLOP/s and bytes/s of HBM that can be reached: measured, or else the maker's peaks."""
        return (
            self.matmul_flops or self.peak_flops,
            self.copy_bytes_per_second or self.hbm_bytes_per_second,
        )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            'v5e', 'tpu', ('TPU v5 lite', 'TPU v5e'), 197e12, 15.75 * GIB, 819e9, 200e9, 16e9, 48e9,
            dimensions=2, topology='v5e:2x2', torus=16, num_cores=1, num_mxus=4, macs=128 * 128,
            vmem_bytes=128 * MIB, kernel_vmem_bytes=100 * MIB, delay_slots=4,
        ),
        Chip(
            'v5p', 'tpu', ('TPU v5', 'TPU v5p'), 459e12, 95.73 * GIB, 2765e9, 600e9, 16e9, 112e9,
            dimensions=3, topology='v5p:2x2x1', torus=4, num_cores=2, num_mxus=4, macs=128 * 128,
            vmem_bytes=64 * MIB, kernel_vmem_bytes=56 * MIB, delay_slots=4,
        ),
        Chip(
            'v6e', 'tpu', ('TPU v6 lite', 'TPU v6e'), 918e12, 31.24 * GIB, 1638e9, 400e9, 32e9,
            180e9, dimensions=2, topology='v6e:2x2', torus=16, num_cores=1, num_mxus=2,
            macs=2 * 256 * 256, vmem_bytes=128 * MIB, kernel_vmem_bytes=100 * MIB, delay_slots=4,
        ),
        Chip(
            'tpu7x', 'tpu', ('TPU7x',), 2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 300e9, 16e9, 120e9,
            devices_per_chip=2, dimensions=3, topology='tpu7x:2x2x1', torus=4, num_cores=1,
            num_mxus=2, macs=2 * 256 * 256, vmem_bytes=64 * MIB, kernel_vmem_bytes=56 * MIB,
            delay_slots=1,
        ),
        Chip(
            'h100', 'gpu', ('NVIDIA H100 80GB HBM3',), 989e12, 0.93 * 80e9, 3350e9, 450e9, 64e9,
            234e9, capability='9.0', matmul_flops=798e12, copy_bytes_per_second=3.0e12,
        ),
        Chip(
            'h200', 'gpu', ('NVIDIA H200',), 989e12, 0.93 * 141e9, 4800e9, 450e9, 64e9, 369e9,
            capability='9.0',
        ),
        Chip(
            'a100', 'gpu', ('NVIDIA A100-SXM4-80GB',), 312e12, 0.93 * 80e9, 2039e9, 300e9, 32e9,
            170e9, capability='8.0',
        ),
        Chip(
            'a100_40gb', 'gpu', ('NVIDIA A100-SXM4-40GB',), 312e12, 0.93 * 40e9, 1555e9, 300e9,
            32e9, 85e9, capability='8.0',
        ),
    )
}  # fmt: skip


class Source(NamedTuple):
    """Source of figures; `checked` is the day on which they were last compared with it."""

    text: str
    checked: str


_PAGES = Source('docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, specifications', '2026-11-22')
_SCHEDULES = Source('schedules of plain matmuls and of our kernels, libtpu 0.0.50', '2026-11-22')
_JAX = Source('jax._src.pallas.mosaic.tpu_info, jax 0.10.2', '2026-11-24')
_SHEETS = Source("NVIDIA's data sheets of the SXM modules", '2026-11-22')
# (platform, field) → source. Figures of a chip are divided by its devices.
SOURCES: dict[tuple[str, str], Source] = {
    ('tpu', 'device_kinds'): _JAX,
    ('tpu', 'peak_flops'): _PAGES,
    # What the compiler lets a program use.
    ('tpu', 'hbm_bytes'): Source(
        "libtpu 0.0.50's out-of-memory message: available HBM", '2026-11-22'
    ),
    # The page of v6e rounds to 1600 (once to 1640), the page of tpu7x has 1638: twice v5e's 819.
    ('tpu', 'hbm_bytes_per_second'): _PAGES._replace(checked='2026-11-24'),
    ('tpu', 'network_bytes_per_second'): Source('the same pages: ICI, one way', '2026-11-22'),
    # tpu7x is not published; taken as v6e's, for two devices.
    ('tpu', 'host_bytes_per_second'): Source(
        'jax-ml.github.io/scaling-book/tpus: PCIe', '2026-11-22'
    ),
    ('tpu', 'host_bytes'): Source(
        'machine types ct5lp-hightpu-4t 192 GB, ct5p-hightpu-4t 448, ct6e-standard-4t 720, '
        'tpu7x-standard-4t 960, of four chips each',
        '2026-11-22',
    ),
    ('tpu', 'devices_per_chip'): _PAGES,
    ('tpu', 'dimensions'): _PAGES,
    # v5e, v6e: whole pods of 16x16; v5p and tpu7x: cubes of 4x4x4 and what is made of them.
    ('tpu', 'torus'): _PAGES._replace(checked='2026-11-29'),
    ('tpu', 'topology'): Source('what libtpu 0.0.50 describes', '2026-11-22'),
    ('tpu', 'num_cores'): _JAX,
    ('tpu', 'num_mxus'): _JAX,
    ('tpu', 'macs'): _SCHEDULES,  # v6e and tpu7x pass two rows a cycle
    ('tpu', 'vmem_bytes'): _JAX,
    ('tpu', 'kernel_vmem_bytes'): Source(
        'what compiles for each generation beside XLA, libtpu 0.0.50', '2026-11-22'
    ),
    ('tpu', 'delay_slots'): _SCHEDULES,
    ('gpu', 'device_kinds'): Source("CUDA's cudaDeviceProp.name, as JAX hands it on", '2026-11-24'),
    ('gpu', 'peak_flops'): _SHEETS,
    ('gpu', 'matmul_flops'): Source('a bfloat16 product of 8192³ on one card', '2026-11-22'),
    ('gpu', 'copy_bytes_per_second'): Source('a copy on one card', '2026-11-22'),
    ('gpu', 'capability'): Source('developer.nvidia.com/cuda-gpus', '2026-11-29'),
    # 0.93: what driver, CUDA and XLA's allocator leave at XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
    ('gpu', 'hbm_bytes'): Source('data sheets, times 0.93 as measured on an H100', '2026-11-22'),
    ('gpu', 'hbm_bytes_per_second'): _SHEETS,
    ('gpu', 'network_bytes_per_second'): Source('data sheets: NVLink, one way', '2026-11-22'),
    ('gpu', 'host_bytes_per_second'): Source('PCIe 5 or 4, 16 lanes, one way', '2026-11-22'),
    ('gpu', 'host_bytes'): Source(
        'machine types a3-highgpu-8g 1872 GB, a3-ultragpu-8g 2952, a2-ultragpu-8g 1360, '
        'a2-highgpu-8g 680, of eight GPUs each',
        '2026-11-24',
    ),
}


class Topology(NamedTuple):
    name: str
    chip: Chip
    num_devices: int


def cpu() -> Chip:
    """Describes this machine as one device, whose memory is the host's."""
    return Chip(
        name='cpu',
        platform='cpu',
        device_kinds=('cpu',),
        # 16 float32 FMAs a cycle at 3 GHz: a core with AVX-512 or two AVX2 units, by its order.
        peak_flops=96e9 * (os.cpu_count() or 1),
        hbm_bytes=host_memory(),
        hbm_bytes_per_second=50e9,  # a desktop's two channels of DDR5
        network_bytes_per_second=10e9,
        host_bytes_per_second=50e9,
        host_bytes=0.0,
    )


def find(device_kind: str) -> Chip | None:
    """Finds a device's row by the kind that JAX gives it; None if the table lacks it."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


@functools.cache
def peak_flops(device_kind: str) -> float:
    """Dense bfloat16 FLOP/s of one device, for MFU; NaN for a CPU or an unknown device.

    Warns of an unknown accelerator, once.
    """
    chip = find(device_kind)
    if chip is None and device_kind != 'cpu':
        log.warning(
            'helios_jax/chips.py does not know %r: no MFU is reported. It knows %s.',
            device_kind,
            ', '.join(kind for chip in CHIPS.values() for kind in chip.device_kinds),
        )
    return chip.peak_flops if chip else math.nan


def here() -> Topology:
    """Describes the devices of this run.

    Raises:
      UserError: an accelerator that the table lacks.
    """
    import jax

    device = jax.devices()[0]
    found = cpu() if device.platform == 'cpu' else find(device.device_kind)
    if found is None:
        raise UserError(
            f"memory.policy='auto' knows no {device.device_kind!r}; name a policy, such as "
            'memory.policy=full.'
        )
    return Topology(found.name, found, jax.device_count())


def topology(name: str) -> Topology:
    """Parses the name of a set of devices, such as 'v5p:2x2x4', 'h100:8' or 'cpu'.

    Raises:
      UserError: a chip that the table lacks, a number of dimensions that it does not come in, or
        dimensions that are no positive numbers.
    """
    chip_name, colon, text = name.partition(':')
    known = (*CHIPS, 'cpu')
    require(
        chip_name in known,
        f'--topology={name}: {chip_name!r} is not in the table of chips.'
        f'{nearest(chip_name, known)} There are: {", ".join(known)}.',
    )
    chip = cpu() if chip_name == 'cpu' else CHIPS[chip_name]
    sizes = text.split('x') if colon else []
    example = chip.topology or f'{chip_name}:8'
    require(
        all(re.fullmatch('[1-9][0-9]{0,5}', size) for size in sizes),
        f'--topology={name}: {text!r} must be numbers joined by x, such as {example}.',
    )
    require(
        not sizes or len(sizes) == chip.dimensions,
        f'--topology={name}: {text!r} must have {chip.dimensions} '
        f'{"number" if chip.dimensions == 1 else "dimensions"}, such as {example}.',
    )
    return Topology(name, chip, math.prod(map(int, sizes)) * chip.devices_per_chip)


def host_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or its container's share."""
    physical = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limits = (file.read_text().strip() for file in CONTAINER_LIMITS if file.exists())
    return float(min([physical, *(int(limit) for limit in limits if limit.isdigit())]))
