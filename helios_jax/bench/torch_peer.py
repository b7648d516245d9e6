"""What PyTorch trains on the same card: transformers' Llama of helios_1b's shape.

    helios bench torch_peer --json

torch.compile, scaled dot-product attention, fused AdamW, bfloat16 autocast over float32 parameters,
the loss inside the model: the usual way to train there. Needs torch and transformers, which nothing
else here does. One H100: about a minute to compile, then half a second a step.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from helios_jax.chips import peak_flops
from helios_jax.config import UserError

GIB = 2**30


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser('helios bench torch_peer', description=__doc__.splitlines()[0])
    for name, value, text in (
        ('batch', 8, 'rows a step, B'),
        ('length', 4096, 'tokens a row, T'),
        ('steps', 20, 'steps that are timed'),
        ('warmup', 5, 'steps before them; the first compiles'),
        ('layers', 16, 'L'),
        ('embed', 2048, 'D'),
        ('heads', 16, 'N'),
        ('kv_heads', 4, 'K'),
        ('head', 128, 'H'),
        ('mlp', 8192, 'F'),
        ('vocab', 32768, 'V'),
    ):
        parser.add_argument(f'--{name}', type=int, default=value, help=f'{text} ({value})')
    parser.add_argument('--tokens', default='', help='.npy of token ids to train on; else random')
    parser.add_argument('--device', default='cuda', help='torch device (cuda)')
    parser.add_argument('--checkpointing', action='store_true', help='recompute each layer')
    parser.add_argument('--eager', action='store_true', help='without torch.compile')
    parser.add_argument('--json', action='store_true', help='one line of JSON')
    return parser.parse_args(argv)


def batches(options: argparse.Namespace) -> Iterator[np.ndarray]:
    """Rows [B T] of int64 token ids, from the start again when they run out."""
    size = options.batch * options.length
    if not options.tokens:
        rng = np.random.default_rng(0)
        while True:
            yield rng.integers(options.vocab, size=(options.batch, options.length))
    path = epath.Path(options.tokens)
    if not path.exists():
        raise UserError(f'--tokens={path} is not there; give a .npy file of token ids.')
    with path.open('rb') as file:
        tokens = np.load(file).reshape(-1)
    if tokens.size < size or tokens.dtype.kind not in 'iu' or tokens.max() >= options.vocab:
        raise UserError(
            f'--tokens={path} holds {tokens.size} values of {tokens.dtype}; it needs at least '
            f'{size} token ids below --vocab={options.vocab}.'
        )
    while True:
        for start in range(0, tokens.size - size + 1, size):
            rows = tokens[start : start + size].reshape(options.batch, options.length)
            yield rows.astype(np.int64)


def build(options: argparse.Namespace, torch: Any, transformers: Any) -> Any:
    """The model in float32 on the device."""
    config = transformers.LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.embed,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head,
        max_position_embeddings=options.length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation='sdpa',
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(options.device, torch.float32).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    return model


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains warmup + steps steps; throughput of the latter.

    Raises:
      UserError: torch, transformers or the device is missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f'the PyTorch peer needs torch and transformers ({error}); pip install them.'
        ) from error
    cuda = options.device.startswith('cuda')
    if cuda and not torch.cuda.is_available():
        raise UserError(f'--device={options.device}: torch finds no CUDA device.')
    wait = torch.cuda.synchronize if cuda else lambda: None

    model = build(options, torch, transformers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = model if options.eager else torch.compile(model, dynamic=False)

    def step(rows: np.ndarray) -> Any:
        ids = torch.from_numpy(rows).to(options.device)
        with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    rows = batches(options)
    start = time.perf_counter()
    first_loss = float(step(next(rows)))
    wait()
    compile_seconds = time.perf_counter() - start
    for _ in range(options.warmup - 1):
        step(next(rows))
    wait()
    start = time.perf_counter()
    for _ in range(options.steps):
        loss = step(next(rows))
    wait()
    seconds = time.perf_counter() - start
    loss = float(loss)
    if not math.isfinite(loss):
        raise UserError(
            f'the peer diverged: loss {loss} after {first_loss}; its time says nothing.'
        )

    parameters = sum(p.numel() for p in model.parameters())
    tokens_per_second = options.steps * options.batch * options.length / seconds
    flops_per_token = 6 * (parameters - options.vocab * options.embed)
    flops_per_token += 6 * options.layers * options.length * options.heads * options.head
    hardware = torch.cuda.get_device_name() if cuda else options.device
    mfu = tokens_per_second * flops_per_token / peak_flops(hardware)
    return {
        'tokens_per_second': tokens_per_second,
        'mfu': mfu if math.isfinite(mfu) else None,
        'tflops_per_second': tokens_per_second * flops_per_token / 1e12,
        'step_seconds': seconds / options.steps,
        'peak_memory_gib': torch.cuda.max_memory_allocated() / GIB if cuda else None,
        'compile_seconds': compile_seconds,
        'first_loss': first_loss,
        'last_loss': loss,
        'parameters': parameters,
        'batch': options.batch,
        'length': options.length,
        'steps': options.steps,
        'checkpointing': options.checkpointing,
        'compiled': not options.eager,
        'tokens': options.tokens or 'random',
        'torch': torch.__version__,
        'transformers': transformers.__version__,
        'cuda': torch.version.cuda,
        'hardware': hardware,
    }


def main(argv: Sequence[str]) -> None:
    options = arguments(argv)
    result = measure(options)
    if options.json:
        print(json.dumps(result), flush=True)
        return
    for name, value in result.items():
        print(f'{name}: {value:.6g}' if isinstance(value, float) else f'{name}: {value}')
