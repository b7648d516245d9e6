"""Steps of a few arrays, written and damaged."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from helios_jax import checkpoint
from helios_jax.checkpoint import manifest


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    return {
        'layers': {'q': draw(8, 16, 3), 'gate': draw(8, 5).astype(jnp.bfloat16)},
        'ids': jnp.arange(24, dtype=jnp.int32).reshape(8, 3),
        'bytes': jnp.arange(16, dtype=jnp.uint8),
        'scale': jnp.float32(0.1),
    }


def abstract(tree, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def same(a, b) -> bool:
    """Equal in structure, dtype and every bit."""
    bits = lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(bits, a, b))


def write(directory, steps, *, keep=9, scores=None, metadata=None) -> None:
    writer = checkpoint.Checkpoints(directory, keep=keep)
    for step in steps:
        metrics = {'bits_per_byte': scores[step]} if scores and step in scores else None
        writer.save(step, {'params': params(step)}, metadata or {}, metrics)
    writer.close()


def flip_bit(folder: epath.Path) -> str:
    """Flips one bit in the middle of the largest file; returns its name."""
    files = manifest.files(folder)
    path = max(files.values(), key=lambda p: p.stat().length)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    return path.name


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def contents(folder) -> dict[str, tuple]:
    """Everything below, with contents, sizes and times of change; folders' times left out."""
    return {
        str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else ()
        for p in sorted(folder.rglob('*'))
    }


def refuse(*args, **kwargs):
    raise OSError(28, 'No space left on device')
