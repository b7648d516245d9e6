"""Table of the planner's figures read off a schedule, a profile or a clock, with their days.

Such figures age with compilers and kernels: `helios plan --validate` compares predictions with the
compiler at hand and prints when each figure was last true. Those of chips are in chips.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from helios_jax import chips

Number = TypeVar('Number', int, float)


@dataclasses.dataclass(frozen=True)
class Measured(Generic[Number]):
    value: Number
    meaning: str
    seen: str  # the day on which it was last true
    source: str


# `seen` is the day of the last --validate with all cases within their limits.
_SCHEDULES = ('2026-11-23', "read from libtpu 0.0.50's schedules for v5e; validated by jax 0.10.2")
_TRACED = ('2026-11-23', 'the traced gradient: jax 0.12.0')
_TRACED_HYPER = ('2026-11-30', 'the traced gradient: jax 0.10.2')
_H100 = ('2026-11-22', 'one H100 80GB HBM3')
_PROFILE = ('2026-11-22', 'profile of helios_1b on one H100: jax 0.12.0')
_MOE_PROFILE = ('2026-11-30', 'profiles of Hydra on one H200: jax 0.11.2')
_MESH = ('2026-11-30', 'helios bench mesh on two H200s: jax 0.11.2')
_STEPS = ('2026-11-29', 'helios plan --compile of helios_8b, 16 chips: jax 0.10.2')
_MOE_STEP = ('2026-11-29', 'helios plan --compile of hydra_30b_a3b, v5p:4x4x2: jax 0.10.2')
_ESTIMATED = ('2026-11-29', 'a matmul, and bytes that helios_8b waits for; no step was played')
_GATES = ('2026-11-30', 'helios plan --compile of helios_8b, full, v5p:2x2x4: jax 0.10.2')
_GATES_GPU = ('2026-11-30', 'steps of helios_1b on one H200: jax 0.11.2')
_COUNTED = ('2026-11-30', 'counted from the formulas of model/; no step was measured')
_KERNELS = ('2026-11-29', 'schedules of our kernels, libtpu 0.0.42')

# One layer's backward pass, in arrays [B T D] or, inside an MLP, [B T F].
STREAMS = Measured(
    6,
    "[B T D] in one sublayer's backward pass: x, x̂, the update, and the gradients of the stream, "
    'of the update and of what it was computed from',
    *_SCHEDULES,
)
RECOMPUTED_STREAMS = Measured(
    3,
    '[B T D] more where a layer runs again from its input: both x̂ and the stream between',
    *_SCHEDULES,
)
RECOMPUTED_OF_A_GATE = Measured(
    2,
    "[B T D] more for each gate of such a layer: what its weights' gradients, which XLA computes "
    'last, are to be made of',
    *_SCHEDULES,
)
EMBEDDING_STREAMS = Measured(
    2,
    'arrays more of what every layer reads, x₀ or the first values: it, its gradients’ sum',
    *_SCHEDULES,
)
HYPER_STREAMS = Measured(
    6,
    '[B T D] more for each stream beyond one: x, its gradient, and float32 sums of streams',
    '2026-11-30',
    "libtpu 0.0.42's peaks of steps for v5e, full, 4 streams of all forms: jax 0.10.2",
)
AVERAGE_STREAMS = Measured(
    3,
    '[B T D] more for each depth-weighted average: its gradient, which all layers below read, and '
    'copies of it',
    '2026-11-30',
    "peaks of XLA's gradients for a CPU, residual, full, 2 to 16 averages of 16 layers: jax 0.10.2",
)
REPLAYED_STREAMS = Measured(
    7,
    "[B T D] while an MLP in parts runs again, whole: both sublayers' x̂, the stream between them "
    "and its norm's, q, attention's output and update",
    *_SCHEDULES,
)
REPLAYED_INSIDE = Measured(3, '[B T F] of the same: gate, up and their product', *_SCHEDULES)
INSIDE = Measured(
    3, '[B T F] of an MLP: the gradients of gate and up, and one of gate, up, product', *_SCHEDULES
)
INSIDE_QUANTISED = Measured(
    2, 'the same from a byte a value, restored in the operations that read it', *_SCHEDULES
)
IN_A_PART = Measured(
    6, "[B T F/parts] of one part's inside: gate, up, product, and their gradients", *_SCHEDULES
)
# What autodiff keeps under memory.policy=none, in float32.
NORM = Measured(2, '[B T D] of a norm in front of a sublayer', *_TRACED)
GATE = Measured(4, '[B T D] of a gate', *_TRACED)
STATIC_GATE = Measured(1, '[B T D] of a static gate', *_TRACED)
HYPER = Measured(3, '[B T D] of each of n streams, and one more of the update', *_TRACED_HYPER)
STATIC_HYPER = Measured(2, 'the same of static coefficients', *_TRACED_HYPER)
OUTPUT_NORM = Measured(2, '[B T D] of the norm of an output', *_TRACED)
SILU = Measured(3, '[B T F] of a SiLU', *_TRACED)
AVERAGED = Measured(1, '[B T D] of a layer’s output, which averages multiply', *_TRACED_HYPER)
# Seconds.
HOST_FRACTION = Measured(
    0.75, "of PCIe 5's 64 GB/s: a state fetched and written back, one after the other", *_H100
)
HYPER_PASSES = Measured(
    12,
    'times that a sublayer reads or writes each of n streams: 3 forward, 3 again, 6 backward',
    *_COUNTED,
)
EMBEDDING_PASSES = Measured(
    5,
    "times that a sublayer reads or writes x₀: 1 forward, 1 again; backward it and its gradients' "
    'sum, read and written',
    *_COUNTED,
)
AVERAGE_PASSES = Measured(
    6,
    'times that a layer reads or writes each depth-weighted average: 2 forward, 4 backward',
    *_COUNTED,
)
HOP_SECONDS = Measured(
    1e-6, 'seconds from a chip to the next', '2026-11-29', 'jax-ml.github.io/scaling-book/tpus'
)


class Speeds(NamedTuple):
    """Shares of a chip's peaks that a step reaches, and how often it passes over its arrays."""

    matmul: Measured[float]  # of peak FLOP/s
    attention: Measured[float]  # of peak FLOP/s, of long rows
    attention_tokens: Measured[int]  # a row's queries see so many keys more, masked ones of blocks
    memory: Measured[float]  # of HBM bandwidth
    stream_passes: Measured[int]  # elementwise over [B T D] in a layer
    gate_passes: Measured[int]  # more of them for each gated sublayer
    inside_passes: Measured[int]  # elementwise over [B T F] in an MLP
    expert_passes: Measured[int]  # the same over [pairs F] of experts
    permuted_passes: Measured[int]  # over [pairs D], to the experts and back
    gathered_passes: Measured[int]  # over a layer's gathered weights
    exposed: Measured[float]  # share of the network's time that nothing hides


