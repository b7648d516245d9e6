"""Settings of the architecture."""

import dataclasses
import math
from collections import Counter

from helios_jax.config.gmu import GMU
from helios_jax.errors import at_least_zero, one_of, positive, require

MOST_LAYERS = 10_000  # far above any model: what lies beyond is a typing error
LAYER_KINDS = ('dense', 'moe', 'dense_window', 'moe_window')
SCALINGS = ('none', 'static', 'dynamic', 'linear', 'llama3', 'ntk')
ATTENTION = ('tpu', 'cudnn', 'reference')  # kernels/attention has a row for each


@dataclasses.dataclass(frozen=True)
class Rope:
    base: float = 10_000.0  # θ_i = base^(−2i/H)
    scaling: str = 'none'  # none | static, dynamic (YaRN) | linear | llama3 | ntk (dynamic NTK)
    factor: float = 1.0  # s of static, linear and llama3; of ntk the factor of its base; 1 or more
    trained_length: int = 0  # L_train, tokens; 0 takes data.row_length
    ramp: str = 'linear_in_dimension'  # linear_in_dimension | linear_in_rotations (YaRN's paper)
    truncate: bool = True  # linear_in_dimension runs between whole dimensions
    beta_fast: float = 32.0  # rotations over L_train above which a frequency is kept
    beta_slow: float = 1.0  # rotations over L_train below which a frequency is divided by s
    attention_factor: float = 0.0  # m of static YaRN; 0 takes 0.1 ln s + 1

    def __post_init__(self) -> None:
        one_of('model.rope.scaling', self.scaling, SCALINGS)
        one_of('model.rope.ramp', self.ramp, ('linear_in_dimension', 'linear_in_rotations'))
        positive('model.rope', self, 'beta_slow')
        at_least_zero('model.rope', self, 'trained_length', 'attention_factor')
        require(self.base > 1, f'model.rope.base={self.base} must be greater than 1.')
        require(self.factor >= 1, f'model.rope.factor={self.factor} must be 1 or more.')
        require(
            self.beta_fast > self.beta_slow,
            f'model.rope.beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}.',
        )
        require(
            not self.attention_factor or self.scaling == 'static',
            f'model.rope.attention_factor={self.attention_factor} belongs to scaling=static, not '
            f'{self.scaling}; set it to 0.',
        )

    @property
    def grows(self) -> bool:
        """True if the scale belongs to the query and grows with its position."""
        return self.scaling in ('dynamic', 'ntk')

    @property
    def reach(self) -> float:
        """Positions that the frequencies are made for, tokens; those that grow have no end."""
        if self.grows:
            return math.inf
        return self.trained_length * (1.0 if self.scaling == 'none' else self.factor)


@dataclasses.dataclass(frozen=True)
class MoE:
    num_experts: int = 0  # E, of each MoE layer
    num_experts_per_token: int = 2  # X
    mlp_dim: int = 0  # F of one expert; 0 takes model.mlp_dim
    num_shared_experts: int = 0  # experts that every token visits, beside the routed ones
    scores: str = 'softmax'  # the router's scores: softmax | sigmoid
    renormalize: bool = True  # divide the chosen experts' scores by their sum
    scale: float = 1.0  # multiplies the weights of the chosen experts
    balance: str = 'bias'  # keeps the load even: bias (no auxiliary loss) | aux | both | none
    bias_rate: float = 1e-3  # γ, the step of the balance bias
    aux_loss: float = 1e-2  # weight of the load-balance loss
    router_z_loss: float = 1e-3  # weight of the mean squared log-sum-exp of the router's logits
    capacity_factor: float = 0.0  # 0: dropless; above: room for this times the even load

    def __post_init__(self) -> None:
        one_of('model.moe.scores', self.scores, ('softmax', 'sigmoid'))
        one_of('model.moe.balance', self.balance, ('bias', 'aux', 'both', 'none'))
        require(
            self.num_experts == 0 or 1 <= self.num_experts_per_token <= self.num_experts,
            f'model.moe.num_experts_per_token={self.num_experts_per_token} must lie between 1 and '
            f'num_experts={self.num_experts}.',
        )
        at_least_zero(
            'model.moe', self, 'num_experts', 'num_shared_experts', 'mlp_dim', 'capacity_factor'
        )


