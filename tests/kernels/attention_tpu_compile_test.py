"""What the compiler makes of the TPU kernels within a layer, for every generation; needs no TPU."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import chips
from helios_jax.kernels.attention import Setting, Tokens, attention
from helios_jax.kernels.attention.tpu import blocks
from helios_jax.parallel import mesh as meshes

pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")

TOPOLOGIES = {name: chip.topology for name, chip in chips.CHIPS.items() if chip.topology}
GIB = 2**30


def layer(weights, x, positions, ids, residuals='', **options):
    H = weights['q'].shape[-1]
    q, k, v = (jnp.einsum('btd,dnh->btnh', x, weights[name]) for name in 'qkv')
    frequencies = jnp.asarray(1e4 ** (-np.arange(H // 2) / (H // 2)), jnp.float32)
    out = attention(
        q, k, v, Tokens(positions, ids), Setting(frequencies, **options), residuals=residuals,
        implementation='tpu', platform='tpu',
    )  # fmt: skip
    return jnp.einsum('btnh,nhd->btd', out, weights['out'])


def compiled(generation, T, N, K, H, packed, **options):
    """Value and gradients of a layer, for one device of the generation."""
    mesh = jax.sharding.Mesh(meshes.topology_devices(TOPOLOGIES[generation])[:1], 'data')
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=where)
    D = N * H
    sizes = {'q': (D, N, H), 'k': (D, K, H), 'v': (D, K, H), 'out': (N, H, D)}
    weights = {name: shape(size, jnp.bfloat16) for name, size in sizes.items()}
    tokens = shape((1, T), jnp.int32)
    arguments = weights, shape((1, T, D), jnp.bfloat16), tokens, tokens if packed else None

    def step(weights, x, *rest):
        def loss(weights, x):
            return jnp.sum(layer(weights, x, *rest, **options).astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, (0, 1))(weights, x)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert blocks.generation() == generation
        return jax.jit(step).lower(*arguments).compile()


def long(*case):
    return pytest.param(*case, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ('generation', 'packed', 'residuals'),
    [
        pytest.param('v5e', True, 'fp8', marks=pytest.mark.slow),
        long('v5p', False, ''),
        long('v6e', True, ''),
        long('tpu7x', False, 'int8'),
    ],
)
def test_memory_is_linear_in_length_and_compact(generation, packed, residuals):
    """No [T T]; no partial sums of dq and no log-sum-exp a lane, which would be float32 like q."""
    T, N, K, H = 8192, 8, 2, 128
    text = compiled(generation, T, N, K, H, packed, residuals=residuals).as_text()
    arrays = {
        (dtype, tuple(map(int, size.split(','))))
        for dtype, size in re.findall(r'\b(f32|bf16|s32|u8|s8|pred)\[([\d,]+)\]', text)
    }
    for dtype, size in arrays:
        assert size.count(T) < 2
        # The layer's own float32 of this size is its output before the sum, of which D = N·H.
        assert np.prod(size) < N * T * H or dtype != 'f32' or size[-1] == N * H, (dtype, size)
    for kernel in ('forward', 'backward'):
        calls = re.findall(rf'= .* custom-call\(.*helios_attention_{kernel}', text)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ('generation', 'packed'),
    [long(*case) for case in itertools.product(('v5e', 'v5p', 'v6e', 'tpu7x'), (False, True))],
)
def test_128k_tokens_fit_in_16_gib(generation, packed):
    memory = compiled(generation, 131072, 32, 8, 128, packed).memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 16 * GIB


@pytest.mark.long
@pytest.mark.parametrize('H', [64, 96, 128, 192, 256])
@pytest.mark.parametrize('generation', TOPOLOGIES)
def test_every_head_size_compiles(generation, H):
    text = compiled(generation, 2048, 6, 2, H, packed=True, window=300, softcap=30.0).as_text()
    for kernel in ('forward', 'backward'):
        assert re.search(rf'= .* custom-call\(.*helios_attention_{kernel}', text)


def test_the_table_is_of_blocks_that_the_kernels_take():
    for generation, passes in blocks.tuned().items():
        assert generation in chips.CHIPS
        for name, sizes in passes.items():
            for H, lengths in sizes.items():
                for length in map(int, lengths):
                    for G, T in ((1, length), (3, 4 * length), (8, 200)):
                        found = blocks.choose(
                            generation, G, int(H), T, T, wide=False, backward=name == 'backward'
                        )
                        check(found, T)
    for wide, backward in ((False, False), (True, True)):
        check(blocks.choose('v5p', 4, 192, 3000, 77, wide=wide, backward=backward), 77)


def check(found, S):
    assert found.k % found.strip == 0
    assert found.k // found.strip < 64
    assert found.run * found.strip <= found.k < S + 2 * found.strip
    assert found.run.bit_count() == 1
    assert found.q % 128 == 0
