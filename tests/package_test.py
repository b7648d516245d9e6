"""What a wheel carries."""

import configparser
import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import helios_jax

ROOT = Path(helios_jax.__file__).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The built wheel; of a copy, as building writes beside the sources."""
    directory = tmp_path_factory.mktemp('wheel')
    left_out = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'tests', 'runs', 'shared')
    shutil.copytree(ROOT, directory / 'source', ignore=left_out)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q']
    environment = os.environ | {'PIP_NO_INDEX': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    done = subprocess.run(
        [*command, '--wheel-dir', str(directory), str(directory / 'source')],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = directory.glob('*.whl')
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_every_module_and_shipped_config_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'helios_jax').rglob('*.py')}
    configs = {f'helios_jax/{p.relative_to(ROOT)}' for p in (ROOT / 'configs').rglob('*.py')}
    assert {f'helios_jax/configs/{name}.py' for name in ('tiny', 'studies/smoke')} <= configs
    assert modules | configs <= names, sorted((modules | configs) - names)
    # A top-level `configs` would collide with any other project's.
    assert {name.split('/')[0].removesuffix('.dist-info') for name in names} == {
        'helios_jax',
        f'helios_jax-{helios_jax.__version__}',
    }


@pytest.mark.slow
def test_the_wheel_describes_itself(wheel):
    (info,) = {n.split('/')[0] for n in wheel.namelist() if n.endswith('.dist-info/METADATA')}
    metadata = email.message_from_bytes(wheel.read(f'{info}/METADATA'))
    assert (metadata['License-Expression'] or metadata['License']) == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.11'
    assert {'tpu', 'cuda', 'eval', 'test', 'parity'} <= set(metadata.get_all('Provides-Extra'))
    always = [r for r in metadata.get_all('Requires-Dist') if 'extra ==' not in r]
    assert not [r for r in always if r.startswith(('torch', 'tensorflow>', 'clu', 'lm'))]
    assert any(
        name.startswith(f'{info}/') and name.endswith('LICENSE') for name in wheel.namelist()
    )
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f'{info}/entry_points.txt').decode())
    assert dict(scripts['console_scripts']) == {'helios': 'helios_jax.cli:main'}
