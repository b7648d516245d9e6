"""Memory, seconds and limits of a plan: against the state of a run, and against each other."""

import dataclasses
import math
import operator

import jax
import pytest

from helios_jax import chips, config, options
from helios_jax.errors import UserError
from helios_jax.parallel import mesh as meshes
from helios_jax.plan import changes, planning, search
from helios_jax.plan.compiler import compiled
from helios_jax.plan.measured import AVERAGE_STREAMS
from helios_jax.plan.planning import plan
from helios_jax.train import state as states

MODEL = config.Model(
    num_layers=5, embed_dim=96, num_heads=8, num_kv_heads=4, head_dim=24, mlp_dim=160,
    prefix='dense', period='moe,dense', moe=config.MoE(num_experts=12, mlp_dim=40),
)  # fmt: skip
SMALL = config.Config(
    model=MODEL, data=config.Data(row_length=64), train=config.Train(batch_rows=48)
).resolve(300)
V5E = chips.CHIPS['v5e']


def large(**memory: str) -> config.Config:
    """A model for 16 v5e: what fits depends on the policy."""
    return config.Config(
        model=config.Model(
            num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128,
            mlp_dim=14_336,
        ),
        data=config.Data(row_length=4096),
        train=config.Train(batch_rows=32),
        memory=config.Memory(**memory),
    ).resolve(32_000)  # fmt: skip


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('moments', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    'mesh',
    [
        config.Mesh(),
        config.Mesh(fsdp=2, expert=2, tensor=2),
        config.Mesh(data=2, fsdp=2, context=2),
        config.Mesh(slice=2, fsdp=4),
    ],
    ids=lambda mesh: '-'.join(map(str, dataclasses.astuple(mesh))),
)
def test_arguments_are_the_shards_of_state_and_batch(mesh, optimizer, moments):
    chosen = config.Optimizer(name=optimizer, moments_dtype=moments)
    cfg = dataclasses.replace(SMALL, mesh=mesh, optimizer=chosen)
    planned = plan(cfg, V5E, 8).memory
    abstract = meshes.abstract(mesh, 8)
    setup = states.create(cfg, abstract)

    def shards(tree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)

    given = planned.arguments
    assert given.parameters == shards(setup.state.params)
    assert given.router == shards(setup.state.router)
    assert given.batch == shards(compiled.abstract_batch(cfg, abstract))
    # Besides the moments: a few counts, and Muon's coefficients.
    assert 0 <= shards(setup.state.optimizer) - given.optimizer <= 64


def test_a_plan_refuses_what_a_run_would():
    with pytest.raises(UserError, match='does not fit 6 devices'):
        plan(dataclasses.replace(SMALL, mesh=config.Mesh(fsdp=4)), V5E, 6)
    with pytest.raises(UserError, match='kv_heads=4 is not divisible'):
        plan(dataclasses.replace(SMALL, mesh=config.Mesh(tensor=8)), V5E, 8)
    with pytest.raises(UserError, match='batch_rows=48'):
        plan(dataclasses.replace(SMALL, mesh=config.Mesh(data=32)), V5E, 32)


def test_layers_are_counted_without_going_through_them(monkeypatch):
    deep = config.replace(SMALL, {'model.num_layers': 9999})
    expected = plan(deep, V5E, 1)
    monkeypatch.setattr(config.Model, 'layer_kinds', property(lambda model: pytest.fail('asked')))
    assert plan(deep, V5E, 1) == expected


def test_policies_are_ordered_as_their_names_say():
    of = {p: plan(large(policy=p), V5E, 16) for p in changes.PRESETS}
    peak = {p: made.memory.peak for p, made in of.items()}
    assert peak['fp8'] < peak['minimal']
    assert peak['full'] < peak['fp8']
    assert peak['fp8_offload'] < peak['offload'] < peak['full']
    inputs = sum(s.num_bytes for s in of['full'].memory.saved if s.name == 'block_input')
    assert of['offload'].memory.saved_host == inputs
    assert of['full'].memory.saved_device - of['offload'].memory.saved_device == inputs
    assert of['full'].seconds.flops > of['minimal'].seconds.flops
    assert of['full'].memory.host == 0


def test_state_on_the_host_leaves_the_device():
    device = plan(large(), V5E, 16).memory
    moments = plan(large(optimizer='host'), V5E, 16).memory
    both = plan(large(optimizer='host', parameters='host'), V5E, 16)
    assert device.arguments_device - moments.arguments_device == device.arguments.optimizer
    assert moments.host == device.arguments.optimizer
    assert both.memory.host == device.arguments.optimizer + device.arguments.parameters
    assert both.memory.peak < moments.peak < device.peak
    # There and back, and the parameters once more for the copy that the model reads.
    state, seconds = device.arguments, both.seconds
    assert seconds.host_bytes == 2 * state.optimizer + 3 * state.parameters
    assert seconds.step == pytest.approx(
        max(seconds.compute + seconds.memory + seconds.exposed, seconds.network) + seconds.update
    )
    assert seconds.update == seconds.host > 0


