"""Names, shapes and places of tensors: one table for import and export.

Their matrices are [out, in] with heads beside one another, ours [in, …, out]; ours stack the layers
of a period and the experts of a layer, theirs are a tensor each. Our vocabulary is padded. We
divide a tied head by √D and they do not, so that √D moves into the last norm's scale.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from helios_jax.arch import weights
from helios_jax.arch.weights import Weight
from helios_jax.config import Model

ROUTER = 'router.'  # in front of the names of balance biases, which are no parameters
TOP = {
    'embed.w': 'model.embed_tokens.weight',
    'depth_weights': 'model.depth_weights',
    'final_norm.scale': 'model.norm.weight',
    'unembedding.w': 'lm_head.weight',
}
MLP = {f'mlp.{name}.w': f'mlp.{name}_proj.weight' for name in ('gate', 'up', 'down')}
GMU = {  # families of theirs have none of these
    f'{unit}.{ours}': f'{unit}.{theirs}'
    for unit in ('attention_gmu', 'mlp_gmu')
    for ours, theirs in {
        'from_input.w': 'from_input.weight',
        'from_output.w': 'from_output.weight',
        'out.w': 'out.weight',
        'bias': 'bias',
        'scale': 'scale',
        'embedding': 'embedding',
        'stream_scale': 'stream_scale',
        'output_norm.scale': 'output_norm.weight',
    }.items()
}
LAYER = {
    'attention_norm.scale': 'input_layernorm.weight',
    'mlp_norm.scale': 'post_attention_layernorm.weight',
    **{f'attention.{x}.w': f'self_attn.{x}_proj.weight' for x in 'qkv'},
    **{f'attention.{x}_bias': f'self_attn.{x}_proj.bias' for x in 'qkv'},
    **{f'attention.{x}_norm.scale': f'self_attn.{x}_norm.weight' for x in 'qk'},
    'attention.out.w': 'self_attn.o_proj.weight',
    'attention.value_mix': 'self_attn.value_mix',
    **MLP,
    **GMU,
    'moe.router.w': 'mlp.gate.weight',
    'moe.bias': 'mlp.gate.balance_bias',
    **{f'moe.{x}.w': f'mlp.experts.{{}}.{x}_proj.weight' for x in ('gate', 'up', 'down')},
    **{f'moe.shared.{x}.w': f'mlp.shared.{x}_proj.weight' for x in ('gate', 'up', 'down')},
}
MIXTRAL = {
    'moe.router.w': 'block_sparse_moe.gate.weight',
    'moe.gate.w': 'block_sparse_moe.experts.{}.w1.weight',
    'moe.up.w': 'block_sparse_moe.experts.{}.w3.weight',
    'moe.down.w': 'block_sparse_moe.experts.{}.w2.weight',
}
# The experts of an upcycled layer are copies of its MLP; its router is new.
UPCYCLED = {name.replace('mlp.', 'moe.'): theirs for name, theirs in MLP.items()}
UPCYCLED['moe.router.w'] = ''


class Counterpart(NamedTuple):
    """A tensor of theirs, and which slice of an array of ours has its values."""

    name: str  # theirs
    shape: tuple[int, ...]  # theirs
    weight: Weight  # ours: a parameter, or a balance bias behind `ROUTER`
    place: tuple[int, ...]  # layer of the stack, if it is one, and expert, if there are some
    factor: float  # theirs = ours / factor

    def to_ours(self, x: Any) -> Any:
        """Returns their tensor as the slice of our array, without the padding of the vocabulary.

        What is no factor's product keeps its dtype, and of NumPy is a view.

        Args:
          x: of NumPy or of JAX.
        """
        if self.factor != 1:
            x = x.astype(np.float32) * np.float32(self.factor)
        if self.weight.fan_in:
            x = x.T
        if _vocabulary(self.weight.axes[len(self.place) :]) >= 0:
            return x
        return x.reshape(self.weight.shape[len(self.place) :])

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Returns their tensor of the slice of our array, float32."""
        if self.factor != 1:
            x = x / np.float32(self.factor)
        if self.weight.fan_in:
            x = x.reshape(self.weight.fan_in, -1).T
        if _vocabulary(self.weight.axes[len(self.place) :]) >= 0:
            return np.ascontiguousarray(x[: self.shape[0]])
        return np.ascontiguousarray(x.reshape(self.shape))


