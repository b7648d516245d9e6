"""helios <command>: parses flags, resolves names, and calls in.

Every command that takes a config takes `--config=NAME` (one that is shipped), `--config=FILE.py`,
and `--config.section.field=value` for each of its settings. Bad input ends with one line and exit
code 2.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags

from helios_jax import config, options
from helios_jax.bench.commands import bench_command, show
from helios_jax.config import UserError, nearest, require
from helios_jax.plan.command import plan_command


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format='%(message)s')
    logging.getLogger('helios_jax').setLevel(logging.INFO)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    try:
        command = argv.pop(0) if argv else '--help'
        if command in ('-h', '--help', 'help'):
            print('helios <command>\n')
            print('\n'.join(f'  {name:9} {f.__doc__}' for name, f in COMMANDS.items()))
            return
        require(
            command in COMMANDS,
            f'helios {command}: no such command.{nearest(command, COMMANDS)} There are: '
            f'{", ".join(COMMANDS)}.',
        )
        COMMANDS[command](argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has enough (`| head`); what is left to print goes nowhere, at the exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        fail(str(error))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        fail(f'{error.filename}: {error.strerror}; choose another directory.')


def fail(message: str) -> NoReturn:
    print(f'helios: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(2)


def train_command(argv: Sequence[str]) -> None:
    """Trains: --config --workdir [--dry_run [--num_devices]]."""
    values = flags.FlagValues()
    options.config_flag(values, argv)
    flags.DEFINE_string('workdir', '', 'Where the run is kept.', flag_values=values)
    flags.DEFINE_bool('dry_run', False, 'Describe the run, touch nothing.', flag_values=values)
    flags.DEFINE_integer('num_devices', 1, 'Devices of the dry run.', flag_values=values)
    options.parse(values, options.config_file(argv))
    cfg = config.from_dict(values.config)
    if values.dry_run:
        dry_run(cfg, values.num_devices)
        return
    require(bool(values.workdir), '--workdir is missing; name a directory for the run.')
    from helios_jax.parallel import cluster

    cluster.start()
    from helios_jax.train import loop

    loop.train(with_policy(cfg), values.workdir)


def with_policy(cfg: config.Config) -> config.Config:
    """The config with what memory.policy=auto stands for on this run's devices."""
    if cfg.memory.policy != 'auto':
        return cfg
    from helios_jax import chips
    from helios_jax.plan import command

    memory = command.prepared(cfg, chips.here()).memory
    parts = f', backward_parts={memory.backward_parts}' if memory.backward_parts > 1 else ''
    print(f'memory.policy=auto: {memory.policy}{parts}')
    return dataclasses.replace(cfg, memory=memory)


def dry_run(cfg: config.Config, num_devices: int) -> None:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from helios_jax.data import tokenizer
    from helios_jax.train.dry_run import describe

    vocab_size = cfg.model.vocab_size or tokenizer.load(cfg.data.tokenizer).vocab_size
    print(describe(cfg.resolve(vocab_size), num_devices))


def checkpoint_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string('checkpoint', '', "A run's workdir.", flag_values=values)
    flags.DEFINE_string('step', 'latest', 'latest, best, or a number.', flag_values=values)
    flags.DEFINE_string(
        'yarn', '', "Reads past the trained length: 'dynamic', or a factor.", flag_values=values
    )
    flags.DEFINE_bool('json', False, 'One JSON object instead of text.', flag_values=values)


def restore(values: flags.FlagValues) -> Any:
    require(bool(values.checkpoint), "--checkpoint is missing; name a run's workdir.")
    from helios_jax import restoring
    from helios_jax.parallel import cluster

    cluster.enable_compilation_cache(config.Train().compilation_cache)
    return restoring.restore(values.checkpoint, values.step, rope=yarn(values.yarn))


def yarn(value: str) -> dict[str, Any]:
    if value in ('', 'dynamic'):
        return {'scaling': value} if value else {}
    try:
        return {'scaling': 'static', 'factor': float(value)}
    except ValueError:
        raise UserError(f"--yarn={value} must be 'dynamic' or a factor such as 4.") from None


def eval_command(argv: Sequence[str]) -> None:
    """Bits per byte of a checkpoint: --checkpoint [--step --text --row_length --rows --yarn]."""
    values = flags.FlagValues()
    checkpoint_flags(values)
    flags.DEFINE_string(
        'text', '', 'Corpus to read instead of the held-out split.', flag_values=values
    )
    flags.DEFINE_integer('row_length', 0, "Tokens a row; 0: the run's.", flag_values=values)
    flags.DEFINE_integer('rows', 0, 'Rows to read; 0: all.', flag_values=values)
    flags.DEFINE_integer('batch_rows', 16, 'Rows at a time.', flag_values=values)
    flags.DEFINE_bool(
        'allow_lossy_tokenizer', False, 'Score text that the tokenizer loses some of.',
        flag_values=values,
    )  # fmt: skip
    options.parse(values, argv)
    from helios_jax import restoring
    from helios_jax.evaluate.held_out import held_out

    figures = held_out(
        restore(values),
        text=values.text,
        row_length=values.row_length,
        num_rows=values.rows,
        batch_rows=values.batch_rows,
        allow_lossy_tokenizer=values.allow_lossy_tokenizer,
        trained_on=restoring.read_metadata(values.checkpoint, values.step).get('data'),
    )
    show(figures, values.json)


