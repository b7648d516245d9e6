"""Finds the time that a step's kernels cannot go below: what they must move, and must multiply.

The compiled program says what each instruction does, the profile which kernels ran for it, and how
often. An instruction takes at least its bytes by the rate of memory and its FLOPs by the rate of a
large matmul, whichever is longer; elementwise arithmetic counts as free. Arrays small enough for
the card's cache may be read in less. What sends to other cards or to the host, and what is not
understood, has no floor.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from helios_jax.bench import trace
from helios_jax.memory.hlo import HOST_SPACE
from helios_jax.plan.compiler import collectives
from helios_jax.plan.compiler.operations import FREE
from helios_jax.plan.compiler.program import (
    OPERAND,
    SHAPE,
    Instruction,
    content,
    hbm_bytes,
    moved,
    split,
)

FLOORLESS = (*FREE, *collectives.KINDS, 'call', 'conditional')
LIBRARIES = ('__cublas', '__cudnn')  # calls that may multiply
Computations = dict[str, list[str]]


class SeenKeys(NamedTuple):
    """Mean number of keys that a query of a packed row sees; padding sees none."""

    full: float
    window: float  # in a layer with a window


class Needs(NamedTuple):
    """Bytes to move and FLOPs to do in one run of an instruction."""

    num_bytes: float
    flops: float


Gap = dict[str, Any]
AllNeeds = dict[tuple[str, str], Needs]  # by the names of a program and of an instruction in it


def of_programs(texts: Iterable[str], keys: SeenKeys) -> AllNeeds:
    """Reads what the instructions of optimised modules need; names that differ are left out."""
    found: dict[tuple[str, str], set[Needs]] = {}
    for text in texts:
        named = re.match(r'HloModule ([\w.\-]+)', text)
        for name, needs in of_program(text, keys):
            found.setdefault((named[1] if named else '', name), set()).add(needs)
    return {name: alike.pop() for name, alike in found.items() if len(alike) == 1}


def of_program(text: str, keys: SeenKeys) -> Iterator[tuple[str, Needs]]:
    """Yields what each instruction needs, wherever in the program it is, where that is known."""
    _, computations = split(text)
    for computation in computations:
        for found in content(computation, computations):
            if not isinstance(found, Instruction) or floorless(found):
                continue
            flops = flops_of(found, computations, keys)
            if flops is not None:
                yield found.name, Needs(num_bytes(found, computations), flops)


def floorless(instruction: Instruction) -> bool:
    """True if an instruction takes no time, or time that depends on more than this card."""
    opcode = instruction.opcode
    on_host = any(HOST_SPACE in shape for shape in (instruction.shape, *instruction.operands))
    return opcode in FLOORLESS or opcode.endswith(('-start', '-done')) or on_host


def num_bytes(instruction: Instruction, computations: Computations) -> float:
    """Adds up what an instruction reads and writes, each array once, workspaces left out."""
    if instruction.opcode != 'custom-call':
        return moved(instruction, computations)
    names = OPERAND.findall(instruction.text.partition(')')[0])
    read = dict(zip(names, instruction.operands, strict=True))
    results = instruction.shape
    if target(instruction).startswith('__cu'):
        results = re.sub(r'\b[su]8\[\d+\]', '', results)  # a library's workspace
    return hbm_bytes(results) + sum(map(hbm_bytes, read.values()))


def flops_of(instruction: Instruction, computations: Computations, keys: SeenKeys) -> float | None:
    """Counts the FLOPs of an instruction's products; None where it has some that are not known."""
    text, called = instruction.text, target(instruction)
    if instruction.opcode == 'fusion':
        fused = re.search(r'calls=%([\w.\-]+)', text)
        if not fused or fused[1] not in computations:
            return None
        inner = content(fused[1], computations)
        counts = [flops_of(i, computations, keys) for i in inner if isinstance(i, Instruction)]
        return None if None in counts else math.fsum(filter(None, counts))
    if instruction.opcode == 'convolution':
        return None
    if 'fmha' in called:
        return attention_flops(instruction, keys)
    if called.startswith('mosaic_gpu'):
        return grouped_flops(instruction)
    if instruction.opcode == 'dot' or called in ('__cublas$gemm', '__cublas$lt$matmul'):
        found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', text)
        if not found or not instruction.operands:
            return None
        left = sizes(instruction.operands[0])[0]
        contracted = math.prod(left[int(dim)] for dim in re.findall(r'\d+', found[1]))
        return 2.0 * math.prod(sizes(instruction.shape)[0]) * contracted
    return None if called.startswith(LIBRARIES) else 0.0


def attention_flops(instruction: Instruction, keys: SeenKeys) -> float | None:
    """Counts two products of cuDNN's attention forward, five backward, of the keys that are seen.

    In rows of several segments a query sees as many as `keys` says.
    """
    text = instruction.text
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\[([^\]]*)\]', text)
    mask = re.search(r'"mask_type":"(\w+)"', text)
    known = mask and mask[1] in ('NO_MASK', 'CAUSAL', 'PADDING_CAUSAL')
    if not scores or not mask or not known or not instruction.operands:
        return None
    setting = dict(re.findall(r'"(sliding_window_length|max_seg_per_batch)":"?(\d+)', text))
    window = int(setting.get('sliding_window_length', 0))
    B, N, T, S = (int(size) for size in re.findall(r'\d+', scores[1]))
    if int(setting.get('max_seg_per_batch', 1)) > 1 or mask[1] == 'PADDING_CAUSAL':
        seen = keys.window if window else keys.full
    elif mask[1] == 'CAUSAL':
        seen = math.fsum(min(t + 1, window or S) for t in range(T)) / T
    else:
        seen = S
    H = sizes(instruction.operands[0])[0][-1]
    products = 5 if 'Backward' in target(instruction) else 2
    return 2.0 * products * B * N * T * H * seen


