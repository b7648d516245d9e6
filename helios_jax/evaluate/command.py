"""helios eval and generate: the commands that read a checkpoint's weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from helios_jax import config, options, paths
from helios_jax.errors import UserError, require
from helios_jax.evaluate.length_settings import METHODS, Lengths
from helios_jax.evaluate.prompting import Prompting


def eval_command(argv: Sequence[str]) -> None:
    """Measures a checkpoint: bits per byte, benchmarks, or rows of several lengths.

    helios eval --checkpoint=runs/tiny --step=best --text='other/*.txt'
    helios eval --checkpoint=runs/tiny --tasks=quiz --include_path=tasks --output=runs/tiny/quiz
    helios eval --checkpoint=runs/tiny --lengths=256,512,1024 --text='long/*.txt'
    """
    values = flags.FlagValues()
    checkpoint_flags(values)
    flags.DEFINE_string(
        'text', '', 'Corpus to read instead of the held-out split.', flag_values=values
    )
    flags.DEFINE_string(
        'output', '', 'Directory for results; what was stopped goes on there.', flag_values=values
    )
    flags.DEFINE_integer(
        'context', 1, 'Devices that share a row, which travels round a ring.', flag_values=values
    )
    flags.DEFINE_integer('row_length', 0, "Tokens a row; 0 takes the run's.", flag_values=values)
    flags.DEFINE_integer('rows', 0, 'Rows to read; 0 takes all.', flag_values=values)
    flags.DEFINE_integer('batch_rows', 16, 'Rows at a time.', flag_values=values)
    flags.DEFINE_bool(
        'allow_lossy_tokenizer', False, 'Score a text that the tokenizer loses some of.',
        flag_values=values,
    )  # fmt: skip
    task_flags(values)
    length_flags(values)
    options.parse(values, argv)
    prepare(values)
    chosen = [f'--{name}' for name in ('tasks', 'lengths') if values[name].value]
    require(len(chosen) < 2, f'{" and ".join(chosen)} are two evaluations; give one of them.')
    require(paths.is_local(values.output), f'--output={values.output} must be a local directory.')
    for name in ('row_length', 'rows'):
        unread = bool(chosen) and values[name].value != 0
        require(not unread, f'--{name} means nothing to {"".join(chosen)}; leave it out.')
    if values.tasks:
        return run_tasks(values)
    for name in Prompting._fields:
        require(not values[name].present, f'--{name} is for --tasks; name some, or leave it out.')
    if values.lengths:
        return run_lengths(values)
    require(not values.output, '--output is for --tasks and --lengths; print with --json.')
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


def task_flags(values: flags.FlagValues) -> None:
    """Defines the flags of benchmarks."""
    flags.DEFINE_list('tasks', [], 'Tasks of lm-evaluation-harness to run.', flag_values=values)
    flags.DEFINE_string(
        'include_path', '', 'Directory of task files, which are code.', flag_values=values
    )
    flags.DEFINE_integer('limit', 0, 'Documents of each task; 0 takes all.', flag_values=values)
    flags.DEFINE_integer(
        'max_length', 0, "Tokens of a task's row; longer contexts are cut.", flag_values=values
    )
    flags.DEFINE_integer(
        'num_fewshot', None, "Solved examples in a prompt; else the task's own number.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        'apply_chat_template', False, 'A prompt is a conversation, of the chat template.',
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        'system_instruction', '', 'Text in front of a prompt; the system message of a chat.',
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        'fewshot_as_multiturn', True, 'Examples are turns of the chat, not one message.',
        flag_values=values,
    )  # fmt: skip


def length_flags(values: flags.FlagValues) -> None:
    """Defines the flags of an evaluation at several lengths: fields of `Lengths`."""
    flags.DEFINE_list('lengths', [], 'Tokens of a row, such as 512,1024.', flag_values=values)
    flags.DEFINE_list('methods', list(METHODS), 'How positions are stretched.', flag_values=values)
    for name, text in (
        ('documents', 'Documents to read, each as long as the longest row.'),
        ('trials', 'Prompts of each task and of each depth; 0 makes none.'),
        ('stride', 'Tokens that a row scores, in the perplexity.'),
        ('seed', 'Another seed makes other prompts.'),
    ):
        flags.DEFINE_integer(name, getattr(Lengths, name), text, flag_values=values)


def run_tasks(values: flags.FlagValues) -> None:
    """Runs --tasks on the checkpoint, and prints their table."""
    require(not values.text, '--text and --tasks are two evaluations; give one of them.')
    require(
        values.apply_chat_template or not values['fewshot_as_multiturn'].present,
        '--fewshot_as_multiturn says how a chat is made; add --apply_chat_template, or drop it.',
    )
    from helios_jax import restoring
    from helios_jax.evaluate import benchmarks, conversation
    from helios_jax.evaluate.conversation import Chat

    given: dict[str, Any] = {name: values[name].value for name in Prompting._fields}
    prompting = Prompting(**given)
    prompting.check()
    benchmarks.check(values.limit, values.batch_rows, values.max_length)
    tokenizer = None
    if prompting.apply_chat_template:
        tokenizer = restoring.read_tokenizer(values.checkpoint, values.step)
        conversation.check(tokenizer, Chat(values.system_instruction))
    tasks = benchmarks.load(values.tasks, values.include_path, prompting)
    if tokenizer:  # before the weights are read
        benchmarks.check_descriptions(tokenizer, tasks)
    results = benchmarks.run(
        restore(values), tasks, prompting=prompting, limit=values.limit,
        batch_rows=values.batch_rows, max_length=values.max_length, output=values.output,
    )  # fmt: skip
    print(options.to_json(results) if values.json else benchmarks.table(results))


def run_lengths(values: flags.FlagValues) -> None:
    """Measures the checkpoint at --lengths, and prints their table."""
    require(not values.yarn, '--yarn stretches positions as --methods do; leave it out.')
    names = [field.name for field in dataclasses.fields(Lengths)]
    given: dict[str, Any] = {name: values[name].value for name in names}
    for length in values.lengths:
        require(length.isdecimal(), f'--lengths: {length!r} is no number of tokens, such as 512.')
    given |= {'lengths': tuple(map(int, values.lengths)), 'methods': tuple(values.methods)}
    wanted = Lengths(**given)
    from helios_jax import restoring
    from helios_jax.evaluate import length_report
    from helios_jax.evaluate.lengths import measure

    trained_on = restoring.read_metadata(values.checkpoint, values.step).get('data')
    results = measure(restore(values), wanted, trained_on=trained_on, output=values.output)
    if values.output:
        length_report.write(values.output, results)
    print(options.to_json(results) if values.json else length_report.table(results))


def generate_command(argv: Sequence[str]) -> None:
    """Continues prompts with text from a checkpoint.

    helios generate --checkpoint=runs/tiny --prompt='def main(' --temperature=0.7
    helios generate --checkpoint=runs/qwen --chat --system='Be brief.' --prompt='Why is it dark?'
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
    flags.DEFINE_bool('chat', False, 'A prompt is a message, to be answered.', flag_values=values)
    flags.DEFINE_string('system', '', 'Message in front of a chat.', flag_values=values)
    options.parse(values, argv)
    require(
        values.chat or not values.system, '--system is a message of a chat; add --chat, or drop it.'
    )
    prepare(values)
    from helios_jax.evaluate.conversation import Chat
    from helios_jax.evaluate.generate import compile_ahead, complete

    settings: dict[str, Any] = {
        name: values[name].value for name in ('max_tokens', 'temperature', 'top_k', 'top_p', 'seed')
    }
    settings['chat'] = Chat(values.system) if values.chat else None
    compiled = functools.partial(compile_ahead, prompts=values.prompt, **settings)
    texts = complete(restore(values, compiled), values.prompt, stop=values.stop, **settings)
    for prompt, text in zip(values.prompt, texts, strict=True):
        shown = text if values.chat else prompt + text
        print(options.to_json({'prompt': prompt, 'text': text}) if values.json else shown)


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
    from helios_jax.parallel import mesh as meshes

    context = values.context if 'context' in values else 1
    mesh = meshes.make(config.Mesh(context=context)) if context != 1 else None
    scaling = yarn(values.yarn)
    return restoring.restore(
        values.checkpoint,
        values.step,
        weights=values.weights,
        mesh=mesh,
        rope=scaling,
        meanwhile=meanwhile,
    )


def yarn(value: str) -> dict[str, Any]:
    """Returns the settings of model.rope that --yarn stands for."""
    if not value:
        return {}
    own = {'attention_factor': 0.0}  # the m of another factor would not be right
    if value == 'dynamic':
        return own | {'scaling': 'dynamic'}
    try:
        return own | {'scaling': 'static', 'factor': float(value)}
    except ValueError:
        raise UserError(f"--yarn={value} must be 'dynamic' or a factor such as 4.") from None
