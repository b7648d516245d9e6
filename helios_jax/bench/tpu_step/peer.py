"""MaxText's train step of a config's shape: its settings, its program, its kernels' time."""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helios_jax import config
from helios_jax.bench.attention import jax_splash
from helios_jax.bench.attention.problem import Problem
from helios_jax.bench.attention.task import Task, run
from helios_jax.errors import UserError, require
from helios_jax.parallel.compiler_options import STEP, of_table
from helios_jax.plan.compiler import predicted
from helios_jax.plan.compiler.program import Instruction

SCRIPT = Path(__file__).with_name('maxtext_step.py')
# What MaxText 0.2.5 sets itself: for v5e src/maxtext/configs/tpu/v5e/llama2_7b.sh, for v5p
# v5p/32b.sh, for v6e its benchmark llama3_1_8b_8192. Left out on v5p and v6e is the fusion of
# asynchronous collectives, since libtpu refuses that of all-gathers there from jax 0.12 on, and on
# v6e what is for transfers to the host, of which full rematerialisation has none.
DATA_PARALLEL = (
    'xla_tpu_enable_data_parallel_all_reduce_opt=true '
    'xla_tpu_data_parallel_opt_different_sized_ops=true'
)
SPARSE_CORES = (
    'xla_tpu_use_tc_device_shape_on_sc=true xla_sc_disable_megacore_partitioning=true '
    'xla_tpu_enable_sparse_core_collective_offload_'
)
RECIPES = {
    'v5e': f'{DATA_PARALLEL} xla_tpu_overlap_compute_collective_tc=true '
    'xla_tpu_enable_async_collective_fusion=true '
    'xla_tpu_enable_async_collective_fusion_multiple_steps=true '
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather=true xla_enable_async_all_gather=true',
    'v5p': f'{DATA_PARALLEL} xla_tpu_megacore_fusion_allow_ags=false '
    'xla_enable_async_collective_permute=true xla_tpu_enable_ag_backward_pipelining=true '
    'xla_tpu_overlap_compute_collective_tc=true xla_enable_async_all_gather=true '
    f'{SPARSE_CORES}all_gather=true',
    'v6e': f'{DATA_PARALLEL} xla_tpu_scoped_vmem_limit_kib=98304 '
    'xla_tpu_use_minor_sharding_for_major_trivial_input=true '
    'xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 '
    f'xla_tpu_assign_all_reduce_scatter_layout=true {SPARSE_CORES}all_reduce=true',
}
DEFAULTS, RECIPE, OURS = FORMS = ('defaults', 'recipe', 'ours')


def options_of(form: str, chip: str) -> dict[str, str]:
    """Options of XLA's that MaxText's step is compiled with.

    Args:
      form: 'defaults', none; 'recipe', what its own scripts set for the chip; 'ours', the rows of
        parallel/compiler_options.py.
    Raises:
      UserError: MaxText has no script for the chip.
    """
    if form == DEFAULTS:
        return {}
    if form == OURS:
        return {name: str(value).lower() for name, value in of_table(chip, 'tpu', STEP).items()}
    require(chip in RECIPES, f'--forms=recipe: MaxText has none for {chip}; leave it out.')
    return dict(word.split('=') for word in RECIPES[chip].split())


