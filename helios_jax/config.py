"""Every setting of Helios: frozen dataclasses are the schema, a ConfigDict is the surface.

A config file returns `to_dict(Config(...))`; the command line overrides its fields; `from_dict`
rebuilds the dataclasses, which validate themselves before any device is touched. No field is None:
off is '' or 0. The comment behind a field is what `helios explain FIELD` prints.
"""

import dataclasses
import inspect
import math
import re
from typing import Any

import ml_collections

from helios_jax.errors import UserError, at_least_zero, fraction, nearest, one_of, positive, require

LAYER_KINDS = ('dense', 'moe', 'dense_window', 'moe_window')
ACTIONS = ('', 'remat', 'device', 'offload')
POLICIES = ('none', 'full', 'dots', 'minimal', 'offload')


@dataclasses.dataclass(frozen=True)
class GMU:
    kind: str = 'convex'  # mix: convex | additive | residual | layerscale | rezero | highway
    gate: str = 'low_rank'  # what the gate depends on: low_rank | full | per_head | scalar | static
    rank: int = 0  # r of the low-rank gate; 0 takes max(16, D/64)
    bias: str = 'depth'  # the gate's initial bias: depth (−ln l), or a number such as -3
    normalize_output: str = 'auto'  # mix RMSNorm(u) instead of u: auto (convex alone) | on | off
    layerscale: float = 0.1  # initial λ of kind=layerscale

    def __post_init__(self) -> None:
        one_of(
            'model.gmu.kind',
            self.kind,
            ('convex', 'additive', 'residual', 'layerscale', 'rezero', 'highway'),
        )
        one_of('model.gmu.gate', self.gate, ('low_rank', 'full', 'per_head', 'scalar', 'static'))
        one_of('model.gmu.normalize_output', self.normalize_output, ('auto', 'on', 'off'))
        at_least_zero('model.gmu', self, 'rank')
        if self.bias != 'depth':
            try:
                float(self.bias)
            except ValueError:
                raise UserError(
                    f"model.gmu.bias={self.bias!r} must be 'depth' or a number such as -3."
                ) from None

    @property
    def normalizes(self) -> bool:
        """Whether the sublayer's output is normalised before it is mixed."""
        if self.normalize_output == 'auto':
            return self.kind == 'convex'
        return self.normalize_output == 'on'

    @property
    def has_gate(self) -> bool:
        return self.kind in ('convex', 'additive', 'highway')


@dataclasses.dataclass(frozen=True)
class Rope:
    base: float = 10_000.0  # θ_i = base^(−2i/H)
    scaling: str = 'none'  # YaRN: none | static (fixed s) | dynamic (s grows with the position)
    factor: float = 1.0  # s of static YaRN, 1 or more
    trained_length: int = 0  # L_train, tokens; 0 takes data.row_length
    ramp: str = 'linear_in_dimension'  # linear_in_dimension | linear_in_rotations (YaRN's paper)
    beta_fast: float = 32.0  # rotations over L_train above which a frequency is kept
    beta_slow: float = 1.0  # rotations over L_train below which a frequency is divided by s

    def __post_init__(self) -> None:
        one_of('model.rope.scaling', self.scaling, ('none', 'static', 'dynamic'))
        one_of('model.rope.ramp', self.ramp, ('linear_in_dimension', 'linear_in_rotations'))
        positive('model.rope', self, 'base', 'beta_slow')
        require(self.factor >= 1, f'model.rope.factor={self.factor} must be 1 or more.')
        require(
            self.beta_fast > self.beta_slow,
            f'model.rope.beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}.',
        )


