"""Updates a state that lies on the host, of which one group at a time comes to the device.

    norm of the whole gradient
    → group by group: fetch → clip, moments, decay, rate → average → write back

A group is one layer of the scanned ones, or one array of the rest. Each is updated by the optimizer
of its parameters alone: past the clipping no parameter's update reads another's, so that only the
order changes.

`in_one_program` is traced as a piece of the step: layers follow each other in a loop that fetches a
layer ahead, carries whole arrays and replaces a layer of them, so that they are updated where they
lie. `Programs` is for a GPU, where a loop does not change an array on the host where it lies: XLA
would copy all of it for every layer, and a host copies slowly.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.lax import dynamic_index_in_dim, dynamic_update_index_in_dim
from jaxtyping import Array, Float, PyTree

from helios_jax.arch.rules import Axes
from helios_jax.arch.weights import read_in_compute_dtype
from helios_jax.train import optimizer
from helios_jax.train.state import Setup, TrainState

Arrays = dict[Any, Array]  # parameters by key, leaves of optax's state by path
Kept = tuple[Arrays, Arrays, Arrays]  # a group's parameters, its moments, and their average if any


class ParameterGroup(NamedTuple):
    """Parameters that are updated together."""

    keys: list[optimizer.Key]
    stacked: bool  # scanned layers, one after another


def working_copy(setup: Setup, params: PyTree) -> PyTree:
    """The parameters as the model is to read them, on the device.

    A weight is in the compute dtype if the model reads it in no other; one that lies on the host
    comes layer by layer. The loss is the same bit for bit; so is the gradient, which `Einsum`
    computes in that dtype either way, but all layers' gradients wait for the update in half the
    bytes of float32. XLA would make the copy by itself, out of the scanned layers' casts.
    """
    dtype = jnp.dtype(setup.config.model.compute_dtype)

    def copy(weight: Array, axes: Axes) -> Array:
        narrow = dtype if read_in_compute_dtype(axes) else weight.dtype
        if jax.typeof(weight).memory_space != jax.memory.Space.Host:
            return weight.astype(narrow)
        if axes[0] != 'layers':
            return fetch(weight).astype(narrow)
        layers = jnp.arange(weight.shape[0])
        return jax.lax.map(lambda i: fetch(layer(i, weight)).astype(narrow), layers)

    return jax.tree.map(copy, params, setup.axes)


def averaged(setup: Setup, ema: PyTree, params: PyTree) -> PyTree:
    """The running average after an update, d·ema + (1 − d)·params; none where there is none.

    Written as ema + (1 − d)·(params − ema), which rounds once and leaves equal ones equal: the
    float32 numbers nearest to d and to 1 − d do not add up to 1.
    """
    share = 1 - setup.config.train.ema
    return jax.tree.map(lambda e, p: e + share * (p - e), ema, params) if ema else ema


def in_one_program(
    setup: Setup, gradients: PyTree, norm: Float[Array, ''], state: TrainState
) -> TrainState:
    """The update as a piece of the program that computed the gradient.

    Args:
      gradients: of the working copy, in its dtypes.
      norm: of all of them together.
    Returns:
      The state, with new parameters, moments and average.
    """

    def run(group: ParameterGroup, change: Callable[..., Any]) -> Callable[..., Kept]:
        return partial(layer_by_layer if group.stacked else at_once, change)

    return updated(setup, gradients, norm, state, run)


class Programs:
    """The update as programs of their own: one for each group, run for each of its layers."""

    def __init__(self, setup: Setup, options: dict[str, Any]):
        self.setup, self.options = setup, options  # for the compiler
        self.compiled: dict[optimizer.Key, Callable[..., Kept]] = {}  # by a group's first key

    def __call__(self, gradients: PyTree, norm: Float[Array, ''], state: TrainState) -> TrainState:
        """`in_one_program`'s arguments and results; the state is used up."""
        return updated(self.setup, gradients, norm, state, self.program)

    def program(self, group: ParameterGroup, change: Callable[..., Any]) -> Callable[..., Kept]:
        if group.keys[0] not in self.compiled:
            run = jax.jit(
                partial(one_layer if group.stacked else at_once, change),
                donate_argnums=3,
                compiler_options=self.options,
            )
            self.compiled[group.keys[0]] = partial(each_layer, run) if group.stacked else run
        return self.compiled[group.keys[0]]


def updated(
    setup: Setup,
    gradients: PyTree,
    norm: Float[Array, ''],
    state: TrainState,
    run: Callable[[ParameterGroup, Callable[..., Any]], Callable[..., Kept]],
) -> TrainState:
    """The state with new parameters, moments and average, group after group.

    Args:
      run: (a group, `changed` of it) → what updates the group's arrays in their memory space.
    """
    trees = setup.axes, gradients, state.params, state.ema
    axes, gradients, params, ema = map(flatten_dict, trees)
    slots, structure = named(state.optimizer)
    owners = optimizer.owners(state.optimizer, axes)
    counts = {path: slots[path] for path in slots if not owners[path]}
    new_params: Arrays = {}
    new_slots: Arrays = {}
    new_ema: Arrays = {}
    for group in groups(axes):
        own_params = {key: params[key] for key in group.keys}
        own_gradients = {key: gradients[key] for key in group.keys}
        moments = {path: slots[path] for path in slots if owners[path] in group.keys}
        own_ema = {key: ema[key] for key in group.keys if ema}
        cut = {key: axes[key][group.stacked :] for key in group.keys}
        update = run(group, partial(changed, setup, cut))
        kept = update(norm, counts, own_gradients, (own_params, moments, own_ema))
        for new, group_arrays in zip((new_params, new_slots, new_ema), kept, strict=True):
            new |= group_arrays
    return state.replace(
        params=unflatten_dict(new_params),
        optimizer=jax.tree.unflatten(structure, [new_slots[path] for path in slots]),
        ema=unflatten_dict(new_ema),
    )


