"""Tiny random Hugging Face checkpoints of every family, in shapes that are not round."""

import contextlib
import io
import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from helios_jax.convert import families, names

V, L, D, N, K, H, F, E, X = 61, 3, 42, 6, 2, 10, 57, 5, 3
EPS, BASE = 3e-3, 543.0
SHAPE = {
    'vocab_size': V,
    'hidden_size': D,
    'num_hidden_layers': L,
    'num_attention_heads': N,
    'num_key_value_heads': K,
    'head_dim': H,
    'intermediate_size': F,
    'rms_norm_eps': EPS,
    'max_position_embeddings': 64,
    'bos_token_id': 0,
    'eos_token_id': 1,
}
CONFIG = SHAPE | {'model_type': 'qwen2', 'rms_norm_eps': 1e-5, 'dtype': 'float32'}
del CONFIG['bos_token_id']  # Qwen's has none
PLAIN = {'rope_type': 'default', 'rope_theta': BASE}
YARN = PLAIN | {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8}
MOE = {'num_experts_per_tok': X}
# name: (family in transformers' spelling, what its config says)
MODELS = {
    'llama_tied': (
        'Llama',
        {
            'tie_word_embeddings': True, 'num_key_value_heads': N,
            'rope_parameters': PLAIN | {'rope_type': 'dynamic', 'factor': 3.0},
        },
    ),
    'llama': ('Llama', {'rope_parameters': PLAIN | {'rope_type': 'linear', 'factor': 3.0}}),
    'mistral': (
        'Mistral',
        {
            'sliding_window': 5, 'num_key_value_heads': 1, 'num_attention_heads': 5,
            'rope_parameters': PLAIN
            | {
                'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
            },
        },
    ),
    'qwen2': (
        'Qwen2',
        {
            'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 1,
            'rope_parameters': YARN | {'mscale': 0.7, 'mscale_all_dim': 0.4, 'truncate': False},
        },
    ),
    'qwen3': (
        'Qwen3',
        {
            'rope_parameters': YARN | {'attention_factor': 1.3}, 'tie_word_embeddings': True,
        },
    ),
    'mixtral': ('Mixtral', MOE | {'num_local_experts': E, 'sliding_window': 7}),
    'qwen3_moe': (
        'Qwen3Moe',
        MOE | {
            'num_experts': E, 'moe_intermediate_size': 25, 'norm_topk_prob': False,
            'mlp_only_layers': [0],
        },
    ),
}  # fmt: skip


def model(name):
    """A model of transformers with random weights, norms and biases included."""
    import torch
    import transformers

    family, said = MODELS[name]
    settings = {**SHAPE, 'rope_parameters': PLAIN, **said}
    config_class = getattr(transformers, f'{family}Config')
    torch.manual_seed(0)
    implementations = {'attn_implementation': 'eager', 'experts_implementation': 'eager'}
    made = getattr(transformers, f'{family}ForCausalLM')(
        config_class(**settings, **implementations)
    )
    with torch.no_grad():
        for label, parameter in made.named_parameters():
            parameter.normal_(std=0.3)
            if 'norm' in label:
                parameter.add_(1)
    return made.eval()


def save(made, directory, *, shards='100GB'):
    """Writes a model as transformers does, with a tokenizer of its size."""
    with contextlib.redirect_stderr(io.StringIO()):
        made.save_pretrained(directory, max_shard_size=shards)
    write_tokenizer(directory, made.config.vocab_size)
    return directory


def write_tokenizer(directory, size):
    words = {'<s>': 0, '</s>': 1, '<unk>': 2} | {f'w{n}': n for n in range(3, size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(directory / 'tokenizer.json'))
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>',
        'chat_template': '{{ messages[0].content }}',
    }  # fmt: skip
    (directory / 'tokenizer_config.json').write_text(json.dumps(settings))
    (directory / 'chat_template.jinja').write_text('{{ messages[-1].content }}')


def tokens(rows=2, length=23):
    return np.random.default_rng(0).integers(0, V, size=(rows, length))


def random_tensors(said):
    """Tensors of a config.json, by their names."""
    rng = np.random.default_rng(0)
    family, made = families.read(said)
    return {
        piece.name: rng.normal(size=piece.shape).astype(np.float32)
        for piece in names.pieces(made, family)
    }


def write_random(directory, said):
    """Writes a checkpoint of random weights without transformers; returns its tensors."""
    found = random_tensors(said)
    save_file(found, directory / 'model.safetensors')
    (directory / 'config.json').write_text(json.dumps(said))
    write_tokenizer(directory, said['vocab_size'])
    return found