def test_an_embedding_that_layers_add_stays_there_with_its_gradient():
    plain = plan(large(), V5E, 16).memory
    added = plan(config.replace(large(), {'model.gmu.embedding': 'on'}), V5E, 16).memory
    cfg = large()
    tokens = cfg.train.batch_rows * cfg.data.row_length // 16
    assert added.working - plain.working == 2 * 2 * tokens * cfg.model.embed_dim


@pytest.mark.parametrize('chip', ['v5e', 'h100'])
@pytest.mark.parametrize('kind', ['residual', 'convex'])
def test_an_embedding_that_layers_add_is_passed_over_in_every_sublayer(kind, chip):
    cfg = config.replace(large(), {'model.gmu.kind': kind})
    on = config.replace(cfg, {'model.gmu.embedding': 'on'})
    plain, added = (plan(c, chips.CHIPS[chip], 16).seconds for c in (cfg, on))
    sublayers = 2 * cfg.model.num_layers
    tokens = cfg.train.batch_rows * cfg.data.row_length // 16
    # Read forward, again and backward, where its gradients' sum is read and written: bfloat16.
    passed = sublayers * (1 + 1 + 3) * 2 * tokens * cfg.model.embed_dim
    # A number α of each sublayer, float32, with its gradient and two moments: read and written.
    updated = sublayers * 4 * 2 * 4
    assert added.memory_bytes - plain.memory_bytes == passed + updated
    rate = plain.memory_bytes / plain.memory
    assert added.memory - plain.memory == pytest.approx((passed + updated) / rate)
    assert added.step > plain.step
    assert added.flops == plain.flops


def test_averages_over_depth_have_a_gradient_each_and_are_passed_over():
    cfg = large()
    period = cfg.model.num_layers // 2
    plain, averaged = (
        plan(config.replace(cfg, {'model.gmu.dwa': dwa}), V5E, 16) for dwa in ('off', f'1x{period}')
    )
    tokens = cfg.train.batch_rows * cfg.data.row_length // 16
    stream = 2 * tokens * cfg.model.embed_dim
    assert averaged.memory.working - plain.memory.working == 2 * AVERAGE_STREAMS.value * stream
    assert averaged.seconds.memory > plain.seconds.memory


def test_an_average_of_the_parameters_is_counted_where_the_moments_lie():
    averaged = lambda **memory: config.replace(large(**memory), {'train.ema': 0.999})
    without, on_device = (plan(cfg, V5E, 16).memory for cfg in (large(), averaged()))
    ema = without.arguments.parameters
    assert on_device.arguments == without.arguments._replace(ema=ema)
    assert on_device.peak - without.peak == ema
    mesh = meshes.abstract(config.Mesh(), 16)
    leaves = jax.tree.leaves(states.create(averaged(), mesh).state.ema)
    assert ema == 4 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    moments, both = (plan(f(optimizer='host'), V5E, 16) for f in (large, averaged))
    assert both.memory.arguments_device == moments.memory.arguments_device
    assert both.memory.host - moments.memory.host == ema
    assert both.seconds.host_bytes - moments.seconds.host_bytes == 2 * ema
    assert both.memory.streamed > moments.memory.streamed


def test_accumulating_takes_fewer_activations_and_float32_sums_of_gradients():
    one = plan(large(), V5E, 16).memory
    two = plan(config.replace(large(), {'train.microbatches': 2}), V5E, 16).memory
    assert 2 * two.saved_device == one.saved_device
    # Of one microbatch in bfloat16, but for norms and the head; their sums in float32.
    assert (two.gradients, one.accumulated) == (one.gradients, 0)
    assert 1.7 * two.gradients < two.accumulated < 2 * two.gradients
    assert two.phases['update'] == two.accumulated


@pytest.mark.parametrize('policy', ['full', 'fp8', 'offload'])
def test_the_most_rows_and_the_longest_row_are_really_the_most(policy):
    cfg = large(policy=policy)
    rows = planning.largest_rows(cfg, V5E, 16)
    fits = lambda n: plan(planning.with_rows(cfg, 16, n), V5E, 16).fits
    assert fits(rows)
    assert not fits(rows + 1)
    length = planning.longest_row(cfg, V5E, 16)
    fits = lambda n: plan(planning.with_length(cfg, n), V5E, 16).fits
    assert fits(length)
    assert not fits(length + planning.LENGTH_STEP)


def test_the_cheapest_changes_fit_and_are_sorted_by_time():
    cfg = large(policy='minimal')
    assert not plan(cfg, V5E, 16).fits
    found = changes.cheapest(cfg, V5E, 16)
    assert len(found) == 3
    seconds = [change.plan.seconds.step for change in found]
    assert seconds == sorted(seconds)
    for change in found:
        assert change.plan.fits
        assert all(override.startswith('--config.') for override in change.overrides)


def test_auto_is_the_fastest_preset_that_fits():
    cfg = large(policy='auto')
    memory = search.resolve_auto(cfg, V5E, 16)
    made = plan(dataclasses.replace(cfg, memory=memory), V5E, 16)
    assert made.fits
    for preset in changes.PRESETS:
        other = plan(large(policy=preset), V5E, 16)
        assert not other.fits or made.seconds.step <= other.seconds.step
    assert search.resolve_auto(cfg, chips.CHIPS['v5p'], 16).policy in ('minimal', 'fp8')
    with pytest.raises(UserError, match=r"'auto'.*no preset fits 1 v5e.*GiB"):
        search.resolve_auto(cfg, V5E, 1)


