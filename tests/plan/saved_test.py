"""The closed form of what is saved, against the marks in the traced gradient: exact."""

import collections
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from helios_jax import config
from helios_jax.kernels.attention import gpu
from helios_jax.memory import policy, traced
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.plan import saved
from helios_jax.plan.placement import place

Bytes = dict[tuple[str, str], int]  # (tensor, device or host) → of one device

# A dense layer, then MoE layers: no two sizes coincide.
MODEL = config.Model(
    num_layers=3, embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=32, mlp_dim=56,
    prefix='dense', period='moe',
    moe=config.MoE(num_experts=12, num_experts_per_token=3, mlp_dim=40),
)  # fmt: skip
CONVEX = config.GMU(kind='convex', gate='low_rank')
RESIDUAL = config.GMU(kind='residual')
MESH = config.Mesh(fsdp=2, expert=2, tensor=2)


def make(model: config.Model, memory: config.Memory, mesh: config.Mesh = MESH) -> config.Config:
    return config.Config(
        model=model,
        data=config.Data(row_length=64),
        train=config.Train(batch_rows=8),
        mesh=mesh,
        memory=memory,
    ).resolve(300)


def stored_bytes(cfg: config.Config, num_devices: int, platform: str, few: bool) -> Bytes:
    """Bytes of each tensor that is marked as saved in the traced gradient."""
    model = Transformer(cfg.model, cfg.memory, platform, few_documents=few)
    variables = nn.unbox(abstract_variables(model))
    tokens = jax.ShapeDtypeStruct((cfg.train.batch_rows, cfg.data.row_length), jnp.int32)

    def loss(params: Any, router: Any, tokens: Any) -> Any:
        segment_ids = tokens if cfg.data.packing == 'best_fit' else None
        own = {'params': params, 'router': router}
        hidden, stats = model.apply(own, tokens, tokens, segment_ids)
        losses = [s.z_loss.sum() for group in stats.values() for s in group.values()]
        return hidden.astype(jnp.float32).sum() + sum(losses)

    with jax.sharding.use_abstract_mesh(meshes.abstract(cfg.mesh, num_devices)):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(
            variables['params'], variables.get('router', {}), tokens
        )
    found: Bytes = collections.Counter()
    for array in traced.saved(jaxpr):
        found[array.name, 'host' if array.host else 'device'] += array.num_bytes
    return found


def planned_bytes(cfg: config.Config, num_devices: int, platform: str) -> Bytes:
    found: Bytes = collections.Counter()
    for tensor in saved.saved_tensors(place(cfg, num_devices, platform)):
        found[tensor.name, tensor.place] += tensor.num_bytes
    return found


def compare(cfg: config.Config, num_devices: int, platform: str, few: bool = False) -> None:
    stored = stored_bytes(cfg, num_devices, platform, few)
    assert planned_bytes(cfg, num_devices, platform) == stored


# The others save the same tensors elsewhere.
PRESETS = [
    name if name in ('full', 'fp8') else pytest.param(name, marks=pytest.mark.slow)
    for name in policy.PRESETS
]


@pytest.mark.parametrize(
    ('gmu', 'platform'),
    [
        (CONVEX, 'gpu'),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((CONVEX, 'tpu'), (RESIDUAL, 'gpu'), (RESIDUAL, 'tpu'))
        ),
    ],
    ids=lambda value: getattr(value, 'kind', value),
)
@pytest.mark.parametrize('preset', PRESETS)
def test_what_each_preset_saves_is_what_is_traced(preset, gmu, platform):
    # On a GPU the reference stands in: the kernel there is another library's.
    attention = 'tpu' if platform == 'tpu' else 'reference'
    model = dataclasses.replace(MODEL, gmu=gmu, attention=attention)
    compare(make(model, config.Memory(preset)), 8, platform)


@pytest.mark.parametrize(
    'preset', ['minimal', *(pytest.param(p, marks=pytest.mark.slow) for p in ('fp8', 'full'))]
)
@pytest.mark.parametrize(
    ('packing', 'few'),
    [
        ('best_fit', True),
        pytest.param('best_fit', False, marks=pytest.mark.slow),
        pytest.param('concatenate', False, marks=pytest.mark.slow),
    ],
)
def test_what_cudnn_saves_is_what_is_traced(packing, few, preset, monkeypatch):
    monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: gpu.PACKED_CUDNN)
    monkeypatch.setattr(cudnn, 'check_compute_capability', lambda _: True)
    model = dataclasses.replace(MODEL, gmu=CONVEX, attention='cudnn')
    cfg = config.replace(make(model, config.Memory(preset)), {'data.packing': packing})
    compare(cfg, 8, 'gpu', few)


GMUS = [
    config.GMU(kind='additive', gate='full'),
    config.GMU(kind='highway', gate='per_head'),
    config.GMU(kind='residual', normalize_output='on'),
    config.GMU(kind='rezero'),
    config.GMU(kind='convex', gate='static', normalize_output='off'),
    config.GMU(kind='convex', gate_input='input'),
    config.GMU(kind='additive', gate_input='output'),
    config.GMU(kind='residual', dwa='1x1'),
    config.GMU(kind='hyper', hyper='static', streams=3),
    config.GMU(kind='hyper', hyper='dynamic', normalize_output='on'),
    config.GMU(kind='hyper', hyper='constrained', streams=2),
]


SKIPPED = ('q', 'attention_output', 'gate_up', 'attention_update')


@pytest.mark.parametrize(
    ('gmu', 'skipped'),
    [
        # In CI each unit meets two of the tensors, before a release the others too.
        pytest.param(
            gmu, skipped, marks=pytest.mark.long if (i + j) % 2 else pytest.mark.slow,
            id=f'{gmu.kind}-{gmu.gate}-{gmu.gate_input}-{gmu.hyper}-{skipped}',
        )
        for i, gmu in enumerate(GMUS)
        for j, skipped in enumerate(SKIPPED)
    ],
)  # fmt: skip
def test_any_table_of_actions_saves_what_is_traced(gmu, skipped):
    saves = dict.fromkeys(policy.NAMES, 'device') | {skipped: 'remat'}
    model = dataclasses.replace(MODEL, gmu=gmu, head_dim=24, qk_norm=True, attention='reference')
    compare(make(model, config.Memory('minimal', actions=config.Actions(**saves))), 8, 'gpu')


@pytest.mark.slow
def test_shared_experts_and_bounded_buffers_are_counted():
    bounded = {'moe.num_shared_experts': 2, 'moe.capacity_factor': 1.5}
    model = config.replace(MODEL, {'attention': 'reference'} | bounded)
    compare(make(model, config.Memory('fp8')), 8, 'gpu')


@pytest.mark.slow
def test_rows_split_over_devices_are_counted():
    compare(make(MODEL, config.Memory('minimal'), config.Mesh(context=2, fsdp=2)), 4, 'tpu')


def test_a_tensor_that_backward_never_reads_costs_nothing():
    model = dataclasses.replace(MODEL, gmu=RESIDUAL)
    names = lambda preset: {
        t.name for t in saved.saved_tensors(place(make(model, config.Memory(preset)), 8, 'tpu'))
    }
    assert 'mlp_update' not in names('minimal')
    assert 'log_sum_exp' not in names('full')
    assert names('full') == {'block_input', 'router_choices', 'final_hidden'}


def test_offload_stays_on_the_device_where_there_is_no_host_memory_space():
    cfg = make(MODEL, config.Memory('offload'))
    on = lambda platform: {place for _, place in planned_bytes(cfg, 8, platform)}
    assert on('cpu') == {'device'}
    assert on('tpu') == {'device', 'host'}