def generate_command(argv: Sequence[str]) -> None:
    """Continues a prompt: --checkpoint --prompt [--temperature --top_k --top_p --seed …]."""
    values = flags.FlagValues()
    checkpoint_flags(values)
    flags.DEFINE_multi_string('prompt', [''], 'Text to continue; may repeat.', flag_values=values)
    flags.DEFINE_integer('max_tokens', 256, 'Tokens to add at most.', flag_values=values)
    flags.DEFINE_float('temperature', 0.8, '0 is greedy.', flag_values=values)
    flags.DEFINE_integer('top_k', 0, 'Only the k likeliest; 0: all.', flag_values=values)
    flags.DEFINE_float('top_p', 1.0, 'Only the likeliest of this mass.', flag_values=values)
    flags.DEFINE_integer('seed', 0, 'Of the draws.', flag_values=values)
    flags.DEFINE_multi_string('stop', [], 'Text to stop before; may repeat.', flag_values=values)
    options.parse(values, argv)
    from helios_jax.evaluate.generate import complete

    texts = complete(
        restore(values),
        values.prompt,
        stop=values.stop,
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
    )
    for prompt, text in zip(values.prompt, texts, strict=True):
        print(json.dumps({'prompt': prompt, 'text': text}) if values.json else prompt + text)


def data_command(argv: Sequence[str]) -> None:
    """data prepare --config [--rebuild] | data tokenizer --corpus --vocab_size --output."""
    action = argv[0] if argv else ''
    require(
        action in ('prepare', 'tokenizer'),
        f'helios data {action}: no such action.{nearest(action, ("prepare", "tokenizer"))} '
        'There are: prepare, tokenizer.',
    )
    from helios_jax.data import pipeline, tokenizer

    values = flags.FlagValues()
    if action == 'tokenizer':
        flags.DEFINE_string('corpus', 'python_stdlib', 'As data.corpus.', flag_values=values)
        flags.DEFINE_integer('vocab_size', 32768, 'Tokens.', flag_values=values)
        flags.DEFINE_string('output', 'tokenizer.json', 'File to write.', flag_values=values)
        options.parse(values, argv[1:])
        pipeline.train_tokenizer(values.corpus, values.vocab_size, values.output)
        print(f'{values.output}: {values.vocab_size} tokens')
        return
    options.config_flag(values, argv)
    flags.DEFINE_bool('json', False, 'One JSON object a line.', flag_values=values)
    flags.DEFINE_bool('rebuild', False, 'Make all of it again.', flag_values=values)
    options.parse(values, options.config_file(argv[1:]))
    cfg = config.from_dict(values.config)
    loaded = tokenizer.load(cfg.data.tokenizer)
    prepared = pipeline.prepare(cfg.data, loaded, rebuild=values.rebuild)
    for row in pipeline.summary(prepared):
        show(row, values.json)


def ckpt_command(argv: Sequence[str]) -> None:
    """ckpt ls DIR: the checkpoints of a run."""
    values = flags.FlagValues()
    flags.DEFINE_bool('json', False, 'One JSON object a line.', flag_values=values)
    arguments = options.parse(values, argv, positional=True)
    require(
        len(arguments) == 2 and arguments[0] == 'ls',
        f'helios ckpt {" ".join(arguments)}: write helios ckpt ls DIR.',
    )
    from helios_jax import checkpoint, restoring

    for row in checkpoint.list_steps(restoring.checkpoint_directory(arguments[1])):
        show(row | {'damage': row['damage'] or 'none'}, values.json)


def explain_command(argv: Sequence[str]) -> None:
    """explain [FIELD]: what a setting means, and its default."""
    described = config.describe()
    name = argv[0].removeprefix('config.') if argv else ''
    chosen = {
        n: d for n, d in described.items() if n == name or n.startswith(f'{name}.') or not name
    }
    require(bool(chosen), f'{name}: no such setting.{nearest(name, described)}')
    for setting, (default, comment) in chosen.items():
        print(f'{setting} = {default}\n    {comment}')


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    'train': train_command,
    'eval': eval_command,
    'generate': generate_command,
    'data': data_command,
    'plan': plan_command,
    'ckpt': ckpt_command,
    'explain': explain_command,
    'bench': bench_command,
}
