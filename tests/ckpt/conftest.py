import shutil
from pathlib import Path

import pytest
import small_checkpoints


@pytest.fixture(scope='session')
def original(tmp_path_factory) -> Path:
    """A workdir with three steps, which no test may change."""
    workdir = tmp_path_factory.mktemp('ckpt') / 'run'
    small_checkpoints.write(workdir)
    return workdir


@pytest.fixture
def workdir(original, tmp_path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(original, tmp_path / 'run')
    return tmp_path / 'run'
