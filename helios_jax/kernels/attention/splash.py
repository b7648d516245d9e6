"""jax's splash attention on TPU, to compare our kernels with: rotated outside the kernel.

Blocks above the diagonal or outside the window are skipped, blocks of another segment are masked.
The backward pass takes two kernels: the fused one is faster but keeps a float32 copy of dq for each
block of keys, which is quadratic in T.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Int, Num

from helios_jax.kernels.attention.rotation import rotate

# Of the output and its log-sum-exp. Under a remat policy that saves it, backward does not run the
# forward kernel again.
RESIDUALS = 'attention_output'
BLOCKS = (1024, 512, 256, 128)  # tokens


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    positions: Num[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None,
    key_positions: Num[Array, 'B S'] | None,
    key_segment_ids: Int[Array, 'B S'] | None,
    frequencies: Float[Array, 'R'],
    query_scale: float | Float[Array, ''],
    scale: float,
    window: int,
    softcap: float,
    interpret: bool = False,
) -> Float[Array, 'B T N H']:
    """As `kernels.attention.attention`, on one device's arrays.

    Args:
      interpret: run the kernel in Python, on any device.
    Raises:
      NotImplementedError: `key_positions`, T not a multiple of 128, H neither below nor a multiple
        of 128, or a dtype other than bfloat16 and float32.
    """
    _, T, N, H = q.shape
    if key_positions is not None:
        raise NotImplementedError('cannot take key_positions: it masks by index.')
    if T % BLOCKS[-1]:
        raise NotImplementedError(f'cannot take T={T}: it must be a multiple of {BLOCKS[-1]}.')
    if H > 128 and H % 128:
        raise NotImplementedError(f'cannot take H={H}: above 128 it must be a multiple of 128.')
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f'cannot take {q.dtype}: only bfloat16 and float32.')

    kernel = make_kernel(
        T, N, window, softcap, wide=q.dtype == jnp.float32 or H > 128, interpret=interpret
    )
    queries = rotate(q, positions, frequencies, query_scale * scale).astype(q.dtype)
    keys = rotate(k, positions, frequencies).astype(k.dtype)
    heads_first = [x.swapaxes(1, 2) for x in (queries, keys, v)]
    key_ids = segment_ids if key_segment_ids is None else key_segment_ids
    if key_ids is None:
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
    segment_ids = jnp.ones_like(key_ids) if segment_ids is None else segment_ids
    ids = splash.SegmentIds(q=segment_ids, kv=key_ids)
    out = jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)
    # The kernel lets padding attend to padding, and averages what it masks wholly.
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)


def make_kernel(
    T: int, N: int, window: int, softcap: float, *, wide: bool, interpret: bool
) -> Callable[..., Array]:
    """Splash attention of q [N T H], k and v [K T H]; `wide` operands take smaller blocks."""
    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    block = next(size for size in BLOCKS if T % size == 0 and not (wide and size > 512))
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        block_q_dq=block,
        block_kv_dq=min(block, 512),
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