def settings(cfg: config.Config, num_devices: int, options: dict[str, str]) -> list[str]:
    """Lists MaxText's settings for a model of this shape, in the words of its command line.

    Raises:
      UserError: a config that MaxText would not train the same way.
    """
    model = cfg.model
    require(
        set(model.kind_counts) == {'dense'} and not model.tied_embeddings,
        'bench tpu-step: the peer is compiled for dense models of full attention alone; take '
        'another --config.',
    )
    require(
        cfg.memory.policy == 'full',
        f"memory.policy={cfg.memory.policy}: MaxText's remat_policy is full here; set it to full.",
    )
    require(
        cfg.train.batch_rows % num_devices == 0,
        f'train.batch_rows={cfg.train.batch_rows} must be a multiple of the {num_devices} devices.',
    )
    flags = ' '.join(f'--{name}={value}' for name, value in options.items())
    named = {
        'run_name': 'step',
        'base_output_directory': tempfile.gettempdir(),
        'enable_checkpointing': False,
        'dataset_type': 'synthetic',
        'decoder_block': 'llama2',
        'base_emb_dim': model.embed_dim,
        'base_num_query_heads': model.num_heads,
        'base_num_kv_heads': model.num_kv_heads,
        'head_dim': model.head_dim,
        'base_mlp_dim': model.mlp_dim,
        'base_num_decoder_layers': model.num_layers,
        'vocab_size': model.padded_vocab_size,
        'max_target_length': cfg.data.row_length,
        'per_device_batch_size': cfg.train.batch_rows // num_devices,
        'ici_fsdp_parallelism': -1,
        'remat_policy': 'full',
        'attention': 'flash',
        'compile_xla_flags': flags,
    }
    return [f'{name}={value}' for name, value in named.items()]


def compile_peer(python: str, name: str, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Compiles MaxText's step with the Python that has it; returns its program and its figures.

    Raises:
      UserError: MaxText refused; the last line of what it wrote says why.
    """
    with tempfile.TemporaryDirectory(prefix='helios_maxtext_') as folder:
        program, figures = Path(folder) / 'program', Path(folder) / 'figures'
        cloud = {  # libtpu asks the cloud's metadata server who it is unless these answer
            'JAX_PLATFORMS': 'cpu',
            'TPU_SKIP_MDS_QUERY': '1',
            'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
            'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
            'TPU_WORKER_HOSTNAMES': 'localhost',
            'TPU_WORKER_ID': '0',
        }
        # Ours names our libtpu there once JAX is imported.
        inherited = {n: value for n, value in os.environ.items() if n != 'TPU_LIBRARY_PATH'}
        done = subprocess.run(
            [python, str(SCRIPT), name, str(program), str(figures), *arguments],
            capture_output=True,
            text=True,
            errors='replace',
            check=False,
            env=inherited | cloud,
        )
        if done.returncode or not figures.is_file():
            written = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(f'MaxText: {written[-1] if written else "it wrote no reason"}')
        return program.read_text(), json.loads(figures.read_text())


def kernel_clock(hlo: str, cfg: config.Config, chip: str, rows: int) -> predicted.Kernels:
    """Makes the clock of the attention kernels in MaxText's step: jax's splash attention.

    They are timed with their fastest blocks and without segments, which is a favour: by default
    MaxText takes blocks of 512, and it passes segments.

    Args:
      rows: rows of a device.
    """
    known = fastest(cfg, chip, rows, 'forward', lambda options: True)
    fused = not re.search(r'splash_mha_dq', hlo)
    known |= fastest(cfg, chip, rows, 'backward', lambda options: options['fused'] == fused)

    def seconds(kernel: Instruction) -> float | None:
        phase = re.match(r'splash_mha_(fwd|dkv|dq)', kernel.name)
        return known.get(phase[1]) if phase else None

    return seconds


def fastest(
    cfg: config.Config, chip: str, rows: int, which: str, fits: Callable[[dict[str, Any]], bool]
) -> dict[str, float]:
    """Seconds of the kernels of splash attention's fastest pass, by phase (fwd, dkv, dq)."""
    model = cfg.model
    shape = Problem(
        cfg.data.row_length, rows, model.num_heads, model.num_kv_heads, head_dim=model.head_dim
    )
    tasks = [
        Task(chip, dataclasses.asdict(shape), which, 'jax_splash', options, alone=True)
        for options in jax_splash.variants(shape, which, chip)
        if fits(options)
    ]
    done = [row for row in run(tasks, 1) if 'refused' not in row]
    best = min(done, key=lambda row: row['kernel_ms'])
    return {kernel['name'].split('_')[2]: kernel['ms'] / 1e3 for kernel in best['kernels']}
