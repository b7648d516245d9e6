"""How often the regions of our kernels run."""

import pytest
from attention_shapes import PROBLEMS, total, visible

from helios_jax.bench.attention import ours
from helios_jax.kernels.attention.tpu.blocks import Shape
from helios_jax.kernels.attention.tpu.specs import MARKS

# Rows, keys of a block, keys of a part, parts of a run, and the width of a product.
SHAPE, LONG = Shape(768, 1024, 256, 4, 512), Shape(768, 4096, 256, 4, 512)


@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_parts_of_keys_are_computed_where_a_query_of_the_block_sees_them(problem):
    """Whole ones four or two at a time or alone, those that need a mask one by one."""
    found = ours.candidate(problem, {'shape': SHAPE}).visits
    query_block = 256  # of each of the group's three heads: 768 rows
    seen = visible(problem)
    size = problem.length // query_block
    cut = seen.reshape(len(seen), size, query_block, size, 256)
    some, every = cut.any((2, 4)).sum(), cut.all((2, 4)).sum()
    assert list(found) == ['helios_attention_forward', 'helios_attention_backward']
    for visits in found.values():
        whole = 4 * total(visits, 'run') + 2 * total(visits, 'run/2') + total(visits, 'run/4')
        assert whole + total(visits, 'masked') == problem.kv_heads * some
        assert whole == problem.kv_heads * every
        assert total(visits, 'first_q') == total(visits, 'last_q')
        assert total(visits, 'first_q') == problem.kv_heads * problem.batch * size


def test_one_block_of_keys_is_copied_once_for_each_key_head():
    problem = PROBLEMS[0]
    forward, backward = ours.candidate(problem, {'shape': LONG}).visits.values()
    head = 4096 * 128 * 2  # bytes of a head in bfloat16
    numbers, rotation = 4096 * 4, 4096 * (128 + MARKS) * 4  # one float32 a query; a token's table
    tables = 2 * 2 * rotation  # of queries and of keys, for both key heads
    queries, keys = 6 * head, 2 * head
    assert copied(forward) == 2 * queries + 6 * numbers + 2 * keys + tables  # q, out; lse; k, v
    # q, out, cotangent, dq; log-sum-exp; k, v, dk, dv.
    assert copied(backward) == 4 * queries + 6 * numbers + 4 * keys + tables
    assert set(backward.bodies) - set(forward.bodies) == {'last_k'}
    assert set(forward.bodies) - set(backward.bodies) == {'start'}


def copied(visits) -> float:
    """Bytes that all steps copy."""
    return sum(step.number * step.hbm_bytes for step in visits.steps)
