"""The layers and the last norm, bound to their variables, as the memory system runs them."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from helios_jax import config
from helios_jax.memory import policy, store
from helios_jax.memory.unrolled import unrolled, unrolls
from helios_jax.model.block import NOTHING, Block, Shared, Stream
from helios_jax.model.depth_average import Averaged
from helios_jax.model.gmu import input_eps
from helios_jax.model.hyper import merged
from helios_jax.model.layers import RMSNorm
from helios_jax.parallel import platforms

Variables = Mapping[str, Any]  # collection → name of the layer → its variables
Reports = dict[str, Any]  # name of the layer → what `Stack.run` gives beside the stream


@dataclasses.dataclass(frozen=True)
class Stack:
    """Every layer of a model in order, whose gradient reads what `memory` says."""

    model: config.Model
    memory: config.Memory
    platform: str = ''
    few_documents: bool = False  # of each row, counted by the caller

    def __call__(
        self,
        variables: Mapping[str, Variables],
        x: Stream,
        indices: Int[Array, 'R'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None,
        shared: Shared = NOTHING,
    ) -> tuple[Float[Array, 'B T D'], dict[str, Reports]]:
        """The normalised stream behind the last layer, and what each layer reports beside.

        Args:
          variables: of `prefix` (where the model has one), of `periods`, stacked, and of `norm`.
          x: the stream below the first layer, or n of them side by side; averages with it.
          indices: number of the first layer in each of the R repeats of the period.
          shared: what every layer reads beside it.
        """
        model = self.model
        # Policy `none` names nothing: its gradient is JAX's own.
        table = None if self.memory.policy == 'none' else policy.actions(self.memory)
        host = platforms.has_host_memory(self.platform)
        where: dict[str, Any] = {'table': table, 'host': host}
        statistics: dict[str, Reports] = {}

        for i, kind in enumerate(model.prefix_kinds):
            params, router = layer_variables(variables['prefix'], i)
            x, own = store.apply(
                partial(self.layer, kind, i),
                params=(params, shared), x=x, others=(router, positions, segment_ids),
                input_name='block_input', **where,
            )  # fmt: skip
            if own is not None:
                statistics.setdefault('prefix', {})[f'layer_{i}'] = own

        period = [layer_variables(variables['periods'], i) for i in range(len(model.period_kinds))]
        run = unrolled if unrolls(self.memory, model, self.platform) else store.scan
        x, stacked = run(
            [partial(self.scanned_layer, kind, i) for i, kind in enumerate(model.period_kinds)],
            params=[params for params, _ in period],
            x=x,
            shared=shared,
            scanned=[(indices, router) for _, router in period],
            others=(positions, segment_ids),
            input_name='block_input',
            **where,
        )
        layers = {f'layer_{i}': own for i, own in enumerate(stacked) if own is not None}
        statistics['periods'] = layers

        top = merged(model, x.x if isinstance(x, Averaged) else x)
        params = variables['norm']['params']
        out = store.apply(self.last_norm, params=params, x=top, input_name='final_hidden', **where)
        return out, statistics

    def layer(
        self,
        kind: str,
        index: Any,
        given: Any,
        x: Stream,
        router: Any,
        positions: Array,
        segment_ids: Array | None,
    ) -> Any:
        """Layer `index` of a kind: the stream behind it, and its router's statistics or None.

        Args:
          given: its parameters, and what all layers read.
        """
        form, num_parts = '', 0
        if self.memory.policy != 'none':
            form = policy.kernel_form(policy.actions(self.memory))
            num_parts = self.memory.backward_parts
        how = self.platform, form, num_parts, self.few_documents
        block = Block(self.model, kind, *how, parent=None)
        params, shared = given
        variables = {'params': params, 'router': router}
        return self.run(block, variables, x, index, positions, segment_ids, shared)

    def run(self, block: Block, variables: Any, *arguments: Any) -> Any:
        return block.apply(variables, *arguments)

    def scanned_layer(
        self, kind: str, i: int, given: Any, x: Stream, period: Any, *others: Any
    ) -> Any:
        """Layer i of a period: `layer` as `store.scan` calls it."""
        first_index, router = period
        return self.layer(kind, first_index + i, given, x, router, *others)

    def last_norm(self, params: Any, x: Array) -> Array:
        eps = input_eps(self.model, 2 * self.model.num_layers + 1)
        out: Any = RMSNorm(parent=None).apply({'params': params}, x, eps)  # unboxes the scale
        return out


def layer_variables(variables: Variables, i: int) -> tuple[Any, Any]:
    """Returns the parameters and the router's variables of layer i of a prefix or a period."""
    name = f'layer_{i}'
    return variables['params'][name], variables.get('router', {}).get(name, {})
