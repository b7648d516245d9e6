"""How long a TPU kernel takes, from its schedule and how often each of its regions runs."""

from typing import NamedTuple

from helios_jax import chips
from helios_jax.bench.tpu_schedule import Schedule
from helios_jax.chips import Chip

# Those whose schedules can be read.
CHIPS = {name: chip for name, chip in chips.CHIPS.items() if chip.platform == 'tpu'}


class Step(NamedTuple):
    """A kind of grid step."""

    number: float  # of steps of this kind
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
      ValueError: the schedule has another number of bodies than the plan names.
    """
    found, every_step = schedule.bodies, schedule.every_step
    if len(found) == len(plan.bodies) + 1 and found[-1].copies:
        # XLA put the result in VMEM, and a finished block is copied there last of all.
        every_step += found.pop().cycles
    if len(found) != len(plan.bodies):
        raise ValueError(
            f'the plan names {len(plan.bodies)} bodies ({", ".join(plan.bodies)}), the schedule '
            f'has {len(found)}:\n{schedule.grid}'
        )
    bodies = {name: region.cycles for name, region in zip(plan.bodies, found, strict=True)}
    num_cores = 1 if schedule.one_core else chip.num_cores
    cycles_per_byte = chip.clock / chip.hbm_bytes_per_second
    cycles = float(schedule.code.total - schedule.grid.total)
    waiting = multiplying = 0.0
    for step in plan.steps:
        busy = every_step + sum(bodies[name] * runs for name, runs in step.runs.items())
        wait = max(0.0, step.hbm_bytes * cycles_per_byte - busy / num_cores)
        cycles += step.number * (busy / num_cores + wait)
        waiting += step.number * wait
        products = sum(
            region.busy['MXU'] * step.runs.get(name, 0.0)
            for name, region in zip(plan.bodies, found, strict=True)
        )
        multiplying += step.number * products / num_cores / chip.num_mxus
    return Prediction(
        grid_steps=sum(step.number for step in plan.steps),
        every_step=every_step,
        bodies=bodies,
        spills=sum(region.busy['VSTORE:SPILL'] for region in found),
        num_cores=num_cores,
        cycles=cycles,
        waiting=waiting,
        mxu_share=multiplying / cycles,
        seconds=cycles / chip.clock,
        hbm_bytes=sum(step.number * step.hbm_bytes for step in plan.steps),
    )
