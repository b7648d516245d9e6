"""helios data: prepares text and makes tokenizers, before a run or without one."""

from collections.abc import Sequence

from absl import flags

from helios_jax import options


def prepare_command(argv: Sequence[str]) -> None:
    """Tokenizes and packs a config's corpus into its cache, as a run would first do.

    helios data prepare --config=tiny --config.data.corpus='notes/**/*.md'
    """
    values = flags.FlagValues()
    flags.DEFINE_bool('json', False, 'Print JSON, an object a line.', flag_values=values)
    flags.DEFINE_bool(
        'rebuild', False, 'Prepare it again, whatever the cache has.', flag_values=values
    )
    cfg = options.parse_config(values, argv)
    from helios_jax.data import pipeline, tokenizer

    encoder = tokenizer.load(cfg.data.tokenizer, chat_setting=cfg.data.chat_template)
    prepared = pipeline.prepare(cfg.data, encoder, rebuild=values.rebuild)
    for row in pipeline.summary(prepared):
        options.show(row, values.json)


def tokenizer_command(argv: Sequence[str]) -> None:
    """Trains a byte-level BPE tokenizer on a corpus.

    helios data tokenizer --corpus='notes/**/*.md' --vocab_size=8192 --output=tokenizer.json
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        'corpus', 'python_stdlib', 'What to read, as in data.corpus.', flag_values=values
    )
    flags.DEFINE_integer('vocab_size', 32768, 'Tokens to make.', flag_values=values)
    flags.DEFINE_string('output', 'tokenizer.json', 'File to write.', flag_values=values)
    options.parse(values, argv)
    from helios_jax.data import pipeline

    pipeline.train_tokenizer(values.corpus, values.vocab_size, values.output)
    print(f'{values.output}: {values.vocab_size} tokens')


DATA = options.Group(
    'Prepares text for training.',
    {'prepare': prepare_command, 'tokenizer': tokenizer_command},
)
