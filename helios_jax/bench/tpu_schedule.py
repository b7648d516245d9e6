"""How long a compiled TPU kernel takes: reads the schedules that libtpu dumps.

A TPU core issues one bundle a cycle and nothing in a kernel's timing depends on its data, so that
the schedule is the time, but for memory. With `flags(directory)` in LIBTPU_INIT_ARGS before libtpu
loads, libtpu writes three files per fusion and per Pallas kernel:
  final_bundles: the program, a bundle a line, with its branches;
  final…utilization: busy units per bundle;
  pre-delay…utilization: busy units per cycle, the cycles in which the core waits for a result (of
    the MXU above all) included. The final program leaves those out, and is up to 20% shorter.
`parse` puts the three together as a tree: a kernel holds loops and predicated regions, each with
the cycles of its own bundles. `predict` then needs to be told only how often each region runs.

The largest outermost loop is the grid's: a turn is a step. Bundles of a step that are neither in a
branch nor in an inner loop run in every step, and so, for lack of a better guess, do branches
without vector work (they start and await copies).
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from helios_jax.config import UserError
from helios_jax.model import flops

FILES = {
    'bundles': 'final_bundles',
    'final': 'final_hlo-static-per-bundle-utilization',
    'cycles': 'pre-delay_hlo-static-per-bundle-utilization',
}
FILE = re.compile(rf'(\d+)-(.+)-\d+-({"|".join(FILES.values())})\.txt')
BUNDLE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(?:L[HBE]|P[BF]|CT)?\s*:')
BRANCH = re.compile(r'sbr\.rel (?:\(!?(%\w+)\) )?target = \$region(\d+)')
REGION = re.compile(r'Start(?:/End empty)? region (\d+)')
CORE_ID = re.compile(r'(%\w+) = sld [^;]*?/\* megacore core id')
# Columns that count what a bundle issues; the others go on while it is long past.
ISSUED = ('VALU', 'VLOAD', 'VLOAD:FILL', 'VSTORE', 'VSTORE:SPILL', 'SALU')
VECTOR = ('MXU', 'XLU', 'VALU', 'EUP', 'VLOAD', 'VSTORE')
WORK = 16  # busy unit-cycles from which a branch counts as vector work


class Chip(NamedTuple):
    """What JAX shows as one device."""

    topology: str  # the smallest to compile for
    device_kind: str
    num_cores: int  # TensorCores that one kernel can be split over
    num_mxus: int  # of a core
    macs: int  # multiply-adds of an MXU a cycle
    hbm_bytes_per_second: float
    vmem_mib: int  # of a core
    delay_slots: int  # bundles after a branch that run whether or not it is taken

    @property
    def clock(self) -> float:
        """Cycles per second, from the peak FLOP/s."""
        return flops.peak_flops(self.device_kind) / (2 * self.num_cores * self.num_mxus * self.macs)


# MXUs and VMEM: jax._src.tpu_info; multiply-adds per MXU cycle: pre-delay MXU occupancy of plain
# matmuls (v6e and tpu7x pass two rows a cycle); HBM: cloud.google.com/tpu/docs. The clocks follow:
# 1.50, 1.75 (as documented), 1.75 and 2.20 GHz.
CHIPS = {
    'v5e': Chip('v5e:2x2', 'TPU v5e', 1, 4, 128 * 128, 819e9, 128, 4),
    'v5p': Chip('v5p:2x2x1', 'TPU v5p', 2, 4, 128 * 128, 2765e9, 64, 4),
    'v6e': Chip('v6e:2x2', 'TPU v6e', 1, 2, 2 * 256 * 256, 1640e9, 128, 4),
    'tpu7x': Chip('tpu7x:2x2x1', 'TPU7x', 1, 2, 2 * 256 * 256, 7370e9 / 2, 64, 1),
}


@dataclasses.dataclass(frozen=True)
class Region:
    kind: str  # kernel | loop | predicated
    start: int  # address of its first bundle
    cycles: int  # of its own bundles, without the regions inside
    busy: dict[str, int]  # unit-cycles of its own bundles, by unit
    inner: tuple['Region', ...]

    @property
    def total(self) -> int:
        """Cycles when every region inside runs once."""
        return self.cycles + sum(region.total for region in self.inner)

    @property
    def works(self) -> bool:
        return sum(self.busy[unit] for unit in VECTOR) >= WORK

    def walk(self) -> Iterator['Region']:
        """All regions inside, in the order of the code."""
        for region in self.inner:
            yield region
            yield from region.walk()

    def __str__(self) -> str:
        units = ' '.join(f'{unit} {count}' for unit, count in self.busy.items() if count)
        lines = [f'{self.kind} at {self.start:#x}: {self.cycles} cycles, busy: {units}']
        for region in self.inner:
            lines += [f'  {line}' for line in str(region).splitlines()]
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Schedule:
    code: Region
    one_core: bool  # of several, one does it all

    @property
    def grid(self) -> Region:
        """The loop over grid steps; the whole kernel where there is none."""

        def loops(region: Region) -> Iterator[Region]:
            for inner in region.inner:
                yield from [inner] if inner.kind == 'loop' else loops(inner)

        return max(loops(self.code), key=lambda loop: loop.total, default=self.code)

    @property
    def bodies(self) -> list[Region]:
        """Branches and inner loops of a step that do vector work, in the order of the code.

        The one around the whole step, which is off while the pipeline fills and drains, is not.
        """
        top = [region for region in self.grid.inner if region.works or any_works(region)]
        step = top[0] if len(top) == 1 and any_works(top[0]) else self.grid
        return [region for region in step.walk() if region.works]

    @property
    def every_step(self) -> int:
        """Cycles that each step takes, whatever it does."""
        return self.grid.total - sum(region.cycles for region in self.bodies)


def any_works(region: Region) -> bool:
    return any(inner.works for inner in region.walk())


class Step(NamedTuple):
    """A kind of grid step."""

    count: float  # steps of this kind
    runs: dict[str, float]  # how often each body runs in such a step; 0 where it is not named
    hbm_bytes: float  # read and written for such a step: the blocks that differ from the last


class Plan(NamedTuple):
    """What a kernel does for a problem."""

    bodies: tuple[str, ...]  # names for `Schedule.bodies`, in the order of the code
    steps: list[Step]


class Prediction(NamedTuple):
    grid_steps: float
    every_step: int  # cycles
    bodies: dict[str, int]  # cycles of one run
    spills: int  # vector registers stored to make room, in one run of each body
    num_cores: int
    cycles: float  # of each core at work
    waiting: float  # the part of them in which it waits for HBM
    mxu_share: float  # of the cycles in which all its MXUs are busy
    seconds: float
    hbm_bytes: float


def predict(schedule: Schedule, plan: Plan, chip: Chip) -> Prediction:
    """Adds up the steps: each takes its cycles, or what its bytes take if that is longer.

    Raises:
      UserError: the schedule has another number of bodies than the plan names.
    """
    found = schedule.bodies
    if len(found) != len(plan.bodies):
        raise UserError(
            f'the plan names {len(plan.bodies)} bodies ({", ".join(plan.bodies)}), the schedule '
            f'has {len(found)}:\n{schedule.grid}'
        )
    bodies = {name: region.cycles for name, region in zip(plan.bodies, found, strict=True)}
    num_cores = 1 if schedule.one_core else chip.num_cores
    cycles_per_byte = chip.clock / chip.hbm_bytes_per_second
    cycles = float(schedule.code.total - schedule.grid.total)
    waiting = multiplying = 0.0
    for step in plan.steps:
        busy = schedule.every_step + sum(bodies[name] * runs for name, runs in step.runs.items())
        wait = max(0.0, step.hbm_bytes * cycles_per_byte - busy / num_cores)
        cycles += step.count * (busy / num_cores + wait)
        waiting += step.count * wait
        products = sum(
            region.busy['MXU'] * step.runs.get(name, 0.0)
            for name, region in zip(plan.bodies, found, strict=True)
        )
        multiplying += step.count * products / num_cores / chip.num_mxus
    return Prediction(
        grid_steps=sum(step.count for step in plan.steps),
        every_step=schedule.every_step,
        bodies=bodies,
        spills=sum(region.busy['VSTORE:SPILL'] for region in found),
        num_cores=num_cores,
        cycles=cycles,
        waiting=waiting,
        mxu_share=multiplying / cycles,
        seconds=cycles / chip.clock,
        hbm_bytes=sum(step.count * step.hbm_bytes for step in plan.steps),
    )


def flags(directory: Path) -> str:
    """LIBTPU_INIT_ARGS that make libtpu write its schedules there, about 10 MB a kernel."""
    passes = '(pre-delay|final)_(hlo|bundles)'
    return (
        f'--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true '
        f'--xla_jf_dump_llo_pass_label_regex={passes}'
    )


def read(directory: Path, chip: Chip) -> dict[str, Schedule]:
    """The schedules of all that was compiled, by the name of its HLO instruction."""
    found: dict[str, dict[str, Path]] = {}
    # A name compiled again replaces the first: the number in front is the time.
    for path in sorted(directory.iterdir()):
        if match := FILE.fullmatch(path.name):
            found.setdefault(match[2], {})[match[3]] = path
    return {
        name: parse(*(paths[file].read_text() for file in FILES.values()), chip.delay_slots)
        for name, paths in found.items()
        if len(paths) == len(FILES)
    }


def parse(bundles: str, final: str, cycles: str, delay_slots: int) -> Schedule:
    """The tree of a kernel, from the text of its three files."""
    count, starts, branches, core_ids = 0, {}, [], set()
    for line in bundles.splitlines():
        if not BUNDLE.match(line):
            continue
        starts |= {int(number): count for number in REGION.findall(line)}
        branches += [(count, match[1], int(match[2])) for match in BRANCH.finditer(line)]
        core_ids |= set(CORE_ID.findall(line))
        count += 1
    # A region without bundles at the very end is not marked.
    jumps = [(at, starts.get(region, count)) for at, _, region in branches]
    spans = [
        ('predicated', at + 1 + delay_slots, to) if to > at else ('loop', to, at + 1 + delay_slots)
        for at, to in jumps
    ]
    units, rows = table(final)
    assert len(rows) == count, f'{count} bundles, but utilisation of {len(rows)}'
    busy = stretch(units, rows, table(cycles)[1])
    guards = {branch[1] for branch in branches}
    compared = re.findall(r'(%\w+) = scmp\.ne\.s32\.totalorder (%\w+), 0 ', bundles)
    return Schedule(
        code=tree(spans, units, busy),
        one_core=any(name in guards and value in core_ids for name, value in compared),
    )


def table(utilization: str) -> tuple[list[str], list[list[int]]]:
    """Names of the units, and how many of each are busy, row by row."""
    head, rows = utilization.split('== UTILIZATION:\n')
    units = [unit.strip() for unit in head.splitlines()[1].split(',')]
    return units, [[int(count) for count in row.split()] for row in rows.splitlines() if row]


def stretch(
    units: Sequence[str], final: list[list[int]], cycles: list[list[int]]
) -> list[list[list[int]]]:
    """The cycles that belong to each bundle of the final program.

    Those left out issued nothing: the two tables agree on the rows that issue something, and what
    is missing between two of them goes to the bundle before.
    """
    columns = [units.index(unit) for unit in ISSUED]

    def issues(row: list[int]) -> list[int]:
        return [row[column] for column in columns]

    def next_issue(rows: list[list[int]], at: int) -> int:
        while at < len(rows) and not any(issues(rows[at])):
            at += 1
        return at

    stretched: list[list[list[int]]] = []
    at = bundle = 0
    while bundle < len(final) or at < len(cycles):
        end, last = next_issue(cycles, at), next_issue(final, bundle)
        both = end < len(cycles) and last < len(final)
        assert both or (end == len(cycles) and last == len(final)), 'the tables differ in length'
        assert not both or issues(cycles[end]) == issues(final[last]), 'the tables disagree'
        idle = last - bundle
        assert idle <= end - at, 'the final program has idle bundles of its own'
        stretched += [[row] for row in cycles[at : at + idle]]
        if at + idle < end:
            # The very first bundle always issues something.
            stretched[-1] += cycles[at + idle : end]
        stretched += [[row] for row in cycles[end : end + both]]
        at, bundle = end + both, last + both
    return stretched


def tree(
    spans: list[tuple[str, int, int]], units: Sequence[str], busy: list[list[list[int]]]
) -> Region:
    """Nests the spans [start, end) of bundles."""
    spans = sorted({s for s in spans if s[2] > s[1]}, key=lambda s: (s[1], -s[2], s[0]))

    def build(kind: str, start: int, end: int) -> Region:
        inner, own, at = [], [], start
        while spans and spans[0][1] < end:
            name, first, last = spans.pop(0)
            own += busy[at:first]
            inner.append(build(name, first, min(last, end)))
            at = min(last, end)
        own += busy[at:end]
        rows = [row for bundle in own for row in bundle]
        sums = [sum(column) for column in zip(*rows, strict=True)] or [0] * len(units)
        counts = dict(zip(units, sums, strict=True))
        return Region(kind, start, len(rows), counts, tuple(inner))

    return build('kernel', 0, len(busy))
