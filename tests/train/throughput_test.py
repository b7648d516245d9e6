"""Speed, counted over every step, without what was not computed."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_rows

from helios_jax import config
from helios_jax.arch import flops
from helios_jax.data.pipeline import Batch
from helios_jax.train import throughput

T, PEAK = 64, 1e12
MODEL = config.Model(
    vocab_size=777, num_layers=3, embed_dim=48, num_heads=2, num_kv_heads=1, mlp_dim=80,
    prefix='dense_window', period='moe', window=9,
    moe=config.MoE(num_experts=5, num_experts_per_token=2, mlp_dim=96),
)  # fmt: skip
CFG = config.Config(model=MODEL, data=config.Data(row_length=T))


def reported(tokens: int, context: float = 20.0, drop: float = 0.0) -> dict[str, jax.Array]:
    return {
        'loss': jnp.float32(2.0),
        'tokens': jnp.int32(tokens),
        'mean_context': jnp.float32(context),
        'mean_window_context': jnp.float32(context / 4),
        'router/drop_fraction': jnp.float32(drop),
    }


def measured(steps, seconds: float = 1.0) -> dict[str, float]:
    speed = throughput.Throughput(CFG, PEAK)
    for step in steps:
        speed.add(step)
    return speed.figures(seconds)


def test_tokens_add_up_over_all_steps():
    counts = [1000, 1000, 1000, 100]
    speed = throughput.Throughput(CFG, PEAK)
    for count in counts:
        speed.add(reported(count))
    assert speed.figures(4.0)['tokens_per_second'] == 3100 / 4
    speed.add(reported(70))  # the next figures start anew
    assert speed.figures(2.0)['tokens_per_second'] == 35


def test_context_is_weighted_by_tokens():
    one = measured([reported(1000, context=10.0), reported(3000, context=30.0)])
    assert one == pytest.approx(measured([reported(4000, context=25.0)]))
    longer = measured([reported(4000, context=40.0)])
    assert longer['segment_mfu'] > one['segment_mfu'] and longer['mfu'] == one['mfu']


def test_mfu_is_that_of_the_closed_form():
    figures = measured([reported(5000)], seconds=2.0)
    assert figures['mfu'] == pytest.approx(2500 * flops.flops_per_token(MODEL, T) / PEAK)
    segments = flops.segment_flops_per_token(MODEL, 20.0, 5.0)
    assert figures['segment_mfu'] == pytest.approx(2500 * segments / PEAK)


def test_dropped_tokens_do_not_count():
    visit = 6 * 3 * 48 * 96  # of one expert, forward and backward
    for drop in (0.0, 0.8):
        figures = measured([reported(1000, drop=drop)])
        missing = drop * 2 * 2 * visit  # two experts a token, in two of the layers
        for name, full in (
            ('mfu', flops.flops_per_token(MODEL, T)),
            ('segment_mfu', flops.segment_flops_per_token(MODEL, 20.0, 5.0)),
        ):
            assert figures[name] * PEAK / 1000 == pytest.approx(full - missing), (name, drop)
    varied = measured([reported(1000, drop=0.1), reported(3000, drop=0.5)])
    assert varied == pytest.approx(measured([reported(4000, drop=0.4)]))


def test_no_step_is_waited_for_and_none_is_lost(monkeypatch):
    """Figures are fetched of steps that lie far behind, however long a line is away."""
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, 'device_get', lambda x: fetched.append(len(x)) or get(x))
    speed = throughput.Throughput(CFG, PEAK)
    for count in range(1, 501):
        speed.add(reported(count))
        assert count - sum(fetched) >= min(count, throughput.IN_FLIGHT)
        assert count - sum(fetched) <= 2 * throughput.IN_FLIGHT
    assert speed.figures(10.0)['tokens_per_second'] == sum(range(501)) / 10


def test_a_device_of_unknown_peak_has_a_speed_but_no_mfu():
    speed = throughput.Throughput(CFG, math.nan)
    speed.add(reported(300))
    figures = speed.figures(3.0)
    assert figures['tokens_per_second'] == 100
    assert math.isnan(figures['mfu']) and math.isnan(figures['segment_mfu'])


def packed(lengths_of_rows: list[list[int]]) -> Batch:
    """Documents of these lengths in rows of T, whose padding has the row's own index."""
    positions, ids = packed_rows(lengths_of_rows, T)
    positions = np.where(ids > 0, positions, np.arange(T, dtype=np.int32))
    zeros = np.zeros_like(ids)
    return Batch(zeros, ids, positions, zeros > 0, zeros[:, 0])


@pytest.mark.parametrize(
    'rows',
    [[[50, 1, 3], [64]], [[64], [40]], [[7, 7], []], [[], []]],
    ids=['packed', 'one_stream_a_row', 'padding', 'empty'],
)
@pytest.mark.parametrize('window', [5, 9, 200])
def test_the_mean_context_is_what_attention_sees(rows, window):
    batch = packed(rows)
    model = dataclasses.replace(MODEL, window=window)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    visible = (same & (j <= i)).sum(-1)  # keys of each query
    near = (same & (j <= i) & (j > i - window)).sum(-1)
    real = batch.segment_ids > 0
    means = throughput.mean_context(model, jax.tree.map(jnp.asarray, batch))
    count = max(real.sum(), 1)
    np.testing.assert_allclose(means['mean_context'], visible[real].sum() / count, rtol=1e-6)
    np.testing.assert_allclose(means['mean_window_context'], near[real].sum() / count, rtol=1e-6)
    permuted = jax.tree.map(lambda x: x[..., ::-1] if x.ndim == 2 else x, batch)
    again = throughput.mean_context(model, jax.tree.map(jnp.asarray, permuted))
    np.testing.assert_allclose(list(again.values()), list(means.values()), rtol=1e-6)


def test_a_model_without_windows_reports_none():
    model = dataclasses.replace(MODEL, prefix='', period='dense')
    batch = jax.tree.map(jnp.asarray, packed([[50, 1, 3], [64]]))
    assert set(throughput.mean_context(model, batch)) == {'mean_context'}


def test_the_timer_splits_the_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, 'perf_counter', lambda: now)
    timer = throughput.Timer()
    for wait, step in [(0.5, 1.5), (0.25, 3.75)]:
        with timer.measure('data_wait'):
            now += wait
        now += step
    with timer.measure('evaluation'):
        now += 4.0
    seconds, figures = timer.lap()
    assert seconds == pytest.approx(6.0)
    assert figures == pytest.approx(
        {
            'data_wait_fraction': 0.075,
            'evaluation_fraction': 0.4,
            'step_fraction': 0.525,
            'step_seconds': 3.0,
        }
    )
    with timer.measure('data_wait'):  # the next lap starts anew
        now += 1.0
    now += 1.0
    seconds, figures = timer.lap()
    assert seconds == pytest.approx(2.0)
    assert figures == pytest.approx(
        {'data_wait_fraction': 0.5, 'step_fraction': 0.5, 'step_seconds': 2.0}
    )
