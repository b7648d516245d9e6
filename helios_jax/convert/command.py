"""helios convert: the command that imports and exports Hugging Face checkpoints."""

import re
from collections.abc import Sequence

from absl import flags
from etils import epath

from helios_jax import options, paths
from helios_jax.errors import UserError, one_of, require


def convert_command(argv: Sequence[str]) -> None:
    """Imports a Hugging Face checkpoint, or exports one of ours.

    helios convert --from=models/llama --to=runs/llama
    helios convert --from=models/llama --to=runs/gated --to_gmu
    helios convert --from=runs/gated --to=models/gated
    """
    values = flags.FlagValues()
    flags.DEFINE_string('from', '', "A Hugging Face directory, or a run's workdir.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string('to', '', 'Directory to write; it must not exist.', flag_values=values)
    flags.DEFINE_bool('to_gmu', False, 'Import as a gated model of the same logits.',
                      flag_values=values)  # fmt: skip
    flags.DEFINE_string('upcycle', '', 'E,X: import a dense model as E experts, X for a token.',
                        flag_values=values)  # fmt: skip
    flags.DEFINE_integer('seed', 0, 'Draws the weights that an import adds.', flag_values=values)
    flags.DEFINE_string('step', 'latest', 'Export latest, best, or a number.', flag_values=values)
    flags.DEFINE_string('dtype', 'float32', 'Of exported tensors: float32 or bfloat16.',
                        flag_values=values)  # fmt: skip
    flags.DEFINE_float('shard_gb', 5.0, 'Most GB of an exported file of tensors.',
                       flag_values=values)  # fmt: skip
    options.parse(values, argv)
    source, to = _directory('--from', values['from'].value), _directory('--to', values.to)
    require(source.is_dir(), f'--from={source}: no such directory.')
    require(not to.exists(), f'--to={to} exists already; nothing is written over, name another.')
    one_of('--dtype', values.dtype, ('float32', 'bfloat16'))
    require(values.shard_gb > 0, f'--shard_gb={values.shard_gb} must be above 0.')
    upcycle = _upcycle(values.upcycle)
    if (source / 'checkpoints').exists() or (source / 'helios_checkpoints.json').exists():
        require(
            not values.to_gmu and not upcycle,
            f'--to_gmu and --upcycle change what is imported, but --from={source} is a workdir of '
            'ours; name a Hugging Face directory.',
        )
        from helios_jax.convert.exporting import export

        shard_bytes = int(values.shard_gb * 10**9)
        family = export(source, to, step=values.step, dtype=values.dtype, shard_bytes=shard_bytes)
        remote = '; load it with trust_remote_code=True' if family == 'helios' else ''
        print(f'Wrote {to}, a {family} model{remote}.')
        return
    from helios_jax.convert import importing, workdir

    opened = importing.open_directory(source, to_gmu=values.to_gmu, upcycle=upcycle)
    workdir.save(opened, to, seed=values.seed)
    print(f'Wrote {to}, from a {opened.family} model; go on with train.init_from={to}.')


def _directory(flag: str, value: str | None) -> epath.Path:
    require(bool(value), f'{flag} is missing; name a directory.')
    require(paths.is_local(value), f'{flag}={value} must be a local directory.')
    return epath.Path(value).expanduser()


def _upcycle(value: str) -> tuple[int, int] | None:
    if not value:
        return None
    found = re.fullmatch(r'(\d{1,4}),(\d{1,4})', value)
    if not found or not 1 <= int(found[2]) <= int(found[1]):
        raise UserError(f'--upcycle={value} must be E,X with 1 ≤ X ≤ E, such as 8,2.')
    return int(found[1]), int(found[2])
