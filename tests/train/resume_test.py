import copy
import dataclasses
import types
from unittest import mock

import pytest
from etils import epath

from helios_jax import checkpoint, config
from helios_jax.data import pipeline
from helios_jax.errors import UserError
from helios_jax.train import resume as resuming

CONTENTS = {
    'train': {'rows': 'a', 'text': 'b', 'documents': 97, 'bytes': 81_234},
    'validation': {'rows': 'c', 'text': 'd', 'documents': 13, 'bytes': 9_340},
}


def resume(now: dict, metadata: dict) -> None:
    """Checks a run whose data is `now` against a checkpoint of the same config."""
    cfg, workdir = config.Config(), epath.Path('runs/x')
    train = types.SimpleNamespace(fingerprint=now['train']['rows'])
    data = mock.Mock(spec=pipeline.Prepared, contents=now, train=train)
    samples = 3 * cfg.train.batch_rows
    saved = {'config': dataclasses.asdict(cfg), 'fingerprint': 'a', 'samples': samples}
    opened = mock.Mock(
        spec=checkpoint.Opened, step=3, folder='runs/x/checkpoints/3', metadata=saved | metadata
    )
    resuming.require_resumable(workdir, cfg, opened)
    resuming.require_same_data(workdir, cfg, data, opened)


def changed(**splits: dict) -> dict:
    contents = copy.deepcopy(CONTENTS)
    for split, values in splits.items():
        contents[split] |= values
    return contents


def test_the_same_data_is_gone_on_with():
    resume(CONTENTS, {'data': CONTENTS})


def test_a_changed_validation_split_is_refused_and_told():
    now = changed(validation={'rows': 'e', 'text': 'f', 'documents': 10, 'bytes': 9_002})
    told = r'\(validation: 3 documents fewer, 9,002 bytes instead of 9,340\); restore the files'
    with pytest.raises(UserError, match=told):
        resume(now, {'data': CONTENTS})


def test_a_changed_training_split_is_refused_and_told():
    now = changed(train={'rows': 'e', 'text': 'f', 'bytes': 81_235})
    told = r'\(train: 97 documents as before, .* 81,235 bytes instead of 81,234\)'
    with pytest.raises(UserError, match=told):
        resume(now, {'data': CONTENTS})


def test_a_checkpoint_that_tells_only_of_its_training_rows_is_compared_by_them():
    resume(CONTENTS, {})
    with pytest.raises(UserError, match=r'has changed since runs/x was begun; restore'):
        resume(changed(train={'rows': 'e'}), {})


def test_an_average_may_begin_only_where_a_checkpoint_is_from_before_it():
    def go_on(now: float, saved: dict) -> None:
        cfg = config.replace(config.Config(), {'train.ema': now})
        metadata = {'config': {'train': saved}, 'samples': 3 * cfg.train.batch_rows}
        opened = mock.Mock(spec=checkpoint.Opened, step=3, folder='x/3', metadata=metadata)
        resuming.require_resumable(epath.Path('x'), cfg, opened)

    go_on(0.9, {})
    go_on(0.0, {})
    go_on(0.9, {'ema': 0.9})
    for now, before in ((0.9, 0.0), (0.0, 0.9), (0.8, 0.9)):
        with pytest.raises(UserError, match=f'train.ema={now}, but x was trained with {before}'):
            go_on(now, {'ema': before})


def test_a_checkpoint_from_before_lossy_tokenizers_could_be_allowed_is_gone_on_with():
    old = dataclasses.asdict(config.Config())
    del old['data']['allow_lossy_tokenizer']
    resume(CONTENTS, {'data': CONTENTS, 'config': old})


def test_another_chat_template_is_refused_and_told():
    saved = changed(train={'chat_template': 'x'})
    resume(saved, {'data': saved})
    now = changed(train={'rows': 'e', 'chat_template': 'y'})
    told = r'\(train: its conversations are rendered by another chat template\); restore the files'
    with pytest.raises(UserError, match=told):
        resume(now, {'data': saved})
