"""`helios train` as a program on a terminal, as someone who watches it would see it."""

import os
import pty
import re
import subprocess
import sys

import pyte
import pytest
import small_run

COLUMNS, ROWS = 200, 60
PROGRAM = """
import logging, sys, warnings
logging.basicConfig(format='%(message)s')  # or what is imported below would say how
from helios_jax import cli
from helios_jax.train import finish, metrics

finish.SAMPLE_TOKENS = 3
write = metrics.MetricWriter.write

def write_and_speak(self, step, values):
    write(self, step, values)
    if step == 2 and 'loss' in values:
        logging.getLogger('third.party').error('an error of a library, ' + 'x' * 230)
        warnings.warn('a warning of a library')
        print('printed')

metrics.MetricWriter.write = write_and_speak
cli.main(sys.argv[1:])
"""
SEEN = [
    r'Reading .*\.txt: 40 documents in \d.*s',
    r'Packing .*\(validation\): 1 shard in \d.*s',
    r'Packing .*\(train\): 1 shard in \d.*s',
    r'Training [\d,]+ parameters on 1 × cpu: steps 1 to 4, each of 8 rows of 32 tokens',
    r'attention: reference on cpu\.',
    r'Compiling the training step: \d.* s',
    r'an error of a library, x{177}',
    r'x{53}',
    r'<string>:\d+: UserWarning: a warning of a library',
    r'printed',
    r'step 4/4  held-out loss \d\.\d{4} nats/token  \d\.\d{4} bits/byte',
    r'━{20} 0:00:00 step 4/4  loss \d\.\d{4}  lr .* tokens/s .*',
    r'Looking at the layers: \d.* s',
    r'Writing a sample: \d.* s',
    r'',
    r'held-out text +\d\.\d{4}  bits/byte',
    r'gzip -9 on it +\d\.\d{4}  bits/byte',
    r'byte frequencies on it +\d\.\d{4}  bits/byte',
    r'held-out loss +\d\.\d{4}  nats/token',
    r'held-out perplexity +[\d.,]+',
    r'held-out tokens +[\d,]+',
    r'held-out bytes +[\d,]+',
    r'speed +[\d,]+  tokens/s',
    r'',
]


def watch(command: list[str]) -> tuple[int, list[str]]:
    """The exit code of a program and what its terminal shows at the end."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    environment = os.environ | {
        'TERM': 'xterm', 'COLUMNS': str(COLUMNS), 'LINES': str(ROWS), 'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }  # fmt: skip
    program = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        while True:
            try:
                stream.feed(os.read(ours, 65536))
            except OSError:  # the program has ended
                break
        return program.wait(timeout=30), [line.rstrip() for line in screen.display]
    finally:
        program.kill()
        os.close(ours)


@pytest.mark.slow
def test_every_line_of_a_run_is_whole_and_its_bar_stays_below(tmp_path):
    cfg = small_run.write_config(small_run.make_config(tmp_path), tmp_path / 'small.py')
    code, lines = watch(
        [
            sys.executable, '-c', PROGRAM, 'train', f'--config={cfg}',
            f'--workdir={tmp_path / "run"}', '--config.train.num_steps=4',
        ]
    )  # fmt: skip
    shown = '\n'.join(lines)
    assert code == 0, shown
    for line, pattern in zip(lines, SEEN, strict=False):
        assert re.fullmatch(pattern, line), f'{line!r} is not {pattern!r}:\n{shown}'
    assert shown.rstrip().endswith(f'\n\nReport: {tmp_path}/run/report.md'), shown
