"""Our logits equal transformers' on the same weights: the parts against code that is not ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face import BASE, EPS, PLAIN, SHAPE, YARN, D, E, F, H, K, L, N, V, X

from helios_jax import config
from helios_jax.model.transformer import Transformer

REASON = "needs torch and transformers: pip install 'helios_jax[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
pytest.importorskip('transformers', reason=REASON)

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

B, T = 2, 23
EAGER = {'attn_implementation': 'eager', 'experts_implementation': 'eager'}
# name: (their config's class, model and settings; our layer pattern and settings)
MODELS = {
    'llama': (LlamaConfig, LlamaForCausalLM, {'rope_parameters': PLAIN}, {'period': 'dense'}),
    'llama_yarn': (
        LlamaConfig,
        LlamaForCausalLM,
        {'rope_parameters': YARN, 'max_position_embeddings': 32},
        {
            'period': 'dense',
            'rope': config.Rope(base=BASE, scaling='static', factor=4.0, trained_length=8),
        },
    ),
    'llama_tied': (
        LlamaConfig,
        LlamaForCausalLM,
        {'rope_parameters': PLAIN, 'tie_word_embeddings': True},
        {'period': 'dense', 'tied_embeddings': True},
    ),
    'mixtral': (
        MixtralConfig,
        MixtralForCausalLM,
        {'rope_parameters': PLAIN, 'num_local_experts': E, 'num_experts_per_tok': X},
        {'period': 'moe', 'moe': config.MoE(num_experts=E, num_experts_per_token=X)},
    ),
    'mixtral_window': (
        MixtralConfig,
        MixtralForCausalLM,
        {
            'rope_parameters': PLAIN,
            'num_local_experts': E,
            'num_experts_per_tok': X,
            'sliding_window': 7,
        },
        {
            'period': 'moe_window',
            'window': 7,
            'moe': config.MoE(num_experts=E, num_experts_per_token=X),
        },
    ),
    'qwen3_moe': (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            'rope_parameters': PLAIN,
            'num_experts': E,
            'num_experts_per_tok': X,
            'moe_intermediate_size': 25,
            'norm_topk_prob': True,
            'mlp_only_layers': [0],
        },
        {
            'prefix': 'dense',
            'period': 'moe',
            'qk_norm': True,
            'moe': config.MoE(num_experts=E, num_experts_per_token=X, mlp_dim=25),
        },
    ),
}


def theirs(name):
    """The model with random weights, norms included."""
    config_class, model_class, settings, _ = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | EAGER | settings))).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if 'norm' in label:
                parameter.add_(1)
    return model


def ours(name):
    return config.Model(
        **{
            'vocab_size': V,
            'num_layers': L,
            'embed_dim': D,
            'num_heads': N,
            'num_kv_heads': K,
            'head_dim': H,
            'mlp_dim': F,
            'norm_eps': EPS,
            'compute_dtype': 'float32',
            'rope': config.Rope(base=BASE),
            'gmu': config.GMU(kind='residual', normalize_output='off'),
        }
        | MODELS[name][-1]
    )


def layer(weights, model, index):
    """One layer's parameters: their matrices are [out, in], ours [in, …, out]."""
    get = lambda label: weights[f'model.layers.{index}.{label}'].astype(np.float32)
    heads = lambda label: get(f'self_attn.{label}_proj.weight').T.reshape(D, -1, H)
    params = {
        'attention_norm': {'scale': get('input_layernorm.weight')},
        'mlp_norm': {'scale': get('post_attention_layernorm.weight')},
        'attention': {name: {'w': heads(name)} for name in ('q', 'k', 'v')},
    }
    params['attention']['out'] = {'w': get('self_attn.o_proj.weight').T.reshape(N, H, D)}
    if model.qk_norm:
        for name in ('q_norm', 'k_norm'):
            params['attention'][name] = {'scale': get(f'self_attn.{name}.weight')}
    if model.layer_kinds[index].startswith('moe'):
        gate, up = np.split(get('mlp.experts.gate_up_proj').swapaxes(1, 2), 2, axis=-1)
        down = get('mlp.experts.down_proj').swapaxes(1, 2)
        parts = {'gate': gate, 'up': up, 'down': down, 'router': get('mlp.gate.weight').T}
        params['moe'] = {name: {'w': w} for name, w in parts.items()}
    else:
        params['mlp'] = {
            name: {'w': get(f'mlp.{name}_proj.weight').T} for name in ('gate', 'up', 'down')
        }
    return params


def convert(model, their_model):
    """Our variables with their weights; the vocabulary is padded with what must not matter."""
    weights = {name: w.detach().numpy() for name, w in their_model.state_dict().items()}
    layers = [layer(weights, model, index) for index in range(L)]
    pad = ((0, model.padded_vocab_size - V), (0, 0))
    embedding = np.pad(weights['model.embed_tokens.weight'], pad, constant_values=9)
    first = len(model.prefix_kinds)
    params = {
        'embed': {'w': embedding},
        'periods': {'layer_0': jax.tree.map(lambda *w: np.stack(w), *layers[first:])},
        'final_norm': {'scale': weights['model.norm.weight']},
    }
    if first:
        params['prefix'] = {'layer_0': layers[0]}
    if not model.tied_embeddings:
        head = np.pad(weights['lm_head.weight'], pad, constant_values=9)
        params['unembedding'] = {'w': head.T}
    else:
        # We divide a tied head by √D, they do not: fold it into the last norm.
        params['final_norm'] = {'scale': params['final_norm']['scale'] * np.sqrt(D)}
    bias = np.zeros((L - first, E), np.float32)
    router = {'periods': {'layer_0': {'moe': {'bias': bias}}}}
    variables = {'params': params} | ({'router': router} if 'moe' in model.period else {})
    return jax.tree.map(jnp.asarray, variables)


@pytest.mark.parametrize('name', MODELS)
def test_logits_equal_transformers(name):
    their_model, model = theirs(name), ours(name)
    tokens = np.random.default_rng(0).integers(0, V, size=(B, T))
    with torch.no_grad():
        expected = their_model(torch.tensor(tokens)).logits.numpy()
    positions = jnp.tile(jnp.arange(T)[None], (B, 1))
    run = jax.jit(lambda *a: Transformer(model).apply(*a, method='logits'))
    logits = run(convert(model, their_model), jnp.asarray(tokens, jnp.int32), positions)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits[..., :V], expected, rtol=0, atol=1e-4)
