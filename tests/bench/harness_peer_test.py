"""Both sides answer the same requests alike."""

import json
import statistics

import pytest
from refusals import refused

from helios_jax import config
from helios_jax.bench import harness_peer

MODEL = config.Model(
    vocab_size=300, num_layers=2, embed_dim=48, num_heads=3, num_kv_heads=1, head_dim=16,
    mlp_dim=80,
)  # fmt: skip


@pytest.mark.long
def test_both_score_the_same_requests_alike(capsys):
    for name in ('torch', 'transformers', 'accelerate', 'lm_eval'):
        pytest.importorskip(name)
    cfg = config.Config(model=MODEL, data=config.Data(row_length=512))
    rows = harness_peer.compare_harness(
        cfg, requests=24, batch_rows=4, dtype='float32', as_json=True
    )
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == rows and [row['side'] for row in rows] == ['helios', 'hf']
    assert all(row['requests'] == 24 and row['requests_per_second'] > 0 for row in rows)
    assert rows[1]['batch_size'] > 0 and rows[1]['mean_gap_nats'] < 1e-3


def test_a_task_has_lengths_as_text_has(tmp_path):
    harness_peer.write_task(tmp_path / 'tasks', 300, 200)
    lines = (tmp_path / 'tasks/bench.jsonl').read_text().splitlines()
    found = [json.loads(line) for line in lines]
    lengths = [len(each['question'].split()) + 12 for each in found]
    assert len(found) == 200 and 60 <= min(lengths) < 75 and 340 < max(lengths) <= 400
    assert 130 < statistics.median(lengths) < 170
    sizes = {len(choice.split()) for each in found for choice in each['choices']}
    assert sizes == set(range(2, 13))


def test_what_cannot_be_measured_is_refused(capsys):
    given = '--config=tiny', '--requests=10'
    line = refused(capsys, 'bench', 'eval', *given, alone=True)
    assert '--requests=10 must be a multiple of 4' in line
    line = refused(capsys, 'bench', 'eval', '--config=tiny', '--config.data.row_length=400')
    assert 'data.row_length=400 must be above 400' in line
