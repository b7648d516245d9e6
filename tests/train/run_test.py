import copy
import dataclasses
import types
from unittest import mock

import pytest

from helios_jax import config
from helios_jax.errors import UserError
from helios_jax.train import run as runs

CONTENTS = {
    'train': {'rows': 'a', 'text': 'b', 'documents': 97, 'bytes': 81_234},
    'validation': {'rows': 'c', 'text': 'd', 'documents': 13, 'bytes': 9_340},
}


def resume(now: dict, metadata: dict) -> None:
    """Checks a run whose data is `now` against a checkpoint of the same config."""
    cfg = config.Config()
    train = types.SimpleNamespace(fingerprint=now['train']['rows'])
    data = types.SimpleNamespace(contents=now, train=train)
    run = mock.Mock(spec=runs.Run, config=cfg, data=data, workdir='runs/x')
    saved = {'step': 3, 'config': dataclasses.asdict(cfg), 'fingerprint': 'a'}
    runs.check_resumable(run, saved | metadata)


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


def test_a_checkpoint_from_before_lossy_tokenizers_could_be_allowed_is_gone_on_with():
    old = dataclasses.asdict(config.Config())
    del old['data']['allow_lossy_tokenizer']
    resume(CONTENTS, {'data': CONTENTS, 'config': old})
