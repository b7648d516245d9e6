"""A small corpus of files, and shards small enough for it to have several."""

import random

import pytest
from etils import epath

from helios_jax.data import documents


def _write_corpus(directory: epath.Path, num_documents: int, seed: int = 0) -> str:
    """Writes that many text files of up to 1,700 characters, some of them not ASCII; the glob."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(num_documents):
        words = [rng.choice(['alpha', 'βήτα', 'γ', 'delta ε', '😀', '\n']) for _ in range(300)]
        text = f'{seed}/{number} ' + ' '.join(words[: rng.randrange(1, 300)])
        (directory / f'{number:03d}.txt').write_text(text)
    return str(directory / '*.txt')


@pytest.fixture(scope='session')
def write_corpus():
    return _write_corpus


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(documents, 'SHARD_BYTES', 4_000)
    return _write_corpus(epath.Path(tmp_path) / 'corpus', 61)


@pytest.fixture
def cache_dir(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / 'cache'
