"""Chips as data: what one JAX device can hold and how fast it reads, computes and sends.

Bandwidths are the makers' peaks; peak FLOP/s come from model/flops.py. A topology is a chip and a
number of devices: 'v5p:2x2x4', 'h100:8', 'cpu'.
"""

import dataclasses
import math
import os

from helios_jax import config
from helios_jax.model import flops
from helios_jax.parallel.host import host_memory

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts devices (tpu7x shows each of its two cores)."""

    name: str
    device_kind: str  # key of flops.PEAK_FLOPS
    hbm_bytes: float  # that a program may use
    hbm_bandwidth: float  # bytes/s
    network_bandwidth: float  # bytes/s that a device sends to its peers (ICI, NVLink), all links
    host_bandwidth: float  # bytes/s to or from the host's memory, one way
    host_bytes: float  # of the host's memory, a device's share
    platform: str = 'tpu'
    devices_per_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        if self.platform == 'cpu':
            # 16 float32 FMAs a cycle at 3 GHz, the order of a core with AVX-512 or two AVX2 units.
            return 96e9 * (os.cpu_count() or 1)
        return flops.peak_flops(self.device_kind)


# HBM of TPUs: "available HBM" in libtpu 0.0.50's out-of-memory message for each generation, which
# is what the compiler lets a program use. HBM and ICI bandwidth of TPUs: the system architecture
# pages docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, one way and a chip (v5e 400 and v6e 800
# GB/s both ways, v5p 4800 Gb/s, tpu7x 1200 GB/s both ways). Host links:
# jax-ml.github.io/scaling-book/tpus, PCIe 16 GB/s a chip, 32 on v6e; tpu7x is not published, taken
# as v6e's. Host memory: machine types ct5lp-hightpu-4t 192 GB, ct5p-hightpu-4t 448,
# ct6e-standard-4t 720, tpu7x-standard-4t 960 (docs.cloud.google.com/tpu/docs), of four chips each.
# NVIDIA: data sheets (HBM, NVLink one way: half of 900 or 600 GB/s; PCIe 5 or 4 x16, one way); 0.93
# of the memory is what the driver, CUDA and XLA's allocator leave at
# XLA_PYTHON_CLIENT_MEM_FRACTION=.95. Hosts a3-highgpu-8g 1872 GB, a3-ultragpu-8g 2952,
# a2-ultragpu-8g 1360, of eight.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip('v5e', 'TPU v5e', 15.75 * GIB, 819e9, 200e9, 16e9, 48e9),
        Chip('v5p', 'TPU v5p', 95.73 * GIB, 2765e9, 600e9, 16e9, 112e9),
        Chip('v6e', 'TPU v6e', 31.24 * GIB, 1600e9, 400e9, 32e9, 180e9),
        Chip('tpu7x', 'TPU7x', 94.74 * GIB, 3690e9, 300e9, 16e9, 120e9, devices_per_chip=2),
        Chip('h100', 'H100', 0.93 * 80e9, 3350e9, 450e9, 64e9, 234e9, 'gpu'),
        Chip('h200', 'H200', 0.93 * 141e9, 4800e9, 450e9, 64e9, 369e9, 'gpu'),
        Chip('a100', 'A100', 0.93 * 80e9, 2039e9, 300e9, 32e9, 170e9, 'gpu'),
        # A desktop's two channels of DDR5; the host is the device.
        Chip('cpu', '', host_memory(), 50e9, 10e9, 50e9, 0.0, 'cpu'),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str
    chip: Chip
    num_devices: int


def here() -> Topology:
    """This run's devices.

    Raises:
      UserError: a chip that the table lacks.
    """
    import jax

    kind, platform = jax.devices()[0].device_kind, jax.devices()[0].platform
    chips = [chip for chip in CHIPS.values() if chip.platform == platform]
    named = [chip for chip in chips if chip.device_kind and chip.device_kind in kind]
    # A TPU calls itself by another name: 'TPU v5 lite' is v5e.
    alike = [c for c in chips if platform != 'gpu' and c.peak_flops == flops.peak_flops(kind)]
    if platform == 'cpu':
        named = [CHIPS['cpu']]
    found = named or alike
    config.require(
        bool(found),
        f"memory.policy='auto' knows no {kind!r}; name a policy, such as memory.policy=full.",
    )
    return Topology(found[0].name, found[0], jax.device_count())


def topology(name: str) -> Topology:
    """The devices that a name such as 'v5p:2x2x4', 'h100:8' or 'cpu' stands for.

    Raises:
      UserError: a chip that the table lacks, or dimensions that are no positive numbers.
    """
    chip_name, _, dims = name.partition(':')
    config.require(
        chip_name in CHIPS,
        f'--topology={name}: {chip_name!r} is not in the table of chips.'
        f'{config.nearest(chip_name, CHIPS)} There are: {", ".join(CHIPS)}.',
    )
    chip = CHIPS[chip_name]
    sizes = dims.split('x') if dims else []
    config.require(
        all(size.isdigit() and int(size) > 0 for size in sizes) and (bool(dims) or ':' not in name),
        f'--topology={name}: {dims!r} must be numbers joined by x, such as {chip_name}:'
        f'{"2x2x4" if chip.platform == "tpu" else "8"}.',
    )
    return Topology(name, chip, math.prod(map(int, sizes)) * chip.devices_per_chip)
