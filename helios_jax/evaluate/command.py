"""helios eval and generate: the commands that read a checkpoint's weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from helios_jax import config, options, paths
from helios_jax.errors import UserError, require


def eval_command(argv: Sequence[str]) -> None:
    """Measures a checkpoint's bits per byte, on its held-out text or on any other.

    helios eval --checkpoint=runs/tiny --step=best --text='other/*.txt'
    """
    values = flags.FlagValues()
    checkpoint_flags(values)
    flags.DEFINE_string(
        'text', '', 'Corpus to read instead of the held-out split.', flag_values=values
    )
    flags.DEFINE_integer('row_length', 0, "Tokens a row; 0 takes the run's.", flag_values=values)
    flags.DEFINE_integer('rows', 0, 'Rows to read; 0 takes all.', flag_values=values)
    flags.DEFINE_integer('batch_rows', 16, 'Rows at a time.', flag_values=values)
    flags.DEFINE_bool(
        'allow_lossy_tokenizer', False, 'Score a text that the tokenizer loses some of.',
        flag_values=values,
    )  # fmt: skip
    options.parse(values, argv)
    prepare(values)
    restored = restore(values)
    from helios_jax import display, restoring
    from helios_jax.evaluate.figures import labelled
    from helios_jax.evaluate.held_out import held_out

    figures = held_out(
        restored,
        text=values.text,
        row_length=values.row_length,
        num_rows=values.rows,
        batch_rows=values.batch_rows,
        allow_lossy_tokenizer=values.allow_lossy_tokenizer,
        trained_on=restoring.read_metadata(values.checkpoint, values.step).get('data'),
    )
    if values.json:
        print(options.to_json(figures))
        return
    rows = labelled(figures)
    if values.text:
        rows = [(label.removeprefix('held-out '), *rest) for label, *rest in rows]
    display.table(rows)


def generate_command(argv: Sequence[str]) -> None:
    """Continues prompts with text from a checkpoint.

    helios generate --checkpoint=runs/tiny --prompt='def main(' --temperature=0.7
    """
    values = flags.FlagValues()
    checkpoint_flags(values)
    flags.DEFINE_multi_string('prompt', [''], 'Text to continue; may repeat.', flag_values=values)
    flags.DEFINE_integer('max_tokens', 256, 'Tokens to add at most.', flag_values=values)
    flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token.', flag_values=values)
    flags.DEFINE_integer('top_k', 0, 'Draw from the k likeliest; 0 is all.', flag_values=values)
    flags.DEFINE_float('top_p', 1.0, 'Draw from the likeliest of this mass.', flag_values=values)
    flags.DEFINE_integer('seed', 0, 'Another seed draws another text.', flag_values=values)
    flags.DEFINE_multi_string('stop', [], 'Text to stop before; may repeat.', flag_values=values)
    options.parse(values, argv)
    prepare(values)
    from helios_jax.evaluate.generate import compile_ahead, complete

    settings: dict[str, Any] = {
        name: values[name].value for name in ('max_tokens', 'temperature', 'top_k', 'top_p', 'seed')
    }
    compiled = functools.partial(compile_ahead, prompts=values.prompt, **settings)
    texts = complete(restore(values, compiled), values.prompt, stop=values.stop, **settings)
    for prompt, text in zip(values.prompt, texts, strict=True):
        print(options.to_json({'prompt': prompt, 'text': text}) if values.json else prompt + text)


def checkpoint_flags(values: flags.FlagValues) -> None:
    """Defines the flags that say which checkpoint to read, and how."""
    flags.DEFINE_string('checkpoint', '', "A run's workdir.", flag_values=values)
    flags.DEFINE_string('step', 'latest', 'latest, best, or a number.', flag_values=values)
    flags.DEFINE_string(
        'weights', 'auto', 'ema, trained, or auto: the ema if there is one.', flag_values=values
    )
    flags.DEFINE_string(
        'yarn', '', "Reads past the trained length: 'dynamic', or a factor.", flag_values=values
    )
    flags.DEFINE_bool('json', False, 'Print JSON instead of text.', flag_values=values)


def prepare(values: flags.FlagValues) -> None:
    """Readies the machine for `restore`, which takes as long as importing what it needs.

    Raises:
      UserError: a checkpoint or a scaling that cannot be.
    """
    require(bool(values.checkpoint), "--checkpoint is missing; name a run's workdir.")
    paths.check('--checkpoint', values.checkpoint)
    yarn(values.yarn)
    from helios_jax.parallel import cluster

    cluster.enable_compilation_cache(config.Train().compilation_cache)
    cluster.wake()


def restore(values: flags.FlagValues, meanwhile: Callable[[Any], object] | None = None) -> Any:
    """Returns what `checkpoint_flags` name, ready to use; `meanwhile` as in `restoring.restore`."""
    from helios_jax import restoring

    scaling = yarn(values.yarn)
    return restoring.restore(
        values.checkpoint, values.step, weights=values.weights, rope=scaling, meanwhile=meanwhile
    )


def yarn(value: str) -> dict[str, Any]:
    """Returns the settings of model.rope that --yarn stands for."""
    if value in ('', 'dynamic'):
        return {'scaling': value} if value else {}
    try:
        return {'scaling': 'static', 'factor': float(value)}
    except ValueError:
        raise UserError(f"--yarn={value} must be 'dynamic' or a factor such as 4.") from None
