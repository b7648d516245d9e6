"""Predicts permutations of rows: our kernels, and XLA's gathers."""

import math
import re

from helios_jax.chips import Chip
from helios_jax.kernels.permutation.tpu import LANES, PACK, TAKE, TAKE_SUMS, sublanes
from helios_jax.plan.compiler.program import SHAPE, Instruction, hbm_bytes

# Cycles of one core that XLA's gather takes for a row, and for each KiB of it: its schedules for
# rows of 4 and 8 KiB have 24 and 41 on v5e and v5p, 19 and 30 on v6e (libtpu 0.0.42, `helios bench
# moe`). On tpu7x it is SparseCores that gather.
GATHER_CYCLES = {'v5e': (4, 5), 'v5p': (4, 5), 'v6e': (7, 3)}


def seconds(kernel: Instruction, chip: Chip) -> float | None:
    """Predicts a kernel of ours; None if it is another one.

    All are bound by HBM: by their schedules, a row of 4 KB takes 7 cycles or less.
    """
    name = re.sub(r'[.\d]+$', '', kernel.name)
    shapes = re.search(r'operand_layout_constraints=\{(.*?)\}, \w+=', kernel.text)
    if name not in (PACK, TAKE, TAKE_SUMS) or not shapes:
        return None
    moved = hbm_bytes(kernel.shape)
    if name == PACK:
        moved += hbm_bytes(shapes[1])
    else:
        indices = re.search(r's32\[(\d+)\]', shapes[1])
        width = re.search(r'(\d+)\]', kernel.shape)
        assert indices and width, kernel.text
        moved += int(indices[1]) * sublanes(int(width[1])) * LANES * 4
    return moved / chip.hbm_bytes_per_second


def gathering(instruction: Instruction, computations: dict[str, list[str]], chip: Chip) -> float:
    """Predicts what XLA's gather of rows takes on the core; 0 for what is none."""
    each, more = GATHER_CYCLES.get(chip.name, (0, 0))
    called = re.search(r'calls=%([\w.\-]+)', instruction.text)
    texts = computations.get(called[1], ()) if called else (instruction.opcode,)
    if not any(re.search(r'\bgather\b\(|^gather$', text) for text in texts):
        return 0.0
    shape = SHAPE.match(instruction.shape)
    if not shape or not shape[2]:
        return 0.0
    *rows, width = map(int, shape[2].split(','))
    kib = hbm_bytes(f'{shape[1]}[{width}]') / 2**10
    return math.prod(rows) * (each + more * kib) / chip.clock if kib >= 1 else 0.0