def pieces(model: Model, family: str, *, upcycled: bool = False) -> list[Counterpart]:
    """Lists every tensor of theirs that a model of ours is made of, bottom first.

    What has no tensor of theirs is left out: the gates of a model whose family has none, and, of
    an upcycled one, the routers.

    Args:
      upcycled: whether the experts are to come from the MLP of a dense model.
    """
    table = LAYER | (MIXTRAL if family == 'mixtral' else {}) | (UPCYCLED if upcycled else {})
    table |= {} if family == 'helios' else dict.fromkeys((*GMU, 'moe.bias'), '')
    found = []
    for weight in (*weights.all_weights(model), *balance_biases(model)):
        for layer, name, index in _places(model, weight):
            theirs = table[name] if layer >= 0 else TOP[name]
            if theirs:
                theirs = f'model.layers.{layer}.{theirs}' if layer >= 0 else theirs
                found.append((layer, Counterpart(
                    theirs.format(index[-1]) if '{}' in theirs else theirs,
                    _shape(model, weight, len(index)),
                    weight,
                    index,
                    math.sqrt(model.embed_dim)
                    if model.tied_embeddings and weight.name == 'final_norm.scale'
                    else 1.0,
                )))  # fmt: skip
    return [piece for _, piece in sorted(found, key=lambda pair: pair[0])]


def balance_biases(model: Model) -> list[Weight]:
    """Lists the balance biases as `weights.all_weights` lists parameters."""
    row, found = weights.router_bias(model), []
    for i, kind in enumerate(model.prefix_kinds):
        if kind.startswith('moe'):
            found.append(row._replace(name=f'{ROUTER}prefix.layer_{i}.moe.bias'))
    for i, kind in enumerate(model.period_kinds):
        if kind.startswith('moe'):
            shape, axes = (model.num_periods, *row.shape), ('layers', *row.axes)
            name = f'{ROUTER}periods.layer_{i}.moe.bias'
            found.append(row._replace(name=name, shape=shape, axes=axes))
    return found


def _places(model: Model, weight: Weight) -> Iterable[tuple[int, str, tuple[int, ...]]]:
    """Yields the layer (-1: none), the name below it, and the index, of each slice of a weight."""
    group, _, rest = weight.name.removeprefix(ROUTER).partition('.')
    if group not in ('prefix', 'periods'):
        yield -1, weight.name, ()
        return
    layer_name, _, name = rest.partition('.')
    i = int(layer_name.removeprefix('layer_'))
    stack: list[tuple[int, ...]] = [()]
    if group == 'periods':
        stack = [(r,) for r in range(model.num_periods)]
    for index in stack:
        layer = i + sum(index) * len(model.period_kinds)
        layer += len(model.prefix_kinds) if index else 0
        if not weight.expert:
            yield layer, name, index
            continue
        for expert in range(model.moe.num_experts):
            yield layer, name, (*index, expert)


def _shape(model: Model, weight: Weight, num_indices: int) -> tuple[int, ...]:
    own, axes = weight.shape[num_indices:], weight.axes[num_indices:]
    if _vocabulary(axes) >= 0:
        return (model.vocab_size, model.embed_dim)
    size = math.prod(own)
    return (size // weight.fan_in, weight.fan_in) if weight.fan_in else (size,)


def _vocabulary(axes: tuple[str, ...]) -> int:
    """Position of the vocabulary in our array; -1: it has none."""
    return next((i for i, axis in enumerate(axes) if axis in ('vocab', 'unembed_vocab')), -1)
