"""Imported and exported models have transformers' logits."""

import json

import jax
import numpy as np
import pytest

from helios_jax import restoring
from helios_jax.convert import exporting, importing, workdir

REASON = "needs torch and transformers: pip install 'helios_jax[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
pytest.importorskip('transformers', reason=REASON)

import hugging_face  # noqa: E402
import transformers  # noqa: E402
from hugging_face import MODELS  # noqa: E402
from logits import load, one_device, ours, theirs  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_logits_equal_transformers_on_import_and_after_a_round_trip(name, tmp_path):
    made = hugging_face.model(name)
    source = hugging_face.save(made, tmp_path / 'theirs', shards='40KB')
    assert (source / 'model.safetensors.index.json').exists()
    tokens = hugging_face.tokens()
    expected = theirs(made, tokens)
    assert expected.std() > 0.5
    imported = load(source)
    np.testing.assert_allclose(ours(imported, tokens), expected, rtol=0, atol=1e-4)

    workdir.save(importing.open_directory(source), tmp_path / 'run')
    exporting.export(tmp_path / 'run', tmp_path / 'back', shard_bytes=30_000)
    assert len(list((tmp_path / 'back').glob('*.safetensors'))) > 2
    said = json.loads((tmp_path / 'back/config.json').read_text())
    assert said['model_type'] == made.config.model_type
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'back', attn_implementation='eager', experts_implementation='eager'
    )
    np.testing.assert_allclose(theirs(back, tokens), expected, rtol=0, atol=1e-4)
    again = load(tmp_path / 'back')
    assert again.config.model == imported.config.model
    for mine, other in zip(
        jax.tree.leaves(again.variables),
        jax.tree.leaves(imported.variables),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-6)
    for file in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
        assert (tmp_path / 'back' / file).read_bytes() == (source / file).read_bytes()
    restored = restoring.restore(tmp_path / 'run', mesh=one_device())
    np.testing.assert_allclose(ours(restored, tokens), expected, rtol=0, atol=1e-4)
