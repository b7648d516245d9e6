"""Collectives of a compiled step: each form that libtpu gives them, and what the step waits for."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helios_jax import config
from helios_jax.parallel import mesh as meshes
from helios_jax.plan.compiler import step
from helios_jax.plan.compiler.collectives import Collective, collectives, group
from helios_jax.plan.compiler.program import hbm_bytes

FOUR = (0, 2, 4, 6)
GROUPS = "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}"
# Three turns of a loop, and what is around it; bodies that say nothing more are left out. One
# channel may serve two collectives.
PROGRAM = f"""
%async_collective_fusion.9 (p: bf16[8,6]) -> bf16[32,6] {{
  %p = bf16[8,6]{{1,0}} parameter(0)
  %all-gather.2 = bf16[32,6]{{1,0}} all-gather(%p), channel_id=2, {GROUPS}, dimensions={{0}}
}}

%done (p: bf16[8,6]) -> bf16[32,6] {{
  %p = bf16[8,6]{{1,0}} parameter(0)
  %all-gather.3 = bf16[32,6]{{1,0}} all-gather(%p), channel_id=2, {GROUPS}, dimensions={{0}}
  ROOT %custom-call.1 = bf16[32,6]{{1,0}} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.1 (p: f32[40,6]) -> f32[5,6] {{
  %p = f32[40,6]{{1,0}} parameter(0)
  %all-reduce.4 = f32[40,6]{{1,0}} all-reduce(%p), channel_id=1, {GROUPS}, to_apply=%add
}}

%called (p: bf16[64,6]) -> bf16[16,6] {{
  %p = bf16[64,6]{{1,0}} parameter(0)
  ROOT %reduce-scatter.1 = bf16[16,6]{{1,0}} reduce-scatter(%p), channel_id=4, {GROUPS}, dimensions={{0}}
}}

%condition (state: (s32[])) -> pred[] {{
  %bound = s32[] constant(3)
}}

%body (state: (s32[])) -> (s32[]) {{
  %all-gather.1 = bf16[24,6]{{1,0}} all-gather(%x), channel_id=1, {GROUPS}, metadata={{op_name="step/Block/q" stack_frame_id=7}}
  %fusion.1 = (f32[2], bf16[32,6]{{1,0}}) fusion(%x), kind=kOutput, calls=%async_collective_fusion.9, backend_config={{"estimated_cycles":"700"}}
  %fusion.2 = bf16[32,6]{{1,0}} fusion(%x), kind=kCustom, calls=%done
  %fusion.3 = f32[5,6]{{1,0}} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %rs.start = ((bf16[64,6], token[]), bf16[16,6]) call-start(%z), async_execution_thread="sparsecore", to_apply=%called
  %kernel.12 = f32[2] custom-call(%z), custom_call_target="tpu_custom_call"
  %rs.done = bf16[16,6] call-done(%rs.start)
}}

ENTRY %main (x: f32[2]) -> f32[2] {{
  %start = (f32[9]{{0}}, f32[9]{{0}}, u32[], u32[]) collective-permute-start(%x), channel_id=5, source_target_pairs={{{{0,1}}}}
  %while = (s32[]) while(%state), condition=%condition, body=%body
  %convert.1 = f32[2] convert(%x), backend_config={{"estimated_cycles":"11"}}
}}
"""  # noqa: E501


def test_each_form_is_found_once_with_what_it_moves():
    found = collectives(PROGRAM)
    assert found == [
        Collective('collective-permute', 9 * 4, 1, False, True, '', (0, 1)),
        Collective('all-gather', 24 * 6 * 2, 3, True, False, 'step/Block/q', FOUR),
        Collective('all-gather', 32 * 6 * 2, 3, True, True, '', FOUR),
        Collective('reduce-scatter', 40 * 6 * 4, 3, True, False, '', FOUR),
        Collective('reduce-scatter', 4 * 16 * 6 * 2, 3, True, True, '', FOUR),
    ]


@pytest.mark.parametrize(
    ('text', 'devices'),
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0','axis_1'}, x", (0, 1, 2, 3, 4, 5)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=3] {'axis_1'}, x", (0, 1, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=5] {'axis_0'}, x", (0, 5)),
        ('replica_groups=[2,3]<=[6], x', (0, 1, 2)),
        ('replica_groups=[5,2]<=[2,5]T(1,0), x', (0, 5)),
        ('replica_groups={{0,4,8},{1,5,9}}, x', (0, 4, 8)),
        ('source_target_pairs={{3,4},{4,3}}, x', (3, 4)),
        ('x', (0,)),
    ],
)
def test_a_group_is_read_in_every_notation(text, devices):
    assert group(text) == devices


@pytest.mark.parametrize(
    ('shape', 'size'),
    [
        ('(bf16[3,5]{1,0}, token[], pred[7]{0})', 3 * 5 * 2 + 7),
        ('f8e4m3fn[3,5]{1,0:T(8,128)(4,1)}', 8 * 128),
        ('(f32[3]{0:S(1)}, s4[10]{0})', 5),
        ('()', 0),
    ],
)
def test_bytes_of_every_kind_of_shape(shape, size):
    assert hbm_bytes(shape) == size


def test_figures_add_up_cycles_kernels_and_collectives_by_turns():
    found = step.figures(PROGRAM)
    assert found['cycles'] == 3 * 700 + 11
    assert found['kernels'] == {'kernel': 3}
    assert found['partial_sums'] == 0
    windowed = PROGRAM.replace('%body', '%windowed_dot_general_body')
    assert step.figures(windowed)['partial_sums'] == 1
    rows = {(row['kind'], row['place']): row for row in found['collectives']}
    gathers = rows['all-gather', 'loops']
    assert gathers['number'] == 2
    assert gathers['gib'] == 3 * (24 + 32) * 12 / 2**30
    assert gathers['waited_gib'] == 3 * 24 * 12 / 2**30
    assert gathers['largest_waited_mib'] == 24 * 12 / 2**20
    assert rows['collective-permute', 'outside']['waited_gib'] == 0
    assert 'kernel × 3' in step.text(found)


T, D, F = 2048, 1024, 2816


def two_layers(mesh, x, up, down):
    """Two matmuls with weights that are gathered, and a gradient that is scattered."""
    whole = lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    rows = lambda h: jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P('fsdp')))
    h = rows(jax.nn.relu(rows(x @ whole(up))))
    gradient = jnp.einsum('td,tf->df', rows(h @ whole(down)), h)
    return jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, P('fsdp')))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('topology', 'beside'),
    [('v5e:2x2', {'all-gather'}), ('v5p:2x2x1', set()), ('tpu7x:2x2x1', {'reduce-scatter'})],
)
def test_the_compilers_own_forms_are_known(topology, beside):
    """Of the second gather at least, where a generation of TPUs runs one beside a matmul."""
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")
    mesh = meshes.make(config.Mesh(), meshes.topology_devices(topology))
    place = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, P('fsdp'))
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(lambda *a: two_layers(mesh, *a)).lower(
            place(T * mesh.size, D), place(D, F), place(F, D)
        )
    options = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}
    found = collectives(lowered.compile(options).as_text())
    gathers = [one for one in found if one.kind == 'all-gather']
    assert [one.num_bytes for one in gathers] == [2 * D * F] * 2
    (reduced,) = [one for one in found if one.kind in ('all-reduce', 'reduce-scatter')]
    assert reduced.num_bytes == 2 * D * F
    assert beside <= {one.kind for one in found if one.beside}
