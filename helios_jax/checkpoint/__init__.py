"""Checkpoints: saved asynchronously and sharded by Orbax, verified by hash, restored onto any mesh.

    DIRECTORY/helios_checkpoints.json   marks the directory as ours
    DIRECTORY/tokenizer/                files that every step shares
    DIRECTORY/STEP/ITEM/                arrays of one item (params, optimizer, …)
    DIRECTORY/STEP/metadata/            JSON: format version, step, time, shapes; the caller's
    DIRECTORY/STEP/manifest.json        size and SHA-256 of each item's files, written last
    DIRECTORY/STEP.unfinished           STEP is being deleted or, on an object store, saved (a mark)
    DIRECTORY/STEP.damaged              STEP was damaged, and a run has written it again

A step is a checkpoint exactly if it has a manifest. Nothing is deleted but what `keep` lets go and
what a save or a deletion of ours left unfinished. Arrays are stored under flat names, such as
`layers.attention.q`, so that the files depend on no class of the optimizer's. Readers need no lock:
they may read while a run writes. In a run of several processes all of them call the methods of
`Checkpoints` and `Opened`, and `open_step`.
"""

from helios_jax.checkpoint.layout import (
    FORMAT_VERSION,
    absolute,
    committed,
    in_the_way,
    incomplete,
    require_directory,
    require_ours,
    tokenizer_directory,
)
from helios_jax.checkpoint.listing import describe_step, list_steps
from helios_jax.checkpoint.manifest import DamageError
from helios_jax.checkpoint.read import Opened, damage_of, open_step, ranked
from helios_jax.checkpoint.stream import LazyArray, StoredItem, write_step
from helios_jax.checkpoint.write import Checkpoints, delete_step

__all__ = [
    'FORMAT_VERSION',
    'Checkpoints',
    'DamageError',
    'LazyArray',
    'Opened',
    'StoredItem',
    'absolute',
    'committed',
    'damage_of',
    'delete_step',
    'describe_step',
    'in_the_way',
    'incomplete',
    'list_steps',
    'open_step',
    'ranked',
    'require_directory',
    'require_ours',
    'tokenizer_directory',
    'write_step',
]
