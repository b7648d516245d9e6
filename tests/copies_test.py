"""No code is written twice: what two files do alike is a function of one of them."""

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in ('helios_jax', 'configs') for path in (ROOT / name).rglob('*.py'))
RUN = 8  # lines


def code(source: str) -> list[str]:
    """Lines without blank ones and those that begin an import, which users of a library share."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1] = ''
    return [line.strip() for line in lines if line.strip()]


def copies(sources: dict[str, str]) -> dict[str, set[str]]:
    """Maps each run of RUN lines that stands in several files to these."""
    found = collections.defaultdict(set)
    for name, source in sources.items():
        lines = code(source)
        for start in range(len(lines) - RUN + 1):
            found['\n'.join(lines[start : start + RUN])].add(name)
    return {run: names for run, names in found.items() if len(names) > 1}


def test_no_run_of_lines_stands_in_two_files():
    assert len(FILES) > 100
    assert copies({str(path): path.read_text() for path in FILES}) == {}


def test_the_check_sees_a_copy_however_far_it_is_indented():
    body = [f'x{i} = {i}' for i in range(RUN)]
    nested = 'def f(a):\n' + '\n\n'.join(f'    {line}' for line in body)
    assert copies({'a.py': '\n'.join(body), 'b.py': nested}).keys() == {'\n'.join(body)}
    assert copies({'a.py': '\n'.join(body[1:]), 'b.py': nested}) == {}
