"""PyTorch's training on several cards: FSDP2 around each layer of the peer's model.

As torchtitan trains: one process a card, `fully_shard` for each layer, parameters gathered in
bfloat16, gradients summed in float32, torch.compile for each layer and for the loss, fused AdamW.
"""

import dataclasses
import datetime
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from helios_jax.bench import torch_peer
from helios_jax.bench.torch_peer import GIB, Peer
from helios_jax.errors import UserError, require

JOIN_SECONDS = 60.0  # that a process may wait for the others
LAYER_FORMS = 64  # compiled forms of a layer's code, of which torch keeps 8


def measure_fsdp(values: dict[str, Any], num_devices: int, seconds: float) -> dict[str, Any]:
    """Trains on each of the first devices, and measures the steps after the warm-up.

    Args:
      values: a value for each field of Peer; `batch` is the rows of one device.
      seconds: after which all processes are killed.
    Raises:
      UserError: torch or a device is missing; a process failed or did not end in time; the loss is
        not finite.
    """
    peer = Peer(**values)
    try:
        import torch
        import torch.multiprocessing
    except ImportError as error:
        raise UserError(f'PyTorch is missing ({error}); pip install torch transformers.') from error
    there = torch.cuda.device_count() if peer.device == 'cuda' else num_devices
    require(there >= num_devices, f'torch finds {there} CUDA devices, not {num_devices}.')
    with tempfile.TemporaryDirectory() as folder:
        given = (dataclasses.asdict(peer), num_devices, folder)
        context = torch.multiprocessing.spawn(work, given, num_devices, join=False)
        assert context is not None
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1.0):
                require(time.monotonic() < deadline, f'FSDP2 took more than {seconds:.0f} seconds.')
        except (
            torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException,
        ) as error:
            raise UserError(str(error).strip().splitlines()[-1]) from error
        finally:
            for process in context.processes:
                process.kill()
        found: dict[str, Any] = json.loads((Path(folder) / 'result.json').read_text())
    loss = found['last_loss']
    require(math.isfinite(loss), f'FSDP2 diverged: loss {loss}; its time says nothing.')
    return found


def work(rank: int, values: dict[str, Any], num_devices: int, folder: str) -> None:
    """Trains as one of the processes; the first writes the figures."""
    import torch
    import torch.distributed
    import transformers

    peer = Peer(**values)
    cuda = peer.device == 'cuda'
    if cuda:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        'nccl' if cuda else 'gloo',
        init_method=f'file://{folder}/rendezvous',
        rank=rank,
        world_size=num_devices,
        timeout=datetime.timedelta(seconds=JOIN_SECONDS),
    )
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch._dynamo.config.recompile_limit = LAYER_FORMS
    model = torch_peer.build(peer, torch, transformers)
    parameters = sum(p.numel() for p in model.parameters())
    shard(model, peer, num_devices, torch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.from_numpy(next(torch_peer.batches(peer))).to(peer.device)

    def steps(count: int) -> tuple[float, Any]:
        wait()
        torch.distributed.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - begin, loss.detach()

    compile_seconds, first = steps(1)
    steps(peer.warmup)
    seconds, last = steps(peer.steps)
    hardware = torch.cuda.get_device_name() if cuda else peer.device
    peak = torch.tensor(torch.cuda.max_memory_allocated() / GIB if cuda else 0.0).to(peer.device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if rank == 0:
        figures = torch_peer.speed(peer, parameters, seconds, hardware)
        found = {
            'step_ms': 1e3 * seconds / peer.steps,
            'card_tokens_per_second': figures['tokens_per_second'],
            'mfu': figures['mfu'],
            'peak_gib': float(peak),
            'compile_seconds': compile_seconds,
            'steps': peer.steps,
            'first_loss': float(first),
            'last_loss': float(last),
            'parameters': parameters,
            'checkpointing': peer.checkpointing,
            'device': hardware,
            'torch': torch.__version__,
            'transformers': transformers.__version__,
        }
        (Path(folder) / 'result.json').write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def shard(model: Any, peer: Peer, num_devices: int, torch: Any) -> None:
    """Compiles each layer and the loss, and shards the parameters over the processes.

    A layer's `forward` alone is compiled, so that FSDP2's hooks run around it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    how: dict[str, Any] = {
        'mesh': init_device_mesh(peer.device, (num_devices,)),
        'mp_policy': precision,
    }
    compiled = (lambda f: f) if peer.eager else lambda f: torch.compile(f, dynamic=False)
    for layer in model.model.layers:
        layer.forward = compiled(layer.forward)
        fully_shard(layer, **how)
    model.loss_function = compiled(model.loss_function)
    fully_shard(model, **how)