@pytest.mark.parametrize(('kind', 'again'), [('residual', False), ('convex', True)])
def test_parts_free_memory_and_cost_a_gated_layer_its_mlp_again(kind, again):
    cfg = config.replace(large(policy='full'), {'model.gmu.kind': kind})
    peaks, flops, seconds = [], [], []
    for parts in (1, 2, 4):
        made = plan(config.replace(cfg, {'memory.backward_parts': parts}), V5E, 16)
        peaks.append(made.memory.peak)
        flops.append(made.seconds.flops)
        seconds.append(made.seconds.compute + made.seconds.memory)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    assert (flops[1] > flops[0]) == again and flops[1] == flops[2]
    assert seconds[0] < seconds[1] < seconds[2]


def test_parts_are_tried_where_their_tensors_are_recomputed():
    tried = changes.memories(config.Memory('auto', backward_parts=2))
    found = {(memory.policy, memory.backward_parts) for memory in tried}
    assert {('full', parts) for parts in (1, 2, changes.PARTS)} <= found
    assert ('minimal', 1) in found and ('minimal', 2) not in found
    kept = config.Actions(gate_up='fp8')
    tried = changes.memories(config.Memory('auto', actions=kept))
    assert {memory.backward_parts for memory in tried} == {1}


@pytest.mark.slow
def test_a_search_is_sorted_and_its_overrides_make_its_plans():
    chip = chips.CHIPS['v5p']
    found = search.search(large(), chip, 4)
    speeds = [change.plan.seconds.tokens_per_second for change in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(change.plan.fits for change in found)
    best = found[0]
    cfg = large()
    for override in best.overrides:
        name, value = override.removeprefix('--config.').split('=')
        kind = type(operator.attrgetter(name)(cfg))
        cfg = config.replace(cfg, {name: kind(value)})
    assert plan(cfg, chip, 4).memory.peak == best.plan.memory.peak


# By `helios plan --compile`: docs/results/2026-11-29-tpu-step, 2026-11-30-tpu-hydra-step and
# 2026-11-30-gates.
@pytest.mark.parametrize(
    ('name', 'topology', 'kind', 'policy', 'rows', 'compiled_seconds'),
    [
        ('helios_8b', 'v5p:2x2x4', 'residual', 'full', 64, 2.296),
        ('helios_8b', 'v6e:4x4', 'residual', 'full', 32, 0.788),
        ('helios_8b', 'tpu7x:2x2x4', 'residual', 'full', 64, 0.707),
        ('hydra_30b_a3b', 'v5p:4x4x2', 'residual', 'full', 128, 1.576),
        ('helios_8b', 'v5p:2x2x4', 'convex', 'full', 64, 2.492),
        ('helios_8b', 'v5p:2x2x4', 'convex', 'minimal', 64, 1.975),
        ('helios_8b', 'v6e:4x4', 'convex', 'full', 32, 0.881),
        ('helios_8b', 'v5e:4x4', 'convex', 'full', 32, 3.148),
    ],
)
def test_seconds_are_near_those_of_compiled_steps(
    name, topology, kind, policy, rows, compiled_seconds
):
    settings = {'model.gmu.kind': kind, 'memory.policy': policy, 'train.batch_rows': rows}
    cfg = config.replace(options.load_config(name), settings)
    where = chips.topology(topology)
    found = plan(cfg.resolve(cfg.model.vocab_size), where.chip, where.num_devices)
    error = found.seconds.step / compiled_seconds - 1
    assert abs(error) < (0.15 if name.startswith('hydra') else 0.05), error


# By `helios bench train` on an H200: docs/results/2026-11-30-h200-hydra and 2026-11-30-gates.
@pytest.mark.parametrize(
    ('name', 'settings', 'measured_seconds'),
    [
        ('helios_1b', {}, 0.4314),
        ('helios_1b', {'model.gmu.kind': 'convex'}, 0.4511),
        ('helios_1b', {'model.num_layers': 4}, 0.1330),
        (
            'helios_1b',
            {
                'model.num_layers': 4,
                'model.period': 'moe',
                'model.moe.num_experts': 8,
                'model.moe.num_experts_per_token': 2,
                'model.moe.mlp_dim': 4096,
            },
            0.1465,
        ),
        ('bench_qwen3_moe', {}, 0.2855),
    ],
    ids=['dense', 'gated', 'dense, 4 layers', '8 experts', '64 experts'],
)
def test_seconds_are_near_those_of_measured_steps(name, settings, measured_seconds):
    settings = {'model.gmu.kind': 'residual'} | settings
    cfg = config.replace(options.load_config(name), settings)
    found = plan(cfg, chips.CHIPS['h200'], 1)
    error = found.seconds.step / measured_seconds - 1
    assert abs(error) < 0.15, error
