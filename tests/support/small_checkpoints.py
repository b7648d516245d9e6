"""Checkpoints of a small mixture of experts, with every item, written without training."""

import contextlib
import dataclasses
import functools
import hashlib
from pathlib import Path

import jax
import numpy as np
from etils import epath

from helios_jax import checkpoint, config
from helios_jax.data.bpe import train_bpe
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states

VOCABULARY = 290
CONFIG = config.Config(
    model=config.Model(
        vocab_size=VOCABULARY, num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_dim=40, prefix='dense', period='moe', moe=config.MoE(num_experts=5),
    ),
    data=config.Data(row_length=16),
    train=config.Train(batch_rows=8, ema=0.9),
).resolve(VOCABULARY)  # fmt: skip
SCORES = {20: 1.25, 40: 1.5, 60: 1.75}  # so that the oldest step is the best


def mesh() -> jax.sharding.Mesh:
    return meshes.make(config.Mesh(fsdp=1), jax.devices()[:1])


@functools.cache
def setup() -> states.Setup:
    return states.create(CONFIG, mesh())


def numbers(step: int) -> dict:
    """Every item of a step; no two steps share a number."""
    state, rng = setup().state, np.random.default_rng(step)
    draw = lambda x: rng.standard_normal(x.shape).astype(x.dtype)
    items = {'params': state.params, 'router': state.router, 'ema': state.ema}
    return jax.tree.map(draw, items) | {'optimizer': {'mu': np.full(13, step, np.float32)}}


def write(workdir: Path, steps=SCORES, cfg: config.Config = CONFIG) -> None:
    """Writes the steps into a workdir, beside a tokenizer's file."""
    directory = workdir / 'checkpoints'
    folder = checkpoint.tokenizer_directory(directory)
    path = folder / 'tokenizer.json'
    if not path.exists():
        texts = [f'{n} quick brown foxes jump over lazy dogs' for n in range(300)]
        train_bpe(texts, VOCABULARY, path)
    template = folder / 'tokenizer_config.json'
    template.write_text('{"chat_template": "{{ messages }}"}')
    held = path, template
    metadata = {
        'config': dataclasses.asdict(cfg),
        'tokenizer': 'tokenizer.json',
        'tokenizer_files': {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in held
        },
    }
    with contextlib.closing(checkpoint.Checkpoints(directory, keep=9)) as writer:
        for step in steps:
            placed = jax.device_put(numbers(step), jax.devices()[0])
            writer.save(step, placed, metadata, {'bits_per_byte': SCORES.get(step, 2.0)})


def damage(workdir: Path, step: int, item: str = 'params') -> str:
    """Flips a bit of an item's largest file; returns its name."""
    files = [path for path in (workdir / f'checkpoints/{step}/{item}').rglob('d/*')]
    path = max(files, key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    return path.name


def arrays(workdir: Path, item: str) -> dict[str, np.ndarray]:
    """The arrays of the newest step's item, as they are stored."""
    stored = checkpoint.StoredItem(checkpoint.open_step(epath.Path(workdir) / 'checkpoints'), item)
    return {name: stored.read(name) for name in stored.arrays}


def flat(tree) -> dict[str, np.ndarray]:
    return checkpoint.layout.flatten(tree)
