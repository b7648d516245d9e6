"""Settings of data, optimizer, training, mesh and memory."""

import dataclasses
from typing import Any

from helios_jax.errors import at_least_zero, fraction, one_of, positive, require

# What a saved activation becomes, and those that keep every bit.
EXACT_ACTIONS = ('remat', 'device', 'offload')
ACTIONS = ('', *EXACT_ACTIONS, 'fp8', 'int8', 'fp8+offload', 'int8+offload')
POLICIES = ('none', 'minimal', 'full', 'fp8', 'offload', 'fp8_offload', 'auto')


@dataclasses.dataclass(frozen=True)
class Data:
    corpus: str = 'python_stdlib'  # python_stdlib, a glob or tfds:NAME; a mixture: 'a=0.7,b=0.3'
    tokenizer: str = 'bytes'  # bytes, a tokenizer.json, or a SentencePiece .model
    chat_template: str = ''  # .jinja that renders "messages"; '': the tokenizer's, or a plain one
    row_length: int = 256  # T, tokens
    packing: str = 'best_fit'  # best_fit (documents apart) | concatenate (one stream, all causal)
    validation_fraction: float = 0.02  # share of documents held out, chosen by content
    cache_dir: str = '~/.cache/helios'  # where packed rows are kept; gs:// works
    num_workers: int = 0  # processes that tokenize; 0 takes every core
    allow_lossy_tokenizer: bool = False  # takes text that decoding does not give back, uncounted

    def __post_init__(self) -> None:
        require(self.row_length >= 4, f'data.row_length={self.row_length} must be 4 or more.')
        one_of('data.packing', self.packing, ('best_fit', 'concatenate'))
        require(bool(self.corpus), "data.corpus is empty; name one, such as 'python_stdlib'.")
        require(
            0 < self.validation_fraction < 1,
            f'data.validation_fraction={self.validation_fraction} must lie between 0 and 1.',
        )
        at_least_zero('data', self, 'num_workers')

    @property
    def documents_apart(self) -> bool:
        """True if attention stays within a document; False if a row is one stream."""
        return self.packing == 'best_fit'


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = 'adamw'  # adamw | muon (matrices; the rest takes adamw)
    learning_rate: float = 1e-3  # the peak
    schedule: str = 'cosine'  # after warmup: cosine | wsd (stable, then linear decay)
    warmup_steps: int = 100  # updates of a linear rise, whose first takes the peak / warmup_steps
    decay_fraction: float = 0.2  # share of the updates that wsd decays over
    final_fraction: float = 0.1  # learning rate of the last update, of the peak
    beta1: float = 0.9  # first moment's decay; Muon's momentum is 0.95
    beta2: float = 0.95  # second moment's decay
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; matrices only, never norms, biases, gates, embeddings
    clip_norm: float = 1.0  # global gradient norm; 0 is off
    moments_dtype: str = 'float32'  # dtype of stored moments: float32 | bfloat16

    def __post_init__(self) -> None:
        one_of('optimizer.name', self.name, ('adamw', 'muon'))
        one_of('optimizer.schedule', self.schedule, ('cosine', 'wsd'))
        one_of('optimizer.moments_dtype', self.moments_dtype, ('float32', 'bfloat16'))
        positive('optimizer', self, 'learning_rate', 'eps')
        at_least_zero('optimizer', self, 'warmup_steps', 'weight_decay', 'clip_norm')
        fraction('optimizer', self, 'decay_fraction', 'final_fraction', 'beta1', 'beta2')
        for name in ('beta1', 'beta2'):
            value = getattr(self, name)
            require(value < 1, f'optimizer.{name}={value} must be below 1.')


