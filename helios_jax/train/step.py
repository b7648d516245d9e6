"""One training step: loss and gradient over microbatches, then the update."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from helios_jax import config
from helios_jax.arch.buffers import CUDNN_SEGMENTS
from helios_jax.data.pipeline import Batch
from helios_jax.memory import policy
from helios_jax.model.layers import float32_or_wider
from helios_jax.model.loss import cross_entropy, with_targets
from helios_jax.parallel import compiler_options
from helios_jax.parallel.sharding import constrain
from helios_jax.train import optimizer, throughput, update
from helios_jax.train.state import Setup, TrainState

Metrics = dict[str, Array]


def num_routed(data: config.Data, batch: Batch) -> Float[Array, '']:
    """Tokens that a router counts: all but padding, where segments tell which that is."""
    ids = batch.attention_segments(data.documents_apart)
    if ids is None:
        return jnp.asarray(batch.tokens.size, jnp.float32)
    return (ids > 0).sum(dtype=jnp.float32)


class CompiledStep(NamedTuple):
    """A step that is ready to run, and the program in it that saves tensors for a backward pass."""

    run: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    program: str  # 'step', or 'gradient' where the update is programs of its own
    traced: jax.stages.Traced  # of `program`, as is `compiled`
    compiled: jax.stages.Compiled


def few_documents(data: config.Data, batch: Batch) -> bool:
    """Tells whether the step may count on few documents in each row of a batch.

    Attention on a GPU then needs no decision that depends on the data.

    Args:
      batch: this host's, before it is on the devices. Several hosts must run one program, and none
        knows the others' rows: with several it is False.
    """
    if jax.default_backend() != 'gpu' or jax.process_count() > 1 or not data.documents_apart:
        return False
    return int(np.max(batch.segment_ids)) <= CUDNN_SEGMENTS


def compile_step(
    setup: Setup, state: TrainState, batch: Batch, *, few: bool = False
) -> CompiledStep:
    """The step compiled for these arrays, under the setup's mesh; it takes the state for itself.

    Args:
      few: only batches of which `few_documents` is True will be given to it.
    """
    memory = setup.config.memory
    setup = dataclasses.replace(setup, model=setup.model.clone(few_documents=few))
    options = compiler_options_of(setup.config, jax.local_devices()[0], setup.mesh.size)
    if memory.on_host and jax.default_backend() == 'gpu':
        traced = jax.jit(partial(begin, setup)).trace(state, batch)
        compiled = traced.lower().compile(options)
        run = in_programs(compiled, update.Programs(setup, options))
        return CompiledStep(run, 'gradient', traced, compiled)
    traced = jax.jit(make_train_step(setup), donate_argnums=0).trace(state, batch)
    compiled = traced.lower().compile(options)
    return CompiledStep(compiled, 'step', traced, compiled)


def compiler_options_of(cfg: config.Config, device: jax.Device, num_devices: int) -> dict[str, Any]:
    """Options that the programs of a step are compiled with for a device.

    Raises:
      UserError: a word of train.compiler_options that cannot be used.
    """
    return compiler_options.resolve(
        device,
        compiler_options.STEP,
        transfers=policy.uses_host(cfg.memory),
        several=num_devices > 1,
        wanted=cfg.train.compiler_options,
    )


def make_train_step(setup: Setup) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a pure function; jit it with the state donated, under the setup's mesh."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, metrics, rest = begin(setup, state, batch)
        if setup.config.memory.on_host:
            norm = metrics['gradient_norm']
            updated = update.in_one_program(setup, gradients, norm, state)
        else:
            wide = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.params)
            updates, moments = setup.optimizer.update(wide, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = update.averaged(setup, state.ema, params)
            updated = state.replace(params=params, optimizer=moments, ema=ema)
        return updated.replace(**rest), metrics

    return train_step


def in_programs(
    first: Callable[..., Any], programs: update.Programs
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`make_train_step` as a program that ends with the gradient, and those of the update.

    Args:
      first: `begin`, compiled.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, metrics, rest = first(state, batch)
        updated = programs(gradients, metrics['gradient_norm'], state)
        # Or the next step's gradients would take memory while this one's still wait to be used.
        jax.block_until_ready(updated.params)
        return updated.replace(**rest), metrics

    return train_step


def begin(setup: Setup, state: TrainState, batch: Batch) -> tuple[PyTree, Metrics, dict[str, Any]]:
    """Gradients, metrics, and what of the new state does not wait for the update."""
    cfg = setup.config
    gradients, metrics, load = gradient(setup, state, batch)
    rate = optimizer.schedule(cfg.optimizer, cfg.train.num_steps)(state.step)
    metrics |= {
        'gradient_norm': optax.global_norm(jax.tree.map(float32_or_wider, gradients)),
        'learning_rate': jnp.asarray(rate, jnp.float32),
    }
    router = balance(cfg.model.moe, state.router, load)
    return gradients, metrics, {'step': state.step + 1, 'router': router}


def gradient(
    setup: Setup, state: TrainState, batch: Batch
) -> tuple[PyTree, Metrics, dict[str, dict[str, Array]]]:
    """Gradient and metrics of a whole batch, and each router's load.

    Gradients of weights that the model reads in the compute dtype alone are in that dtype, unless
    they add up over microbatches.

    The loss is the sum over all targets ÷ their number in the whole batch, so that it does not
    depend on how rows fall into microbatches; nor does the routers' z-loss, a mean over tokens.
    Their balance loss, no such mean, is the microbatches' own, averaged by their tokens.
    """
    data, num_microbatches = setup.config.data, setup.config.train.microbatches
    whole: Any = with_targets(batch)
    weights = whole[2]
    num_targets = jnp.maximum(weights.sum(), 1)
    num_tokens = jnp.maximum(num_routed(data, batch), 1)
    params = update.working_copy(setup, state.params)
    grad = jax.grad(loss, argnums=2, has_aux=True)

    def of(microbatch: Any) -> Any:
        rows, targets, weights = microbatch
        share = num_routed(data, rows) / num_tokens
        return grad(setup, state.router, params, rows, targets, weights / num_targets, share)

    if num_microbatches == 1:
        gradients, (sums, load) = of(whole)
    else:
        # Every device cuts its own rows, so that no row moves.
        whole = jax.tree.map(
            lambda x: constrain(
                x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1),
                'whole',
                'batch',
                *['length'] * (x.ndim - 1),
            ),
            whole,
        )
        first = jax.tree.map(lambda x: x[0], whole)
        # Gradients of a bfloat16 copy of the weights add up in float32 all the same.
        zeros = jax.tree.map(
            lambda x: float32_or_wider(jnp.zeros(x.shape, x.dtype)), jax.eval_shape(of, first)
        )

        def add(total: Any, microbatch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of(microbatch)), None

        (gradients, (sums, load)), _ = jax.lax.scan(add, zeros, whole)
    metrics = {
        'loss': sums.pop('cross_entropy'),
        'targets': weights.sum(),
        'tokens': (batch.segment_ids > 0).sum(dtype=jnp.int32),
        **throughput.mean_context(setup.config.model, batch),
        **sums,
    }
    if load:
        per_layer = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(load)])
        even = per_layer.mean(axis=-1)
        metrics['router/load_max_over_mean'] = jnp.max(per_layer.max(axis=-1) / even)
        metrics['router/drop_fraction'] /= per_layer.sum()
    return gradients, metrics, load


def loss(
    setup: Setup,
    router: PyTree,
    params: PyTree,
    batch: Batch,
    targets: Array,
    weights: Array,
    share: Float[Array, ''],
) -> tuple[Float[Array, ''], tuple[Metrics, dict[str, dict[str, Array]]]]:
    """The microbatch's share of the loss, with what is summed over microbatches.

    Args:
      weights: of each target; those of the whole batch add up to 1.
      share: of the batch's tokens, by which means over tokens are weighted.
    """
    cfg = setup.config
    variables = {'params': params, 'router': router}
    hidden, reported = setup.model.apply(
        variables, batch.tokens, batch.positions, batch.attention_segments(cfg.data.documents_apart)
    )
    head = setup.model.apply(variables, method='unembedding_weight')
    losses = cross_entropy(hidden, head, targets, weights, cfg.model.vocab_size, cfg.train.z_loss)
    sums = {'cross_entropy': jnp.sum(losses.nll * weights)}
    total = losses.total
    layers = [stats for group in reported.values() for stats in group.values()]
    if layers:
        moe = cfg.model.moe
        of = lambda name: jnp.sum(jnp.stack([getattr(s, name).sum() for s in layers]))
        auxiliary = moe.router_z_loss * of('z_loss')
        if moe.balance in ('aux', 'both'):
            auxiliary += moe.aux_loss * of('balance_loss')
        total += share * auxiliary
        num_layers = sum(stats.dropped.size for stats in layers)
        sums |= {
            'router/drop_fraction': of('dropped'),
            'router/entropy': share * of('entropy') / num_layers,
            'router/balance_loss': share * of('balance_loss') / num_layers,
            'router/z_loss': share * of('z_loss') / num_layers,
        }
    load = {
        group: {name: stats.load for name, stats in layer.items()}
        for group, layer in reported.items()
    }
    return total, (sums, load)


def balance(moe: config.MoE, router: PyTree, load: dict[str, dict[str, Array]]) -> PyTree:
    """Moves each expert's bias towards the mean load (2408.15664)."""
    if moe.balance not in ('bias', 'both'):
        return router

    def move(bias: Array, load: Array) -> Array:
        return bias + moe.bias_rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)

    return {
        group: {
            name: {'moe': {'bias': move(variables['moe']['bias'], load[group][name])}}
            for name, variables in layers.items()
        }
        for group, layers in router.items()
    }
