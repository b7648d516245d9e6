"""AdamW and Muon, with every parameter's rule read from its logical axes (arch/weights.py).

Matrices decay; norms, biases, gates and both embeddings do not. Muon takes the matrices but for the
router, each layer and each expert on its own, with all heads as one side; its updates are scaled to
AdamW's size (Moonlight, 2502.16982), so that one learning rate serves both.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, PyTree

# `scale_by_shape` is in no public module of optax 0.2.8.
from optax.contrib._muon import MuonDimensionNumbers, scale_by_muon, scale_by_shape

from helios_jax.arch import weights
from helios_jax.arch.rules import Axes
from helios_jax.config import Optimizer
from helios_jax.errors import UserError

Key = tuple[str, ...]  # a parameter's place in the tree
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # root mean square of an update's elements, as AdamW's


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rule that updates one parameter; `rows` and `columns` are the axes of Muon's matrices."""

    name: str
    axes: Axes
    shape: tuple[int, ...]
    optimizer: str  # adamw | muon
    decay: bool
    rows: Axes = ()
    columns: Axes = ()


def muon_dimensions(axes: Axes) -> MuonDimensionNumbers | None:
    """Axes of the rows (inputs) and columns (outputs) of a Muon matrix; None if it is none."""
    sides = weights.muon_sides(axes)
    return MuonDimensionNumbers(*sides) if sides else None


def rules(config: Optimizer, axes: PyTree, params: PyTree) -> list[Rule]:
    """Lists the rule of every parameter, in the tree's order.

    Args:
      axes: the logical axes (a tuple of names) of each array of `params`, in the same tree.
      params: arrays or shapes.
    """
    table = []
    for (path, leaf), leaf_axes in zip(
        jax.tree_util.tree_leaves_with_path(params), _leaves(axes), strict=True
    ):
        if len(leaf_axes) != leaf.ndim:
            raise ValueError(f'{path}: logical axes {leaf_axes} for shape {leaf.shape}.')
        muon = muon_dimensions(leaf_axes) if config.name == 'muon' else None
        table.append(
            Rule(
                name=jax.tree_util.keystr(path, simple=True, separator='.'),
                axes=leaf_axes,
                shape=tuple(leaf.shape),
                optimizer='muon' if muon else 'adamw',
                decay=weights.is_matrix(leaf_axes),
                rows=tuple(leaf_axes[i] for i in muon.reduction_axis) if muon else (),
                columns=tuple(leaf_axes[i] for i in muon.output_axis) if muon else (),
            )
        )
    return table


def schedule(config: Optimizer, num_steps: int) -> optax.Schedule:
    """Makes the learning rate of each update, by the count of updates made before it.

    Rises linearly from peak / warmup_steps at the first update to the peak at update number
    warmup_steps, then falls; the last update of the run takes final_fraction · peak, however short
    the run is.
    """
    peak, warmup = config.learning_rate, max(1, config.warmup_steps)
    num_falling = num_steps - warmup
    if config.schedule == 'wsd':
        num_falling = min(num_falling, round(num_steps * config.decay_fraction))
    num_falling = max(1, num_falling)
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else lambda _: peak
    if config.schedule == 'cosine':
        fall = optax.cosine_decay_schedule(peak, num_falling, config.final_fraction)
    else:
        fall = optax.linear_schedule(peak, peak * config.final_fraction, num_falling)
    # The first falling update is below the peak already, so that the last one reaches the end.
    return optax.join_schedules([rise, lambda count: fall(count + 1)], [num_steps - num_falling])


def make(config: Optimizer, num_steps: int, axes: PyTree) -> optax.GradientTransformation:
    """Makes the optimizer of parameters with these logical axes.

    Moments are computed in float32 and stored in `moments_dtype`; the learning rate follows a count
    in the state, so that a restored state goes on exactly.

    Raises:
      UserError: moments whose decay bfloat16 would round away.
    """
    _check_moments(config)
    decays = _map(weights.is_matrix, axes)
    direction = _adam(config)
    if config.name == 'muon':
        direction = _muon_and_adam(config, axes)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule(config, num_steps)),
    )


def state_shardings(state: PyTree, shardings: PyTree[jax.sharding.NamedSharding]) -> PyTree:
    """Shardings of an optimizer's state: a moment's is its parameter's, the rest is replicated.

    Args:
      state: result of `make(…).init`, arrays or shapes.
      shardings: sharding of each parameter.
    """
    of_parameter = flatten_dict(shardings)
    mesh = next(iter(of_parameter.values())).mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    owned = owners(state, of_parameter).values()
    leaves = [of_parameter.get(key, replicated) for key in owned]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def owners(state: PyTree, keys: Collection[Key]) -> dict[str, Key]:
    """Maps the path of each array of an optimizer's state to its moment's parameter, or ().

    Args:
      keys: keys of the parameters, as of `flatten_dict`.
    """

    def owner(path: tuple[Any, ...]) -> Key:
        # It ends with its parameter's, whatever optax wraps around it.
        names = tuple(getattr(entry, 'key', None) for entry in path)
        return next((names[i:] for i in range(len(names)) if names[i:] in keys), ())

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return {jax.tree_util.keystr(path): owner(path) for path in paths}


def clip(config: Optimizer, gradients: PyTree, norm: Float[Array, '']) -> PyTree:
    """Clips some gradients as `optax.clip_by_global_norm` does, given the norm of all."""
    if not config.clip_norm:
        return gradients
    small = norm < config.clip_norm
    return jax.tree.map(lambda g: jnp.where(small, g, g / norm * config.clip_norm), gradients)


def _is_axes(leaf: object) -> bool:
    return isinstance(leaf, tuple)


def _leaves(axes: PyTree) -> list[Axes]:
    return jax.tree.leaves(axes, is_leaf=_is_axes)


def _map(function, axes: PyTree) -> PyTree:
    return jax.tree.map(function, axes, is_leaf=_is_axes)


def _adam(config: Optimizer) -> optax.GradientTransformation:
    return _stored(config, optax.scale_by_adam(config.beta1, config.beta2, config.eps))


def _muon_and_adam(config: Optimizer, axes: PyTree) -> optax.GradientTransformation:
    # Muon sees a tree in which the other parameters are masked out, and so are their dimensions.
    dimensions = _map(lambda leaf: muon_dimensions(leaf) or optax.MaskedNode(), axes)
    muon = optax.chain(
        _stored(config, scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=dimensions)),
        scale_by_shape(weight_dimension_numbers=dimensions, consistent_rms=MUON_RMS),
    )
    labels = _map(lambda leaf: 'muon' if muon_dimensions(leaf) else 'adamw', axes)
    return optax.partition({'muon': muon, 'adamw': _adam(config)}, labels)


def _stored(config: Optimizer, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps `inner`, so that moments (`mu`, `nu`) are kept in `moments_dtype` between updates."""

    def cast(state, dtype):
        moments = {name: getattr(state, name) for name in ('mu', 'nu') if hasattr(state, name)}
        return state._replace(**optax.tree.cast(moments, dtype))

    def init(params):
        return cast(inner.init(params), config.moments_dtype)

    def update(gradients, state, params=None):
        updates, state = inner.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, config.moments_dtype)

    return optax.GradientTransformation(init, update)


def _check_moments(config: Optimizer) -> None:
    beta = max(config.beta1, config.beta2)
    if config.moments_dtype == 'bfloat16' and beta > 1 - 2**-8:
        raise UserError(
            f'optimizer.moments_dtype=bfloat16 has 8 bits, which a decay of {beta} never changes; '
            'use float32, or beta1 and beta2 of at most 0.996.'
        )
