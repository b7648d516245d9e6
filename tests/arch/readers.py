"""What everything that reads a fact makes of it, as JSON: run by one_home_test.py."""

import json

import jax

from helios_jax import chips, config
from helios_jax.arch import tensors, weights
from helios_jax.errors import UserError
from helios_jax.kernels.attention import gpu
from helios_jax.memory import policy
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.plan import measured, planning
from helios_jax.plan.compiler.timing import CHIPS
from helios_jax.plan.placement import place
from helios_jax.train import dry_run, optimizer
from helios_jax.train import state as states

model = config.Model(
    num_layers=3, embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=32, mlp_dim=56, qk_norm=True
)
cfg = config.Config(
    model=model,
    data=config.Data(row_length=64),
    train=config.Train(batch_rows=8),
    mesh=config.Mesh(fsdp=2, tensor=2),
    optimizer=config.Optimizer(name='muon'),
).resolve(300)
v5e = chips.topology('v5e:2x2').chip
made = planning.plan(cfg, v5e, 4)
setup = states.create(cfg, meshes.abstract(cfg.mesh, 4))
params = setup.state.params
layer = params['periods']['layer_0']
rules = {rule.name: rule for rule in optimizer.rules(cfg.optimizer, setup.axes, params)}
up = rules['periods.layer_0.mlp.up.w']
described = dry_run.describe(cfg, 4).splitlines()
try:
    refused = str(config.Actions(**{'invented': 'fp8'}))
except (UserError, TypeError) as error:
    refused = str(error)

found = {
    'plan_available': made.available,
    'plan_compute': made.seconds.compute,
    'plan_memory': made.seconds.memory,
    'plan_parameters': made.memory.arguments.parameters,
    'plan_moments': made.memory.arguments.optimizer,
    'plan_working': made.memory.working,
    'plan_cudnn': place(cfg, 4, 'gpu').cudnn_sequences,
    'plan_ages': [line.split()[1] for line in measured.ages() if line.startswith('STREAMS ')],
    'mfu_peak': chips.peak_flops('TPU v5 lite'),
    'kinds': [chips.find(kind) is v5e for kind in ('TPU v5e', 'TPU v5 mini')],
    'bench_clock': CHIPS['v5e'].clock,
    'bench_delay_slots': CHIPS['v5e'].delay_slots,
    'kernel_vmem': v5e.kernel_vmem_bytes >> 20,
    'kernel_cudnn': gpu.CUDNN_SEGMENTS,
    'counted': weights.count(cfg.model),
    'model_parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'sharding_q_norm': list(layer['attention']['q_norm']['scale'].sharding.spec),
    'sharding_up': list(layer['mlp']['up']['w'].sharding.spec),
    'sharding_embed': list(params['embed']['w'].sharding.spec),
    'sharding_table': [
        row for row in sharding.rules_text().splitlines() if row.startswith('vocab ')
    ],
    'optimizer_up': [up.optimizer, up.decay],
    'dry_run_up': [row.split()[2:5] for row in described if '.mlp.up.w' in row],
    'policy': policy.actions(cfg.memory).get('invented'),
    'setting': [name for name in config.to_dict(cfg).memory.actions if name == 'invented'],
    'comment': config.describe().get('memory.actions.invented'),
    'refused': refused,
    'shape': tensors.shape(model, 'dispatched', 8, 64),
}
print(json.dumps(found))
