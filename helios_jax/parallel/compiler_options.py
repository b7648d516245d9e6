"""Options that XLA compiles our programs with: a row each, with its reason and what it changed.

They go with each program (`jax.jit(…, compiler_options=…)`, `lowered.compile(…)`), never through
the environment, so that they are part of the key under which a compiled program is kept. What this
libtpu or jaxlib does not know is named and left out. `train.compiler_options` adds to a train
step's, changes or drops them.
"""

import functools
import logging
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from helios_jax import chips
from helios_jax.errors import UserError, require

log = logging.getLogger(__name__)

STEP, EVALUATION, PREFILL, DECODING = PROGRAMS = ('step', 'evaluation', 'prefill', 'decoding')
TRANSFERS = 'transfers'  # a step that moves arrays to and from the host
SEVERAL = 'several'  # a step on several devices
MODEL = (STEP, EVALUATION)  # a whole batch through the model, its weights sharded
TPUS = ('v5e', 'v5p', 'v6e', 'tpu7x')
ON_SPARSE_CORES = 'xla_tpu_enable_sparse_core_collective_offload'
MIB = 2**20
# Of the four rows for several GPUs, all at once.
MEASURED_TOGETHER = 'helios_8b, 8 layers, fsdp on two H200s, jax 0.11.2: 458.7 to 452.9 ms'


class Option(NamedTuple):
    """One option of XLA's, and where it is set."""

    name: str
    value: str | int | bool
    places: tuple[str, ...]  # chips (chips.py), or whole platforms
    programs: tuple[str, ...]
    reason: str
    effect: str  # measured, with the versions


# Where `effect` names no program: helios_8b, residual, memory.policy=full, T 4096, 16 chips, 4 rows
# a chip on v5p and tpu7x, 2 on v5e and v6e (jax 0.10.2, libtpu 0.0.42).
OPTIONS = (
    Option(
        'xla_jf_spmd_threshold_for_windowed_einsum_mib', 1_000_000, TPUS, MODEL,
        'A product with gathered weights is one matmul, not a loop that adds up partial results in '
        'bfloat16 in HBM.',
        'cycles outside kernels: v5p 6,014 to 4,706 M, v6e 2,672 to 1,557 M',
    ),
    Option(
        'xla_tpu_scoped_vmem_limit_kib', 96 * 1024, ('v5e', 'v6e'), MODEL,
        'A fusion may hold more VMEM than 16 MiB, and so reads its operands less often.',
        'cycles outside kernels: v6e 1,557 to 1,193 M; v5e, with the row above, 6,086 to 3,821 M',
    ),
    Option(
        'xla_tpu_scoped_vmem_limit_kib', 64 * 1024, ('v5p', 'tpu7x'), MODEL,
        'The same; these choose no better with more.',
        'cycles outside kernels: v5p 4,706 to 3,699 M; tpu7x, with the first row, 1,160 M',
    ),
    *(
        Option(
            f'{ON_SPARSE_CORES}_{gather}', True, places, MODEL,
            "The SparseCores gather the next layer's weights, as tpu7x's do by default.",
            '28.0 of the 42.9 GiB that v5p waits for in loops; not a cycle more',
        )
        for gather, places in (
            ('all_gather', ('v5p', 'v6e')),
            ('2d_all_gather', ('v5p', 'v6e')),
            ('3d_all_gather', ('v5p',)),
        )
    ),
    Option(
        'xla_tpu_prefer_async_allgather_to_allreduce', True, TPUS, MODEL,
        'A gather over many chips stays one. Otherwise each puts its part into zeros, and an '
        'all-reduce that nothing goes on beside adds them up.',
        'v5p:4x4x4 waits for 0.01 and not 34.0 GiB in its loops: 2.418 to 2.292 s',
    ),
    Option(
        f'{ON_SPARSE_CORES}_nd_reduce_scatter', True, ('v5e', 'v5p', 'v6e'), (STEP,),
        "A gradient's sum over all of a torus is a reduce-scatter, also on v5e's TensorCores, and "
        'not a sum that each device gets whole.',
        'v5e: 14.0 GiB of gradients leave by reduce-scatters',
    ),
    Option(
        f'{ON_SPARSE_CORES}_reduce_scatter', True, ('v5p', 'v6e'), (STEP,),
        "The SparseCores sum a layer's gradients beside the next layer's.",
        'with the rows above v5p waits for 0.004 GiB in loops, and v6e for 0.002',
    ),
    Option(
        'xla_gpu_enable_command_buffer', '', ('gpu',), (TRANSFERS,),
        "A GPU would record a loop's kernels and copies as one graph, and run them one by one.",
        'bench_memory, fp8_offload, H100: transfers run beside the computation (jax 0.11.2)',
    ),
    Option(
        'xla_gpu_enable_dynamic_slice_fusion', False, ('gpu',), (STEP,),
        "A kernel whose result goes into a loop's stack and is read as well would run twice: once "
        'for each.',
        'helios_1b, 4 layers, 8 experts, H200, jax 0.11.2: a step of 161.6 ms takes 146.5',
    ),
    # Left out: options that pipeline a loop's collectives, which jax 0.12 has no more, and what XLA
    # does by default: asynchronous sends of a ring, collectives on a stream of high priority.
    Option(
        'xla_gpu_enable_latency_hiding_scheduler', True, ('gpu',), (SEVERAL,),
        "Collectives begin as early as their operands allow, beside products. XLA's default keeps "
        'them about where they are used.',
        MEASURED_TOGETHER,
    ),
    *(
        Option(
            f'xla_gpu_{collective}_combine_threshold_bytes', 128 * MIB, ('gpu',), (SEVERAL,),
            'Small ones become one of at most so many bytes. A larger one would hold weights of '
            'several layers and begin when the last of them is ready.',
            MEASURED_TOGETHER,
        )
        for collective in ('all_gather', 'reduce_scatter', 'all_reduce')
    ),
    Option(
        'xla_gpu_enable_triton_gemm', False, ('gpu',), (PREFILL,),
        'Trying out matmuls takes longer than a prompt takes with the first that will do.',
        'a prefill of 1B compiles in 0.6 s and not 8.0 (H200, jax 0.11.2, by hand)',
    ),
    Option(
        'xla_gpu_autotune_level', 0, ('gpu',), (PREFILL,),
        'The same.',
        'the same',
    ),
)  # fmt: skip