@dataclasses.dataclass(frozen=True)
class Train:
    num_steps: int = 1000  # optimizer steps
    batch_rows: int = 16  # B, rows of one step, over all devices
    microbatches: int = 1  # pieces of a step's rows, whose gradients add up
    seed: int = 0  # seed of initialisation and of the order of rows
    z_loss: float = 0.0  # weight of the squared log-sum-exp of the logits
    ema: float = 0.0  # decay d of a running average: ema ← d·ema + (1 − d)·θ; 0 is off
    init_from: str = ''  # checkpoint directory whose parameters a new run starts from
    log_every: int = 10  # steps between metric lines
    eval_every: int = 200  # steps between evaluations; 0: at the end only
    eval_rows: int = 256  # rows of one evaluation; 0 takes all
    checkpoint_every: int = 200  # steps between checkpoints; 0: at the end only
    keep_checkpoints: int = 3  # the latest ones; the best is kept besides
    profile_steps: int = 0  # steps to profile, from the tenth on
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    compiler_options: str = ''  # changes to those of a step: NAME=VALUE sets, -NAME drops
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
        require(
            0 <= self.ema < 1,
            f'train.ema={self.ema} must be 0 (off) or a decay below 1, such as 0.999.',
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


def _tensor(axes: str, dtype: str = '') -> Any:
    """Makes a setting of `Actions`, with the facts about its tensor that arch/tensors.py reads.

    Args:
      axes: the tensor's logical axes, which are rows of arch/rules.py.
      dtype: a dtype that it must keep, as rounding would change the function; '' is the compute
        dtype.
    """
    return dataclasses.field(default='', metadata={'axes': tuple(axes.split()), 'dtype': dtype})


# Logical axes that several tensors have. What tensor does not split is stored split by length.
_STREAM = 'batch stored_length stream'
_GATE = 'batch stored_length gate'
_HEADS = 'batch length heads head_dim'


@dataclasses.dataclass(frozen=True)
class Actions:
    """Action on each saved activation, one of `ACTIONS`; '' leaves it to the policy.

    A field is the one row of its tensor: the memory system, the planner and the sharding read it.
    """

    block_input: str = _tensor(
        'batch stored_length streams'
    )  # the stream at a layer's bottom [B T D]; gmu.kind=hyper has n side by side
    attention_input: str = _tensor(_STREAM)  # x̂ of the attention sublayer [B T D]
    q: str = _tensor(_HEADS)  # unrotated queries [B T N H]
    k: str = _tensor('batch length kv_heads head_dim')  # unrotated keys [B T K H]
    v: str = _tensor('batch length kv_heads head_dim')  # values [B T K H]
    attention_output: str = _tensor(_HEADS)  # per head, before the output projection [B T N H]
    log_sum_exp: str = _tensor(
        'batch heads length', 'float32'
    )  # log-sum-exp of each query's logits [B N T]
    attention_update: str = _tensor(_STREAM)  # F(x̂) of the attention sublayer [B T D]
    attention_gate: str = _tensor(_GATE)  # inputs of its gate [B T R], or its logits
    mlp_input: str = _tensor(_STREAM)  # x̂ of the feed-forward sublayer [B T D]
    gate_up: str = _tensor('batch length mlp')  # gate and up [B T F] each; experts' are one
    dispatched: str = _tensor('batch length stream')  # tokens at their experts' devices [B T D]
    expert_input: str = _tensor('batch stream')  # tokens sorted by expert [tokens·X D]
    router_choices: str = _tensor('batch length choices', 'int32')  # chosen experts [B T X]
    mlp_update: str = _tensor(_STREAM)  # F(x̂) of the feed-forward sublayer [B T D]
    mlp_gate: str = _tensor(_GATE)  # inputs of its gate [B T R], or its logits
    final_hidden: str = _tensor(_STREAM)  # the stream below the last norm [B T D]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, action = field.name, getattr(self, field.name)
            one_of(f'memory.actions.{name}', action, ACTIONS)
            require(
                action in ('', *EXACT_ACTIONS) or not field.metadata['dtype'],
                f'memory.actions.{name}={action!r} would round it; choose one of '
                f'{", ".join(EXACT_ACTIONS)}.',
            )


@dataclasses.dataclass(frozen=True)
class Memory:
    policy: str = 'full'  # none (save all) | minimal | full | fp8 | offload | fp8_offload | auto
    optimizer: str = 'device'  # memory of the optimizer's moments: device | host
    parameters: str = 'device'  # memory of the float32 parameters: device | host
    backward_parts: int = 1  # parts in which dense MLPs and gates run backward
    layers: str = 'auto'  # a loop, or each by itself: scan | unrolled | auto (on a GPU, if dense)
    actions: Actions = Actions()

    def __post_init__(self) -> None:
        one_of('memory.policy', self.policy, POLICIES)
        one_of('memory.optimizer', self.optimizer, ('device', 'host'))
        one_of('memory.parameters', self.parameters, ('device', 'host'))
        one_of('memory.layers', self.layers, ('scan', 'unrolled', 'auto'))
        positive('memory', self, 'backward_parts')
        require(
            self.backward_parts == 1 or self.policy != 'none',
            f"memory.backward_parts={self.backward_parts} recomputes, but memory.policy='none' "
            'saves everything; choose another policy, such as full.',
        )

    @property
    def on_host(self) -> bool:
        """True if any of the training state lies on the host."""
        return 'host' in (self.optimizer, self.parameters)
