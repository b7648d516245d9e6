"""Predicts how long a TPU kernel takes, from its schedule and how often its regions run."""

from typing import NamedTuple

import numpy as np

from helios_jax import chips
from helios_jax.chips import Chip
from helios_jax.plan.compiler.schedule import Schedule

# Those whose schedules can be read.
CHIPS = {name: chip for name, chip in chips.CHIPS.items() if chip.platform == 'tpu'}


FLOAT, HALF = 4, 2  # bytes of a float32 and of a bfloat16


class Step(NamedTuple):
    """A group of grid steps that are alike."""

    number: float  # number of steps
    runs: dict[str, float]  # runs of each body in one of them; 0 where it is not named
    hbm_bytes: float  # read and written for one of them: the blocks that differ from the last


class Visits(NamedTuple):
    """Number of visits of a kernel to each region of its code, for one problem."""

    bodies: tuple[str, ...]  # names for `Schedule.bodies`, in the order of the code
    steps: list[Step]


def changes(*indices: np.ndarray) -> np.ndarray:
    """Marks by 1 each step whose block differs from the previous step's, and so is copied."""
    stacked = np.stack(indices)
    moved = np.any(stacked[:, 1:] != stacked[:, :-1], axis=0)
    return np.concatenate([[1], moved.astype(int)])


def tally(runs: dict[str, np.ndarray], hbm_bytes: np.ndarray, batch: int) -> Visits:
    """Counts the steps that are alike, over all rows of the batch.

    Args:
      runs: for each body, in the order of the code, how often it runs in each step of one row.
      hbm_bytes: what each step copies.
      batch: rows, which all take the same steps.
    """
    table = np.stack([*runs.values(), hbm_bytes], axis=1).astype(np.int64)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    steps = [
        Step(float(count) * batch, dict(zip(runs, map(float, kind), strict=False)), float(kind[-1]))
        for kind, count in zip(kinds, counts, strict=True)
    ]
    return Visits(tuple(runs), steps)


class Prediction(NamedTuple):
    """A kernel's time for one problem, and the terms that it is the sum of."""

    grid_steps: float
    every_step: int  # cycles
    bodies: dict[str, int]  # cycles of one run
    spills: int  # vector registers stored to make room, in one run of each body
    num_cores: int
    cycles: float  # cycles of each core at work
    waiting: float  # cycles among them in which the core waits for HBM
    mxu_share: float  # share of its cycles that all its MXUs are busy
    seconds: float
    hbm_bytes: float


def predict(schedule: Schedule, visits: Visits, chip: Chip) -> Prediction:
    """Adds up the steps: each takes its cycles, or the time of its bytes if that is longer.

    Raises:
      ValueError: the schedule has another number of bodies than the visits name.
    """
    found, every_step = schedule.bodies, schedule.every_step
    if len(found) == len(visits.bodies) + 1 and found[-1].copies:
        # XLA put the result in VMEM, and a finished block is copied there last of all.
        every_step += found.pop().cycles
    if len(found) != len(visits.bodies):
        raise ValueError(
            f'the visits name {len(visits.bodies)} bodies ({", ".join(visits.bodies)}), the '
            f'schedule has {len(found)}:\n{schedule.grid}'
        )
    bodies = {name: region.cycles for name, region in zip(visits.bodies, found, strict=True)}
    num_cores = 1 if schedule.one_core else chip.num_cores
    cycles_per_byte = chip.clock / chip.hbm_bytes_per_second
    cycles = float(schedule.code.total - schedule.grid.total)
    waiting = multiplying = 0.0
    for step in visits.steps:
        busy = every_step + sum(bodies[name] * runs for name, runs in step.runs.items())
        wait = max(0.0, step.hbm_bytes * cycles_per_byte - busy / num_cores)
        cycles += step.number * (busy / num_cores + wait)
        waiting += step.number * wait
        products = sum(
            region.busy['MXU'] * step.runs.get(name, 0.0)
            for name, region in zip(visits.bodies, found, strict=True)
        )
        multiplying += step.number * products / num_cores / chip.num_mxus
    return Prediction(
        grid_steps=sum(step.number for step in visits.steps),
        every_step=every_step,
        bodies=bodies,
        spills=sum(region.busy['VSTORE:SPILL'] for region in found),
        num_cores=num_cores,
        cycles=cycles,
        waiting=waiting,
        mxu_share=multiplying / cycles,
        seconds=cycles / chip.clock,
        hbm_bytes=sum(step.number * step.hbm_bytes for step in visits.steps),
    )