def groups(axes: Mapping[optimizer.Key, Axes]) -> Iterator[ParameterGroup]:
    """Every array that no layers share alone, then each run of scanned layers."""
    stacked: dict[optimizer.Key, list[optimizer.Key]] = {}
    for key, names in axes.items():
        if names[0] == 'layers':
            stacked.setdefault(key[:2], []).append(key)  # such as periods, layer_0
        else:
            yield ParameterGroup([key], False)
    for keys in stacked.values():
        yield ParameterGroup(keys, True)


def changed(
    setup: Setup,
    axes: dict[optimizer.Key, Axes],
    norm: Float[Array, ''],
    counts: Arrays,
    gradients: Arrays,
    old: Kept,
) -> tuple[Kept, Arrays]:
    """New parameters, moments and average of some parameters, and counts, all on the device.

    Args:
      axes: of these parameters, without their layers.
      counts: what else the optimizer's state holds.
    """
    cfg = setup.config.optimizer
    params, moments, ema = old
    wide = unflatten_dict({key: g.astype(params[key].dtype) for key, g in gradients.items()})
    clipped = optimizer.clip(cfg, wide, norm)
    # Clipped already; its state is as empty as the clipping's.
    cfg = dataclasses.replace(cfg, clip_norm=0.0)
    tx = optimizer.make(cfg, setup.config.train.num_steps, unflatten_dict(axes))
    tree = unflatten_dict(params)
    names, structure = named(jax.eval_shape(tx.init, tree))
    state = jax.tree.unflatten(structure, [(counts | moments)[name] for name in names])
    updates, state = tx.update(clipped, state, tree)
    slots, _ = named(state)
    own = {name: slots.pop(name) for name in moments}
    params = flatten_dict(optax.apply_updates(tree, updates))
    return (params, own, averaged(setup, ema, params)), slots


def at_once(
    change: Callable[..., Any], norm: Any, counts: Arrays, gradients: Arrays, old: Kept
) -> Kept:
    new, counts = change(norm, counts, gradients, fetch(old))
    params, moments, ema = jax.tree.map(put_like, new, old)
    return params, moments | counts, ema


def layer_by_layer(
    change: Callable[..., Any], norm: Any, counts: Arrays, gradients: Arrays, old: Kept
) -> Kept:
    """`change` of each layer, which is fetched while the one below changes."""
    num_layers = jax.tree.leaves(gradients)[0].shape[0]

    def step(i: Any, carry: tuple[Kept, Kept]) -> tuple[Kept, Kept]:
        stacks, arrived = carry
        following = bring(stacks, jnp.minimum(i + 1, num_layers - 1))
        return replaced(change, i, norm, counts, gradients, stacks, arrived), following

    stacks, _ = jax.lax.fori_loop(0, num_layers, step, (old, bring(old, 0)))
    return stacks


def one_layer(
    change: Callable[..., Any], norm: Any, counts: Arrays, gradients: Arrays, old: Kept, i: Any
) -> Kept:
    """`change` of layer i, in place where `old` is donated: outside a loop XLA:GPU can do that."""
    return replaced(change, i, norm, counts, gradients, old, bring(old, i))


def each_layer(
    run: Callable[..., Kept], norm: Any, counts: Arrays, gradients: Arrays, old: Kept
) -> Kept:
    """Runs `one_layer`, compiled, for every layer."""
    for i in range(jax.tree.leaves(gradients)[0].shape[0]):
        old = run(norm, counts, gradients, old, i)
    return old


def bring(stacks: Kept, i: Any) -> Kept:
    return fetch(jax.tree.map(partial(layer, i), stacks))


def replaced(
    change: Callable[..., Any],
    i: Any,
    norm: Any,
    counts: Arrays,
    gradients: Arrays,
    stacks: Kept,
    arrived: Kept,
) -> Kept:
    """The stacks, their layer i as `change` leaves it; `arrived` is that layer on the device."""
    own = jax.tree.map(partial(layer, i), gradients)
    new, _ = change(norm, counts, own, arrived)
    return jax.tree.map(partial(replace_layer, i), stacks, new)


def named(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """The leaves by their path, in the tree's order, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, structure


def fetch(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)


def put_like(array: Array, old: Array) -> Array:
    """`array` in the memory space of `old`."""
    return jax.device_put(array, jax.typeof(old).memory_space)


def layer(i: Any, stack: Array) -> Array:
    return dynamic_index_in_dim(stack, i, keepdims=False)


def replace_layer(i: Any, stack: Array, new: Array) -> Array:
    return dynamic_update_index_in_dim(stack, put_like(new, stack), i, 0)
