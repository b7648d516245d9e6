"""Steps of a state that lies on the host: a part of it at a time comes to the device.

    norm of the whole gradient → part by part: fetch → clip, moments, decay, rate → write back

A part is one layer of the scanned ones, which follow each other in a loop that fetches a layer
ahead, or one array of the rest. Each is updated by the optimizer of its parameters alone: past the
clipping no parameter's update reads another's, so that nothing but the order changes.

Arrays come and go by `device_put` between memory spaces, which the compiler turns into copies that
run beside the computation. The loop carries whole arrays and replaces a layer of them, so that they
are updated where they lie.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.lax import dynamic_index_in_dim, dynamic_update_index_in_dim
from jaxtyping import Array, Float, PyTree

from helios_jax.arch.rules import Axes
from helios_jax.arch.weights import read_in_compute_dtype
from helios_jax.memory import store
from helios_jax.train import optimizer
from helios_jax.train.state import Setup, TrainState

Arrays = dict[Any, Array]  # parameters by key, leaves of optax's state by path
Pair = tuple[Arrays, Arrays]  # both


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


def update(
    setup: Setup,
    gradients: PyTree,
    norm: Float[Array, ''],
    state: TrainState,
    programs: dict[Any, Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """New parameters and optimizer state, every array in the memory space that it was in.

    Args:
      gradients: of the working copy, in its dtypes.
      norm: of all of them together.
      programs: None where this is part of one program. Else the update of each part, of one layer
        of stacked ones, is a program of its own, kept here for the next step; the state is used up.
    """
    axes, gradients, params = map(flatten_dict, (setup.axes, gradients, state.params))
    slots, structure = named(state.optimizer)
    owners = optimizer.owners(state.optimizer, axes)
    counts = {path: slots[path] for path in slots if not owners[path]}
    new_params: Arrays = {}
    new_slots: Arrays = {}
    for keys, stacked in groups(axes):
        of = lambda tree: {key: tree[key] for key in keys}  # noqa: B023, E731
        moments = {path: slots[path] for path in slots if owners[path] in keys}
        cut = {key: axes[key][stacked:] for key in keys}
        change = partial(update_part, setup, cut)
        if programs is None:
            run: Any = partial(layer_by_layer if stacked else at_once, change)
        else:
            run = programs[keys[0]] = programs.get(keys[0]) or program(setup, change, stacked)
        changed = run(norm, counts, of(gradients), (of(params), moments))
        new_params |= changed[0]
        new_slots |= changed[1]
    return (
        unflatten_dict(new_params),
        jax.tree.unflatten(structure, [new_slots[path] for path in slots]),
    )


def groups(axes: Mapping[optimizer.Key, Axes]) -> list[tuple[list[optimizer.Key], bool]]:
    """Keys of the parameters that are updated together, and whether they are stacked layers."""
    stacked: dict[optimizer.Key, list[optimizer.Key]] = {}
    for key, names in axes.items():
        if names[0] == 'layers':
            stacked.setdefault(key[:2], []).append(key)  # such as periods, layer_0
    single = [([key], False) for key, names in axes.items() if names[0] != 'layers']
    return single + [(keys, True) for keys in stacked.values()]


def update_part(
    setup: Setup,
    axes: dict[optimizer.Key, Axes],
    norm: Float[Array, ''],
    counts: Arrays,
    gradients: Arrays,
    old: Pair,
) -> tuple[Arrays, Arrays, Arrays]:
    """New parameters, moments and counts of some parameters, all on the device.

    Args:
      axes: of these parameters, without their layers.
      counts: what else the optimizer's state holds.
      old: parameters and moments.
    """
    cfg = setup.config.optimizer
    params, moments = old
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
    return flatten_dict(optax.apply_updates(tree, updates)), own, slots


def program(setup: Setup, change: Callable[..., Any], stacked: bool) -> Callable[..., Pair]:
    """`change` of a part as a program of its own, which takes what it changes for itself."""
    run = jax.jit(
        partial(one_layer if stacked else at_once, change),
        donate_argnums=3,
        compiler_options=store.compiler_options(setup.config.memory),
    )
    return partial(each_layer, run) if stacked else run


def at_once(
    change: Callable[..., Any], norm: Any, counts: Arrays, gradients: Arrays, old: Pair
) -> Pair:
    params, moments, counts = change(norm, counts, gradients, fetch(old))
    params, moments = jax.tree.map(put_like, (params, moments), old)
    return params, moments | counts


def layer_by_layer(
    change: Callable[..., Any], norm: Any, counts: Arrays, gradients: Arrays, old: Pair
) -> Pair:
    """`change` of each layer, which is fetched while the one below changes."""
    num_layers = jax.tree.leaves(gradients)[0].shape[0]

    def step(i: Any, carry: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        stacks, arrived = carry
        following = bring(stacks, jnp.minimum(i + 1, num_layers - 1))
        return replaced(change, i, norm, counts, gradients, stacks, arrived), following

    stacks, _ = jax.lax.fori_loop(0, num_layers, step, (old, bring(old, 0)))
    return stacks


def one_layer(
    change: Callable[..., Any], norm: Any, counts: Arrays, gradients: Arrays, old: Pair, i: Any
) -> Pair:
    """`change` of layer i, in place where `old` is donated: outside a loop XLA:GPU can do that."""
    return replaced(change, i, norm, counts, gradients, old, bring(old, i))


def each_layer(
    run: Callable[..., Pair], norm: Any, counts: Arrays, gradients: Arrays, old: Pair
) -> Pair:
    """Runs `one_layer`, compiled, for every layer."""
    for i in range(jax.tree.leaves(gradients)[0].shape[0]):
        old = run(norm, counts, gradients, old, i)
    return old


def bring(stacks: Pair, i: Any) -> Pair:
    return fetch(jax.tree.map(partial(layer, i), stacks))


def replaced(
    change: Callable[..., Any],
    i: Any,
    norm: Any,
    counts: Arrays,
    gradients: Arrays,
    stacks: Pair,
    arrived: Pair,
) -> Pair:
    """The stacks, their layer i as `change` leaves it; `arrived` is that layer on the device."""
    own = jax.tree.map(partial(layer, i), gradients)
    params, moments, _ = change(norm, counts, own, arrived)
    return jax.tree.map(partial(replace_layer, i), stacks, (params, moments))


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
