"""Definition of a study in its workdir: what a study that goes on is compared with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from helios_jax import config, paths
from helios_jax.ablate.design import Design
from helios_jax.errors import require

FILE = 'study.json'
# Settings that say where something lies, or how fast it is made.
FREE_TO_CHANGE = ('data.cache_dir', 'data.num_workers', 'train.compilation_cache')
GROWING = ('seeds', 'lengths', 'methods')  # what finished runs need not be repeated for


def read(workdir: Path) -> dict[str, Any]:
    """Returns the definition of the study that was begun in `workdir`; {} if there is none.

    Raises:
      UserError: study.json is no JSON object with seeds and arms.
    """
    path = workdir / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        known = isinstance(found, dict) and {'seeds', 'arms', 'config'} <= set(found)
        known = known and isinstance(found['config'], dict)
    except ValueError:
        known = False
    require(known, f'{path} is no definition of a study; restore it, or name another workdir.')
    found['config'] = dataclasses.asdict(config.from_dict(found['config']))  # with newer fields
    return found


def write(made: Design, workdir: Path) -> None:
    """Writes study.json, whole or not at all."""
    text = json.dumps(made.definition(), indent=1)
    paths.write_whole(epath.Path(workdir) / FILE, f'{text}\n'.encode())


def require_same(made: Design, workdir: Path) -> None:
    """Refuses to go on with another study than was begun in `workdir`; it may have grown.

    Raises:
      UserError: naming what differs.
    """
    for name in ('checkpoints', 'metrics.jsonl'):
        require(
            not (workdir / name).exists(),
            f'{workdir} holds a run of helios train; name another directory for the study.',
        )
    before = read(workdir)
    if not before:
        return
    now = json.loads(json.dumps(made.definition()))
    require(
        now['seeds'] >= before['seeds'],
        f'--seeds={now["seeds"]}, but {workdir} was begun with {before["seeds"]}; it may have '
        'more, not fewer.',
    )
    grown = {name: now['arms'].get(name) for name in before['arms']}
    was, is_now = (_flat(values) for values in (before, now | {'arms': grown}))
    for name in sorted({*was, *is_now}):
        free = name in GROWING or name.removeprefix('config.') in FREE_TO_CHANGE
        require(
            free or was.get(name) == is_now.get(name),
            f'{name}={is_now.get(name)!r}, but {workdir} was begun with {was.get(name)!r}; set it '
            'back, or name another workdir.',
        )


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f'{prefix}{name}.') if inner else {prefix + name: value}
    return found
