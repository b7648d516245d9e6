import os

from helios_jax.parallel import host


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    one, other, missing = tmp_path / 'memory.max', tmp_path / 'limit_in_bytes', tmp_path / 'none'
    monkeypatch.setattr(host, 'CONTAINER_LIMITS', (missing, one, other))
    one.write_text('max\n')
    other.write_text('9223372036854771712\n')
    physical = host.host_memory()
    assert physical == os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    other.write_text('12345678\n')
    assert host.host_memory() == 12345678
