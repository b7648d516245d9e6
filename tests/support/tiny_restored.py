"""A model of random weights as it comes from a checkpoint."""

import functools

import flax.linen as nn
import jax
from random_weights import random_weights

from helios_jax import config
from helios_jax.data.tokenizer import ByteTokenizer
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.restoring import Restored

TRAINED = 64  # tokens


@functools.cache
def restored(num_devices: int = 1, context: int = 1, scaling: str = 'none') -> Restored:
    """A layer in float32 that read bytes, on the first devices."""
    model = config.Model(
        vocab_size=256, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=6,
        mlp_dim=24, compute_dtype='float32',
        rope=config.Rope(scaling=scaling, trained_length=TRAINED),
    )  # fmt: skip
    cfg = config.Config(model=model, data=config.Data(row_length=TRAINED))
    transformer = Transformer(model)
    boxed = abstract_variables(transformer)
    mesh = meshes.make(config.Mesh(context=context), jax.devices()[:num_devices])
    where = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), nn.unbox(boxed))
    variables = jax.device_put(random_weights(boxed), where)
    return Restored(transformer, variables, ByteTokenizer(), cfg)
