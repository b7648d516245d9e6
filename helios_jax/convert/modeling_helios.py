"""Helios for transformers: one file of PyTorch that an exported directory carries.

transformers loads it with `trust_remote_code=True`; helios_jax itself never imports it. The
equations are those of helios_jax's docs/semantics.md. Losses that balance experts are not in it.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name of the cache in a model's output, which transformers 5.24 has changed.
CACHE = 'cache' if 'cache' in CausalLMOutputWithPast.__dataclass_fields__ else 'past_key_values'


class HeliosConfig(PreTrainedConfig):
    """Settings of `helios_jax.config.Model` as `helios`, and what transformers asks every model."""

    model_type = 'helios'

    helios: dict | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) over the last axis, in float32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class HeliosNorm(nn.Module):
    """RMSNorm with a learnt scale, and one that stays."""

    def __init__(self, dim: int, eps: float, factor: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.factor = eps, factor

    def forward(self, x: Tensor) -> Tensor:
        return (normalize(x, self.eps) * (self.factor * wide(self.weight))).to(x.dtype)


def layer_kinds(model: dict[str, Any]) -> list[str]:
    prefix, period = (
        [kind.strip() for kind in model[name].split(',') if kind.strip()]
        for name in ('prefix', 'period')
    )
    return prefix + period * ((model['num_layers'] - len(prefix)) // len(period))


def input_eps(model: dict[str, Any], index: int) -> float:
    """Eps of the norm below sublayer `index`, from 1: it follows the stream's scale."""
    follows = model['gmu']['kind'] == 'convex' and model['gmu']['bias'] == 'depth'
    return model['norm_eps'] / index**2 if follows else model['norm_eps']


def averaged(gmu: dict[str, Any], num_layers: int) -> dict[int, range]:
    """Layer → outputs that are averaged behind it, 0 the embedding's (DenseFormer)."""
    if gmu['dwa'] == 'off':
        return {}
    k, p = map(int, gmu['dwa'].split('x'))
    return {i: range(i % k, i + 1, k) for i in range(p, num_layers + 1, p)}


