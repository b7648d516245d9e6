"""helios ckpt: lists, verifies, compares, removes, averages and exports checkpoints."""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from helios_jax import options, paths
from helios_jax.errors import UserError, require


def list_command(argv: Sequence[str]) -> None:
    """Lists the checkpoints of a run: step, bytes, held-out figures, damage.

    helios ckpt ls runs/tiny
    """
    values = flags.FlagValues()
    json_flag(values)
    (path,) = directories(values, argv, 'ls DIR')
    from helios_jax import checkpoint, restoring

    for row in checkpoint.list_steps(restoring.checkpoint_directory(path)):
        options.show(row | {'damage': row['damage'] or 'none'}, values.json)


def verify_command(argv: Sequence[str]) -> None:
    """Hashes every file of every step; exits with code 2 if any is damaged.

    helios ckpt verify runs/tiny --step=40
    """
    values = flags.FlagValues()
    json_flag(values)
    flags.DEFINE_integer('step', -1, 'The one step to verify; -1: all of them.', flag_values=values)
    (path,) = directories(values, argv, 'verify DIR')
    on_host()
    from helios_jax.ckpt import places, verify

    directory = places.directory_of(path)
    damaged, count = [], 0
    if not values.json:
        print(f'{"step":>10} {"files":>7} {"bytes":>18}  damage')
    for row in verify.verify(directory, values.step):
        count += 1
        damaged += [str(row['step'])] if row['damage'] else []
        if values.json:
            print(options.to_json(row))
        else:
            told = row['damage'] or 'none'
            print(f'{row["step"]:>10} {row["files"]:>7,} {row["bytes"]:>18,}  {told}', flush=True)
    require(
        not damaged,
        f'{len(damaged)} of {count} steps in {directory} damaged: {", ".join(damaged)}; restore '
        'their files from a copy, or remove them (helios ckpt prune).',
    )


def diff_command(argv: Sequence[str]) -> None:
    """Compares two checkpoints: settings, tokenizer, and how far weights are apart.

    helios ckpt diff runs/tiny/checkpoints/20 runs/tiny/checkpoints/40
    """
    values = flags.FlagValues()
    json_flag(values)
    step_flag(values)
    first, second = directories(values, argv, 'diff A B', count=2)
    on_host()
    from helios_jax.ckpt import diff, places

    a, b = (places.opened_at(path, values.step) for path in (first, second))
    changed = diff.settings(a, b)
    if values.json:
        print(options.to_json({'settings': changed, 'weights': list(diff.weights(a, b))}))
        return
    for name, (x, y) in changed.items():
        print(f'{name}: {x!r} → {y!r}')
    equal = 0
    for row in diff.weights(a, b):
        equal += row['difference'] == 'none'
        if row['difference'] != 'none':
            print(line(row), flush=True)
    print(f'{equal} weights are equal')


def line(row: dict[str, Any]) -> str:
    """Writes a row of `diff.weights` for people."""
    told = {
        'values': 'max {max:.3e}  relative {relative:.3e}',
        'shape': 'shapes {shapes}',
        'missing': 'only in A',
        'extra': 'only in B',
    }
    return f'{row["name"]:60} ' + told[row['difference']].format(**row)


def prune_command(argv: Sequence[str]) -> None:
    """Removes old steps of a run; never the best one, unless it is named.

    helios ckpt prune runs/tiny --keep=2 --dry_run
    """
    values = flags.FlagValues()
    json_flag(values)
    flags.DEFINE_integer('keep', 0, 'Newest intact steps to keep.', flag_values=values)
    flags.DEFINE_list('steps', [], 'Or the steps to remove, such as 20,40.', flag_values=values)
    flags.DEFINE_bool('dry_run', False, 'Say what would be removed.', flag_values=values)
    (path,) = directories(values, argv, 'prune DIR')
    steps = numbers(values.steps)
    one_way('keep', values.keep, steps)
    on_host()
    from helios_jax.ckpt import places, prune

    total, word = 0, 'Would remove' if values.dry_run else 'Removed'
    chosen: dict[str, Any] = {'keep': values.keep, 'steps': steps, 'dry_run': values.dry_run}
    for step, num_bytes in prune.prune(places.directory_of(path), **chosen):
        total += 1
        if values.json:
            print(
                options.to_json({'step': step, 'bytes': num_bytes, 'removed': not values.dry_run})
            )
        else:
            print(f'{word} step {step}: {num_bytes:,} bytes', flush=True)
    if not total and not values.json:
        print('There is nothing to remove')


