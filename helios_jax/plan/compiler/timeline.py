"""Plays a compiled step through, in the order of its program, and tells where its time goes.

A TensorCore runs one operation after another. Collectives run on the links, one after another, but
that a short one shares them with those that are under way and is done before them; copies to and
from the host run on the host's link. From an operation that starts one to the operation that ends
it other work goes on, and the step waits for what is left.
Loops are played twice: the second turn, which finds the links as a turn leaves them, stands for all
that follow.

Left out: what transfers take from HBM's bandwidth, work of the SparseCores other than collectives,
kernels whose visits are not known, the start of a program, and its input.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from helios_jax.memory.hlo import HOST_SPACE
from helios_jax.plan.compiler import links
from helios_jax.plan.compiler.collectives import inside
from helios_jax.plan.compiler.links import Slice
from helios_jax.plan.compiler.program import (
    Instruction,
    Loop,
    content,
    hbm_bytes,
    multiplies,
    split,
)

NETWORK, HOST = 'network', 'host'
# Kinds of kernels, by what is in the names of ours, and of jax's.
KERNELS = {'attention': 'attention|splash', 'experts': 'grouped|gmm'}


class Item(NamedTuple):
    """A cause of time in a step."""

    kind: str  # matmuls | attention | experts | copies | other | network | host
    source: str  # name of the operation in the model
    line: str  # file:line, where the program tells


class Timeline:
    """Time of a program, as it is played.

    Attributes:
      seconds: time so far.
      spent: seconds by cause: of operations, and of waiting for `network` and `host`.
      unknown: kernels whose time is not known, and how often they run.
    """

    def __init__(
        self, hlo: str, where: Slice, time_of: Callable[[Instruction], float | None]
    ) -> None:
        """Plays a program.

        Args:
          time_of: seconds of one run of an instruction that is no transfer; None: not known.
        """
        entry, self._computations = split(hlo)
        self._lines = source_lines(hlo)
        self._where, self._time_of = where, time_of
        self._number = 1.0  # times that what is played now runs in a step
        self._free = {NETWORK: 0.0, HOST: 0.0}  # when each link is free
        self._ends: dict[str, tuple[float, str]] = {}  # by a start's name or channel
        self.seconds = 0.0
        self.spent: defaultdict[Item, float] = defaultdict(float)
        self.unknown: Counter[str] = Counter()
        self._play(entry)

    def _play(self, name: str) -> None:
        for found in content(name, self._computations):
            if isinstance(found, Loop):
                self._loop(found)
            else:
                self._run(found)

    def _loop(self, loop: Loop) -> None:
        self._play(loop.body)
        if loop.turns <= 1:
            return
        begin = self.seconds
        self._number *= loop.turns - 1
        self._play(loop.body)
        self._number /= loop.turns - 1
        later = (loop.turns - 2) * (self.seconds - begin)
        self.seconds += later
        self._free = {link: at + later for link, at in self._free.items()}
        self._ends = {name: (at + later, link) for name, (at, link) in self._ends.items()}

    def _run(self, instruction: Instruction) -> None:
        transfers = list(inside(instruction, self._computations))
        for channel, one in transfers:
            # What a matmul's fusion goes on with was started, and will be ended, by others.
            if channel not in self._ends:
                time = links.seconds(one, self._where)
                names = (channel, instruction.name) if one.beside else (channel,)
                self._start(NETWORK, time, *names)
            if not one.beside or 'AsyncCollectiveDone' in self._called(instruction):
                self._wait(channel, instruction)
        if instruction.opcode.endswith('-start') and not transfers:
            moved = _copied(instruction)
            if HOST_SPACE in instruction.shape:
                rate = self._where.chip.host_bytes_per_second
                self._start(HOST, moved / rate, instruction.name)
        elif instruction.opcode.endswith('-done'):
            started = re.match(r'%([\w.\-]+)', instruction.text)
            self._wait(started[1] if started else '', instruction)
        elif not transfers or multiplies(instruction, self._computations):
            self._compute(instruction)

    def _called(self, instruction: Instruction) -> str:
        names = re.findall(r'calls=%([\w.\-]+)', instruction.text)
        return instruction.text + ''.join(t for n in names for t in self._computations.get(n, ()))

    def _start(self, link: str, time: float, *names: str) -> None:
        under_way = {end for end, at in self._ends.values() if at == link and end > self.seconds}
        self._free[link] = max(self.seconds, self._free[link]) + time
        shared = self.seconds + (1 + len(under_way)) * time
        if shared < self._free[link]:
            later = {end: (end + time, link) for end in under_way}
            self._ends = {
                name: later[end] if at == link and end in later else (end, at)
                for name, (end, at) in self._ends.items()
            }
        self._ends |= dict.fromkeys(names, (min(shared, self._free[link]), link))

    def _wait(self, name: str, instruction: Instruction) -> None:
        end, link = self._ends.pop(name, (0.0, NETWORK))
        self._ends = {n: e for n, e in self._ends.items() if e != (end, link)}
        self._add(link, instruction, max(0.0, end - self.seconds))

    def _compute(self, instruction: Instruction) -> None:
        time = self._time_of(instruction)
        if time is None:
            self.unknown[re.sub(r'[.\d]+$', '', instruction.name)] += round(self._number)
            return
        self._add(self._kind(instruction), instruction, time)

    def _add(self, kind: str, instruction: Instruction, time: float) -> None:
        self.seconds += time
        if time:
            frame = re.search(r'stack_frame_id=(\d+)', instruction.text)
            line = self._lines.get(int(frame[1]), '') if frame else ''
            self.spent[Item(kind, instruction.source, line)] += self._number * time

    def _kind(self, instruction: Instruction) -> str:
        if instruction.kernel:
            kinds = (kind for kind, name in KERNELS.items() if re.search(name, instruction.name))
            return next(kinds, 'other')
        if multiplies(instruction, self._computations):
            return 'matmuls'
        return 'copies' if instruction.opcode in ('copy', 'transpose') else 'other'


def _copied(instruction: Instruction) -> float:
    """Bytes of the array that a start copies; its shape names source, destination and a token."""
    parts = re.findall(r'\w+\[[\d,]*\](?:\{[^}]*\})?', instruction.shape)
    return max((hbm_bytes(re.sub(r'S\(\d+\)', '', part)) for part in parts), default=0.0)


def source_lines(hlo: str) -> dict[int, str]:
    """Maps stack frames to their lines, 'file:line' within the package, by a module's tables."""

    def table(name: str) -> dict[int, str]:
        found = re.search(rf'^{name}\n((?:\d+ .*\n)+)', hlo, re.MULTILINE)
        rows = (row.split(' ', 1) for row in found[1].splitlines()) if found else ()
        return {int(number): text for number, text in rows}

    files, places = table('FileNames'), table('FileLocations')
    lines = {}
    for number, text in places.items():
        at = dict(re.findall(r'(\w+)=(\d+)', text))
        file = files.get(int(at['file_name_id']), '').strip('"')
        lines[number] = f'{file.rpartition("helios_jax/")[2]}:{at["line"]}'
    frames = {
        number: dict(re.findall(r'(\w+)=(\d+)', text))
        for number, text in table('StackFrames').items()
    }
    return {n: lines.get(int(at['file_location_id']), '') for n, at in frames.items()}
