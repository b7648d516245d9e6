"""Imports go one way, and what starts often stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import helios_jax

# A module imports from its own part and from parts to the left of it.
ORDER = [
    {'errors', 'display', 'plot'}, {'chips', 'config', 'paths', 'process'}, {'options', 'arch'},
    {'kernels'}, {'parallel'}, {'memory'}, {'model'}, {'data', 'checkpoint'}, {'restoring'},
    {'evaluate'}, {'train'}, {'plan', 'convert', 'ablate', 'verify', 'ckpt'}, {'bench'}, {'cli'},
    {'__main__'},
]  # fmt: skip
RANKS = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
ROOT = Path(helios_jax.__file__).parent
MODULES = sorted(path for path in ROOT.rglob('*.py') if path != ROOT / '__init__.py')


def imported(path: Path) -> set[str]:
    """The parts of helios_jax that a module imports anywhere, inside functions too."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        parts |= {n.split('.')[1] for n in names if n.startswith('helios_jax.')}
    return parts - {'configs'}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix('.py')


def test_every_part_has_its_place_in_the_order():
    assert {part_of(path) for path in MODULES} <= set(RANKS)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_left(path):
    own = part_of(path)
    wrong = {part for part in imported(path) if part != own and RANKS[part] >= RANKS[own]}
    assert not wrong, f'{path.relative_to(ROOT)} imports {", ".join(sorted(wrong))}'


def test_the_check_sees_an_import_inside_a_function(tmp_path):
    path = tmp_path / 'sample.py'
    path.write_text('def f():\n    from helios_jax.train import loop\n\nimport helios_jax.cli\n')
    assert imported(path) == {'train', 'cli'}


@pytest.mark.parametrize(
    ('module', 'absent'),
    [
        ('helios_jax', ['jax', 'flax', 'tensorflow_datasets']),
        ('helios_jax.cli', ['jax', 'flax', 'tensorflow_datasets']),
        ('helios_jax.chips', ['jax', 'flax']),
        ('helios_jax.plan.command', ['jax', 'flax', 'optax']),
        ('helios_jax.data.packing', ['jax', 'flax']),  # each worker process imports it
    ],
)
def test_what_starts_often_does_not_load_jax(module, absent):
    code = f'import sys, {module}; print(*(n for n in {absent} if n in sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ''), done.stderr


def test_tensorflow_is_never_needed():
    # It may be installed; nothing of ours may name it.
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split('.')[0] not in ('tensorflow', 'clu', 'seqio', 't5x'), path


def test_what_is_true_of_a_config_needs_no_jax():
    names = sorted(f'helios_jax.arch.{path.stem}' for path in (ROOT / 'arch').glob('*.py'))
    code = f'import sys, importlib; [importlib.import_module(n) for n in {names}]; '
    code += 'print(*{"jax", "flax", "optax", "numpy"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ''), done.stderr
