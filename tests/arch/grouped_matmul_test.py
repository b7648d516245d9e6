"""Which implementation of the grouped matmul is taken, and what the planner makes of it."""

import pytest

from helios_jax import config
from helios_jax.arch import grouped_matmul
from helios_jax.chips import CHIPS
from helios_jax.plan import planning

MODEL = config.Model(
    vocab_size=512, num_layers=3, embed_dim=512, num_heads=4, num_kv_heads=2, head_dim=64,
    mlp_dim=768, period='moe', moe=config.MoE(num_experts=8, mlp_dim=384),
)  # fmt: skip


@pytest.mark.parametrize(
    ('platform', 'dtype', 'widths', 'capability', 'name'),
    [
        ('tpu', 'bfloat16', (512, 384), '', 'tpu'),
        ('tpu', 'float32', (40, 24), '', 'tpu'),
        ('tpu', 'float64', (512, 384), '', 'reference'),
        ('gpu', 'bfloat16', (512, 384), '9.0', 'hopper'),
        ('gpu', 'bfloat16', (512, 384), '8.0', 'reference'),
        ('gpu', 'bfloat16', (512, 192), '9.0', 'reference'),
        ('gpu', 'float32', (512, 384), '9.0', 'reference'),
        ('cpu', 'bfloat16', (512, 384), '', 'reference'),
    ],
)
def test_the_first_that_can_is_taken(platform, dtype, widths, capability, name):
    assert grouped_matmul.choose(platform, dtype, widths, capability) == name
    reasons = [row.refusal(platform, dtype, widths, capability) for row in rows_before(name)]
    assert all(reason.endswith('.') for reason in reasons)


def rows_before(name):
    names = list(grouped_matmul.ROWS)
    return [grouped_matmul.ROWS[other] for other in names[: names.index(name)]]


def test_every_chip_that_has_the_kernel_is_known_by_its_capability():
    assert {n for n, chip in CHIPS.items() if chip.capability == '9.0'} == {'h100', 'h200'}


def test_the_plan_counts_every_expert_only_where_all_are_computed():
    """All of a token's experts against two of eight."""
    cfg = config.Config(model=MODEL, train=config.Train(batch_rows=8)).resolve(512)
    compute = {n: planning.plan(cfg, CHIPS[n], 8).seconds.compute for n in ('h100', 'h200', 'a100')}
    assert compute['h100'] == compute['h200']
    slower = CHIPS['h100'].peak_flops / CHIPS['a100'].peak_flops
    assert compute['a100'] > 3 * slower * compute['h100']
