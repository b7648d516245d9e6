"""Finds the collectives of a compiled step, and tells which of them the step waits for.

libtpu has four ways to run one beside other work: a pair of `…-start` and `…-done`; a call on the
SparseCore (`call-start`, `call-done`); inside a matmul's fusion, whose computation it names
`async_collective_fusion`; and a custom call `AsyncCollectiveStart` or `…Done`, which begins or ends
one of those. Whatever else holds a collective, the step waits for. Whether the work
beside one takes as long as it does is not told here.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from helios_jax.plan.compiler.program import (
    INSTRUCTION,
    SHAPE,
    Instruction,
    hbm_bytes,
    instructions,
    split,
)

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
SCATTERED = 'calls=%all-reduce-scatter'  # a fusion that sends no more than a reduce-scatter
BESIDE = ('async_collective_fusion', 'AsyncCollectiveStart', 'AsyncCollectiveDone')


class Collective(NamedTuple):
    """A collective of a compiled step."""

    kind: str  # one of KINDS
    num_bytes: float  # of the larger of its operands and its results, on one device
    times: float  # number of runs in a step
    looped: bool  # within a loop, such as that over layers
    beside: bool  # asynchronous: other work may go on meanwhile
    source: str  # name of the operation in the model that it was made for
    group: tuple[int, ...]  # some devices that take part in it together; a pair of a permutation


def collectives(hlo: str) -> list[Collective]:
    """Lists the collectives of an optimised module, in the order in which they start."""
    entry, computations = split(hlo)
    found: dict[tuple[str, str], Collective] = {}
    for instruction in instructions(entry, computations):
        for channel, one in inside(instruction, computations):
            # Of one that runs beside others its start, its end and each of these tell.
            key = (one.kind, channel) if one.beside else ('', instruction.name)
            found.setdefault(key, one)
    return list(found.values())


def inside(
    instruction: Instruction, computations: dict[str, list[str]]
) -> Iterator[tuple[str, Collective]]:
    """Yields the collectives that an instruction is, or calls, each with its channel."""
    texts = (instruction.text, *_called(instruction, computations))
    beside = instruction.opcode.endswith('-start') or any(
        word in text for text in texts for word in BESIDE
    )
    yield from _inside(instruction, computations, beside)


def _inside(
    instruction: Instruction, computations: dict[str, list[str]], beside: bool
) -> Iterator[tuple[str, Collective]]:
    kind = instruction.opcode.removesuffix('-start')
    if kind in KINDS:
        numbered = re.search(r'channel_id=(\d+)', instruction.text)
        yield numbered[1] if numbered else instruction.name, Collective(
            kind, _size(instruction), instruction.times, instruction.looped, beside,
            instruction.source, group(instruction.text),
        )  # fmt: skip
    for text in _called(instruction, computations):
        if match := INSTRUCTION.match(text):
            name, shape, opcode, rest = match.groups()
            inner = instruction._replace(name=name, shape=shape, opcode=opcode, text=rest)
            for channel, one in _inside(inner, computations, beside):
                fused = one.kind == 'all-reduce' and SCATTERED in instruction.text
                yield channel, one._replace(kind='reduce-scatter') if fused else one


def _called(instruction: Instruction, computations: dict[str, list[str]]) -> list[str]:
    names = re.findall(r'(?:calls|called_computation|to_apply)=%([\w.\-]+)', instruction.text)
    return [text for name in names for text in computations.get(name, ())]


def _size(instruction: Instruction) -> float:
    """Bytes of what is gathered, reduced, exchanged or sent, whole, on one device.

    A reduce-scatter prints its piece: the group's size times that is what is reduced. A start
    prints its operands beside its results.
    """
    shape = instruction.shape.replace('S(1)', '')  # VMEM
    if instruction.opcode.endswith('-start'):
        return max(hbm_bytes(match[0]) for match in SHAPE.finditer(shape))
    scattered = len(group(instruction.text)) if instruction.opcode == 'reduce-scatter' else 1
    return scattered * hbm_bytes(shape)


def group(text: str) -> tuple[int, ...]:
    """Devices of the first group that a collective's text names; one where it names none."""
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', text):
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", found[1])}
        taken = re.findall(r"'([\w.]+)'", found[2])
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return tuple(
            devices[tuple(slice(None) if n in taken else 0 for n in sizes)].ravel().tolist()
        )
    if found := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
        dims = [int(size) for size in found[3].split(',')]
        order = [int(axis) for axis in found[4].split(',')] if found[4] else range(len(dims))
        devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return tuple(devices.reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}', text):
        return tuple(int(device) for device in found[1].split(','))
    return (0,)