def grouped_flops(instruction: Instruction) -> float | None:
    """Counts a grouped matmul's FLOPs: each of M rows by a matrix [E D F], or two rows to one."""
    found = [dims for shape in (*instruction.operands, instruction.shape) for dims in sizes(shape)]
    weights = [dims for dims in found if len(dims) == 3]
    rows = [dims for dims in found if len(dims) == 2 and weights and dims[1] in weights[0][1:]]
    if len(weights) != 1 or len(rows) != 2 or rows[0][0] != rows[1][0]:
        return None
    return 2.0 * rows[0][0] * weights[0][1] * weights[0][2]


def target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    return found[1] if found else ''


def sizes(shape: str) -> list[tuple[int, ...]]:
    """Returns the sizes of each array of a shape."""
    return [tuple(int(d) for d in dims.split(',') if d) for _, dims, *_ in SHAPE.findall(shape)]


def compare(
    events: Iterable[trace.Event], needs: AllNeeds, ceilings: tuple[float, float], each: float
) -> dict[str, Gap]:
    """Puts each kind of kernel's time beside its floor.

    An instruction's floor counts where most of its time went.

    Args:
      ceilings: FLOP/s and bytes/s, as `Chip.ceilings`.
      each: factor that makes a second of all events milliseconds of a step on a card.
    Returns:
      kind → `ms`; `known_ms`, of the kernels whose floor is known; `floor_ms` of those; `reached`,
      floor over time; `bound`, by which most of the floor is: 'bytes' or 'FLOPs'. The last three
      are None where nothing is known.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    known: dict[str, float] = collections.defaultdict(float)
    runs: dict[tuple[str, str], dict[str, list[float]]] = {}
    names = by_kernel_name(needs)
    for event in events:
        kind, taken = trace.kind_of(event.name, trace.KINDS), (event.end - event.start) / 1e9
        seconds[kind] += taken
        own = (event.module, event.instruction) if event.instruction else names.get(event.name)
        if own in needs:
            known[kind] += taken
            runs.setdefault(own, {}).setdefault(event.name, []).append(taken)
    floors: dict[str, dict[str, float]] = {}
    for own, kernels in runs.items():
        longest = max(kernels, key=lambda name: sum(kernels[name]))
        # A run takes each of its kernels once, and what is small, such as a memset, perhaps twice.
        times = min(map(len, kernels.values()))
        bound, least = floor(needs[own], ceilings)
        of_kind = floors.setdefault(trace.kind_of(longest, trace.KINDS), {})
        of_kind[bound] = of_kind.get(bound, 0.0) + times * least
    return {
        kind: row(each * taken, each * known[kind], each, floors.get(kind))
        for kind, taken in sorted(seconds.items(), key=lambda item: -item[1])
    }


def floor(needs: Needs, ceilings: tuple[float, float]) -> tuple[str, float]:
    """Returns what bounds a run of an instruction, and the seconds that it takes at least."""
    flops, num_bytes = needs.flops / ceilings[0], needs.num_bytes / ceilings[1]
    return ('FLOPs', flops) if flops > num_bytes else ('bytes', num_bytes)


def row(ms: float, known_ms: float, each: float, bounds: Mapping[str, float] | None) -> Gap:
    """Makes a row of the seconds by which each resource bounds a kind of kernel."""
    if not bounds:
        return {'ms': ms, 'known_ms': known_ms, 'floor_ms': None, 'reached': None, 'bound': None}
    floor_ms = each * math.fsum(bounds.values())
    return {
        'ms': ms,
        'known_ms': known_ms,
        'floor_ms': floor_ms,
        'reached': floor_ms / known_ms,
        'bound': max(bounds, key=lambda name: bounds[name]),
    }


def by_kernel_name(needs: AllNeeds) -> dict[str, tuple[str, str]]:
    """Finds an instruction by the name that XLA gives its kernel, where one alone has it."""
    named: dict[str, list[tuple[str, str]]] = {}
    for own in needs:
        named.setdefault(re.sub(r'[.\-]', '_', own[1]), []).append(own)
    return {name: owns[0] for name, owns in named.items() if len(owns) == 1}


def lines(found: Mapping[str, Gap]) -> list[str]:
    """Writes the rows of `compare` as lines; a dash where no floor is known."""
    if not found:
        return []
    heads = f'{"kernels":12} {"ms":>8} {"floor ms":>9} {"reached":>8} {"bound by":>9} {"known":>6}'
    dash = lambda value, form: '–' if value is None else format(value, form)
    return [f'  {heads}'] + [
        f'  {kind:12} {of["ms"]:8.1f} {dash(of["floor_ms"], ".1f"):>9} '
        f'{dash(of["reached"], ".0%"):>8} {dash(of["bound"], ""):>9} '
        f'{of["known_ms"] / of["ms"] if of["ms"] else 0:6.0%}'
        for kind, of in found.items()
    ]
