import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec
from random_weights import random_weights

from helios_jax import config
from helios_jax.data import pipeline, tokenizer
from helios_jax.errors import UserError
from helios_jax.evaluate import lengths
from helios_jax.evaluate.held_out import held_out
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.restoring import Restored

pytestmark = pytest.mark.usefixtures('quick_compilation')

TEXTS = [f'{number} alpha beta gamma ' * (number % 7 + 1) for number in range(37)]
VOCABULARY = 256


@functools.cache
def model_and_variables():
    model = config.Model(
        vocab_size=VOCABULARY, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=6,
        mlp_dim=20, compute_dtype='float32',
    )  # fmt: skip
    transformer = Transformer(model)
    two = NamedSharding(meshes.make(config.Mesh(), jax.devices()[:2]), PartitionSpec())
    return transformer, jax.device_put(random_weights(abstract_variables(transformer)), two)


@pytest.fixture
def restored(tmp_path) -> Restored:
    """A run on files in `text`, as it comes from its checkpoint."""
    (tmp_path / 'text').mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / 'text' / f'{number:02}.txt').write_text(text)
    transformer, variables = model_and_variables()
    data = config.Data(
        corpus=f'{tmp_path}/text/*.txt', row_length=48, validation_fraction=0.3,
        cache_dir=str(tmp_path / 'cache'),
    )  # fmt: skip
    cfg = config.Config(model=transformer.model, data=data)
    return Restored(transformer, variables, tokenizer.load('bytes'), cfg)


@pytest.fixture
def prepared(restored) -> pipeline.Prepared:
    return pipeline.prepare(restored.config.data, restored.tokenizer)


def test_the_runs_own_split_is_scored(restored, prepared):
    figures = held_out(restored, trained_on=prepared.contents)
    assert figures['bytes'] == prepared.validation.num_bytes
    assert 'lost_fraction' not in figures
    assert figures == held_out(restored)  # of an older checkpoint, which tells nothing
    longer = held_out(restored, trained_on=prepared.contents, row_length=96)
    assert longer['bytes'] == figures['bytes']


def test_lengths_read_the_documents_of_the_runs_own_split(restored, prepared, tmp_path):
    source = (restored.config.data, restored.tokenizer, prepared.contents)
    texts = list(lengths.held_out(*source))
    assert sum(len(text.encode()) for text in texts) == prepared.validation.num_bytes
    assert len(texts) == len(set(texts)) and set(texts) < set(TEXTS)
    for path in sorted((tmp_path / 'text').iterdir())[:9]:
        path.unlink()
    with pytest.raises(UserError, match='is not the one that the run held out'):
        next(lengths.held_out(*source))


def test_another_split_than_the_runs_is_refused(restored, prepared, tmp_path):
    before = prepared.contents
    for path in sorted((tmp_path / 'text').iterdir())[:9]:
        path.unlink()
    with pytest.raises(
        UserError,
        match=r'held-out split of data\.corpus=.* is not the one .*documents fewer, [\d,]+ bytes '
        r'instead of [\d,]+\), and may hold what it was trained on; .*--text',
    ):
        held_out(restored, trained_on=before)
    assert held_out(restored, text=f'{tmp_path}/text/2*.txt', trained_on=before)['bytes'] > 0


def test_a_training_document_more_leaves_the_split_alone(restored, prepared, tmp_path):
    before = prepared.contents
    for number in range(9):
        path = tmp_path / 'text' / f'more{number}.txt'
        path.write_text(f'more {number}')
        now = pipeline.prepare(restored.config.data, restored.tokenizer).contents
        if now['validation']['text'] == before['validation']['text']:
            break
        path.unlink()
    assert now['train']['text'] != before['train']['text']
    held_out(restored, trained_on=before)


@pytest.mark.parametrize('num_rows', [pytest.param(0, marks=pytest.mark.slow), 3])
def test_no_more_rows_at_a_time_than_there_are(restored, prepared, monkeypatch, num_rows):
    sizes = []
    assemble = pipeline._assemble

    def recording(source, located, num_rows):
        sizes.append(num_rows)
        return assemble(source, located, num_rows)

    monkeypatch.setattr(pipeline, '_assemble', recording)
    figures = held_out(restored, batch_rows=10**6, num_rows=num_rows)
    rows = num_rows or len(prepared.validation)
    assert sizes == [rows + rows % 2]  # rounded up to what two devices divide
    small = held_out(restored, batch_rows=2, num_rows=num_rows)
    np.testing.assert_allclose(figures['loss'], small['loss'], rtol=1e-5)
    assert figures['bytes'] == small['bytes']


def lossy(directory: Path) -> tokenizer.Tokenizer:
    """Knows no digit."""
    letters = {c: i for i, c in enumerate('abeghlmpt ')}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    made.add_special_tokens(['<|bos|>', '<|eos|>'])
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(directory / 'lossy.json'))
    return tokenizer.load(str(directory / 'lossy.json'))


def test_lost_bytes_are_refused_or_told_and_left_out(restored, tmp_path):
    restored = restored._replace(tokenizer=lossy(tmp_path))
    with pytest.raises(UserError, match=r'loses .*% of .*allow_lossy_tokenizer'):
        held_out(restored)
    figures = held_out(restored, text=f'{tmp_path}/text/*.txt', allow_lossy_tokenizer=True)
    digits = sum(character.isdigit() for text in TEXTS for character in text)
    total = sum(map(len, TEXTS))
    assert figures['bytes'] == total - digits
    assert figures['lost_fraction'] == digits / total
    allowed = config.replace(restored.config, {'data.allow_lossy_tokenizer': True})
    run = restored._replace(config=allowed)
    assert held_out(run, text=f'{tmp_path}/text/*.txt') == figures
