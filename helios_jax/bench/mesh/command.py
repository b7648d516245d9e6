"""Flags of `helios bench mesh`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from helios_jax import options


def mesh_bench(argv: Sequence[str]) -> None:
    """Measures training on several devices, beside one of them and PyTorch.

    helios bench mesh --rows=helios_1b:fsdp,helios_1b:data --options=ours,none --peer
    """
    from helios_jax.bench.mesh import compare

    default = compare.MeshBench()
    values = flags.FlagValues()
    text = 'CONFIG:MESH or CONFIG:MESH:T, tokens of a row; none: all.'
    flags.DEFINE_list('rows', [], text, flag_values=values)
    text = "Chip, and how many: h200:8; '': those of this machine."
    flags.DEFINE_string('topology', default.topology, text, flag_values=values)
    text = "XLA's for several devices: ours, none, or changes: -xla_a xla_b=1."
    flags.DEFINE_list('options', list(default.options), text, flag_values=values)
    flags.DEFINE_string('kind', default.kind, 'GMU kind of every row.', flag_values=values)
    text = 'Layers kept at most; 0: as many as fit.'
    flags.DEFINE_integer('layers', default.layers, text, flag_values=values)
    flags.DEFINE_bool(
        'peer', default.peer, 'Measure PyTorch, by FSDP2, as well.', flag_values=values
    )
    flags.DEFINE_bool('one', default.one, 'Measure one device as well.', flag_values=values)
    text = 'Begin nothing after so many; 0: no end.'
    flags.DEFINE_float('minutes', default.minutes, text, flag_values=values)
    flags.DEFINE_bool('plan', default.plan, 'Predict alone, measure nothing.', flag_values=values)
    flags.DEFINE_bool(
        'verify', False, "Losses of every mesh beside one device's.", flag_values=values
    )
    flags.DEFINE_string('plot', default.plot, 'File of a picture to write.', flag_values=values)
    flags.DEFINE_bool('json', default.json, 'JSON lines.', flag_values=values)
    options.parse(values, argv)
    if values.verify:
        from helios_jax.bench.mesh import verify

        verify.verify_meshes(as_json=values.json, seconds=60 * values.minutes or None)
        return
    given: Any = {field.name: values[field.name].value for field in dataclasses.fields(default)}
    compare.compare_meshes(compare.MeshBench(**given))