@dataclasses.dataclass(frozen=True)
class MoE:
    num_experts: int = 0  # E, of each MoE layer
    num_experts_per_token: int = 2  # X
    mlp_dim: int = 0  # F of one expert; 0 takes model.mlp_dim
    num_shared_experts: int = 0  # experts that every token visits, beside the routed ones
    scores: str = 'softmax'  # the router's scores: softmax | sigmoid
    scale: float = 1.0  # multiplies the renormalised weights of the chosen experts
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
    num_layers: int = 4  # L
    embed_dim: int = 256  # D
    num_heads: int = 4  # N, query heads
    num_kv_heads: int = 2  # K, key/value heads; must divide N
    head_dim: int = 64  # H, even
    mlp_dim: int = 768  # F, hidden size of a dense layer
    prefix: str = ''  # layers before the period: dense, moe, dense_window, moe_window, by commas
    period: str = 'dense'  # layers that repeat up to num_layers, comma-separated, as in prefix
    window: int = 0  # tokens that a *_window layer sees, itself included
    qk_norm: bool = False  # RMSNorm on queries and keys before rotation
    attention_softcap: float = 0.0  # c·tanh(logits/c) on attention logits; 0 is off
    tied_embeddings: bool = False  # one matrix for embedding and unembedding
    norm_eps: float = 1e-6  # of every RMSNorm
    compute_dtype: str = 'bfloat16'  # of matmuls and the stream: bfloat16 | float32
    attention: str = 'auto'  # implementation: auto | reference | splash | cudnn
    gmu: GMU = GMU()
    rope: Rope = Rope()
    moe: MoE = MoE()

    def __post_init__(self) -> None:
        positive(
            'model', self, 'num_layers', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim',
            'mlp_dim', 'norm_eps',
        )  # fmt: skip
        at_least_zero('model', self, 'vocab_size', 'window', 'attention_softcap')
        require(
            self.num_heads % self.num_kv_heads == 0,
            f'model.num_heads={self.num_heads} must be a multiple of '
            f'model.num_kv_heads={self.num_kv_heads}.',
        )
        require(self.head_dim % 2 == 0, f'model.head_dim={self.head_dim} must be even for RoPE.')
        one_of('model.compute_dtype', self.compute_dtype, ('bfloat16', 'float32'))
        one_of('model.attention', self.attention, ('auto', 'reference', 'splash', 'cudnn'))
        require(
            self.gmu.gate != 'per_head' or self.embed_dim % self.head_dim == 0,
            f'model.gmu.gate=per_head needs head_dim={self.head_dim} to divide '
            f'embed_dim={self.embed_dim}.',
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
        """The kind of each of the L layers, bottom first."""
        return self.prefix_kinds + self.period_kinds * self.num_periods

    @property
    def padded_vocab_size(self) -> int:
        """V up to a multiple of 256: a size that tiles and shards."""
        return math.ceil(self.vocab_size / 256) * 256

    @property
    def gate_rank(self) -> int:
        return self.gmu.rank or max(16, self.embed_dim // 64)

    @property
    def expert_mlp_dim(self) -> int:
        return self.moe.mlp_dim or self.mlp_dim


@dataclasses.dataclass(frozen=True)
class Data:
    corpus: str = 'python_stdlib'  # python_stdlib, a glob or tfds:NAME; a mixture: 'a=0.7,b=0.3'
    tokenizer: str = 'bytes'  # bytes, a tokenizer.json, or a SentencePiece .model
    row_length: int = 256  # T, tokens
    packing: str = 'best_fit'  # best_fit (documents apart) | concatenate (one stream, all causal)
    validation_fraction: float = 0.02  # of documents, chosen by their content
    cache_dir: str = '~/.cache/helios'  # where packed rows are kept; gs:// works
    num_workers: int = 0  # processes that tokenize; 0 takes every core

    def __post_init__(self) -> None:
        require(self.row_length >= 4, f'data.row_length={self.row_length} must be 4 or more.')
        one_of('data.packing', self.packing, ('best_fit', 'concatenate'))
        require(bool(self.corpus), "data.corpus is empty; name one, such as 'python_stdlib'.")
        require(
            0 < self.validation_fraction < 1,
            f'data.validation_fraction={self.validation_fraction} must lie between 0 and 1.',
        )
        at_least_zero('data', self, 'num_workers')


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = 'adamw'  # adamw | muon (matrices; the rest takes adamw)
    learning_rate: float = 1e-3  # the peak
    schedule: str = 'cosine'  # after warmup: cosine | wsd (stable, then linear decay)
    warmup_steps: int = 100  # linear, from 0
    decay_fraction: float = 0.2  # share of the steps that wsd decays over
    final_fraction: float = 0.1  # learning rate at the end, of the peak
    beta1: float = 0.9  # first moment's decay; Muon's momentum is 0.95
    beta2: float = 0.95  # second moment's decay
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; matrices only, never norms, biases, gates, embeddings
    clip_norm: float = 1.0  # global gradient norm; 0 is off
    moments_dtype: str = 'float32'  # of stored moments: float32 | bfloat16

    def __post_init__(self) -> None:
        one_of('optimizer.name', self.name, ('adamw', 'muon'))
        one_of('optimizer.schedule', self.schedule, ('cosine', 'wsd'))
        one_of('optimizer.moments_dtype', self.moments_dtype, ('float32', 'bfloat16'))
        positive('optimizer', self, 'learning_rate', 'eps')
        at_least_zero('optimizer', self, 'warmup_steps', 'weight_decay', 'clip_norm')
        fraction('optimizer', self, 'decay_fraction', 'final_fraction', 'beta1', 'beta2')


@dataclasses.dataclass(frozen=True)
class Train:
    num_steps: int = 1000  # optimizer steps
    batch_rows: int = 16  # B, rows of one step, over all devices
    microbatches: int = 1  # gradient accumulation: parts that a step's rows are cut into
    seed: int = 0  # of initialisation and of the order of rows
    z_loss: float = 0.0  # weight of the squared log-sum-exp of the logits
    init_from: str = ''  # checkpoint directory whose parameters a new run starts from
    log_every: int = 10  # steps between metric lines
    eval_every: int = 200  # steps between evaluations; 0: at the end only
    eval_rows: int = 256  # rows of one evaluation; 0 takes all
    checkpoint_every: int = 200  # steps between checkpoints; 0: at the end only
    keep_checkpoints: int = 3  # the latest ones; the best is kept besides
    profile_steps: int = 0  # steps to profile, from the tenth on
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    compilation_cache: str = '~/.cache/helios/xla'  # directory of compiled programs; '' is off

    def __post_init__(self) -> None:
        positive('train', self, 'num_steps', 'batch_rows', 'microbatches', 'log_every')
        positive('train', self, 'keep_checkpoints')
        require(
            self.batch_rows % self.microbatches == 0,
            f'train.batch_rows={self.batch_rows} must be a multiple of '
            f'train.microbatches={self.microbatches}.',
        )
        at_least_zero(
            'train', self, 'eval_every', 'eval_rows', 'checkpoint_every', 'profile_steps', 'z_loss'
        )


@dataclasses.dataclass(frozen=True)
class Mesh:
    slice: int = 1  # slices joined by the data-centre network
    data: int = 1  # copies of the model, each with rows of its own
    fsdp: int = -1  # rows and parameters split; -1 takes the devices that are left
    expert: int = 1  # experts split; rows split as well
    context: int = 1  # one sequence split
    tensor: int = 1  # heads and hidden units split

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(
                size == -1 or size > 0, f'mesh.{name}={size} must be above 0, or -1 for the rest.'
            )
        require(list(sizes.values()).count(-1) <= 1, f'mesh: only one axis may be -1, got {sizes}.')


@dataclasses.dataclass(frozen=True)
class Actions:
    """What each saved activation becomes: '' (as the policy says) | remat | device | offload."""

    block_input: str = ''  # the stream at a layer's bottom [B T D]
    attention_input: str = ''  # x̂ of the attention sublayer [B T D]
    q: str = ''  # unrotated queries [B T N H]
    k: str = ''  # unrotated keys [B T K H]
    v: str = ''  # values [B T K H]
    attention_output: str = ''  # per head, before the output projection [B T N H]
    attention_update: str = ''  # F(x̂) of the attention sublayer [B T D]
    attention_gate: str = ''  # its gate before the sigmoid [B T D]
    mlp_input: str = ''  # x̂ of the feed-forward sublayer [B T D]
    gate_up: str = ''  # gate and up projections, of dense layers and experts [B T F] each
    dispatched: str = ''  # tokens sorted to experts [tokens·X D]
    router_choices: str = ''  # chosen experts and their weights [B T X]
    mlp_update: str = ''  # F(x̂) of the feed-forward sublayer [B T D]
    mlp_gate: str = ''  # its gate before the sigmoid [B T D]

    def __post_init__(self) -> None:
        for name, action in dataclasses.asdict(self).items():
            one_of(f'memory.actions.{name}', action, ACTIONS)


@dataclasses.dataclass(frozen=True)
class Memory:
    policy: str = 'full'  # preset: none (save all) | full (layer inputs) | dots | minimal | offload
    actions: Actions = Actions()

    def __post_init__(self) -> None:
        one_of('memory.policy', self.policy, POLICIES)


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        rope = self.model.rope
        require(
            rope.scaling != 'dynamic' or self.data.row_length <= (rope.trained_length or math.inf),
            f'model.rope.scaling=dynamic cannot train rows of {self.data.row_length} tokens, more '
            f'than trained_length={rope.trained_length}; use static to train at this length.',
        )

    def resolve(self, vocab_size: int) -> 'Config':
        """Fills what depends on other settings: V from the tokenizer, L_train from the rows."""
        model = self.model
        require(
            model.vocab_size in (0, vocab_size),
            f'model.vocab_size={model.vocab_size} differs from the {vocab_size} tokens of '
            f'data.tokenizer={self.data.tokenizer!r}; set it to 0 or to {vocab_size}.',
        )
        length = model.rope.trained_length or self.data.row_length
        rope = dataclasses.replace(model.rope, trained_length=length)
        model = dataclasses.replace(model, vocab_size=vocab_size, rope=rope)
        return dataclasses.replace(self, model=model)


def to_dict(config: Any) -> ml_collections.ConfigDict:
    """The ConfigDict (locked, type-safe) of a config dataclass."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_dict(values: Any, cls: Any = Config, path: str = 'config') -> Any:
    """Rebuilds and validates the dataclass `cls` from nested mappings.

    Raises:
      UserError: a key that `cls` lacks (with the nearest name), or a value that it refuses.
    """
    require(hasattr(values, 'items'), f'{path} must be a mapping, got {values!r}.')
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        require(key in fields, f'{path}.{key}: no such setting.{nearest(key, fields)}')
        kind: Any = fields[key].type
        if dataclasses.is_dataclass(kind):
            built[key] = from_dict(value, kind, f'{path}.{key}')
        elif kind is float and type(value) is int:
            built[key] = float(value)
        else:
            require(type(value) is kind, f'{path}.{key}={value!r} must be of type {kind.__name__}.')
            built[key] = value
    return cls(**built)


def describe(cls: Any = Config, prefix: str = '') -> dict[str, tuple[str, str]]:
    """Each setting's dotted name → (default, one-line comment), read from this file's source."""
    source = inspect.getsource(cls)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.+)$', source, re.M))
    described: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            described |= describe(field.type, f'{prefix}{field.name}.')
        else:
            described[prefix + field.name] = (repr(field.default), comments[field.name])
    return described
