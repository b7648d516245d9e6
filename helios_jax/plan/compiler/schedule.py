"""Reads the schedules that libtpu dumps: a compiled TPU kernel as a tree of regions and cycles.

A TPU core issues one bundle a cycle and nothing in a kernel's timing depends on its data, so that
the schedule is the time, but for memory. Within `dumped`, libtpu writes three files per fusion and
per Pallas kernel:
  final_bundles: the program, a bundle a line, with its branches;
  final…utilization: busy units per bundle;
  pre-delay…utilization: busy units per cycle, the cycles in which the core waits for a result (of
    the MXU above all) included. The final program leaves those out, and is up to 20% shorter.
`parse` puts the three together as a tree: a kernel holds loops and predicated regions, each with
the cycles of its own bundles. How often each runs is for the caller to say (timing.Visits).

The largest outermost loop is the grid's: a turn is a step. Bundles of a step that are neither in a
branch nor in an inner loop run in every step, and so, for lack of a better guess, do branches
without vector work (they start and await copies).
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

FILES = (
    'final_bundles',
    'final_hlo-static-per-bundle-utilization',
    'pre-delay_hlo-static-per-bundle-utilization',
)
FILE = re.compile(rf'(\d+)-(.+)-\d+-({"|".join(FILES)})\.txt')
BUNDLE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(?:L[HBE]|P[BF]|CT)?\s*:')
BRANCH = re.compile(r'sbr\.rel (?:\(!?(%\w+)\) )?target = \$region(\d+)')
REGION = re.compile(r'Start(?:/End empty)? region (\d+)')
CORE_ID = re.compile(r'(%\w+) = sld [^;]*?/\* (?:megacore )?core id')
# Columns that count what a bundle issues; the others go on while it is long past.
ISSUED = ('VALU', 'VLOAD', 'VLOAD:FILL', 'VSTORE', 'VSTORE:SPILL', 'SALU')
VECTOR = ('MXU', 'XLU', 'VALU', 'EUP', 'VLOAD', 'VSTORE')
WORK = 16  # busy unit-cycles from which a branch counts as vector work


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of a kernel's code that runs as a whole: a loop's body or a branch."""

    kind: str  # kernel | loop | predicated
    start: int  # address of its first bundle
    cycles: int  # cycles of its own bundles, without the regions inside
    busy: dict[str, int]  # unit-cycles of its own bundles, by unit
    inner: tuple['Region', ...]

    @property
    def total(self) -> int:
        """Adds up the cycles when every region inside runs once."""
        return self.cycles + sum(region.total for region in self.inner)

    @property
    def works(self) -> bool:
        """Tells whether its own bundles do vector work."""
        return sum(self.busy[unit] for unit in VECTOR) >= WORK

    @property
    def copies(self) -> bool:
        """Tells whether it loads and stores, and computes nothing."""
        computes = any(self.busy[unit] for unit in ('MXU', 'XLU', 'VALU', 'EUP'))
        return self.busy['VLOAD'] > 0 and self.busy['VSTORE'] > 0 and not computes

    def walk(self) -> Iterator['Region']:
        """Yields all regions inside, in the order of the code."""
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
    """A compiled kernel."""

    code: Region
    one_core: bool  # True: one core does all the work, even where a chip has several

    @property
    def grid(self) -> Region:
        """Finds the loop over grid steps; the whole kernel where there is none."""

        def loops(region: Region) -> Iterator[Region]:
            for inner in region.inner:
                yield from [inner] if inner.kind == 'loop' else loops(inner)

        return max(loops(self.code), key=lambda loop: loop.total, default=self.code)

    @property
    def bodies(self) -> list[Region]:
        """Lists the branches and inner loops of a step that do vector work, in the code's order.

        Around them all stands one branch, off while the pipeline fills and drains, which does not
        count. Beside that branch blocks are copied: copies within VMEM take vector work, and do not
        count either.
        """
        branch = max(self.grid.inner, key=lambda region: region.total, default=self.grid)
        if 2 * branch.total < self.grid.total or not any(r.works for r in branch.walk()):
            branch = self.grid
        return [region for region in branch.walk() if region.works]

    @property
    def every_step(self) -> int:
        """Adds up the cycles that each step takes, whatever it does."""
        return self.grid.total - sum(region.cycles for region in self.bodies)


@contextlib.contextmanager
def dumped() -> Iterator[Path]:
    """Makes libtpu write the schedules of all that it compiles, up to 10 MB each.

    Nothing in the process may have loaded libtpu before, which reads its flags but once.

    Yields:
      A directory that is removed at the end.
    """
    passes = '(pre-delay|final)_(hlo|bundles)'
    others = os.environ.get('LIBTPU_INIT_ARGS', '')
    with tempfile.TemporaryDirectory(prefix='helios_schedules_') as directory:
        os.environ['LIBTPU_INIT_ARGS'] = (
            f'{others} --xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true '
            f'--xla_jf_dump_llo_pass_label_regex={passes}'
        )
        yield Path(directory)


def read(directory: Path, delay_slots: int) -> dict[str, Schedule]:
    """Reads the schedules of all that was compiled, by the name of the HLO instruction.

    Args:
      delay_slots: bundles after a branch that run whether or not it is taken.
    """
    found: dict[str, dict[str, Path]] = {}
    # A name compiled again replaces the first: the number in front is the time.
    for path in sorted(directory.iterdir()):
        if match := FILE.fullmatch(path.name):
            found.setdefault(match[2], {})[match[3]] = path
    schedules = {}
    for name, paths in found.items():
        if len(paths) == len(FILES):
            bundles, final, cycles = (paths[file].read_text() for file in FILES)
            schedules[name] = parse(bundles, final, cycles, delay_slots)
    return schedules


def parse(bundles: str, final: str, cycles: str, delay_slots: int) -> Schedule:
    """Builds the tree of a kernel from the text of its three files."""
    count, starts, core_ids = 0, dict[int, int](), set[str]()
    branches: list[tuple[int, str, int]] = []
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
    units, rows = busy_units(final)
    assert len(rows) == count, f'{count} bundles, but utilisation of {len(rows)}'
    busy = stretch(units, rows, busy_units(cycles)[1])
    guards = {branch[1] for branch in branches}
    compared = re.findall(r'(%\w+) = scmp\.ne\.s32\.totalorder (%\w+), 0\b', bundles)
    return Schedule(
        code=tree(spans, units, busy),
        one_core=any(name in guards and value in core_ids for name, value in compared),
    )


def busy_units(utilization: str) -> tuple[list[str], list[list[int]]]:
    """Reads the names of the units, and how many of each are busy, row by row."""
    head, rows = utilization.split('== UTILIZATION:\n')
    # From libtpu 0.0.52 on, what was MXU is MATMUL, beside the loading of weights.
    renamed = {'MATMUL': 'MXU'}
    units = [renamed.get(unit, unit) for unit in head.splitlines()[1].split(', ')]
    return units, [[int(count) for count in row.split()] for row in rows.splitlines() if row]


def stretch(
    units: Sequence[str], final: list[list[int]], cycles: list[list[int]]
) -> list[list[list[int]]]:
    """Assigns to each bundle of the final program the cycles that belong to it.

    The final program leaves out cycles that issue nothing: the two tables agree on the rows that
    issue something, and what is missing between two of them goes to the bundle before.
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
    spans = sorted({s for s in spans if s[2] > s[1]}, key=lambda s: (s[1], -s[2], s[0] == 'loop'))

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