def frequencies(rope: dict[str, Any], head_dim: int, factor: float) -> Tensor:
    """Rotary frequencies for a scale factor, float64."""
    half = torch.arange(head_dim // 2, dtype=torch.float64)
    base, scaling, length = rope['base'], rope['scaling'], rope['trained_length']
    if scaling == 'ntk' and head_dim > 2:
        base *= (rope['factor'] * factor - rope['factor'] + 1) ** (head_dim / (head_dim - 2))
    theta = base ** (-2 * half / head_dim)
    if factor == 1 or scaling == 'ntk':
        return theta
    if scaling == 'linear':
        return theta / factor
    fast, slow = rope['beta_fast'], rope['beta_slow']
    if scaling == 'llama3' or rope['ramp'] == 'linear_in_rotations':
        keep = (length * theta / (2 * math.pi) - slow) / (fast - slow)
    else:
        low, high = (
            head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (fast, slow)
        )
        if rope['truncate']:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        keep = 1 - (half - low) / max(high - low, 0.001)
    keep = keep.clamp(0, 1)
    return (1 - keep) * theta / factor + keep * theta


def tables(rope: dict[str, Any], head_dim: int, length: int) -> list[tuple[Tensor, float]]:
    """Frequencies and the queries' factor of each bucket of positions below `length`."""
    factors = [1.0 if rope['scaling'] == 'none' else rope['factor']]
    if rope['scaling'] in ('dynamic', 'ntk'):
        buckets = math.ceil(math.log2(max(1, length / rope['trained_length'])))
        factors = [float(2**c) for c in range(buckets + 1)]
    found = []
    for s in factors:
        m = 1.0
        if rope['scaling'] in ('static', 'dynamic'):
            m = rope['attention_factor'] or (0.1 * math.log(s) + 1 if s > 1 else 1.0)
        found.append((frequencies(rope, head_dim, s).float(), m * m))
    return found


def rotate(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Turns heads [B, N, T, H] by their positions [B, T], in float32."""
    angles = (positions[..., None].to(table.dtype) * table)[:, None]
    low, high = wide(x).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class HeliosAttention(nn.Module):
    def __init__(self, model: dict[str, Any], window: int, layer: int):
        super().__init__()
        self.model, self.window, self.layer = model, window, layer
        D, N, K = model['embed_dim'], model['num_heads'], model['num_kv_heads']
        H, bias = model['head_dim'], model['qkv_bias']
        self.q_proj = nn.Linear(D, N * H, bias=bias)
        self.k_proj = nn.Linear(D, K * H, bias=bias)
        self.v_proj = nn.Linear(D, K * H, bias=bias)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        if model['value_residual']:
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))
        if model['qk_norm']:
            self.q_norm, self.k_norm = (HeliosNorm(H, model['norm_eps']) for _ in range(2))

    def heads(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], -1, self.model['head_dim']).transpose(1, 2)

    def forward(
        self, x: Tensor, first_values: Tensor | None, positions: Tensor, real: Tensor, cache: Any
    ) -> Tensor:
        """Causal attention.

        Args:
          first_values: those of the first layer, where every layer mixes them with its own.
          positions: [B, S] of every token, those in the cache included.
          real: [B, S], False for padding.
          cache: holds keys before rotation, which depends on the query; None: there is none.
        """
        B, T, _ = x.shape
        q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if first_values is not None:
            own, first = wide(self.value_mix)
            v = (own * wide(v) + first * wide(first_values)).to(v.dtype)
        if self.model['qk_norm']:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        S = k.shape[2]
        index = torch.arange(S, device=x.device)
        distance = index[S - T :, None] - index[None]
        seen = (distance >= 0) & ((distance < self.window) if self.window else True)
        seen = seen[None, None] & real[:, None, None]
        rope, own = self.model['rope'], positions[:, S - T :]
        found = tables(rope, self.model['head_dim'], S)
        edges = rope['trained_length'] * 2 ** torch.arange(len(found) - 1, device=x.device)
        buckets = torch.bucketize(own.contiguous(), edges, right=True)
        out = torch.zeros_like(q)
        for bucket, (table, scale) in enumerate(found):
            mine = (buckets == bucket)[:, None, :, None]
            if len(found) == 1 or bool(mine.any()):
                turned = self.attend(q, k, v, own, positions, seen, table.to(x.device), scale)
                out = torch.where(mine, turned, out)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Tensor,
        positions: Tensor,
        seen: Tensor,
        table: Tensor,
        scale: float,
    ) -> Tensor:
        groups, cap = q.shape[1] // k.shape[1], self.model['attention_softcap']
        queries = rotate(q, own, table) * scale
        keys = rotate(k, positions, table)
        keys, values = (y.repeat_interleave(groups, dim=1) for y in (keys, v))
        logits = wide(queries.to(q.dtype) @ keys.to(q.dtype).transpose(2, 3)) / math.sqrt(
            q.shape[-1]
        )
        if cap:
            logits = cap * torch.tanh(logits / cap)
        # Finite, so that a padding token, which sees nothing, gives no NaN.
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
        return weights.to(v.dtype) @ values


class HeliosMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, D: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(wide(self.gate_proj(x))).to(x.dtype) * self.up_proj(x))


class HeliosRouter(nn.Module):
    def __init__(self, D: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, D))
        self.register_buffer('balance_bias', torch.zeros(num_experts))


class HeliosExperts(nn.Module):
    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.moe = model['moe']
        D, E = model['embed_dim'], self.moe['num_experts']
        hidden = self.moe['mlp_dim'] or model['mlp_dim']
        self.gate = HeliosRouter(D, E)
        self.experts = nn.ModuleList(HeliosMLP(D, hidden) for _ in range(E))
        if self.moe['num_shared_experts']:
            self.shared = HeliosMLP(D, hidden * self.moe['num_shared_experts'])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        logits = F.linear(wide(flat), wide(self.gate.weight))
        scores = logits.softmax(-1) if self.moe['scores'] == 'softmax' else logits.sigmoid()
        biased = scores.detach() + wide(self.gate.get_buffer('balance_bias'))
        choices = biased.topk(self.moe['num_experts_per_token'], dim=-1).indices
        weights = scores.gather(-1, choices)
        if self.moe['renormalize']:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = self.moe['scale'] * weights
        out = torch.zeros_like(wide(flat))
        for number, expert in enumerate(self.experts):
            tokens, slots = (choices == number).nonzero(as_tuple=True)
            if len(tokens):
                each = weights[tokens, slots, None] * wide(expert(flat[tokens]))
                out = out.index_add(0, tokens, each)
        out = out.to(x.dtype)
        if self.moe['num_shared_experts']:
            out = out + self.shared(flat)
        return out.view_as(x)


class HeliosGatedMemoryUnit(nn.Module):
    """y = x + g ⊙ (û − x), and the other ways to join a sublayer's output to the stream."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.gmu, self.eps, self.dim = model['gmu'], model['norm_eps'], model['embed_dim']
        D, kind, gate = self.dim, self.gmu['kind'], self.gmu['gate']
        normalizes = {'auto': kind == 'convex', 'on': True, 'off': False}
        self.normalizes = normalizes[self.gmu['normalize_output']]
        if self.normalizes:
            self.output_norm = HeliosNorm(D, self.eps)
        self.has_gate = kind in ('convex', 'additive', 'highway')
        self.sees: tuple[str, ...] = ()
        if self.gmu['embedding'] == 'on':
            self.embedding = nn.Parameter(torch.zeros(1))
        if self.gmu['stream_scale'] == 'on':
            self.stream_scale = nn.Parameter(torch.ones(1))
        if kind in ('layerscale', 'rezero'):
            self.scale = nn.Parameter(torch.zeros(D if kind == 'layerscale' else 1))
        if not self.has_gate:
            return
        width = {
            'low_rank': self.gmu['rank'] or max(16, D // 64),
            'full': D,
            'per_head': D // model['head_dim'],
            'scalar': 1,
            'static': D,
        }[gate]
        if gate != 'static':
            both = ('input', 'output')
            sees = 'input' if kind == 'highway' else self.gmu['gate_input']
            self.sees = both if sees == 'both' else (sees,)
        for name in self.sees:
            self.add_module(f'from_{name}', nn.Linear(D, width, bias=False))
        if gate == 'low_rank':
            self.out = nn.Linear(width, D, bias=False)
        self.bias = nn.Parameter(torch.zeros(D if gate == 'low_rank' else width))

    def forward(self, x: Tensor, x_hat: Tensor, update: Tensor, x_0: Tensor) -> Tensor:
        gate = self.opened(x_hat, update)
        if self.normalizes:
            update = self.output_norm(update)
        stream, update = wide(x), wide(update)
        if self.gmu['kind'] in ('convex', 'highway'):
            update = update - stream
        if self.gmu['stream_scale'] == 'on':
            stream = wide(self.stream_scale) * stream
        stream = stream + gate * update
        if self.gmu['embedding'] == 'on':
            stream = stream + wide(self.embedding) * wide(x_0)
        return stream.to(x.dtype)

    def opened(self, x_hat: Tensor, update: Tensor) -> Any:
        """g, or the factor in its place."""
        if self.gmu['kind'] in ('layerscale', 'rezero'):
            return wide(self.scale)
        if not self.has_gate:
            return 1.0
        logits: Any = 0.0
        if 'input' in self.sees:
            logits = self.get_submodule('from_input')(x_hat)
        if 'output' in self.sees:
            logits = logits + self.get_submodule('from_output')(
                normalize(update, self.eps).to(update.dtype)
            )
        if self.gmu['gate'] == 'low_rank':
            logits = self.out(logits)
        gate = torch.sigmoid((wide(logits) if self.sees else 0.0) + wide(self.bias))
        width = gate.shape[-1]
        return gate.repeat_interleave(self.dim // width, -1) if 1 < width < self.dim else gate


class HeliosLayer(nn.Module):
    def __init__(self, model: dict[str, Any], kind: str, number: int):
        super().__init__()
        D = model['embed_dim']
        window = model['window'] if kind.endswith('window') else 0
        factor = (number + 1) ** -0.5 if model['norm_scale'] == 'depth' else 1.0
        self.input_layernorm = HeliosNorm(D, input_eps(model, 2 * number + 1), factor)
        self.self_attn = HeliosAttention(model, window, number)
        self.attention_gmu = HeliosGatedMemoryUnit(model)
        self.post_attention_layernorm = HeliosNorm(D, input_eps(model, 2 * number + 2), factor)
        moe = kind.startswith('moe')
        self.mlp = HeliosExperts(model) if moe else HeliosMLP(D, model['mlp_dim'])
        self.mlp_gmu = HeliosGatedMemoryUnit(model)

    def forward(
        self,
        x: Tensor,
        x_0: Tensor,
        first_values: Tensor | None,
        positions: Tensor,
        real: Tensor,
        cache: Any,
    ) -> Tensor:
        x_hat = self.input_layernorm(x)
        update = self.self_attn(x_hat, first_values, positions, real, cache)
        x = self.attention_gmu(x, x_hat, update, x_0)
        x_hat = self.post_attention_layernorm(x)
        return self.mlp_gmu(x, x_hat, self.mlp(x_hat), x_0)

    def values(self, x: Tensor) -> Tensor:
        return self.self_attn.heads(self.self_attn.v_proj(self.input_layernorm(x)))


class HeliosPreTrainedModel(PreTrainedModel):
    config_class = HeliosConfig
    base_model_prefix = 'model'
    _no_split_modules: ClassVar = ['HeliosLayer']


class HeliosModel(HeliosPreTrainedModel):
    def __init__(self, config: HeliosConfig):
        super().__init__(config)
        model: Any = config.helios
        kinds = layer_kinds(model)
        self.embed_tokens = nn.Embedding(config.vocab_size, model['embed_dim'])
        self.layers = nn.ModuleList(HeliosLayer(model, kind, i) for i, kind in enumerate(kinds))
        self.norm = HeliosNorm(model['embed_dim'], input_eps(model, 2 * len(kinds) + 1))
        self.averaged = averaged(model['gmu'], len(kinds))
        if self.averaged:
            terms = sum(len(outputs) for outputs in self.averaged.values())
            self.depth_weights = nn.Parameter(torch.zeros(terms))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tensor:
        B, T = input_ids.shape
        S = T + (cache.get_seq_length() if cache is not None else 0)
        real = torch.ones(B, S, dtype=torch.bool, device=input_ids.device)
        if attention_mask is not None:
            real = attention_mask.bool()
        if position_ids is not None and S == T:
            positions = position_ids.expand(B, T)
        else:
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        x = x_0 = self.embed_tokens(input_ids)
        first_values = None
        if self.config.helios['value_residual']:
            first: Any = self.layers[0]
            first_values = first.values(x_0)
        outputs, terms = [x_0], 0
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x, x_0, first_values, positions, real, cache)
            outputs += [x] if self.averaged else []
            if taken := self.averaged.get(i):
                weights = wide(self.depth_weights[terms : terms + len(taken)])
                x = sum(w * wide(outputs[j]) for w, j in zip(weights, taken, strict=True)).to(
                    x.dtype
                )
                terms += len(taken)
        return self.norm(x)


class HeliosForCausalLM(HeliosPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar = {'lm_head.weight': 'model.embed_tokens.weight'}

    def __init__(self, config: HeliosConfig):
        super().__init__(config)
        self.model = HeliosModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the mean loss over `labels` (shifted here), and the cache.

        Args:
          attention_mask: [B, S], 0 for padding, the tokens of the cache included.
          position_ids: [B, T]; with a cache positions follow from the mask.
          cache: transformers' `DynamicCache`; `past_key_values` is its name of old.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        hidden = self.model(input_ids, attention_mask, position_ids, cache)
        kept: Any = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept, None) if kept else slice(None)
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
