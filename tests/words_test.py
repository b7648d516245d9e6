"""Docstrings open with a verb or a noun, and one name means one class."""

import ast
import collections
from pathlib import Path

import pytest

import helios_jax

ROOT = Path(helios_jax.__file__).parent
MODULES = sorted(ROOT.rglob('*.py'))

# Words that open a fragment, which nobody understands before its end.
FRAGMENTS = """
    about above across after against along among around as at because before behind below beneath
    beside between beyond but by despite down during except for from if in inside into like near of
    off on onto out outside over past per since than through throughout to toward towards under
    unless unlike until up upon via when whenever where wherever whether which while who whom whose
    what whatever why how with within without
    he his it its our ours she that their them these they this those us we you your
"""


def nodes(source: str) -> list[ast.AST]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def fragments(source: str) -> list[str]:
    """First lines of the docstrings that open with one of FRAGMENTS."""
    lines = [ast.get_docstring(node).split('\n')[0] for node in nodes(source) if has_doc(node)]
    return [line for line in lines if line.split()[0].strip('.,:;').lower() in FRAGMENTS.split()]


def has_doc(node: ast.AST) -> bool:
    return bool((ast.get_docstring(node) or '').strip())


def repeated(sources: dict[str, str]) -> dict[str, list[str]]:
    """Names of public classes that several modules define → these modules."""
    found = collections.defaultdict(list)
    for module, source in sources.items():
        for node in nodes(source):
            if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
                found[node.name].append(module)
    return {name: modules for name, modules in found.items() if len(modules) > 1}


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path):
    assert fragments(path.read_text()) == []


@pytest.mark.parametrize('path', [p for p in MODULES if p.name == '__init__.py'], ids=str)
def test_every_package_says_what_it_is_for(path):
    assert has_doc(ast.parse(path.read_text()))


def test_no_two_public_classes_share_a_name():
    assert repeated({str(path.relative_to(ROOT)): path.read_text() for path in MODULES}) == {}


@pytest.mark.parametrize(
    ('line', 'is_fragment'),
    [
        ('Of an array, its size.', True),
        ('What it is.', True),
        ('Whether: yes.', True),
        ('Its size.', True),
        ('Size of an array, of what dtype.', False),
        ('A size.', False),
        ('[B T] of nothing.', False),
    ],
)
def test_the_check_sees_a_fragment_wherever_it_stands(line, is_fragment):
    for before in (
        '',
        'class C:\n ',
        'def f():\n ',
        'class C:\n def f():\n  ',
        'def f():\n def g():\n  ',
    ):
        found = fragments(f'{before}"""{line}\n\n{before and "  "}More.\n"""\n')
        assert found == ([line] if is_fragment else [])


def test_the_check_sees_two_classes_of_one_name():
    sources = {'a.py': 'class C: ...\nclass D: ...', 'b.py': 'class _D: ...\nclass C: ...'}
    assert repeated(sources) == {'C': ['a.py', 'b.py']}
