import collections
import gzip
import math

import pytest
from etils import epath

from helios_jax import config
from helios_jax.data import baselines, corpora, pipeline, tokenizer


def test_baselines_are_those_of_the_text(tmp_path, write_corpus):
    glob = write_corpus(epath.Path(tmp_path) / 'texts', 17)
    data = config.Data(row_length=4096, cache_dir=str(tmp_path / 'cache'))
    tokens = tokenizer.load('bytes')
    source = pipeline.from_text(glob, data, tokens)
    found = baselines.bits_per_byte(source, tokens)
    text = ''.join(corpora.texts(glob)).encode()
    counts = collections.Counter(text).values()
    entropy = -sum(count / len(text) * math.log2(count / len(text)) for count in counts)
    assert found['order0_bits_per_byte'] == pytest.approx(entropy)
    # The rows have the documents in another order, which gzip hardly sees.
    bits = 8 * len(gzip.compress(text, 9)) / len(text)
    assert found['gzip_bits_per_byte'] == pytest.approx(bits, rel=0.02)
