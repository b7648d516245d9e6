"""Predicts the time of a compiled step, and says where it goes."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from helios_jax import config, process
from helios_jax.arch import flops
from helios_jax.chips import Chip, topology
from helios_jax.plan.compiler import attention, gated_norm, grouped_matmul, operations, permutation
from helios_jax.plan.compiler.links import Slice
from helios_jax.plan.compiler.program import Instruction, moved, multiplies, split
from helios_jax.plan.compiler.timeline import HOST, NETWORK, Timeline

LARGEST = 10  # items that are listed
Cause = TypeVar('Cause')
Kernels = Callable[[Instruction], float | None]


class Clock:
    """Times the instructions of a step.

    A matmul takes the cycles that the compiler expects, which are its schedule's to 3% on v5e and
    v5p; all else of XLA's takes what its bytes in HBM take, for there the compiler expects four
    times the schedule; a gather of rows takes what its rows do. What a Pallas kernel takes is for
    the caller to say: a kernel of ours takes what it takes alone, in bfloat16.
    """

    def __init__(self, hlo: str, chip: Chip, kernel_seconds: Kernels) -> None:
        self._computations = split(hlo)[1]
        self._chip, self._kernel_seconds = chip, kernel_seconds

    def __call__(self, instruction: Instruction) -> float | None:
        """Predicts one run of what is no transfer; None for a kernel that cannot be timed."""
        if instruction.opcode in operations.FREE:
            return 0.0
        if instruction.kernel:
            return self._kernel_seconds(instruction)
        cycles = instruction.cycles / self._chip.clock
        if multiplies(instruction, self._computations):
            return cycles
        passing = moved(instruction, self._computations) / self._chip.hbm_bytes_per_second
        least = min(cycles, passing) if cycles else passing
        return max(least, permutation.gathering(instruction, self._computations, self._chip))


def own_kernels(cfg: config.Config, chip: Chip) -> Kernels:
    """Makes the clock of our kernels in a step of this config."""
    # A kernel does not tell its window: in a model of both kinds all layers count as full ones.
    windowed = all(kind.endswith('window') for kind in cfg.model.kind_counts)
    window = cfg.model.window if windowed else 0

    def seconds(kernel: Instruction) -> float | None:
        if product := grouped_matmul.product(kernel):
            return product_alone(chip.name, product)
        if (permuting := permutation.seconds(kernel, chip)) is not None:
            return permuting
        if mixing := gated_norm.form(kernel):
            return mix_alone(chip.name, mixing)
        sizes = attention.heads(kernel)
        if sizes is None:
            return None
        alone = kernels_alone(chip.name, sizes, window)
        backward = attention.BACKWARD in kernel.name
        return alone.get(attention.BACKWARD if backward else attention.FORWARD)

    return seconds


@functools.cache
def kernels_alone(target: str, sizes: attention.Heads, window: int) -> dict[str, float]:
    """Times the attention kernels (`attention.seconds_alone`) in a process of their own."""
    return process.run(attention.seconds_alone, target, sizes._asdict(), window)


@functools.cache
def product_alone(target: str, product: grouped_matmul.Product) -> float | None:
    """Times a grouped matmul (`grouped_matmul.seconds_alone`) in a process of its own."""
    return process.run(grouped_matmul.seconds_alone, target, product._asdict())


@functools.cache
def mix_alone(target: str, form: gated_norm.Form) -> float:
    """Times a gated mix (`gated_norm.seconds_alone`) in a process of its own."""
    return process.run(gated_norm.seconds_alone, target, form._asdict())


def figures(
    hlo: str,
    cfg: config.Config,
    name: str,
    coordinates: Sequence[Sequence[int]],
    kernel_seconds: Kernels,
) -> dict[str, Any]:
    """Plays a compiled step (timeline.py).

    Args:
      name: the topology.
      coordinates: where each of the program's devices lies in it.
      kernel_seconds: time of one run of a Pallas kernel, None where it is not known.
    Returns:
      `step_seconds` and `step_mfu`. `step_by_kind`: seconds of each kind of operation, and of
      waiting for the links and for the host. `largest`: items, the largest first. `left_out`:
      kernels whose time is not known, with the number of their runs in a step.
    """
    where = topology(name)
    sizes = tuple(int(size) for size in name.partition(':')[2].split('x'))
    # Three coordinates, whatever the chip.
    places = tuple(tuple(place[: len(sizes)]) for place in coordinates)
    clock = Clock(hlo, where.chip, kernel_seconds)
    played = Timeline(hlo, Slice(where.chip, sizes, places), clock)
    by_kind: defaultdict[str, float] = defaultdict(float)
    for item, seconds in played.spent.items():
        by_kind[item.kind] += seconds
    tokens = cfg.train.batch_rows * cfg.data.row_length
    counted = flops.flops_per_token(cfg.model, cfg.data.row_length) * tokens
    peak = where.chip.peak_flops * len(places)
    return {
        'step_seconds': played.seconds,
        'step_mfu': counted / played.seconds / peak,
        'step_by_kind': largest_first(by_kind),
        'largest': [
            item._asdict() | {'seconds': seconds}
            for item, seconds in list(largest_first(played.spent).items())[:LARGEST]
        ],
        'left_out': dict(played.unknown),
    }


def largest_first(seconds: Mapping[Cause, float]) -> dict[Cause, float]:
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def text(found: dict[str, Any]) -> str:
    """Writes the figures as lines."""
    total = found['step_seconds']
    exposed = sum(found['step_by_kind'].get(link, 0.0) for link in (NETWORK, HOST))
    least = 'more than ' if found['left_out'] else ''
    lines = [
        f'{least}{total:.3f} s a step, MFU {least and "below "}{100 * found["step_mfu"]:.1f}%, '
        f'{100 * exposed / total:.1f}% of it waiting for links',
        *(f'{kind:24} {seconds:9.4f} s' for kind, seconds in found['step_by_kind'].items()),
        'the largest:',
    ]
    for item in found['largest']:
        lines.append(
            f'{item["seconds"]:9.4f} s  {item["kind"]:10} {item["line"]:20} {item["source"]}'
        )
    if found['left_out']:
        kernels = ', '.join(f'{name} × {runs}' for name, runs in found['left_out'].items())
        lines.append(f'not counted, because their visits are not known: {kernels}')
    return '\n'.join(lines)
