"""How often the regions of tokamax's kernels run."""

import dataclasses

import pytest
from attention_shapes import PROBLEMS, blocks, total, visible


@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_tokamax_leaves_out_what_segments_leave_out(problem, tokamax):
    options = {'block': 512, 'compute': 512, 'diagonal_skip': False}
    forward, backward = tokamax.candidate(problem, options | {'dynamic': True}).visits.values()
    # A batch shares one list of steps.
    some, _ = blocks(visible(problem).any(0), 512)
    _, every = blocks(visible(dataclasses.replace(problem, documents=1))[0], 512)
    heads = problem.batch * problem.heads
    for visits in (forward, backward):
        assert total(visits, 'full') == heads * (some & every).sum()
        assert total(visits, 'masked') == heads * (some & ~every).sum()
        assert sum(step.number for step in visits.steps) == heads * some.sum()
    assert total(forward, 'init') == total(forward, 'finish') == heads * len(some)
    writes = total(backward, 'write') + total(backward, 'add')
    assert writes == total(backward, 'init') == heads * len(some)
    assert total(backward, 'add') == 2 * total(backward, 'write')


def test_tokamax_steps_over_all_blocks_where_its_grid_is_static(tokamax):
    problem, options = PROBLEMS[0], {'block': 512, 'compute': 512, 'diagonal_skip': False}
    visits = tokamax.candidate(problem, options | {'dynamic': False}).visits['splash_mha_dkv']
    assert sum(step.number for step in visits.steps) == 6 * 8 * 8
    assert (total(visits, 'full'), total(visits, 'masked')) == (6 * 28, 6 * 8)
    assert total(visits, 'write') == total(visits, 'init') == 2 * 8