@dataclasses.dataclass(frozen=True)
class Model:
    vocab_size: int = 0  # V before padding, tokens; 0 takes the tokenizer's
    spare_vocab: int = 0  # of V, those that the tokenizer lacks, as imported models have some
    num_layers: int = 4  # L, at most 10,000
    embed_dim: int = 256  # D
    num_heads: int = 4  # N, query heads
    num_kv_heads: int = 2  # K, key/value heads; must divide N
    head_dim: int = 64  # H, even
    mlp_dim: int = 768  # F, hidden size of a dense layer
    prefix: str = ''  # layers before the period: dense, moe, dense_window, moe_window, by commas
    period: str = 'dense'  # layers that repeat up to num_layers, comma-separated, as in prefix
    window: int = 0  # tokens that a *_window layer sees, itself included
    qk_norm: bool = False  # RMSNorm on queries and keys before rotation
    qkv_bias: bool = False  # biases on the products that give queries, keys and values
    value_residual: bool = False  # mix the first layer's values into every layer's, by two numbers
    attention_softcap: float = 0.0  # c·tanh(logits/c) on attention logits; 0 is off
    tied_embeddings: bool = False  # one matrix for embedding and unembedding
    norm_eps: float = 1e-6  # eps of every RMSNorm
    norm_scale: str = 'plain'  # what a sublayer reads: plain (x̂) | depth (x̂/√l in layer l)
    output_init: str = 'plain'  # a sublayer's last matrix starts: plain | depth (1/√(2L) of it)
    compute_dtype: str = 'bfloat16'  # dtype of matmuls and the stream: bfloat16 | float32
    attention: str = 'auto'  # implementation: auto | tpu | cudnn | reference
    gmu: GMU = GMU()
    rope: Rope = Rope()
    moe: MoE = MoE()

    def __post_init__(self) -> None:
        positive(
            'model', self, 'num_layers', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim',
            'mlp_dim', 'norm_eps',
        )  # fmt: skip
        at_least_zero('model', self, 'vocab_size', 'spare_vocab', 'window', 'attention_softcap')
        require(
            self.num_layers <= MOST_LAYERS,
            f'model.num_layers={self.num_layers} must be at most {MOST_LAYERS}.',
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f'model.num_heads={self.num_heads} must be a multiple of '
            f'model.num_kv_heads={self.num_kv_heads}.',
        )
        require(self.head_dim % 2 == 0, f'model.head_dim={self.head_dim} must be even for RoPE.')
        one_of('model.compute_dtype', self.compute_dtype, ('bfloat16', 'float32'))
        one_of('model.norm_scale', self.norm_scale, ('plain', 'depth'))
        one_of('model.output_init', self.output_init, ('plain', 'depth'))
        one_of('model.attention', self.attention, ('auto', *ATTENTION))
        require(
            self.gmu.gate != 'per_head' or self.embed_dim % self.head_dim == 0,
            f'model.gmu.gate=per_head needs head_dim={self.head_dim} to divide '
            f'embed_dim={self.embed_dim}.',
        )
        require(
            not self.value_residual or self.gmu.kind != 'hyper',
            "model.value_residual=True, but with gmu.kind='hyper' the first layer reads no fixed "
            'stream; choose another kind, or False.',
        )
        require(
            self.gmu.dwa_period <= self.num_layers,
            f'model.gmu.dwa={self.gmu.dwa!r}: the period must be at most '
            f'model.num_layers={self.num_layers}, or nothing is averaged.',
        )
        self._check_layers()

    def _check_layers(self) -> None:
        kinds = self.prefix_kinds + self.period_kinds
        require(bool(self.period_kinds), 'model.period is empty; name at least one layer.')
        for kind in kinds:
            one_of('model.prefix/period: layer', kind, LAYER_KINDS)
        rest = self.num_layers - len(self.prefix_kinds)
        require(
            rest >= 0 and rest % len(self.period_kinds) == 0,
            f'model.num_layers={self.num_layers} less {len(self.prefix_kinds)} prefix layers must '
            f'be a multiple of the period, {len(self.period_kinds)} layers.',
        )
        require(
            self.moe.num_experts > 0 or not any(k.startswith('moe') for k in kinds),
            'model.moe.num_experts=0, but the layer pattern has MoE layers; set it above 0.',
        )
        require(
            self.window > 0 or not any(k.endswith('window') for k in kinds),
            f'model.window={self.window}, but the layer pattern has window layers; set it above 0.',
        )

    @property
    def prefix_kinds(self) -> tuple[str, ...]:
        return tuple(k.strip() for k in self.prefix.split(',') if k.strip())

    @property
    def period_kinds(self) -> tuple[str, ...]:
        return tuple(k.strip() for k in self.period.split(',') if k.strip())

    @property
    def num_periods(self) -> int:
        return (self.num_layers - len(self.prefix_kinds)) // len(self.period_kinds)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Lists the kind of each of the L layers, bottom first."""
        return self.prefix_kinds + self.period_kinds * self.num_periods

    @property
    def kind_counts(self) -> dict[str, int]:
        """Number of layers of each kind that the model has."""
        counts = Counter(self.prefix_kinds)
        for kind in self.period_kinds:
            counts[kind] += self.num_periods
        return {kind: count for kind, count in counts.items() if count}

    @property
    def padded_vocab_size(self) -> int:
        """V, rounded up to a multiple of 256: a size that tiles and shards."""
        return math.ceil(self.vocab_size / 256) * 256

    @property
    def gate_width(self) -> int:
        """Width of a gate's hidden vector: the rank, D, the number of heads, 1, or 0 (static).

        A static gate reads nothing of a token. Of kind=hyper the logits of all coefficients are
        meant: n of pre, n of post, n² of res.
        """
        if self.gmu.kind == 'hyper':
            return self.gmu.streams * (self.gmu.streams + 2)
        D = self.embed_dim
        rank = self.gmu.rank or max(16, D // 64)
        widths = {'low_rank': rank, 'full': D, 'per_head': D // self.head_dim, 'scalar': 1}
        return widths.get(self.gmu.gate, 0)

    @property
    def streams_dim(self) -> int:
        """Width of all streams side by side, n·D."""
        return self.gmu.num_streams * self.embed_dim

    @property
    def num_averages(self) -> int:
        """Number of depth-weighted averages, one behind every `gmu.dwa_period` layers."""
        return self.num_layers // self.gmu.dwa_period if self.gmu.dwa_period else 0

    @property
    def expert_mlp_dim(self) -> int:
        return self.moe.mlp_dim or self.mlp_dim
