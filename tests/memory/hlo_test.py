"""Reading a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax.errors import UserError
from helios_jax.memory import hlo
from helios_jax.memory.hlo import HloArray


def test_a_loop_carries_what_its_tuple_holds():
    def run(x):
        step = lambda c, row: (jnp.sin(c) + row, jnp.cos(c * row))
        return jax.lax.scan(step, jnp.ones(3), x)

    (loop,) = hlo.loops(hlo.text(jax.jit(run).lower(jnp.ones((5, 3))).compile()))
    # The rows that are read, and the results.
    assert loop[HloArray('f32', (5, 3), False)] == 2


def test_dtype_size_and_memory_space_are_read():
    text = 'f32[] bf16[2,3]{1,0:T(8,128)(2,1)S(5)} bf16[6]{0} bf16[2,3]{1,0:T(8,128)(2,1)S(5)}'
    found = hlo.arrays(text)
    far = HloArray('bf16', (2, 3), True)
    assert found == {HloArray('f32', (), False): 1, far: 2, HloArray('bf16', (6,), False): 1}
    assert far.size == HloArray('bf16', (6,), True)


def test_a_program_that_jaxlib_cannot_read_names_the_libtpu_to_install(monkeypatch):
    def as_text(self):
        raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure\nmore')

    compiled = jax.jit(lambda x: x).lower(1.0).compile()
    monkeypatch.setattr(jax.stages.Compiled, 'as_text', as_text)
    with pytest.raises(UserError, match=r"RET_CHECK failure\).*install 'helios_jax\[tpu\]'"):
        hlo.text(compiled)
