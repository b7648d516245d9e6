"""Tasks of lm-evaluation-harness in files of their own: YAML beside JSONL, nothing to download."""

import json
from pathlib import Path

QUIZ = [
    {'question': 'alpha beta', 'choices': ['gamma', 'delta', 'epsilon zeta'], 'answer': 1},
    {'question': 'eta', 'choices': ['theta', 'iota iota iota'], 'answer': 0},
    {'question': 'a longer question than the others ' * 2, 'choices': ['yes', 'no'], 'answer': 1},
    {'question': 'kappa', 'choices': ['lambda', 'mu', 'nu', 'xi'], 'answer': 3},
]
TEXTS = ['one short text', 'two ' * 70, 'three three é', 'four ' * 30]
LAST_WORDS = [{'context': f'{n} alpha beta', 'word': w} for n, w in enumerate(('x', 'yy', 'z'))]
SUMS = [{'question': f'{n} + {n} =', 'answer': str(2 * n)} for n in (1, 22, 333)]

TASKS = {
    'quiz': (
        QUIZ,
        """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
        """,
    ),
    'texts': (
        [{'text': text} for text in TEXTS],
        """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list:
          - {metric: byte_perplexity}
          - {metric: bits_per_byte}
        """,
    ),
    'last_words': (
        LAST_WORDS,
        """
        output_type: loglikelihood
        doc_to_text: "{{context}}"
        doc_to_target: " {{word}}"
        metric_list:
          - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
          - {metric: acc, aggregation: mean, higher_is_better: true}
        """,
    ),
    'sums': (
        SUMS,
        """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
        metric_list:
          - {metric: exact_match, aggregation: mean, higher_is_better: true}
        """,
    ),
}


def write(directory: Path) -> Path:
    """Writes all of TASKS into a new directory."""
    directory.mkdir()
    for name, (documents, settings) in TASKS.items():
        data = directory / f'{name}.jsonl'
        data.write_text(''.join(json.dumps(document) + '\n' for document in documents))
        lines = [
            f'task: {name}', 'dataset_path: json', 'test_split: test', 'dataset_kwargs:',
            f'  data_files: {{test: "{data}"}}', *(line[8:] for line in settings.splitlines()),
        ]  # fmt: skip
        (directory / f'{name}.yaml').write_text('\n'.join(lines) + '\n')
    return directory
