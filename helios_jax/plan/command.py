"""helios plan: what a run needs and what fits, before it runs."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from helios_jax import chips, config, options
from helios_jax.errors import require
from helios_jax.plan import changes, output, planning, search

BYTE_VOCABULARY = 256  # V of data.tokenizer=bytes, without loading tokenizers
CONFIRMED = 3  # configurations of a search that --compile compiles


def plan_command(argv: Sequence[str]) -> None:
    """Says what a run needs and what fits: bytes and seconds of a step, before it runs.

    helios plan --config=helios_8b --topology=v5p:2x2x4
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        'topology', 'h100', 'Chip, and how many: v5p:4x4x4, h100:8, cpu.', flag_values=values
    )
    flags.DEFINE_integer('batch', 0, "Rows of a step; 0: the config's.", flag_values=values)
    flags.DEFINE_bool('json', False, 'One JSON object.', flag_values=values)
    flags.DEFINE_bool('compile', False, 'Compile for the TPU, and compare.', flag_values=values)
    flags.DEFINE_bool('explain', False, 'Compile, and list what is saved.', flag_values=values)
    flags.DEFINE_bool('search', False, 'Policies × batches × meshes.', flag_values=values)
    flags.DEFINE_bool('validate', False, 'Our arithmetic against the compiler.', flag_values=values)
    cfg = options.parse_config(values, argv)
    if values.validate:
        os.environ['JAX_PLATFORMS'] = 'cpu'
        from helios_jax.plan.compiler import validate

        validate.compare_all(values.json)
        return
    topology = chips.topology(values.topology)
    cfg = prepared(cfg, topology, values.batch)
    found: dict[str, Any] = {}
    if values.search:
        found = searched(cfg, topology, values.compile, values.json)
    else:
        wanted = values.compile or values.explain
        found = planned(cfg, topology, wanted, values.json, values.explain)
    if values.json:
        print(options.to_json(found))


def prepared(cfg: config.Config, topology: chips.Topology, batch_rows: int = 0) -> config.Config:
    """Fills in V, L_train, the rows and the policy of a config.

    Raises:
      UserError: as a run would.
    """
    vocab_size = cfg.model.vocab_size
    if not vocab_size and cfg.data.tokenizer == 'bytes':
        vocab_size = BYTE_VOCABULARY
    elif not vocab_size:
        from helios_jax.data import tokenizer

        vocab_size = tokenizer.load(cfg.data.tokenizer).vocab_size
    cfg = cfg.resolve(vocab_size)
    if batch_rows:
        cfg = config.replace(cfg, {'train.batch_rows': batch_rows})
    if cfg.memory.policy == 'auto':
        memory = search.resolve_auto(cfg, topology.chip, topology.num_devices)
        cfg = dataclasses.replace(cfg, memory=memory)
    return cfg


def with_policy(cfg: config.Config) -> config.Config:
    """Replaces memory.policy=auto by the preset that it stands for on this run's devices."""
    if cfg.memory.policy != 'auto':
        return cfg
    memory = prepared(cfg, chips.here()).memory
    parts = f', backward_parts={memory.backward_parts}' if memory.backward_parts > 1 else ''
    print(f'memory.policy=auto: {memory.policy}{parts}')
    return dataclasses.replace(cfg, memory=memory)


def planned(
    cfg: config.Config,
    topology: chips.Topology,
    compile_too: bool,
    as_json: bool,
    explain: bool = False,
) -> dict[str, Any]:
    """Prints the plan as text unless JSON is wanted; returns it."""
    made = planning.plan(cfg, topology.chip, topology.num_devices)
    most = output.limits(made, topology)
    found = output.as_dict(made, topology) | most
    if not as_json:
        print(output.text(made, topology, most))
    if not made.fits:
        better = changes.cheapest(cfg, topology.chip, topology.num_devices)
        found['changes'] = output.changes_as_list(better)
        if not as_json:
            print('\n' + output.changes_text(better))
    if compile_too:
        found['compiled'] = compiled(made, topology, as_json, explain)
    return found


def searched(
    cfg: config.Config, topology: chips.Topology, compile_too: bool, as_json: bool
) -> dict[str, Any]:
    best = search.search(cfg, topology.chip, topology.num_devices)[:10]
    require(
        bool(best),
        f'nothing fits {topology.name}, not even one row a device under memory.policy=fp8_offload; '
        'take more devices or a smaller model.',
    )
    if not as_json:
        print(output.ranking_text(best))
    found: dict[str, Any] = {'search': output.changes_as_list(best)}
    if compile_too:
        found['compiled'] = [
            compiled(change.plan, topology, as_json) for change in best[:CONFIRMED]
        ]
    return found


def compiled(
    made: planning.Plan, topology: chips.Topology, as_json: bool, explain: bool = False
) -> dict[str, Any]:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax.plan.compiler import compiled as compiling

    measured = compiling.compiled_figures(made.config, topology.name, timed=True)
    if not as_json:
        print('\n' + compiling.comparison(made, measured))
        if explain:
            print('\n' + compiling.explanation(measured))
    return measured
