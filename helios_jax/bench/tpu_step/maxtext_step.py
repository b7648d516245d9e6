"""Compiles MaxText's train step for a TPU topology; runs in MaxText's environment, not in ours.

    PYTHON maxtext_step.py TOPOLOGY PROGRAM FIGURES NAME=VALUE…

The names are MaxText's settings. PROGRAM receives the optimised program, and FIGURES a JSON object:
coordinates of the program's devices, bytes of a device, versions.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def main(topology: str, program: str, figures: str, *settings: str) -> None:
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import accelerator_to_spec_map as names

    chips = names.UserFacingNameToSystemCharacteristics.items()
    theirs = topology.replace('v5p:', 'v5:')
    known = [name for name, its in chips if its.topology_name == theirs]
    if not known:
        sys.exit(f'MaxText has no name for {topology}')
    kept: dict[str, Any] = {}
    compile_step = train_compile.jit_and_compile

    # MaxText keeps neither program nor mesh, so they are taken on their way.
    def keep(func: Any, args: Any, kwargs: Any, mesh: Any, *rest: Any, **named: Any) -> Any:
        compiled = compile_step(func, args, kwargs, mesh, *rest, **named)
        kept.update(compiled=compiled, mesh=mesh)
        return compiled

    train_compile.jit_and_compile = keep
    base = Path(train_compile.__file__).parents[2] / 'configs' / 'base.yml'
    topologies = (f'compile_topology={known[0]}', 'compile_topology_num_slices=1')
    train_compile.main(['train_compile', str(base), *topologies, *settings])
    memory = kept['compiled'].memory_analysis()
    Path(program).write_text(kept['compiled'].as_text())
    packages = ('maxtext', 'jax', 'libtpu')
    found = {
        'coordinates': [[int(x) for x in d.coords] for d in kept['mesh'].devices.flat],
        'temp_bytes': memory.temp_size_in_bytes,
        'peak_bytes': memory.peak_memory_in_bytes,
        'versions': {name: importlib.metadata.version(name) for name in packages},
    }
    Path(figures).write_text(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
