"""Flags of `helios bench <measurement>`: each measurement has its own."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from helios_jax import config, options
from helios_jax.bench.mesh.command import mesh_bench
from helios_jax.errors import one_of, require


def attention_bench(argv: Sequence[str]) -> None:
    """Compares attention kernels on a TPU, by their compiled schedules.

    helios bench attention --target=v5p --lengths=4096 --documents=8
    """
    values = flags.FlagValues()
    shape = {
        'batch': (1, 'Rows, B.'),
        'heads': (32, 'Query heads, N.'),
        'kv_heads': (8, 'Key heads, K.'),
        'head_dim': (128, 'H; the layer is N·H wide.'),
        'documents': (1, 'Documents in a row.'),
        'window': (0, 'Tokens that a query sees; 0: all before it.'),
    }
    flags.DEFINE_string('target', 'v5p', 'v5e | v5p | v6e | tpu7x.', flag_values=values)
    flags.DEFINE_list('lengths', ['2048', '4096', '16384'], 'Tokens, T.', flag_values=values)
    for name, (default, text) in shape.items():
        flags.DEFINE_integer(name, default, text, flag_values=values)
    flags.DEFINE_list('implementations', [], 'Those to compile; none: all.', flag_values=values)
    flags.DEFINE_string('earlier', '', 'File of JSON rows to compare with.', flag_values=values)
    flags.DEFINE_integer('jobs', 1, 'Compilations at a time.', flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    flags.DEFINE_bool('tune', False, "Search our kernels' block sizes.", flag_values=values)
    flags.DEFINE_bool('verify', False, 'Our kernels against float64.', flag_values=values)
    flags.DEFINE_integer('cases', 0, 'Cases to verify; 0: all of them.', flag_values=values)
    options.parse(values, argv)
    if values.verify:
        from helios_jax.verify import attention

        attention.check_cases(values.cases, values.jobs)
        return
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax.bench.attention import compare, tune

    require(
        values.target in compare.CHIPS,
        f'--target={values.target}: there are {", ".join(compare.CHIPS)}.',
    )
    if values.tune:
        tune.tune(values.target, values.head_dim, values.jobs)
        return
    for length in values.lengths:
        require(length.isdigit() and length != '0', f'--lengths={length}: not a number of tokens.')
    sizes: Any = {name: values[name].value for name in shape}
    problems = [compare.Problem(length=int(length), **sizes) for length in values.lengths]
    compare.compare_implementations(
        values.target,
        problems,
        names=values.implementations,
        earlier=values.earlier,
        jobs=values.jobs,
        as_json=values.json,
    )


def moe_bench(argv: Sequence[str]) -> None:
    """Compares the products of experts: on a TPU by schedules, on this GPU by time.

    helios bench moe --target=v5p --shapes=e8,e128
    """
    values = flags.FlagValues()
    flags.DEFINE_string('target', 'v5p', 'v5e | v5p | v6e | tpu7x | gpu.', flag_values=values)
    text = 'Experts and sizes: e8, e128, e56.'
    flags.DEFINE_list('shapes', ['e8', 'e128', 'e56'], text, flag_values=values)
    text = 'TPU: those to compile; none: all.'
    flags.DEFINE_list('implementations', [], text, flag_values=values)
    flags.DEFINE_integer('jobs', 1, 'TPU: compilations at a time.', flag_values=values)
    flags.DEFINE_list('loads', ['even', 'skew'], 'GPU: rows of the experts.', flag_values=values)
    text = 'GPU: sublayer, passes, layer, or multiply, transposed, gradient.'
    flags.DEFINE_list('what', ['layer'], text, flag_values=values)
    flags.DEFINE_bool('verify', False, 'GPU: our kernels against float64.', flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    options.parse(values, argv)
    if values.target == 'gpu':
        if values.verify:
            from helios_jax.verify import grouped_matmul

            grouped_matmul.verify_all()
            return
        from helios_jax.bench.moe import gpu

        gpu.measure_all(values.shapes, values.loads, values.what)
        return
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax.bench.moe import compare

    compare.compare_products(
        values.target,
        values.shapes,
        names=values.implementations,
        jobs=values.jobs,
        as_json=values.json,
    )


def gates_bench(argv: Sequence[str]) -> None:
    """Times the gated mix and the norm behind it on this GPU, beside XLA and PyTorch.

    helios bench gates --widths=2048,4096
    """
    values = flags.FlagValues()
    flags.DEFINE_list('widths', ['2048', '4096'], 'Widths of the stream.', flag_values=values)
    flags.DEFINE_bool('verify', False, 'The kernel against float64.', flag_values=values)
    options.parse(values, argv)
    for width in values.widths:
        require(width.isdigit() and width != '0', f'--widths={width}: not a number of channels.')
    if values.verify:
        from helios_jax.verify import gated_norm

        gated_norm.verify_all()
        return
    from helios_jax.bench import gates

    gates.measure_all([int(width) for width in values.widths])


def train_bench(argv: Sequence[str]) -> None:
    """Measures training speed on real text, and kernels beside their floors.

    helios bench train --config=helios_1b --config.data.tokenizer=tokenizer.json --peer
    """
    values = flags.FlagValues()
    flags.DEFINE_list('kinds', ['residual', 'convex'], 'GMU kinds.', flag_values=values)
    flags.DEFINE_list('packings', ['concatenate', 'best_fit'], 'Packings.', flag_values=values)
    flags.DEFINE_bool('peer', False, 'Measure PyTorch as well.', flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines alone.', flag_values=values)
    flags.DEFINE_integer('warmup_steps', 5, 'Steps before the clock runs.', flag_values=values)
    flags.DEFINE_integer('profiled_steps', 3, 'Steps of a profile, after it.', flag_values=values)
    cfg = options.parse_config(values, argv)
    from helios_jax.bench import train

    train.compare_training(
        cfg,
        kinds=values.kinds,
        packings=values.packings,
        warmup_steps=values.warmup_steps,
        profiled_steps=values.profiled_steps,
        with_peer=values.peer,
        as_json=values.json,
    )


def memory_bench(argv: Sequence[str]) -> None:
    """Compares what memory policies of one model cost and save.

    helios bench memory --config=helios_1b --policies=full,fp8
    """
    values = flags.FlagValues()
    presets = ['full', 'fp8_offload', 'offload', 'fp8', 'minimal']
    policies = [*presets, 'full:backward_parts=4', 'fp8_offload:backward_parts=4', 'none']
    text = 'Presets, each with what differs: fp8:gate_up=offload, full:backward_parts=4.'
    flags.DEFINE_list('policies', policies, text, flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    cfg = options.parse_config(values, argv)
    from helios_jax.bench import memory

    memory.compare_policies(cfg, values.policies, as_json=values.json)


def torch_bench(argv: Sequence[str]) -> None:
    """Measures PyTorch's training speed on helios_1b's shape.

    helios bench torch_peer --json
    """
    from helios_jax.bench.torch_peer import Peer, print_measurement

    values = flags.FlagValues()
    define: Any = {int: flags.DEFINE_integer, str: flags.DEFINE_string, bool: flags.DEFINE_bool}
    described, fields = config.describe(Peer), dataclasses.fields(Peer)
    for field in fields:
        define[field.type](field.name, field.default, described[field.name][1], flag_values=values)
    flags.DEFINE_bool('json', False, 'One line of JSON.', flag_values=values)
    options.parse(values, argv)
    given: Any = {field.name: values[field.name].value for field in fields}
    print_measurement(Peer(**given), as_json=values.json)


def convert_bench(argv: Sequence[str]) -> None:
    """Times the import of a random checkpoint, and measures its host memory.

    helios bench convert --config=helios_1b
    """
    values = flags.FlagValues()
    flags.DEFINE_list('dtypes', ['bfloat16', 'float32'], 'Of its tensors.', flag_values=values)
    flags.DEFINE_string('directory', '', 'On the disk to measure.', flag_values=values)
    flags.DEFINE_integer('repeats', 3, 'Rounds of each.', flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    cfg = options.parse_config(values, argv)
    from helios_jax.bench import convert

    convert.compare_imports(
        cfg,
        dtypes=values.dtypes,
        directory=values.directory,
        repeats=values.repeats,
        as_json=values.json,
    )


def eval_bench(argv: Sequence[str]) -> None:
    """Times benchmarks beside the harness's own hf model, on one random checkpoint.

    helios bench eval --config=helios_1b
    """
    values = flags.FlagValues()
    flags.DEFINE_integer('requests', 2000, 'Log-likelihoods to ask for.', flag_values=values)
    flags.DEFINE_integer('batch_rows', 16, 'Rows at a time, of ours.', flag_values=values)
    flags.DEFINE_string('dtype', 'bfloat16', 'Of the checkpoint.', flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    cfg = options.parse_config(values, argv)
    one_of('--dtype', values.dtype, ('bfloat16', 'float32'))
    from helios_jax.bench import harness_peer

    harness_peer.compare_harness(
        cfg,
        requests=values.requests,
        batch_rows=values.batch_rows,
        dtype=values.dtype,
        as_json=values.json,
    )


def start_bench(argv: Sequence[str]) -> None:
    """Measures how soon `helios generate` answers, with and without compiled programs.

    helios bench start --checkpoint=runs/helios_1b --against=../before
    """
    values = flags.FlagValues()
    flags.DEFINE_string('checkpoint', '', "A run's workdir.", flag_values=values)
    flags.DEFINE_list('against', [], 'Other checkouts, in turns.', flag_values=values)
    flags.DEFINE_integer('repeats', 3, 'Runs of each kind.', flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    options.parse(values, argv)
    require(bool(values.checkpoint), "--checkpoint is missing; name a run's workdir.")
    from helios_jax.bench import start

    start.compare_starts(
        values.checkpoint, values.against, repeats=values.repeats, as_json=values.json
    )


def tpu_step_bench(argv: Sequence[str]) -> None:
    """Predicts a train step on a TPU beside MaxText's, by their compiled programs.

    helios bench tpu-step --config=helios_8b --topology=v5p:2x2x4 --peer=maxtext/bin/python
    """
    values = flags.FlagValues()
    forms = "MaxText's options for XLA: none, those of its scripts, ours."
    flags.DEFINE_string('topology', 'v5p:2x2x4', 'Chip, and how many.', flag_values=values)
    flags.DEFINE_string('peer', '', 'A Python that has MaxText.', flag_values=values)
    flags.DEFINE_list('forms', ['defaults', 'recipe', 'ours'], forms, flag_values=values)
    flags.DEFINE_bool('json', False, 'JSON lines.', flag_values=values)
    cfg = options.parse_config(values, argv)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax import chips
    from helios_jax.bench.tpu_step import compare
    from helios_jax.plan.command import prepared

    compare.compare_steps(
        prepared(cfg, chips.topology(values.topology)),
        values.topology,
        python=values.peer,
        forms=values.forms,
        as_json=values.json,
    )


BENCHMARKS = options.Group(
    'Measures speed and memory.',
    {
        'attention': attention_bench,
        'convert': convert_bench,
        'eval': eval_bench,
        'gates': gates_bench,
        'memory': memory_bench,
        'mesh': mesh_bench,
        'moe': moe_bench,
        'start': start_bench,
        'train': train_bench,
        'torch_peer': torch_bench,
        'tpu-step': tpu_step_bench,
    },
)
