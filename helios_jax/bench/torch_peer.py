"""Measures PyTorch's training speed on the same card: transformers' Llama, or its Qwen3-MoE.

    helios bench torch_peer --json
    helios bench torch_peer --experts=64 --layers=8 --heads=32 --json

It trains the usual way there: torch.compile, scaled dot-product attention, fused AdamW, bfloat16
autocast over float32 parameters, the loss inside the model. With experts, parameters and their
state are bfloat16: transformers' grouped experts compile in no other dtype. Needs torch and
transformers, which nothing else here does. One H100 takes about a minute to compile, then half a
second a step.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from helios_jax import config, options
from helios_jax.chips import peak_flops
from helios_jax.errors import UserError, require

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Peer:
    """Shape and settings of PyTorch's training, by default helios_1b's; each field is a flag."""

    batch: int = 8  # Rows a step, B.
    length: int = 4096  # Tokens a row, T.
    steps: int = 20  # Steps that are timed.
    warmup: int = 5  # Steps before them; the first compiles.
    layers: int = 16  # Layers, L.
    embed: int = 2048  # Width of the stream, D.
    heads: int = 16  # Query heads, N.
    kv_heads: int = 4  # Key heads, K; must divide N.
    head: int = 128  # Width of a head, H.
    mlp: int = 8192  # Hidden width of the MLP, or of an expert, F.
    experts: int = 0  # Experts of each layer, E; 0: one dense MLP.
    chosen: int = 8  # Experts that a token visits, X.
    vocab: int = 32768  # Tokens of the vocabulary, V.
    tokens: str = ''  # File of token ids (.npy) to train on; none: random ones.
    device: str = 'cuda'  # Device, by its name in torch.
    checkpointing: bool = False  # Recompute each layer in the backward pass.
    eager: bool = False  # Leave out torch.compile.

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == 'experts' else 1
            require(
                type(value) is not int or value >= least,
                f'--{name}={value} must be at least {least}.',
            )
        require(
            self.heads % self.kv_heads == 0,
            f'--kv_heads={self.kv_heads} must divide --heads={self.heads}.',
        )
        require(
            not self.experts or self.chosen <= self.experts,
            f'--chosen={self.chosen} must be at most --experts={self.experts}.',
        )

    @property
    def batch_tokens(self) -> int:
        return self.batch * self.length

    def flops_per_token(self, parameters: int) -> int:
        """Counts FLOPs of a training step: 6 a weight, and attention without its masked half.

        Args:
          parameters: all of the model's, the embedding included.
        """
        idle = max(0, self.experts - self.chosen) * 3 * self.embed * self.mlp
        matmuls = parameters - self.vocab * self.embed - self.layers * idle
        return 6 * matmuls + 6 * self.layers * self.length * self.heads * self.head


def same_shape(cfg: config.Config) -> Peer:
    """Describes PyTorch's training of a config's shape.

    Raises:
      UserError: the model has what neither Llama nor Qwen3-MoE has, or no vocabulary.
    """
    model, moe = cfg.model, cfg.model.moe
    kinds = set(model.layer_kinds)
    require(model.vocab_size > 0, '--peer: model.vocab_size=0; set it for PyTorch, above 0.')
    require(
        kinds in ({'dense'}, {'moe'}) and not (model.attention_softcap or moe.num_shared_experts),
        f'--peer: PyTorch has no model of layers {", ".join(sorted(kinds))} with softcap '
        f'{model.attention_softcap} and {moe.num_shared_experts} shared experts; leave it out.',
    )
    sizes: dict[str, Any] = {'mlp': model.mlp_dim}
    if kinds == {'moe'}:
        sizes = {'mlp': model.expert_mlp_dim, 'experts': moe.num_experts}
        sizes['chosen'] = moe.num_experts_per_token
    return Peer(
        batch=cfg.train.batch_rows,
        length=cfg.data.row_length,
        layers=model.num_layers,
        embed=model.embed_dim,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head=model.head_dim,
        vocab=model.vocab_size,
        **sizes,
    )


def batches(peer: Peer) -> Iterator[np.ndarray]:
    """Yields rows [B T] of int64 token ids, from the start again when they run out.

    Raises:
      UserError: the file of tokens is not there, too short, or holds no ids below V.
    """
    size = peer.batch_tokens
    if not peer.tokens:
        rng = np.random.default_rng(0)
        while True:
            yield rng.integers(peer.vocab, size=(peer.batch, peer.length))
    path = epath.Path(peer.tokens)
    if not path.exists():
        raise UserError(f'--tokens={path} is not there; give a .npy file of token ids.')
    try:
        with path.open('rb') as file:
            tokens = np.load(file).reshape(-1)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f'--tokens={path} cannot be read as a .npy file: {error}') from error
    fits = tokens.size >= size and tokens.dtype.kind in 'iu'
    if not fits or tokens.min() < 0 or tokens.max() >= peer.vocab:
        raise UserError(
            f'--tokens={path} holds {tokens.size} values of {tokens.dtype}; it needs at least '
            f'{size} token ids from 0 and below --vocab={peer.vocab}.'
        )
    while True:
        for start in range(0, tokens.size - size + 1, size):
            rows = tokens[start : start + size].reshape(peer.batch, peer.length)
            yield rows.astype(np.int64)


def build(peer: Peer, torch: Any, transformers: Any) -> Any:
    """Makes the model on the device, in float32, or in bfloat16 if it has experts."""
    settings = {
        'vocab_size': peer.vocab,
        'hidden_size': peer.embed,
        'intermediate_size': peer.mlp,
        'num_hidden_layers': peer.layers,
        'num_attention_heads': peer.heads,
        'num_key_value_heads': peer.kv_heads,
        'head_dim': peer.head,
        'max_position_embeddings': peer.length,
        'tie_word_embeddings': False,
        'use_cache': False,
        'attn_implementation': 'sdpa',
    }
    torch.manual_seed(0)
    with torch.device(peer.device):
        if peer.experts:
            settings |= {
                'num_experts': peer.experts,
                'num_experts_per_tok': peer.chosen,
                'moe_intermediate_size': peer.mlp,
                'norm_topk_prob': True,
                'experts_implementation': 'grouped_mm',
            }
            described = transformers.Qwen3MoeConfig(**settings)
            model = transformers.Qwen3MoeForCausalLM(described)
            # A router of zeros, which transformers begins with, sends all tokens one way.
            for layer in model.model.layers:
                torch.nn.init.normal_(layer.mlp.gate.weight, std=peer.embed**-0.5)
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model = model.to(peer.device, torch.bfloat16 if peer.experts else torch.float32).train()
    if peer.checkpointing:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    return model


def measure_peer(values: dict[str, Any]) -> dict[str, Any]:
    """Trains warmup + steps steps, and measures the throughput of the latter.

    Args:
      values: a value for each field of Peer.
    Raises:
      UserError: torch, transformers or the device is missing; the loss is not finite.
    """
    peer = Peer(**values)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f'the PyTorch peer needs torch and transformers ({error}); pip install them.'
        ) from error
    cuda = peer.device.startswith('cuda')
    if cuda and not torch.cuda.is_available():
        raise UserError(f'--device={peer.device}: torch finds no CUDA device.')
    wait = torch.cuda.synchronize if cuda else lambda: None

    model = build(peer, torch, transformers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    called = model if peer.eager else torch.compile(model, dynamic=False)

    def step(rows: np.ndarray) -> Any:
        ids = torch.from_numpy(rows).to(peer.device)
        with torch.autocast(torch.device(peer.device).type, dtype=torch.bfloat16):
            loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    rows = batches(peer)
    start = time.perf_counter()
    first_loss = float(step(next(rows)))
    wait()
    compile_seconds = time.perf_counter() - start
    for _ in range(peer.warmup - 1):
        step(next(rows))
    wait()
    start = time.perf_counter()
    for _ in range(peer.steps):
        loss = step(next(rows))
    wait()
    seconds = time.perf_counter() - start
    last_loss = float(loss)
    require(
        math.isfinite(last_loss),
        f'the peer diverged: loss {last_loss} after {first_loss}; its time says nothing.',
    )

    parameters = sum(p.numel() for p in model.parameters())
    hardware = torch.cuda.get_device_name() if cuda else peer.device
    return {
        **speed(peer, parameters, seconds, hardware),
        'peak_memory_gib': torch.cuda.max_memory_allocated() / GIB if cuda else None,
        'compile_seconds': compile_seconds,
        'first_loss': first_loss,
        'last_loss': last_loss,
        'parameters': parameters,
        'batch': peer.batch,
        'length': peer.length,
        'steps': peer.steps,
        'checkpointing': peer.checkpointing,
        'compiled': not peer.eager,
        'tokens': peer.tokens or 'random',
        'torch': torch.__version__,
        'transformers': transformers.__version__,
        'cuda': torch.version.cuda,
        'hardware': hardware,
    }


def speed(peer: Peer, parameters: int, seconds: float, hardware: str) -> dict[str, float | None]:
    """Computes throughput and MFU of the timed steps; MFU is None on hardware of unknown peak."""
    tokens_per_second = peer.steps * peer.batch_tokens / seconds
    flops_per_second = tokens_per_second * peer.flops_per_token(parameters)
    mfu = flops_per_second / peak_flops(hardware)
    return {
        'tokens_per_second': tokens_per_second,
        'mfu': mfu if math.isfinite(mfu) else None,
        'tflops_per_second': flops_per_second / 1e12,
        'step_seconds': seconds / peer.steps,
    }


def print_measurement(peer: Peer, *, as_json: bool) -> None:
    """Measures the peer and prints the figures."""
    figures = measure_peer(dataclasses.asdict(peer))
    if as_json:
        print(options.to_json(figures), flush=True)
        return
    for name, value in figures.items():
        print(f'{name}: {value:.6g}' if isinstance(value, float) else f'{name}: {value}')
