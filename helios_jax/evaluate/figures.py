"""Formats figures for people, with the digits that matter; metrics.jsonl has all digits."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Style(NamedTuple):
    label: str
    digits: str  # format for str.format
    unit: str = ''


# The figures of a run's end, in the order in which they are read.
FINAL = {
    'bits_per_byte': Style('held-out text', '{:.4f}', 'bits/byte'),
    'trained_bits_per_byte': Style('held-out text, trained weights', '{:.4f}', 'bits/byte'),
    'lost_fraction': Style('left out: bytes that the tokenizer loses', '{:.2%}'),
    'gzip_bits_per_byte': Style('gzip -9 on it', '{:.4f}', 'bits/byte'),
    'order0_bits_per_byte': Style('byte frequencies on it', '{:.4f}', 'bits/byte'),
    'loss': Style('held-out loss', '{:.4f}', 'nats/token'),
    'trained_loss': Style('held-out loss, trained weights', '{:.4f}', 'nats/token'),
    'perplexity': Style('held-out perplexity', '{:,.2f}'),
    'targets': Style('held-out tokens', '{:,.0f}'),
    'bytes': Style('held-out bytes', '{:,.0f}'),
    'time/tokens_per_second': Style('speed', '{:,.0f}', 'tokens/s'),
    'time/mfu': Style('MFU', '{:.1%}'),
    'time/segment_mfu': Style('MFU by segments', '{:.1%}'),
    'device/peak_gib': Style('peak memory of a device', '{:.2f}', 'GiB'),
}

# The figures of a step, as they stand in a line.
STEP = {
    'loss': 'loss {:.4f}',
    'eval/loss': 'held-out loss {:.4f} nats/token',
    'eval/bits_per_byte': '{:.4f} bits/byte',
    'eval/lost_fraction': '(without the {:.2%} of bytes that the tokenizer loses)',
    'learning_rate': 'lr {:.2e}',
    'gradient_norm': 'grad {:.3g}',
    'time/tokens_per_second': '{:,.0f} tokens/s',
    'time/mfu': 'MFU {:.1%}',
    'time/data_wait_fraction': 'data wait {:.1%}',
}


def format_line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    """Writes a line about a step, of those figures that are there."""
    pieces = [f'step {step:,}/{num_steps:,}' if num_steps else f'step {step:,}']
    pieces += [show.format(values[name]) for name, show in STEP.items() if name in values]
    return '  '.join(pieces)


def labelled(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns label, number and unit of each figure, the known ones first."""
    known = [name for name in FINAL if name in values]
    rows = []
    for name in [*known, *(name for name in values if name not in FINAL)]:
        label, digits, unit = FINAL.get(name, Style(name, ''))
        text = digits.format(values[name]) if digits else number(values[name])
        rows.append((label, text, unit))
    return rows


def number(value: Any) -> str:
    """Formats a number with the digits that matter, whole ones in full; other values as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 2**53):
        return f'{int(value):,}'
    return f'{value:,.0f}' if 1e4 <= abs(value) < 1e15 else f'{value:.5g}'


def speed(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums up speed and memory of a run's metric lines: medians, and the largest peak."""
    found = {}
    for name, summary in (
        ('time/tokens_per_second', statistics.median),
        ('time/mfu', statistics.median),
        ('time/segment_mfu', statistics.median),
        ('device/peak_gib', max),
    ):
        values = [line[name] for line in lines if name in line]
        if values:
            found[name] = summary(values)
    return found
