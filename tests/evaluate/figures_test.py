"""Figures as people read them."""

import pytest

from helios_jax.evaluate import figures


def test_line_shows_what_is_there():
    values = {'loss': 2.34567, 'learning_rate': 1e-3, 'time/tokens_per_second': 12345.6}
    line = figures.format_line(20, 50, values | {'time/mfu': 0.4123, 'unshown': 1.0})
    assert line == 'step 20/50  loss 2.3457  lr 1.00e-03  12,346 tokens/s  MFU 41.2%'
    line = figures.format_line(1200, 0, {'eval/bits_per_byte': 2.1, 'eval/loss': 1.5})
    assert line == 'step 1,200  held-out loss 1.5000 nats/token  2.1000 bits/byte'
    lossy = {'eval/bits_per_byte': 2.1, 'eval/lost_fraction': 0.0123}
    line = figures.format_line(20, 0, lossy)
    assert line.endswith('2.1000 bits/byte  (without the 1.23% of bytes that the tokenizer loses)')


def test_the_table_has_units_and_whole_numbers_in_full_the_known_ones_first():
    values = {
        'another': 65177.0, 'device/peak_gib': 61.23456, 'targets': 65177.0, 'bytes': 1.25e9,
        'loss': 1.26018, 'bits_per_byte': 1.8203456, 'time/tokens_per_second': 65177.4,
        'time/mfu': 0.4567, 'gzip_bits_per_byte': 1.87,
    }  # fmt: skip
    assert figures.labelled(values) == [
        ('held-out text', '1.8203', 'bits/byte'),
        ('gzip -9 on it', '1.8700', 'bits/byte'),
        ('held-out loss', '1.2602', 'nats/token'),
        ('held-out tokens', '65,177', ''),
        ('held-out bytes', '1,250,000,000', ''),
        ('speed', '65,177', 'tokens/s'),
        ('MFU', '45.7%', ''),
        ('peak memory of a device', '61.23', 'GiB'),
        ('another', '65,177', ''),
    ]


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (65177, '65,177'), (65177.0, '65,177'), (65177.25, '65,177'), (0, '0'), (-12345, '-12,345'),
        (1.23456789, '1.2346'), (0.000123456, '0.00012346'), (1e300, '1e+300'), (True, 'True'),
        ('65177', '65177'), (float('nan'), 'nan'), (float('inf'), 'inf'),
    ],
)  # fmt: skip
def test_a_number_has_the_digits_that_matter(value, text):
    assert figures.number(value) == text


def test_the_speed_of_a_run_is_its_median_line_and_its_memory_the_largest():
    lines = [
        {'step': 1, 'time/tokens_per_second': 10.0, 'device/peak_gib': 3.0},
        {'step': 1, 'eval/loss': 2.0},
        {'step': 2, 'time/tokens_per_second': 90.0, 'device/peak_gib': 5.0},
        {'step': 3, 'time/tokens_per_second': 80.0, 'device/peak_gib': 4.0},
    ]
    assert figures.speed(lines) == {'time/tokens_per_second': 80.0, 'device/peak_gib': 5.0}
    assert figures.speed([]) == {}
