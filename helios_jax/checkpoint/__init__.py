"""Checkpoints: saved asynchronously and sharded by Orbax, verified by hash, restored onto any mesh.

    DIRECTORY/helios_checkpoints.json   marks the directory as ours
    DIRECTORY/tokenizer/                files that every step shares
    DIRECTORY/STEP/ITEM/                arrays of one item (params, optimizer, …)
    DIRECTORY/STEP/metadata/            JSON: format version, time, metrics, shapes; the caller's
    DIRECTORY/STEP/manifest.json        size and SHA-256 of each part's files, written last

A step is a checkpoint exactly if it has a manifest. Arrays are stored under flat names, such as
`layers.attention.q`, so that the files depend on no class of the optimizer's. In a run of several
processes all of them call every function here (`steps` and `tokenizer_directory` apart).
"""

from helios_jax.checkpoint.layout import FORMAT_VERSION, tokenizer_directory
from helios_jax.checkpoint.read import list_steps, read_metadata, resolve, restore
from helios_jax.checkpoint.write import Checkpoints

__all__ = [
    'FORMAT_VERSION',
    'Checkpoints',
    'list_steps',
    'read_metadata',
    'resolve',
    'restore',
    'tokenizer_directory',
]