def average_command(argv: Sequence[str]) -> None:
    """Writes the mean of several steps' weights as a new checkpoint.

    helios ckpt average runs/tiny --last=3 --to=runs/tiny_mean
    """
    values = flags.FlagValues()
    flags.DEFINE_integer('last', 0, 'Newest steps to average.', flag_values=values)
    flags.DEFINE_list('steps', [], 'Or the steps to average, such as 20,40.', flag_values=values)
    weights_flag(values, 'trained')
    to_flag(values)
    (path,) = directories(values, argv, 'average DIR')
    steps = numbers(values.steps)
    one_way('last', values.last, steps)
    on_host()
    from helios_jax import checkpoint
    from helios_jax.ckpt import derived, places

    directory = places.directory_of(path)
    there = checkpoint.committed(directory)
    require(
        values.last <= len(there),
        f'--last={values.last}, but {directory} holds {len(there)} steps; average fewer.',
    )
    steps = steps or there[-values.last :]
    derived.average(directory, steps, values.to, weights=values.weights)
    print(f'Wrote the mean of steps {", ".join(map(str, sorted({*steps})))} to {values.to}')


def export_command(argv: Sequence[str]) -> None:
    """Writes a step's weights in bfloat16 as a new checkpoint, without the optimizer.

    helios ckpt export runs/tiny --step=best --to=runs/tiny_bfloat16
    """
    values = flags.FlagValues()
    step_flag(values)
    weights_flag(values, 'auto')
    to_flag(values)
    (path,) = directories(values, argv, 'export DIR')
    on_host()
    from helios_jax.ckpt import derived, places

    opened = places.opened_at(path, values.step)
    item = derived.export(opened, values.to, weights=values.weights)
    print(f'Wrote {item} of step {opened.step} in bfloat16 to {values.to}')


CHECKPOINTS = options.Group(
    'Lists, verifies, compares, removes, averages and exports checkpoints.',
    {
        'ls': list_command,
        'verify': verify_command,
        'diff': diff_command,
        'prune': prune_command,
        'average': average_command,
        'export': export_command,
    },
)


def directories(
    values: flags.FlagValues, argv: Sequence[str], usage: str, count: int = 1
) -> list[str]:
    """Parses a command's flags, and the checkpoints that it names."""
    arguments = options.parse(values, argv, positional=True)
    number = 'one directory' if count == 1 else 'two directories'
    command = usage.split()[0]
    require(
        len(arguments) == count,
        f'helios ckpt {" ".join([command, *arguments])}: write helios ckpt {usage}, with {number}.',
    )
    for path in arguments:
        paths.check('DIR', path)
    return arguments


def json_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_bool('json', False, 'Print JSON, an object a line.', flag_values=values)


def step_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_string('step', 'latest', 'latest, best, or a number.', flag_values=values)


def weights_flag(values: flags.FlagValues, default: str) -> None:
    flags.DEFINE_string(
        'weights', default, 'ema, trained, or auto: the ema if there is one.', flag_values=values
    )


def to_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_string('to', '', 'A new directory for the result.', flag_values=values)


def numbers(texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise UserError(f'--steps={",".join(texts)} must be numbers, such as 20,40.') from None


def one_way(name: str, number: int, steps: Sequence[int]) -> None:
    """Refuses anything but one of --NAME=n and --steps."""
    require(
        number >= 0 and bool(number) != bool(steps),
        f'--{name}={number} and --steps={",".join(map(str, steps))}: give one of the two, '
        f'--{name} above 0.',
    )


def on_host() -> None:
    """Keeps JAX off the accelerators, which a training may be using."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
