"""`store.scan` without a loop: each layer is compiled by itself, and keeps its own arrays.

A loop keeps what its layers save in stacks. XLA fills each with zeros before the loop, and on a GPU
copies a layer's slice out of it for every kernel that is not XLA's own. Without the loop nothing is
stacked but the gradients of the weights, which the optimizer updates as one array: on one H200 a
step of 16 dense layers takes 6% less time and 5% less memory. Each layer is compiled, though: about
a second for a dense one on a GPU, a quarter of a minute for one with experts, more on a TPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from helios_jax import config
from helios_jax.memory import store

MOST_LAYERS = 64  # that are compiled one by one without being asked for


def unrolls(memory: config.Memory, model: config.Model, platform: str = '') -> bool:
    """Tells whether layers run without a loop: under `auto` few dense ones on a GPU.

    A state that lies on the host comes a layer at a time, which takes a loop.

    Args:
      platform: the one to compile for where it is not the running one.
    """
    if memory.layers != 'auto':
        return memory.layers == 'unrolled'
    dense = not any(kind.startswith('moe') for kind in model.kind_counts)
    on_gpu = (platform or jax.default_backend()) == 'gpu'
    return on_gpu and dense and model.num_layers <= MOST_LAYERS and not memory.on_host


def unrolled(
    functions: Sequence[Callable[..., Any]],
    *,
    params: Sequence[PyTree],
    x: PyTree,
    scanned: Sequence[PyTree],
    shared: PyTree = None,
    others: Sequence[Any] = (),
    **stored: Any,
) -> tuple[PyTree, list[Any]]:
    """Calls the functions in turn, over and over; arguments and result are `store.scan`'s.

    Args:
      stored: what `store.apply` takes beside: the table, the input's name, host.
    """
    length = jax.tree.leaves(params)[0].shape[0]
    reports = []
    for n, mine in enumerate(apart(length, list(params))):
        its, own = layer_of(scanned, n), []
        for function, weights, extra in zip(functions, mine, its, strict=True):
            given = {'others': (extra, *others), **stored}
            x, report = store.apply(function, params=(weights, shared), x=x, **given)
            own.append(report)
        reports.append(own)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *reports)


def layer_of(stacks: PyTree, n: int) -> PyTree:
    """Returns row n of every array."""
    return jax.tree.map(lambda a: a[n], stacks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def apart(length: int, stacks: PyTree) -> list[PyTree]:
    """Cuts every array along its first axis.

    Differentiation would add up arrays of the stack's size, one for each cut; its gradient stacks.
    """
    return [layer_of(stacks, n) for n in range(length)]


apart.defvjp(
    lambda length, stacks: (apart(length, stacks), None),
    lambda length, _, cuts: (jax.tree.map(lambda *each: jnp.stack(each), *cuts),),
)
