"""Compares the closed form with the compiler: 34 train steps, for TPUs, on any machine.

    helios plan --validate

Models are small enough to compile in a few minutes on two cores, and large enough that activations,
gradients and weights all weigh. Compare `live temp`: what the compiler keeps beside the arguments
at the peak. A plan that is optimistic about the peak would let a run start that cannot fit.
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from helios_jax import config, options
from helios_jax.chips import topology
from helios_jax.plan import changes, measured, planning
from helios_jax.plan.compiler import compiled

TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
POLICIES = ('full', 'fp8', 'offload', 'fp8_offload')
ARGUMENTS_ERROR = 0.05  # largest relative error of argument bytes
TEMPORARY_ERROR = 0.15  # largest relative error of live temporaries
OPTIMISM = 0.05  # largest share by which the peak may lie above the prediction


# libtpu tries out more tilings the more VMEM they may take: with our own limit a case takes ten
# minutes on two cores.
LITTLE_VMEM = 'xla_tpu_scoped_vmem_limit_kib=16384'


class StepCase(NamedTuple):
    layers: str  # dense | moe
    policy: str
    topology: str
    backward_parts: int = 1
    axis: str = ''  # axis of the mesh that takes two of the four devices; the rest is fsdp's

    @property
    def config(self) -> config.Config:
        return config.Config(
            model=config.Model(
                vocab_size=32_768,
                num_layers=8,
                embed_dim=2048,
                num_heads=16,
                num_kv_heads=4,
                head_dim=128,
                mlp_dim=8192,
                period=self.layers,
                moe=config.MoE(num_experts=8, num_experts_per_token=2, mlp_dim=2048),
            ),
            data=config.Data(row_length=2048),
            train=config.Train(batch_rows=8, compiler_options=LITTLE_VMEM),
            memory=config.Memory(self.policy, backward_parts=self.backward_parts),
            mesh=config.Mesh(**({self.axis: 2} if self.axis else {})),
        ).resolve(32_768)


CASES = [
    *(
        StepCase(layers, policy, name)
        for name in TOPOLOGIES
        for layers in ('dense', 'moe')
        for policy in POLICIES
    ),
    *(
        StepCase('dense', policy, name, changes.PARTS)
        for name in TOPOLOGIES
        for policy in ('full', 'fp8_offload')
    ),
    StepCase('moe', 'full', 'v5p:2x2x1', axis='expert'),
    StepCase('moe', 'fp8', 'v6e:2x2', axis='expert'),
    StepCase('dense', 'full', 'v5p:2x2x1', axis='context'),
    StepCase('moe', 'fp8', 'v5e:2x2', axis='context'),
]


def errors(case: StepCase) -> dict[str, Any]:
    """Predicts and compiles one case: GiB of both, and the relative errors of the prediction."""
    where = topology(case.topology)
    made = planning.plan(case.config, where.chip, where.num_devices)
    predicted = compiled.closed_form(made)
    found = compiled.compiled_figures(case.config, case.topology)
    row = {**case._asdict(), 'compile_seconds': found['compile_seconds']}
    for name in ('arguments', 'live_temp', 'peak', 'host_temp'):
        guess, true = predicted[f'{name}_gib'], found[f'{name}_gib']
        row |= {f'{name}_predicted': guess, f'{name}_compiled': true}
        row[f'{name}_error'] = guess / true - 1 if true > 1e-3 else 0.0
    row['within'] = (
        abs(row['arguments_error']) <= ARGUMENTS_ERROR
        and abs(row['live_temp_error']) <= TEMPORARY_ERROR
        and row['peak_error'] >= -OPTIMISM
    )
    return row


def compare_all(as_json: bool) -> None:
    """Compiles every case and prints a line for each, as it is done.

    Exits with code 1 if a case is beyond its limits.
    """
    if not as_json:
        print('\n'.join(ages()), HEAD, sep='\n\n')
    rows = []
    for row in map(errors, CASES):
        rows.append(row)
        print(options.to_json(row) if as_json else line(row), flush=True)
    if not as_json:
        print('\n'.join(summary(rows)))
    if not all(row['within'] for row in rows):
        sys.exit(1)


HEAD = (
    f'{"case":34} {"arguments, GiB":>22} {"live temporary, GiB":>22} {"peak, GiB":>22} '
    f'{"host, GiB":>13}'
)


def ages() -> Iterator[str]:
    """Yields the day on which each figure of the predictions was last true, and versions now."""
    now = ', '.join(
        f'{package.name} {package.version}'
        for name in ('jax', 'libtpu')
        for package in importlib.metadata.distributions(name=name)
    )
    yield f'Figures that were read off, and the day on which each was last true; now {now}:'
    yield from measured.ages()


def line(row: dict[str, Any]) -> str:
    """Writes a case as a line: predicted, compiled and error of each figure."""
    cells = [
        f'{row[f"{n}_predicted"]:6.3f} {row[f"{n}_compiled"]:6.3f} {100 * row[f"{n}_error"]:+6.1f}%'
        for n in ('arguments', 'live_temp', 'peak')
    ]
    host = f'{row["host_temp_predicted"]:6.3f} {row["host_temp_compiled"]:6.3f}'
    parts = f' {row["backward_parts"]} parts' if row['backward_parts'] > 1 else ''
    axis = f' {row["axis"]}=2' if row['axis'] else ''
    name = f'{row["layers"]} {row["policy"]} {row["topology"]}{parts}{axis}'
    return f'{name:34} ' + ' '.join(f'{c:>22}' for c in cells) + f' {host:>13}'


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    worst = lambda name: max(abs(row[f'{name}_error']) for row in rows)
    yield (
        f'largest errors: arguments {100 * worst("arguments"):.1f}%, live temporary '
        f'{100 * worst("live_temp"):.1f}%, peak {100 * worst("peak"):.1f}%'
    )
    optimism = max(-row['peak_error'] for row in rows)
    yield f'most optimistic peak: {100 * max(optimism, 0):.1f}% below the compiler'
    yield f'{sum(row["within"] for row in rows)} of {len(rows)} cases within their limits'
