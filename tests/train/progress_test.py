"""What a run says while it goes on."""

import logging
import math
import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from helios_jax import config
from helios_jax.errors import UserError
from helios_jax.train import progress
from helios_jax.train.run import Run

MOE = config.MoE(num_experts=5, num_experts_per_token=1, mlp_dim=24)


def run(model: config.Model) -> Run:
    """What `Progress` reads of a run of 40 steps."""
    made = mock.Mock(spec=Run)
    made.config = config.Config(
        model=model,
        data=config.Data(row_length=64),
        train=config.Train(num_steps=40, batch_rows=6),
    )
    params = {'w': jax.ShapeDtypeStruct((30, 41), 'float32'), 'b': jnp.zeros(4)}
    made.setup = types.SimpleNamespace(state=types.SimpleNamespace(params=params))
    made.checkpoints = types.SimpleNamespace(wait=lambda: None, steps=lambda: [7])
    return made


def dense() -> config.Model:
    return config.Model(vocab_size=777, embed_dim=48, mlp_dim=80)


def test_a_line_counts_every_step_since_the_last(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.throughput.time, 'perf_counter', lambda: now)
    told = progress.Progress(run(dense()), 0)
    for tokens in (1000, 1000, 1000, 100):
        with told.timer.measure('data_wait'):
            now += 1.0
        reported = {
            'loss': jnp.float32(2.0), 'gradient_norm': jnp.float32(1.0),
            'tokens': jnp.int32(tokens), 'mean_context': jnp.float32(20.0),
        }  # fmt: skip
        told.count(reported)
    figures = told.figures(4, reported)
    assert figures['time/tokens_per_second'] == pytest.approx(3100 / 4)
    assert figures['tokens'] == 100 and figures['mean_context'] == 20  # the step's own
    assert figures['time/step_seconds'] == pytest.approx(1.0)
    assert 'time/mfu' not in figures  # of a CPU no peak is known
    assert not any(math.isnan(value) for value in figures.values())


@pytest.mark.parametrize('name', ['loss', 'gradient_norm'])
def test_a_figure_that_is_not_finite_names_the_checkpoint_to_go_on_from(name):
    figures = {'loss': 2.0, 'gradient_norm': 1.0, name: math.inf}
    with pytest.raises(UserError, match=f'the {name} is inf at step 9.*since step 7'):
        progress.check_finite(run(dense()), 9, figures)


def test_a_run_begins_with_what_it_trains(capsys):
    progress.Progress(run(dense()), 20)
    device = f'{jax.device_count()} × {jax.devices()[0].device_kind}'
    assert capsys.readouterr().err == (
        f'Training 1,234 parameters on {device}: steps 21 to 40, each of 6 rows of 64 tokens\n'
    )
    progress.Progress(run(dense()), 40)  # nothing is left to train
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    ('settings', 'learns'),
    [
        ({}, 'only the z-loss trains it'),
        ({'balance': 'aux'}, 'only the balance loss and the z-loss train it'),
        ({'balance': 'both', 'router_z_loss': 0.0}, 'only the balance loss trains it'),
        ({'router_z_loss': 0.0}, 'nothing trains it'),
        ({'balance': 'aux', 'aux_loss': 0.0, 'router_z_loss': 0.0}, 'nothing trains it'),
    ],
    ids=str,
)
def test_a_router_that_learns_nothing_from_the_loss_is_warned_of_once(caplog, settings, learns):
    moe = config.MoE(**{'num_experts': 5, 'num_experts_per_token': 1} | settings)
    model = config.Model(vocab_size=777, prefix='dense', period='moe_window', window=9, moe=moe)
    with caplog.at_level(logging.WARNING, 'helios_jax'):
        progress.Progress(run(model), 0)
    (record,) = caplog.records
    message = record.getMessage()
    assert 'model.moe.num_experts_per_token=1' in message and learns in message
    assert 'num_experts_per_token=2' in message and '\n' not in message


@pytest.mark.parametrize(
    'model',
    [
        dense(),
        config.Model(period='moe', moe=config.MoE(num_experts=5, num_experts_per_token=2)),
        config.Model(period='moe', moe=config.MoE(num_experts=1, num_experts_per_token=1)),
        config.Model(moe=MOE),  # no layer has it
    ],
    ids=['dense', 'two', 'nothing to choose', 'unused'],
)
def test_other_models_are_not_warned_of(model):
    assert progress.router_warning(model) == ''
