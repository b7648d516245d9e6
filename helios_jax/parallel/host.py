"""The memory of the machine that a process runs on, without JAX."""

import os
from pathlib import Path

# Of Linux's control groups, version 2 and version 1; without a limit, 'max' or a huge number.
CONTAINER_LIMITS = (
    Path('/sys/fs/cgroup/memory.max'),
    Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)


def host_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or its container's share."""
    physical = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limits = (file.read_text().strip() for file in CONTAINER_LIMITS if file.exists())
    return float(min([physical, *(int(limit) for limit in limits if limit.isdigit())]))
