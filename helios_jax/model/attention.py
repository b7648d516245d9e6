"""The attention sublayer: projections, optional q/k norms, the kernel's door, the cache.

Keys are cached after their norm and before rotation, because where scales grow the rotation of a
key depends on the query that reads it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.kernels.attention import Setting, Tokens, attention, blockwise
from helios_jax.kernels.attention.tpu.blocks import generation
from helios_jax.model import rope
from helios_jax.model.layers import Einsum, RMSNorm, partitioned, precision
from helios_jax.parallel import context
from helios_jax.parallel.sharding import constrain, spec


def heads_in_front(x: Float[Array, 'B T N H'], platform: str) -> Float[Array, 'B T N H']:
    """Has a TPU lay an array out as its attention kernel reads it, a head's tokens together.

    XLA would normalise with tokens in the lanes, and transpose before and after.

    Args:
      platform: the one to compile for where it is not the running one.
    """
    if (platform or jax.default_backend()) != 'tpu':
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(0, 2, 1, 3)))


class Attention(nn.Module):
    model: config.Model
    window: int = 0  # 0: full
    platform: str = ''  # compiled for another platform than the running one: 'tpu'; '' is ours
    residuals: str = ''  # form in which a kernel keeps q, k, v, if it can: '' | fp8 | int8
    few_documents: bool = False  # of each row, counted by the caller (kernels.attention.Setting)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None,
        cache_length: int = 0,
        first_values: Float[Array, 'B T K H'] | None = None,
    ) -> Float[Array, 'B T D']:
        """Computes causal attention within segments; `segment_ids=None` means one segment a row.

        With `cache_length` S > 0 the collection 'cache' holds S keys and values: those of x are
        written at their positions, and x attends to all that the cache holds. Where no cache is
        given one is made, and x, whose positions are then its indices, attends to itself.

        Args:
          first_values: those of the first layer, where every layer's values are mixed with them.
        """
        model, dtype = self.model, x.dtype
        rows = weights.attention(model)
        q = Einsum(rows['q'], dtype, name='q')('btd,dnh->btnh', x)
        k = Einsum(rows['k'], dtype, name='k')('btd,dkh->btkh', x)
        v = Einsum(rows['v'], dtype, name='v')('btd,dkh->btkh', x)
        if model.qkv_bias:
            q, k, v = (
                y + self.bias(rows[f'{name}_bias']).astype(dtype)
                for name, y in (('q', q), ('k', k), ('v', v))
            )
        if model.value_residual:
            own, first = self.value_mix(rows['value_mix'])
            if not self.is_initializing():  # when there is no first layer yet
                assert first_values is not None, 'model.value_residual needs the first values'
                v = (own * v + first * first_values).astype(dtype)
        if model.qk_norm:
            front = partial(heads_in_front, platform=self.platform)
            q = front(RMSNorm(name='q_norm')(front(q), model.norm_eps))
            k = front(RMSNorm(name='k_norm')(front(k), model.norm_eps))
        q = checkpoint_name(constrain(q, 'batch', 'length', 'heads', 'head_dim'), 'q')
        k = checkpoint_name(constrain(k, 'batch', 'length', 'kv_heads', 'head_dim'), 'k')
        v = checkpoint_name(constrain(v, 'batch', 'length', 'kv_heads', 'head_dim'), 'v')
        tokens = Tokens(positions, segment_ids)
        goes_on = self.has_variable('cache', 'keys')
        if cache_length:
            keys, values = self.update_cache(k, v, positions, segment_ids, cache_length)
        if goes_on:
            k, v = keys, values
            slots = jnp.arange(cache_length, dtype=positions.dtype)[None]
            slots = jnp.broadcast_to(slots, (x.shape[0], cache_length))
            # Every slot up to a query's position has been written; causality hides the others.
            tokens = Tokens(positions, tokens.ids_of_queries, slots, jnp.ones_like(slots))
        implementation = model.attention
        if cache_length and implementation != 'reference':
            implementation = 'auto'  # the one that is named for training may take no cache
        # Initialising needs shapes alone, and its tiny batch fits neither mesh nor kernel.
        out = q
        if not self.is_initializing():
            out = self.attend(q, k, v, tokens, implementation)
        return self.project(Einsum(rows['out'], dtype, name='out'), out)

    @nn.nowrap
    def project(self, out: Einsum, heads: Float[Array, 'B T N H']) -> Float[Array, 'B T D']:
        """Multiplies by the last weight, as the chip reads it fastest.

        Where the result is wanted row by row, as the gates' kernel wants it, a v6e and a tpu7x
        multiply by a weight [N H D] at half speed, and by [D N H] at full speed.
        """
        on_tpu = (self.platform or jax.default_backend()) == 'tpu'
        by_row = self.model.gmu.kind not in ('residual', 'hyper')
        turned = on_tpu and generation() in ('v6e', 'tpu7x') and by_row
        if not turned:
            return out('btnh,nhd->btd', heads)
        # Without the barrier XLA would turn it back.
        weight = jax.lax.optimization_barrier(jnp.moveaxis(out.weight(), 2, 0))
        return jnp.einsum('btnh,dnh->btd', heads, weight, precision=precision(weight.dtype))

    @nn.nowrap
    def bias(self, row: weights.Weight) -> Float[Array, '1 1 N H']:
        init = partitioned(nn.initializers.zeros, row.axes)
        return self.param(row.name, init, row.shape, jnp.float32)[None, None]

    @nn.nowrap
    def value_mix(self, row: weights.Weight) -> Float[Array, '2']:
        init = partitioned(nn.initializers.constant(0.5), row.axes)
        return self.param(row.name, init, row.shape, jnp.float32)

    @nn.nowrap
    def update_cache(
        self, k: Array, v: Array, positions: Array, segment_ids: Array | None, length: int
    ) -> tuple[Array, Array]:
        """Writes k and v at their positions (padding nowhere); returns all S keys and values."""
        rows = jnp.arange(k.shape[0])[:, None]
        slots = positions if segment_ids is None else jnp.where(segment_ids > 0, positions, length)
        written = []
        for name, new in (('keys', k), ('values', v)):
            shape = (new.shape[0], length, *new.shape[2:])
            cache = self.variable('cache', name, jnp.zeros, shape, new.dtype)
            cache.value = cache.value.at[rows, slots].set(new, mode='drop')
            written.append(cache.value)
        return written[0], written[1]

    @nn.nowrap
    def attend(
        self,
        q: Float[Array, 'B T N H'],
        k: Float[Array, 'B S K H'],
        v: Float[Array, 'B S K H'],
        tokens: Tokens,
        implementation: str,
    ) -> Float[Array, 'B T N H']:
        """Calls the kernel once, or once for each bucket of positions that has queries."""
        tables = rope.tables(self.model.rope, self.model.head_dim, k.shape[1])

        def attend(tokens: Tokens, frequencies: ArrayLike, query_scale: ArrayLike) -> Array:
            turn = jnp.asarray(frequencies), jnp.asarray(query_scale)
            setting = Setting(
                *turn,
                window=self.window,
                softcap=self.model.attention_softcap,
                few_documents=self.few_documents,
            )
            where = implementation, self.platform or None
            return _attend_sharded(q, k, v, tokens, setting, self.residuals, *where)

        if len(tables.query_scale) == 1:
            return attend(tokens, tables.frequencies[0], tables.query_scale[0])
        ids = tokens.ids_of_queries
        tokens = tokens._replace(key_segment_ids=tokens.ids_of_keys)
        num_buckets = len(tables.query_scale)
        # Counted in integers: a float logarithm may miss the powers of two.
        starts = self.model.rope.trained_length * 2 ** jnp.arange(num_buckets - 1)
        buckets = jnp.searchsorted(starts, tokens.positions, side='right')

        def add_bucket(total: Array, table: tuple[Array, ...]) -> tuple[Array, None]:
            bucket, frequencies, query_scale = table
            # Queries of other buckets are padding to this call: they come out as zeros.
            own = tokens._replace(segment_ids=jnp.where(buckets == bucket, ids, 0))
            out = jax.lax.cond(
                jnp.any(own.segment_ids > 0),
                lambda: attend(own, frequencies, query_scale),
                lambda: jnp.zeros_like(q),
            )
            return total + out, None

        numbers = jnp.arange(num_buckets, dtype=buckets.dtype)
        out, _ = jax.lax.scan(
            add_bucket, jnp.zeros_like(q), tuple(map(jnp.asarray, (numbers, *tables)))
        )
        return out


def first_values(
    model: config.Model, params: Mapping[str, Any], x_hat: Float[Array, 'B T D']
) -> Float[Array, 'B T K H']:
    """Computes the values of the first layer, which later layers mix with their own (2410.17897).

    Args:
      params: of the first layer's attention.
      x_hat: what it reads.
    """
    row = weights.attention(model)['v']
    values: Any = Einsum(row, x_hat.dtype, parent=None).apply(
        {'params': params['v']}, 'btd,dkh->btkh', x_hat
    )
    if model.qkv_bias:
        values = values + params['v_bias'].astype(x_hat.dtype)[None, None]
    return constrain(values, 'batch', 'length', 'kv_heads', 'head_dim')


def _attend_sharded(
    q: Array,
    k: Array,
    v: Array,
    tokens: Tokens,
    setting: Setting,
    residuals: str,
    implementation: str,
    platform: str | None,
) -> Array:
    """Calls the kernel on each device's rows and heads.

    Keys go round a ring over the context axis, unless they are a cache's, which every device holds.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ring = not mesh.empty and mesh.shape['context'] > 1 and tokens.own_keys

    def local(q: Array, k: Array, v: Array, tokens: Tokens, setting: Setting) -> Array:
        if ring:
            kernel = blockwise(q, implementation, platform)
            return context.ring_attention(kernel, q, k, v, tokens, setting)
        return attention(
            q, k, v, tokens, setting,
            residuals=residuals, implementation=implementation, platform=platform,
        )  # fmt: skip

    if mesh.empty:
        return local(q, k, v, tokens, setting)
    key_length = 'length' if ring else 'whole'
    heads = spec(('batch', 'length', 'heads', 'head_dim'))
    kv = spec(('batch', key_length, 'kv_heads', 'head_dim'))
    queries, keys = spec(('batch', 'length')), spec(('batch', key_length))
    return jax.shard_map(
        local,
        in_specs=(heads, kv, kv, Tokens(queries, queries, keys, keys), PartitionSpec()),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, tokens, setting)
