"""Logits of a model of ours and of transformers', of the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hugging_face import V

from helios_jax import config
from helios_jax.convert import importing
from helios_jax.parallel import mesh as meshes


def one_device():
    return meshes.make(config.Mesh(), jax.devices()[:1])


def load(directory, **changes):
    return importing.load(importing.open_directory(directory, **changes), mesh=one_device())


def theirs(made, tokens):
    import torch

    with torch.no_grad():
        return made(torch.tensor(tokens)).logits.numpy()


def ours(restored, tokens):
    positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (len(tokens), 1))
    out = logits_of(restored.model)(restored.variables, jnp.asarray(tokens, jnp.int32), positions)
    return np.asarray(out)[..., :V]


@functools.cache
def logits_of(model):
    return jax.jit(functools.partial(model.apply, method='logits'))