def of_table(chip: str, platform: str, *programs: str) -> dict[str, Any]:
    """The table's options for programs of these kinds on a chip, or on one that it lacks ('')."""
    return {
        option.name: option.value
        for option in OPTIONS
        if {chip, platform} & set(option.places) and set(programs) & set(option.programs)
    }


def changed(options: dict[str, Any], wanted: str) -> dict[str, Any]:
    """Options with a user's changes.

    Args:
      wanted: words such as 'xla_a=3 -xla_b': an option to set, an option to drop.
    Raises:
      UserError: a word of neither form, or an option dropped that is not set.
    """
    options = dict(options)
    for word in wanted.split():
        name, equals, value = word.removeprefix('-').partition('=')
        drops = word.startswith('-')
        require(
            bool(re.fullmatch('[a-z0-9_]+', name)) and drops != bool(equals),
            f'train.compiler_options: {word!r} is neither NAME=VALUE nor -NAME.',
        )
        require(
            not drops or name in options,
            f'train.compiler_options: -{name} drops what is not set; there are: '
            f'{", ".join(options) or "none"}.',
        )
        if drops:
            del options[name]
        else:
            options[name] = {'true': True, 'false': False}.get(value, value)
    return options


def resolve(
    device: jax.Device,
    program: str,
    *,
    transfers: bool = False,
    several: bool = False,
    wanted: str = '',
) -> dict[str, Any]:
    """Options for a program on a device, or on one like it that is compiled for.

    Args:
      device: of this machine or of a topology.
      program: one of PROGRAMS.
      transfers: True if the program moves arrays to and from the host.
      several: True if the program runs on several devices.
      wanted: the user's changes (`changed`).
    Raises:
      UserError: a change that cannot be understood.
    """
    chip = chips.find(device.device_kind)
    kinds = (program, *[TRANSFERS] * transfers, *[SEVERAL] * several)
    options = changed(of_table(chip.name if chip else '', device.platform, *kinds), wanted)
    return dict(known(device, tuple(options.items())))


@functools.cache
def known(device: jax.Device, options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """The options that the device's compiler knows; warns of the others, once.

    Raises:
      UserError: a value that it cannot read.
    """
    mesh = jax.sharding.Mesh([device], 'alone')
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):  # a run's mesh may be set, which has other devices
        nothing = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=here))
    left = dict(options)
    while left:
        try:
            nothing.compile(left)
            break
        except jax.errors.JaxRuntimeError as error:
            message = str(error).splitlines()[0]
            found = re.search(r"No such compile option: '(\w+)'", message)
            if found is None or found[1] not in left:
                raise UserError(
                    f'train.compiler_options: {message.removeprefix("INVALID_ARGUMENT: ")}'
                ) from error
            log.warning('This compiler has no option %s: it is left out.', found[1])
            del left[found[1]]
    return tuple(left.items())
