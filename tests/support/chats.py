"""A conversation, chat templates, and tokenizers with special tokens to render it for."""

import io
from pathlib import Path

import sentencepiece
import tokenizers

SPECIALS = ['<|bos|>', '<|eos|>', '<|im_start|>', '<|im_end|>']
MESSAGES = [
    {'role': 'system', 'content': 'Be brief, é.'},
    {'role': 'user', 'content': 'hello there'},
    {'role': 'assistant', 'content': 'hi 😀 you'},
    {'role': 'user', 'content': 'more'},
    {'role': 'assistant', 'content': 'the quick brown fox'},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_BLOCKS = """{% for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}<|im_end|>
{% endgeneration %}
{% else %}
{{ m.content }}<|im_end|>
{% endif %}
{% endfor %}
"""
# Writes BOS, and EOS behind each answer.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + "
    "eos_token }}{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)


def byte_level(path: Path) -> str:
    """Writes a byte-level tokenizer.json, whose offsets leave out spaces, as GPT-2's do."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    made.pre_tokenizer = byte_level(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([' '.join(m['content'] for m in MESSAGES)] * 3, trainer)
    made.save(str(path))
    return str(path)


def sentences(path: Path) -> str:
    """Writes a SentencePiece model that leaves text as it is, as those of chat models do."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the quick brown fox says hello there'] * 5), model_writer=model,
        vocab_size=400, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name='identity', remove_extra_whitespaces=False,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return str(path)
