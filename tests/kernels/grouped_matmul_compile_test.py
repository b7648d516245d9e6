"""What the compiler makes of the grouped matmul on TPUs; needs none."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from helios_jax import chips
from helios_jax.kernels.grouped_matmul import grouped_matmul
from helios_jax.parallel import mesh as meshes

pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")

TPUS = [name for name, chip in chips.CHIPS.items() if chip.platform == 'tpu']


def compiled(target, M, E, D, F, dtype):
    """Result and gradients, for one device of the target."""
    mesh = jax.sharding.Mesh(meshes.topology_devices(chips.CHIPS[target].topology)[:1], 'data')
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=where)
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32, sharding=where)

    def run(x, weights, gradient, sizes):
        multiply = functools.partial(grouped_matmul, group_sizes=sizes, platform='tpu')
        y, backward = jax.vjp(multiply, x, weights)
        return y, *backward(gradient)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(run).lower(shape((M, D)), shape((E, D, F)), shape((M, F)), sizes)
    return lowered.compile()


@pytest.mark.slow
@pytest.mark.parametrize('target', TPUS)
def test_three_kernels_and_no_copy_of_the_weights(target):
    M, E, D, F = 2048, 4, 512, 768
    program = compiled(target, M, E, D, F, jnp.bfloat16)
    text = program.as_text()
    assert len(re.findall(r'custom-call\(.*tpu_custom_call', text)) == 3
    made = re.findall(r'= bf16\[4,(?:512,768|768,512)\]\S* (\S+?)\(', text)
    # XLA may bring what is small into VMEM, as it lies.
    assert set(made) <= {'custom-call', 'parameter', 'copy-start', 'copy-done'}
    assert program.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('target', ['v5p', 'v6e'])
@pytest.mark.parametrize(('M', 'E', 'D', 'F'), [(7, 3, 24, 10), (1000, 5, 96, 200)])
def test_any_size_compiles(target, dtype, M, E, D, F):
    text = compiled(target, M, E, D, F, dtype).as_text()
    assert len(re.findall(r'custom-call\(.*tpu_custom_call', text)) == 3
