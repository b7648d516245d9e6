"""helios train: trains a model, or describes the run (--dry_run)."""

import os
from collections.abc import Callable, Sequence

from absl import flags

from helios_jax import config, options, paths
from helios_jax.errors import require


def train_command(
    argv: Sequence[str], *, with_policy: Callable[[config.Config], config.Config]
) -> None:
    """Trains a model; with the same workdir again, goes on from its newest checkpoint.

    helios train --config=tiny --workdir=runs/tiny --config.train.num_steps=1000
    """
    # `with_policy` puts a preset in the place of memory.policy=auto; the planner, which stands on
    # this package, chooses it.
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', '', 'Directory that the run is kept in.', flag_values=values)
    flags.DEFINE_bool('dry_run', False, 'Describe the run and touch nothing.', flag_values=values)
    flags.DEFINE_integer('num_devices', 1, 'Devices that --dry_run assumes.', flag_values=values)
    text = "Report each layer's gradient at the end, too."
    flags.DEFINE_bool('layer_gradients', False, text, flag_values=values)
    cfg = options.parse_config(values, argv)
    if values.dry_run:
        dry_run(cfg, values.num_devices)
        return
    require(bool(values.workdir), '--workdir is missing; name a directory for the run.')
    paths.check('--workdir', values.workdir)
    paths.check('train.init_from', cfg.train.init_from)
    from helios_jax.parallel import cluster

    cluster.start()
    from helios_jax.train import loop

    loop.train(with_policy(cfg), values.workdir, layer_gradients=values.layer_gradients)


def dry_run(cfg: config.Config, num_devices: int) -> None:
    """Prints a description of the run, and refuses what the run would refuse."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax.data import tokenizer
    from helios_jax.train.dry_run import describe

    vocab_size = tokenizer.load(cfg.data.tokenizer, chat_setting=cfg.data.chat_template).vocab_size
    print(describe(cfg.resolve(vocab_size), num_devices))
