"""Reading an optimised module: its operations, loops and twins."""

from pathlib import Path

from tpu_by_hand import CYCLES, by_hand

from helios_jax.plan.compiler import operations
from helios_jax.plan.compiler.timing import CHIPS


def test_a_program_is_read_with_its_loops_and_twins():
    chip = CHIPS['v5e']
    hlo = (Path(__file__).parent / 'dumps' / 'program.txt').read_text()
    found = {o.name: o for o in operations.read(hlo, {'fusion.1': by_hand()}, chip)}
    assert list(found) == ['fusion.1', 'fusion.2', 'copy-start', 'kernel.2']
    kernel = found['kernel.2']
    assert (kernel.kernel, kernel.times, kernel.vmem_bytes) == (True, 5, 4096)
    # 20 turns of the loop, but for two bundles outside it; fusion.2 is compiled like fusion.1.
    cycles = 2 + 20 * (len(CYCLES) - 2)
    assert found['fusion.1'].seconds == found['fusion.2'].seconds == cycles / chip.clock
    tile = 16 * 128 * 4
    assert found['fusion.1'].hbm_bytes == 3 * 8 * 128 * 2  # padded; the result is in VMEM
    assert found['fusion.2'].hbm_bytes == 3 * 8 * 128 * 2 + tile
    assert found['copy-start'].seconds == 0 and found['copy-start'].hbm_bytes > tile
