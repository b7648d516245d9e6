"""Families of Hugging Face models: what their config.json says, as a config of ours, and back."""

from typing import Any, NamedTuple

from helios_jax import config
from helios_jax.convert import rope
from helios_jax.convert.values import Values, entries, flag, number, require_absent, whole
from helios_jax.errors import UserError, one_of, require

RESIDUAL = config.GMU(kind='residual')
OURS = 'helios'  # the family of everything that the others lack: see modeling_helios.py


class Family(NamedTuple):
    architecture: str  # transformers' class
    rope_base: float = 10_000.0  # what holds where config.json says nothing
    norm_eps: float = 1e-6
    window: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    mixed: bool = False  # each layer may have a window or none: `layer_types`
    moe: str = ''  # name of the number of experts


FAMILIES = {
    'llama': Family('LlamaForCausalLM'),
    'mistral': Family('MistralForCausalLM', window=4096),
    'qwen2': Family('Qwen2ForCausalLM', qkv_bias=True, mixed=True),
    'qwen3': Family('Qwen3ForCausalLM', qk_norm=True, mixed=True),
    'mixtral': Family('MixtralForCausalLM', 1e6, 1e-5, moe='num_local_experts'),
    'qwen3_moe': Family('Qwen3MoeForCausalLM', qk_norm=True, moe='num_experts'),
}