def _of_a_tpu(
    matmul: float,
    attention: float,
    attention_tokens: int,
    exposed: float,
    seen: tuple[str, str] = _STEPS,
) -> Speeds:
    return Speeds(
        Measured(matmul, 'of peak FLOP/s: matmuls of helios_8b', *seen),
        Measured(attention, 'of peak: our kernels, forward twice and backward', *_KERNELS),
        Measured(attention_tokens, 'keys more: the same at T 2048 and 4096', *_KERNELS),
        Measured(1.0, 'of HBM bandwidth: counted so', *_STEPS),
        Measured(17, '[B T D] in a layer of helios_8b, residual, v5p', *_STEPS),
        Measured(20, '[B T D] more in a gated sublayer: convex by its kernel, v5p', *_GATES),
        Measured(0, '[B T F]: part of matmuls', *_STEPS),
        Measured(13, '[pairs F] of experts: hydra_30b_a3b, full, v5p', *_MOE_STEP),
        Measured(12, '[pairs D]: two of each take, three of each sum', *_MOE_STEP),
        Measured(0, 'weights: part of matmuls', *_STEPS),
        Measured(exposed, 'of the network: first gathers, last gradients', *seen),
    )


_CARD = chips.CHIPS['h100']
# By chip, or by platform.
SPEEDS = {
    'gpu': Speeds(
        Measured(
            round(_CARD.matmul_flops / _CARD.peak_flops, 1),
            'of peak FLOP/s: a large product',
            *_H100,
        ),
        Measured(0.44, 'of peak: cuDNN forward and backward, 436 TFLOP/s', *_H100),
        Measured(0, 'keys more: not measured by length', *_H100),
        Measured(
            round(_CARD.copy_bytes_per_second / _CARD.hbm_bytes_per_second, 1),
            'of HBM bandwidth: a copy',
            *_H100,
        ),
        Measured(120, "times that a layer's work reads or writes an array [B T D]", *_PROFILE),
        Measured(16, 'more of them for each gated sublayer: convex by its kernel', *_GATES_GPU),
        Measured(9, 'times that an MLP reads or writes an array [B T F]', *_PROFILE),
        Measured(13, 'the same of experts, and copies of a layer out of its stack', *_MOE_PROFILE),
        Measured(8, 'times that an array [pairs D] is read or written', *_MOE_PROFILE),
        Measured(3, 'times that gathered weights are read or written', *_PROFILE),
        Measured(0.8, 'of the network: helios_8b 0.75, helios_1b 1.15 and 0.58, two H200', *_MESH),
    ),
    'v5e': _of_a_tpu(0.97, 0.85, 965, 0.78, _ESTIMATED),
    'v5p': _of_a_tpu(0.975, 0.85, 965, 0.25),
    'v6e': _of_a_tpu(0.825, 0.43, 1494, 0.3),
    'tpu7x': _of_a_tpu(0.796, 0.42, 1494, 0.63),
}


def speeds(chip: chips.Chip) -> Speeds:
    """Speeds of a chip; for a CPU, which nobody plans for, those of a GPU."""
    return SPEEDS.get(chip.name) or SPEEDS['gpu']


def figures() -> dict[str, Measured[Any]]:
    """Returns every figure of this module by its name."""
    rows = {name: value for name, value in globals().items() if isinstance(value, Measured)}
    for name, of_chip in SPEEDS.items():
        rows |= {f'{name}.{field}': row for field, row in of_chip._asdict().items()}
    return rows


def ages() -> Iterator[str]:
    """Yields a line a figure: its name and value, the day it was last true, and by what."""
    for name, row in figures().items():
        yield f'{name:28} {row.value:<8g} {row.seen}  {row.source}'
    for (platform, field), source in chips.SOURCES.items():
        yield f'{f"chips, {platform}: {field}":37} {source.checked}  {source.text}'
