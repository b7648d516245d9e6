"""Reads the text of an optimised program: what a TPU runs, in order, loop by loop."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

INSTRUCTION = re.compile(r'  (?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)', re.DOTALL)
COMPUTATION = re.compile(r'^(ENTRY )?%([\w.\-]+) \(.*\{$')
SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?')
OPERAND = re.compile(r'%([\w.\-]+)')
SLICES = ('dynamic-slice', 'dynamic-update-slice')
WINDOWED = 'windowed_dot_general'  # loops of XLA's, whose turns do two steps each


class Instruction(NamedTuple):
    """An instruction, and how often the program runs it."""

    name: str
    shape: str
    opcode: str
    text: str  # operands and attributes
    times: float  # number of runs in one run of the program
    looped: bool
    operands: tuple[str, ...] = ()  # their shapes, of those that the same computation makes

    @property
    def kernel(self) -> bool:
        """True if Pallas made it."""
        return 'custom_call_target="tpu_custom_call"' in self.text

    @property
    def cycles(self) -> int:
        """Cycles that the compiler expects of one run; 0 for a Pallas kernel, or a transfer."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def source(self) -> str:
        """Name of the operation in the model that it was made of."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ''


class Loop(NamedTuple):
    """A while instruction."""

    body: str  # name of a computation
    turns: float


def content(name: str, computations: dict[str, list[str]]) -> Iterator[Instruction | Loop]:
    """Yields what a computation runs, in order: each instruction once, and its loops as such."""
    matches = [m for text in computations[name] if (m := INSTRUCTION.match(text))]
    shapes = {match[1]: match[2] for match in matches}
    for match in matches:
        own, shape, opcode, rest = match.groups()
        if opcode == 'while':
            body, turns = loop(rest, computations)
            yield Loop(body, turns / (2 if WINDOWED in body else 1))
            continue
        named = OPERAND.findall(rest.partition(')')[0])
        operands = tuple(shapes[operand] for operand in named if operand in shapes)
        yield Instruction(own, shape, opcode, rest, 1.0, False, operands)


def instructions(entry: str, computations: dict[str, list[str]]) -> Iterator[Instruction]:
    """Yields the instructions that a program runs, those of its loops included, in order.

    Args:
      entry, computations: the program, as `split` returns it.
    """

    def visit(name: str, times: float, looped: bool) -> Iterator[Instruction]:
        for found in content(name, computations):
            if isinstance(found, Loop):
                yield from visit(found.body, times * found.turns, True)
            else:
                yield found._replace(times=times, looped=looped)

    yield from visit(entry, 1.0, False)


def split(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """Finds the name of the entry computation, and each computation's instructions."""
    entry, current = '', ''
    computations: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            current = match[2]
            entry = current if match[1] else entry
            computations[current] = []
        elif INSTRUCTION.match(line):
            computations[current].append(line)
        elif current and line != '}' and computations[current]:
            computations[current][-1] += line  # a kernel's metadata spans lines
    return entry, computations


def loop(text: str, computations: dict[str, list[str]]) -> tuple[str, int]:
    """Finds the body of a while instruction, and how often it turns."""
    names = dict(re.findall(r'\b(body|condition)=%([\w.\-]+)', text))
    body, condition = names['body'], names['condition']
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', text)
    if known:
        return body, int(known[1])
    bounds = re.findall(r' constant\((\d+)\)', '\n'.join(computations[condition]))
    return body, max(map(int, bounds), default=1)


def moved(instruction: Instruction, computations: dict[str, list[str]]) -> float:
    """Adds up the bytes in HBM that an instruction reads and writes; of what it slices, the slice.

    Layers' arrays lie in one array of all layers, of which a turn reads, or writes, one.
    """
    called = re.search(r'calls=%([\w.\-]+)', instruction.text)
    inner = (
        [m for text in computations[called[1]] if (m := INSTRUCTION.match(text))] if called else []
    )
    if not any(match[3] in SLICES for match in inner):
        return hbm_bytes(instruction.shape) + sum(map(hbm_bytes, instruction.operands))
    shapes = {match[1]: match[2] for match in inner}
    operands = {match[1]: OPERAND.findall(match[4].partition(')')[0]) for match in inner}
    # What a bitcast makes is what it is made of.
    source = {m[1]: operands[m[1]][0] for m in inner if m[3] == 'bitcast' and operands[m[1]]}

    def origin(name: str) -> str:
        return origin(source[name]) if name in source else name

    total = 0.0
    for match in inner:
        own, shape, opcode, rest = match.groups()
        if opcode == 'parameter':
            users = [m for m in inner if own in map(origin, operands[m[1]]) and m[3] != 'bitcast']
            whole = [m for m in users if m[3] not in SLICES or origin(operands[m[1]][0]) != own]
            read = [m[2] for m in users if m[3] == 'dynamic-slice']
            index = int(rest.partition(')')[0])
            outer = instruction.operands[index] if index < len(instruction.operands) else shape
            total += hbm_bytes(outer) if whole else sum(map(hbm_bytes, read))
    root = inner[-1]
    results = operands[root[1]] if root[3] == 'tuple' else [root[1]]
    for name in map(origin, results):
        match = next(m for m in inner if m[1] == name)
        written = operands[name][1] if match[3] == 'dynamic-update-slice' else name
        total += hbm_bytes(shapes[written])
    return total


def multiplies(instruction: Instruction, computations: dict[str, list[str]]) -> bool:
    """True if an instruction is a matmul, or a fusion around one."""
    called = re.findall(r'calls=%([\w.\-]+)', instruction.text)
    texts = (text for name in called for text in computations.get(name, ()))
    fused = any(' convolution(' in text or ' dot(' in text for text in texts)
    return fused or instruction.opcode in ('convolution', 'dot')


def hbm_bytes(shape: str) -> float:
    """Adds up the bytes of a shape's arrays, or a tuple's, that are in HBM; tiles are padded."""
    total = 0.0
    for dtype, dims, layout, rest in SHAPE.findall(shape):
        bits = 8 if dtype == 'pred' else int((re.search(r'\d+', dtype) or '0')[0])  # 0 of a token
        if 'S(' in rest:
            continue
        sizes = [int(dim) for dim in dims.split(',') if dim]
        tile = re.search(r':T\((\d+),(\d+)\)', rest)
        if tile and len(sizes) > 1:
            minor, second = (int(index) for index in layout.split(',')[:2])
            sizes[minor] = -(-sizes[minor] // int(tile[2])) * int(tile[2])
            sizes[second] = -(-sizes[second] // int(tile[1])) * int(tile[1])
        total += math.prod(sizes) * bits / 8
    return total
