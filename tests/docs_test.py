"""What README and docs promise: commands parse, Python blocks run, tables are true."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helios_jax import cli, config, options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.rglob('*.md')])
README_LINES = 130


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The `helios …` commands of a page's shell blocks and of its inline code."""
    found = []
    for block in blocks(page, 'sh'):
        for line in block.replace('\\\n', ' ').splitlines():
            found += [unquoted(own) for own in re.findall(r'helios [a-z].*', line)]
    inline = re.findall(r'`(helios [a-z]+ [^`]*--[^`]*)`', page.read_text().replace('\n', ' '))
    return [command for command in found + inline if '…' not in command]


def unquoted(command: str) -> str:
    """Drops the quote that ends a launcher's argument, which our command is the rest of."""
    for quote in ('"', "'"):
        if command.count(quote) % 2:
            command = command.rstrip(quote)
    return command


EVERY_COMMAND = sorted({(page, command) for page in PAGES for command in commands(page)})
PYTHON = [(page, block) for page in PAGES for block in blocks(page, 'python')]


class ParsedError(Exception):
    """A command got as far as its flags."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    parse = options.parse

    def parse_only(values, argv, **kwargs):
        parse(values, argv, **kwargs)
        if 'config' in values:
            config.from_dict(values['config'].value)
        raise ParsedError

    monkeypatch.setattr(options, 'parse', parse_only)
    monkeypatch.chdir(ROOT)


def test_there_is_something_to_check():
    assert len(EVERY_COMMAND) > 40
    assert len(PYTHON) > 4


@pytest.mark.parametrize(('page', 'command'), EVERY_COMMAND, ids=lambda x: getattr(x, 'name', x))
def test_a_command_of_the_docs_parses(page, command, stop_after_parsing, tmp_path, monkeypatch):
    (tmp_path / 'my_config.py').write_text(next(b for p, b in PYTHON if p.stem == 'configs'))
    (tmp_path / 'my_study.py').write_text(next(b for p, b in PYTHON if p.stem == 'ablations'))
    text = re.sub(r'my_(config|study)\.py', rf'{tmp_path}/my_\1.py', command)
    argv = shlex.split(text, comments=True)[1:]
    argv = [argument for argument in argv if argument not in ('&&', '|', ';')]
    if argv[0] == 'explain':
        monkeypatch.undo()  # it does no more than to print
        cli.main(argv)
        return
    with pytest.raises(ParsedError):
        cli.main(argv)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_shell_blocks_are_shell(page):
    for block in blocks(page, 'sh'):
        done = subprocess.run(['bash', '-n'], input=block, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_python_blocks_run(tmp_path):
    """All of them, in their order, beside a run called runs/tiny."""
    train = ['train', '--config=tiny', '--config.train.num_steps=2', '--config.model.num_layers=2']
    run([sys.executable, '-m', 'helios_jax', *train, '--workdir=runs/tiny'], tmp_path)
    for page, block in PYTHON:
        run([sys.executable, '-c', block], tmp_path, page.name)


def run(command: list[str], directory: Path, label: str = '') -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f'{label}: {done.stderr[-2000:]}'


def test_tables_of_results_are_printed_from_their_rows():
    sys.path.insert(0, str(DOCS))
    try:
        import tables
    finally:
        sys.path.pop(0)
    assert len(tables.pages()) >= 7
    for page in tables.pages():
        assert page.read_text() == tables.rendered(page), f'run docs/tables.py: {page.name}'
        assert '<!-- table:' in page.read_text()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / 'mkdocs.yml').read_text()
    missing = [p for p in DOCS.rglob('*.md') if str(p.relative_to(DOCS)) not in navigation]
    assert not missing


def test_the_lines_that_troubleshooting_explains_are_said_somewhere():
    """Each is the start of a cell; a line of the code that changes must change there too."""
    page = (DOCS / 'guides' / 'troubleshooting.md').read_text()
    said = ' '.join(
        node.value
        for path in (ROOT / 'helios_jax').rglob('*.py')
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    lines = re.findall(r'^\| `([^`]+)`', page, re.MULTILINE)
    elsewhere = {'RESOURCE_EXHAUSTED', 'is nan at step'}
    assert len(lines) > 30
    assert not [line for line in lines if line not in said and line not in elsewhere]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)#\s]+)', text):
        if '://' not in target:
            assert (page.parent / target).exists(), target


def test_the_table_of_versions_names_what_runs_here():
    """Rows are Python, JAX, libtpu: what pip installs on this Python must be one of them."""
    python = '.'.join(map(str, sys.version_info[:2]))
    rows = re.findall(
        r'^\| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\|', (DOCS / 'versions.md').read_text(), re.M
    )
    known = [(jax, libtpu) for version, jax, libtpu in rows if version == python]
    assert importlib.metadata.version('jax') in [jax for jax, _ in known], (
        f'docs/versions.md knows Python {python} with JAX {known}, not the installed one'
    )
    try:
        libtpu = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        return
    assert (importlib.metadata.version('jax'), libtpu) in known


def test_the_readme_is_one_screen_or_two():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= README_LINES