def read(values: Values) -> tuple[str, config.Model]:
    """Reads a config.json: the family, and the residual model that it describes.

    Raises:
      UserError: another family, a setting that we lack, or a value of another type.
    """
    name = str(values.get('model_type'))
    one_of('config.json: model_type', name, (*FAMILIES, OURS))
    if name == OURS:
        model = config.from_dict(values.get('helios'), config.Model, 'config.json: helios')
        require(model.vocab_size > 0, 'config.json: vocab_size=0 must be above 0.')
        require_one_stream(model)
        return OURS, model
    family = FAMILIES[name]
    for setting, harmless in (
        ('hidden_act', 'silu'), ('attention_bias', False), ('mlp_bias', False),
    ):  # fmt: skip
        require_absent(values, setting, harmless)
    require_absent(values, 'quantization_config')
    D, N = whole(values, 'hidden_size'), whole(values, 'num_attention_heads')
    require(N > 0, 'config.json: num_attention_heads=0 must be above 0.')
    kinds, window = layers(family, values)
    prefix, period = pattern(kinds)
    model = config.Model(
        vocab_size=whole(values, 'vocab_size'),
        num_layers=len(kinds),
        embed_dim=D,
        num_heads=N,
        num_kv_heads=whole(values, 'num_key_value_heads', N),
        head_dim=whole(values, 'head_dim', D // N),
        mlp_dim=whole(values, 'intermediate_size'),
        prefix=','.join(prefix),
        period=','.join(period),
        window=window,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tied_embeddings=flag(values, 'tie_word_embeddings'),
        norm_eps=number(values, 'rms_norm_eps', family.norm_eps),
        compute_dtype='float32' if dtype(values) == 'float32' else 'bfloat16',
        gmu=RESIDUAL,
        rope=rope.read(values, family.rope_base),
        moe=experts(family, values) if any(k.startswith('moe') for k in kinds) else config.MoE(),
    )
    require(model.vocab_size > 0, 'config.json: vocab_size=0 must be above 0.')
    return name, model


def dtype(values: Values) -> Any:
    return values.get('dtype', values.get('torch_dtype'))


def experts(family: Family, values: Values) -> config.MoE:
    """Reads a router's settings; it goes on under the balance loss that it was trained with."""
    renormalize = family.architecture == 'MixtralForCausalLM' or flag(values, 'norm_topk_prob')
    return config.MoE(
        num_experts=num_experts(family, values),
        num_experts_per_token=whole(values, 'num_experts_per_tok'),
        mlp_dim=whole(values, 'moe_intermediate_size', 0),
        renormalize=renormalize,
        balance='aux',
        aux_loss=number(values, 'router_aux_loss_coef', 0.001),
        router_z_loss=0.0,
    )


def num_experts(family: Family, values: Values) -> int:
    other = {'num_experts': 'num_local_experts', 'num_local_experts': 'num_experts'}[family.moe]
    return whole(values, family.moe if family.moe in values else other)


def layers(family: Family, values: Values) -> tuple[list[str], int]:
    """Returns the kind of each layer, bottom first, and the window of those that have one."""
    L = whole(values, 'num_hidden_layers')
    require(
        0 < L <= config.model.MOST_LAYERS,
        f'config.json: num_hidden_layers={L} must lie between 1 and {config.model.MOST_LAYERS}.',
    )
    switched = family.mixed or family.architecture == 'Qwen3MoeForCausalLM'
    window = whole(values, 'sliding_window', 0)
    if 'sliding_window' not in values:
        window = family.window
    if switched and not flag(values, 'use_sliding_window'):
        window = 0
    sees = [window > 0] * L
    if family.mixed and window:
        first = whole(values, 'max_window_layers', 28)
        sees = [i >= first for i in range(L)]
    if family.mixed and (types := entries(values, 'layer_types', str)):
        require(len(types) == L, f'config.json: layer_types names {len(types)} of {L} layers.')
        for kind in types:
            one_of('config.json: layer_types', kind, ('full_attention', 'sliding_attention'))
        sees = [kind == 'sliding_attention' for kind in types]
        require(window > 0 or not any(sees), 'config.json: layer_types has sliding layers, but '
                'sliding_window is off.')  # fmt: skip
    sparse = [bool(family.moe)] * L
    if family.architecture == 'Qwen3MoeForCausalLM':
        step, dense = (
            whole(values, 'decoder_sparse_step', 1),
            entries(values, 'mlp_only_layers', int),
        )
        require(step > 0, 'config.json: decoder_sparse_step=0 must be above 0.')
        some = num_experts(family, values) > 0
        sparse = [some and i not in dense and (i + 1) % step == 0 for i in range(L)]
    kinds = [
        ('moe' if moe else 'dense') + ('_window' if seen else '')
        for moe, seen in zip(sparse, sees, strict=True)
    ]
    return kinds, window if any(sees) else 0


def pattern(kinds: list[str]) -> tuple[list[str], list[str]]:
    """Finds the shortest prefix and period that give these layers: few are compiled."""
    L = len(kinds)
    for total in range(1, L + 1):
        for first in range(total):
            period = kinds[first:total]
            rest = kinds[first:]
            if len(rest) % len(period) == 0 and rest == period * (len(rest) // len(period)):
                return kinds[:first], period
    raise AssertionError('a period of all layers always fits')


def require_one_stream(model: config.Model) -> None:
    """Refuses a model whose layers carry several streams, which no family has, ours included."""
    require(
        model.gmu.kind != 'hyper',
        "model.gmu.kind='hyper' has no Hugging Face form, neither in transformers nor in "
        'modeling_helios.py; choose another kind.',
    )


def of(model: config.Model, *, biased_router: bool = False) -> str:
    """Name of the family that has all that a model has; `OURS` if none has.

    Args:
      biased_router: a balance bias is not zero.
    """
    kinds = set(model.layer_kinds)
    moe = [kind.startswith('moe') for kind in model.layer_kinds]
    plain = (
        model.gmu.kind == 'residual'
        and not (model.gmu.normalizes or model.gmu.adds_embedding or model.gmu.scales_stream)
        and not model.num_averages
        and model.norm_scale == 'plain'
        and not model.value_residual
        and not model.attention_softcap
        and rope.expressible(model.rope)
    )
    if not plain:
        return OURS
    if not any(moe):
        if model.qkv_bias or model.qk_norm:
            both = model.qkv_bias and model.qk_norm
            return OURS if both else 'qwen2' if model.qkv_bias else 'qwen3'
        if len(kinds) > 1:
            return OURS
        # Llama's class refuses other head counts; Mistral's is the same network.
        divides = model.embed_dim % model.num_heads == 0
        return 'llama' if kinds == {'dense'} and divides else 'mistral'
    own = model.moe
    usual = own.scores == 'softmax' and own.scale == 1 and not own.num_shared_experts
    one_window = len({kind.endswith('window') for kind in kinds}) == 1
    dropless = not own.capacity_factor
    if not usual or biased_router or not one_window or not dropless or model.qkv_bias:
        return OURS
    if model.qk_norm:
        return 'qwen3_moe'
    return 'mixtral' if all(moe) and own.renormalize else OURS


def write(name: str, model: config.Model) -> dict[str, Any]:
    """Returns the config.json of a model of a family that has all it has."""
    family = FAMILIES[name]
    kinds, window = model.layer_kinds, model.window
    seen = [kind.endswith('window') for kind in kinds]
    values: dict[str, Any] = {
        'architectures': [family.architecture],
        'model_type': name,
        **sizes(model),
        'hidden_act': 'silu',
        'rms_norm_eps': model.norm_eps,
        **rope.write(model.rope),
    }
    if name != 'llama':
        values['sliding_window'] = window if any(seen) else None
    if family.mixed or name == 'qwen3_moe':
        values['use_sliding_window'] = any(seen)
    if family.mixed:
        types = ['sliding_attention' if window else 'full_attention' for window in seen]
        first = seen.index(True) if any(seen) else len(seen)
        values |= {'layer_types': types, 'max_window_layers': first}
    if family.moe:
        moe, F = model.moe, model.expert_mlp_dim
        values |= {
            family.moe: moe.num_experts,
            'num_experts_per_tok': moe.num_experts_per_token,
            'router_aux_loss_coef': moe.aux_loss,
        }
        if name == 'mixtral':
            values['intermediate_size'] = F
        else:
            dense = [i for i, kind in enumerate(kinds) if not kind.startswith('moe')]
            values |= {
                'moe_intermediate_size': F,
                'norm_topk_prob': moe.renormalize,
                'mlp_only_layers': dense,
                'decoder_sparse_step': 1,
            }
    return values


def sizes(model: config.Model) -> dict[str, Any]:
    """Returns what every config.json says of a model, whatever its family."""
    return {
        'vocab_size': model.vocab_size,
        'hidden_size': model.embed_dim,
        'num_hidden_layers': model.num_layers,
        'num_attention_heads': model.num_heads,
        'num_key_value_heads': model.num_kv_heads,
        'head_dim': model.head_dim,
        'intermediate_size': model.mlp_dim,
        'tie_word_embeddings': model.tied_embeddings,
    }


def upcycled(model: config.Model, num_experts: int, per_token: int) -> config.Model:
    """Returns a dense model whose every MLP has become a mixture of experts.

    Raises:
      UserError: the model has experts already; more of them for a token than there are.
    """
    if any(kind.startswith('moe') for kind in model.layer_kinds):
        raise UserError('--upcycle takes a dense model; this one has mixtures of experts already.')
    sparse = lambda pattern: pattern.replace('dense', 'moe')
    moe = config.MoE(num_experts=num_experts, num_experts_per_token=per_token)
    changes = {'prefix': sparse(model.prefix), 'period': sparse(model.period), 'moe': moe}
    return config.replace(model, changes, 'model.')


def gated(model: config.Model) -> config.Model:
    """Returns the convex GMU network that starts as this residual network."""
    gmu = config.GMU(kind='convex', normalize_output='off')
    return config.replace(model, {'gmu': gmu}, 'model.')
