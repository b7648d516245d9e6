"""Functions whose saved tensors are what a table of actions says; their values do not change.

Without a table (policy `none`) they are differentiated as they are. With one, the forward rule runs
a function and its linearization (memory/linearized.py) and puts every saved tensor into the form
and the place that its action names; the backward rule brings it back. Of the arguments only the
stream x is a tensor like any other: weights stay where they are. Quantisation touches nothing but
what the backward pass reads, so that errors do not compound from layer to layer.

Layers are scanned. What lies on the host comes back one step of the backward scan before it is
used, while the device computes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree

from helios_jax.arch.tensors import TENSORS
from helios_jax.kernels import quantize
from helios_jax.memory.linearized import Leaf, Linearized, linearize
from helios_jax.memory.policy import Action, parse
from helios_jax.parallel.sharding import constrain, fitting

KEPT = 'device'  # what becomes of a tensor without a name


class Mark(NamedTuple):
    """Name that `checkpoint_name` gives a stored array, for memory/traced.py to find it."""

    tensor: str
    action: str
    local: tuple[int, ...] | None  # its shape on one device, where a shard_map made it
    scanned: bool  # a scan stacks it over the layers

    def text(self) -> str:
        local = '-' if self.local is None else 'x'.join(map(str, self.local))
        return f'stored/{self.tensor}/{self.action}/{local}/{self.scanned:d}'

    @classmethod
    def read(cls, text: str) -> 'Mark | None':
        """The mark with this text; None if the text is another name."""
        if not text.startswith('stored/'):
            return None
        _, tensor, action, local, scanned = text.split('/')
        sizes = None if local == '-' else tuple(int(size) for size in local.split('x') if size)
        return cls(tensor, action, sizes, scanned == '1')


class Kept(NamedTuple):
    """Stored leaves of one function: index of the leaf → array or `quantize.Stored`."""

    near: dict[int, Any]
    far: dict[int, Any]  # on the host


@dataclasses.dataclass(frozen=True, eq=False)
class Scheme:
    """The static arguments of `apply` and `scan`."""

    functions: Sequence[Callable[..., Any]]
    table: Mapping[str, str]
    input_name: str
    host: bool

    def linearize(self, i: int, *arguments: Any) -> Linearized:
        return linearize(self.functions[i], self.table, self.input_name, *arguments)

    def action(self, leaf: Leaf) -> Action:
        return parse(self.table.get(leaf.name, KEPT))


def apply(
    function: Callable[..., Any],
    *,
    table: Mapping[str, str] | None,
    params: PyTree,
    x: PyTree,
    others: Sequence[Any] = (),
    input_name: str,
    host: bool = True,
) -> Any:
    """Calls function(params, x, *others); its gradient in params and x reads what the table says.

    Args:
      table: tensor name → action, as of `policy.actions`; None: the gradient is JAX's own.
      x: an array, or several: those that the gradient reads are stored.
      input_name: what x is called in the table.
      host: True if there is a host memory space; without one, what would be offloaded stays on the
        device.
    """
    if table is None:
        return function(params, x, *others)
    return _apply(Scheme((function,), table, input_name, host), params, x, tuple(others))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(scheme: Scheme, params: PyTree, x: PyTree, others: Any) -> Any:
    return scheme.functions[0](params, x, *others)


def _apply_forward(scheme: Scheme, params: PyTree, x: PyTree, others: Any) -> Any:
    linear = scheme.linearize(0, params, x, *others)
    out, leaves = linear.forward(params, x, *others)
    return out, (linear, params, others, keep(scheme, linear, leaves, scanned=False))


def _apply_backward(scheme: Scheme, residuals: Any, cotangents: Any) -> Any:
    linear, params, others, kept = residuals
    kept = Kept(kept.near, fetch(kept.far))
    # XLA would see that what is to be computed again was computed before, and keep that instead.
    kept, cotangents = jax.lax.optimization_barrier((kept, cotangents))
    leaves = leaves_of(linear, kept, params, others)
    return *linear.backward(leaves, cotangents), None


_apply.defvjp(_apply_forward, _apply_backward)


def scan(
    functions: Sequence[Callable[..., Any]],
    *,
    table: Mapping[str, str] | None,
    params: Sequence[PyTree],
    x: PyTree,
    scanned: Sequence[PyTree],
    shared: PyTree = None,
    others: Sequence[Any] = (),
    input_name: str,
    host: bool = True,
) -> tuple[PyTree, list[Any]]:
    """The functions one after another, over and over: (the last x, each one's statistics, stacked).

    Function i is called as function((params[i], shared), x, scanned[i], *others) → (x, statistics),
    with `params` and `scanned` cut along their leading axis. Differentiable in params, shared and
    x; what is shared is not stored again for each function. The other arguments are `apply`'s.
    """
    if table is None:
        return in_turn(functions, list(params), shared, x, list(scanned), tuple(others))
    scheme = Scheme(functions, table, input_name, host)
    return _scan(scheme, list(params), shared, x, list(scanned), tuple(others))


def in_turn(
    functions: Sequence[Callable[..., Any]],
    params: Any,
    shared: Any,
    x: PyTree,
    scanned: Any,
    others: Any,
) -> Any:
    """`scan` without a table."""

    def step(x: PyTree, slices: Any) -> Any:
        statistics = []
        for function, mine, its in zip(functions, *slices, strict=True):
            x, own = function((mine, shared), x, its, *others)
            statistics.append(own)
        return x, statistics

    return jax.lax.scan(step, x, (params, scanned))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(scheme: Scheme, params: Any, shared: Any, x: PyTree, scanned: Any, others: Any) -> Any:
    return in_turn(scheme.functions, params, shared, x, scanned, others)


def _scan_forward(
    scheme: Scheme, params: Any, shared: Any, x: PyTree, scanned: Any, others: Any
) -> Any:
    one = jax.eval_shape(lambda tree: jax.tree.map(lambda a: a[0], tree), (params, scanned))
    linears = tuple(
        scheme.linearize(i, (mine, shared), x, its, *others)
        for i, (mine, its) in enumerate(zip(*one, strict=True))
    )

    def step(x: PyTree, slices: Any) -> Any:
        statistics, kept = [], []
        for linear, mine, its in zip(linears, *slices, strict=True):
            (x, own), leaves = linear.forward((mine, shared), x, its, *others)
            statistics.append(own)
            kept.append(keep(scheme, linear, leaves, scanned=True))
        return x, (statistics, kept)

    x, (statistics, kept) = jax.lax.scan(step, x, (params, scanned))
    return (x, statistics), (linears, params, shared, scanned, others, kept)


def _scan_backward(scheme: Scheme, residuals: Any, cotangents: Any) -> Any:
    linears, params, shared, scanned, others, kept = residuals
    near, far = [k.near for k in kept], [k.far for k in kept]
    length = jax.tree.leaves(params)[0].shape[0]

    def step(carry: Any) -> Any:
        i, d_x, arrived, gradients, d_shared = carry
        index = length - 1 - i
        mine, its, d_statistics, close = _slices((params, scanned, cotangents[1], near), index)
        # The slice's start is clamped to 0: the last step fetches its own layer once more.
        following = fetch(_slices(far, index - 1))
        for f in reversed(range(len(linears))):
            kept = Kept(close[f], arrived[f])
            leaves = leaves_of(linears[f], kept, (mine[f], shared), (its[f], *others))
            (gradient, more), d_x = linears[f].backward(leaves, (d_x, d_statistics[f]))
            d_shared = jax.tree.map(jnp.add, d_shared, more)
            gradients[f] = jax.tree.map(
                lambda stack, g: jax.lax.dynamic_update_index_in_dim(stack, g, index, 0),
                gradients[f],
                gradient,
            )
        return i + 1, d_x, following, gradients, d_shared

    # Not jax.lax.scan, which would hand each step its own layer's slices: what is on the host is
    # wanted a step earlier.
    first = fetch(_slices(far, length - 1))
    zeros = [jax.tree.map(jnp.zeros_like, p) for p in params]
    none = jax.tree.map(jnp.zeros_like, shared)
    start = (jnp.zeros((), jnp.int32), cotangents[0], first, zeros, none)
    _, d_x, _, gradients, d_shared = jax.lax.while_loop(
        lambda carry: carry[0] < length, step, start
    )
    return gradients, d_shared, d_x, None, None


def _slices(stacks: PyTree, index: Any) -> PyTree:
    """Row `index` of every array, an index below 0 meaning the first."""

    def one(a: Array) -> Array:
        starts = (index, *[jnp.zeros((), jnp.int32)] * (a.ndim - 1))
        return jax.lax.dynamic_slice(
            a, starts, (1, *a.shape[1:]), allow_negative_indices=False
        ).reshape(a.shape[1:])

    return jax.tree.map(one, stacks)


_scan.defvjp(_scan_forward, _scan_backward)


def keep(scheme: Scheme, linear: Linearized, leaves: list[Any], *, scanned: bool) -> Kept:
    """Stores every leaf that is neither an argument nor a constant, once."""
    kept = Kept({}, {})
    for i, (leaf, value) in enumerate(zip(linear.leaves, leaves, strict=True)):
        if leaf.twin != i or leaf.argument >= 0 or leaf.constant >= 0:
            continue
        action = scheme.action(leaf)
        action_name = scheme.table.get(leaf.name, KEPT)
        mark = Mark(leaf.name, action_name, leaf.local, scanned).text()
        # A kernel may have quantised it already, and integers are no numbers to be rounded.
        stored: Any = value
        if action.form and jnp.issubdtype(value.dtype, jnp.floating):
            stored = quantize.store(value, action.form)
            if not scanned:
                # A scan writes it to memory. Else XLA keeps the value, and quantises it where the
                # backward pass reads it.
                stored = jax.lax.optimization_barrier(stored)
        if leaf.name and leaf.local is None:
            stored = jax.tree.map(partial(_place, leaf.name), stored)
        stored = jax.tree.map(lambda a, mark=mark: checkpoint_name(a, mark), stored)
        if action.host and scheme.host:
            kept.far[i] = jax.device_put(stored, jax.memory.Space.Host)
        else:
            kept.near[i] = stored
    return kept


def fetch(far: Any) -> Any:
    """Brings arrays back from the host, still in the form that they were stored in."""
    return jax.device_put(far, jax.memory.Space.Device)


def leaves_of(linear: Linearized, kept: Kept, params: PyTree, others: Any) -> list[Any]:
    """The leaves of the vjp, from what was stored and the arguments other than x."""
    stored = kept.near | kept.far
    mine, rest = jax.tree.leaves(params), jax.tree.leaves(others)
    arguments = [*mine, *rest]  # x, which lies between, is among the stored
    leaves: list[Any] = []
    for i, leaf in enumerate(linear.leaves):
        if leaf.twin != i:
            leaves.append(leaves[leaf.twin])
        elif leaf.argument >= 0:
            leaves.append(arguments[leaf.argument])
        elif leaf.constant >= 0:
            leaves.append(linear.jaxpr.consts[leaf.constant])
        else:
            leaves.append(_whole(stored[i], linear.dtype(leaf)))
    return leaves


def _place(name: str, array: Array) -> Array:
    """A stored array where its logical axes say; an exponent lacks the last of them."""
    return constrain(array, *fitting(array.shape, TENSORS[name].axes[: array.ndim]))


def _whole(stored: Any, dtype: Any) -> Array:
    return quantize.dequantize(stored, dtype) if isinstance(stored, quantize.Stored) else stored
