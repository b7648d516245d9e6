"""Every notebook runs from top to bottom with this interpreter, and is stored without outputs.

Tags mark what a notebook promises: `parameters` the cell that readers change, `plot` a cell that
shows an image, `text` one that prints what the model wrote behind PROMPT, `table` one that shows a
number for all that stands in TABLES, `benchmark` one that needs lm-evaluation-harness.
"""

import ast
import base64
import importlib.util
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from ipykernel.kernelspec import write_kernel_spec
from matplotlib import image
from nbclient import NotebookClient

from helios_jax.evaluate.length_settings import METHODS
from helios_jax.train import metrics

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath('notebooks').glob('*.ipynb'))
COLAB = 'https://colab.research.google.com/github/helios-jax/helios_jax/blob/main/notebooks'
GUIDE = Path(__file__).parents[1] / 'docs' / 'guides' / 'notebooks.md'
CELL_SECONDS = 300

# Shorter than what a reader gets.
PARAMETERS = {
    'quickstart': {'STEPS': 2, 'PROMPT': 'class Sun:\n'},
    'gmu_ablation': {'STEPS': 3, 'WORKERS': 2},
    # A length of rows that another notebook has packed.
    'long_context': {'STEPS': 4, 'TRAINED_LENGTH': 128, 'LENGTHS': (128, 160), 'DOCUMENTS': 5},
    'restore_and_eval': {'STEPS': 3, 'PROMPT': 'class Moon:\n'},
}
AGAIN = {'gmu_ablation': {'SEEDS': 1}}  # before all cells run once more
RUNS = {'gmu_ablation': 6}  # trainings of both times; of other notebooks two
TABLES = {
    'gmu_ablation': ('residual', 'convex'),
    'long_context': ('row length', *METHODS),
    'restore_and_eval': ('held-out text', 'held-out perplexity'),
}
TAGS = {
    'quickstart': {'parameters', 'plot', 'text'},
    'gmu_ablation': {'parameters', 'plot', 'table'},
    'long_context': {'parameters', 'plot', 'table'},
    'restore_and_eval': {'parameters', 'text', 'table', 'benchmark'},
}
DEVICES = {'restore_and_eval': 2}  # of the CPU; others have one
# A file of one machine, in a string or after a flag; none of an address on the web.
ABSOLUTE = re.compile(r"""(?:^|[\s'"=(\[])(?:~?/|[A-Za-z]:\\)\w""", re.MULTILINE)

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get('tags', [])]


def override(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """Sets parameters in a cell of its own, behind the one tagged `parameters`."""
    (cell,) = tagged(notebook, 'parameters')
    assigned = {
        target.id
        for statement in ast.parse(cell.source).body
        for target in getattr(statement, 'targets', [])
    }
    assert values.keys() <= assigned, 'an override that the notebook would not read'
    source = '\n'.join(f'{name} = {value!r}' for name, value in values.items())
    position = notebook.cells.index(cell) + 1
    notebook.cells.insert(position, nbformat.v4.new_code_cell(source))


@pytest.fixture
def kernel(path, tmp_path, monkeypatch):
    """The kernel `python3` is this interpreter, on the CPU, whatever the user installed."""
    write_kernel_spec(tmp_path / 'jupyter' / 'kernels' / 'python3')
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', str(DEVICES.get(path.stem, 1)))
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # compiles sooner
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    monkeypatch.delenv('MPLBACKEND', raising=False)
    return 'python3'


def printed(cell: nbformat.NotebookNode) -> str:
    return ''.join(o.text for o in cell.outputs if o.output_type == 'stream' and o.name == 'stdout')


def shown(cell: nbformat.NotebookNode) -> str:
    """What was printed, and what a notebook shows as text."""
    rich = [o.data for o in cell.outputs if 'data' in o]
    return printed(cell) + '\n'.join(d.get('text/markdown', d.get('text/plain', '')) for d in rich)


def images(cell: nbformat.NotebookNode) -> list[str]:
    return [o.data['image/png'] for o in cell.outputs if 'image/png' in o.get('data', {})]


def install_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    cell = code_cells(notebook)[0]
    assert cell.id == 'install'
    return cell


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == PARAMETERS.keys()


@each_notebook
def test_a_notebook_is_stored_clean_and_opens_in_colab(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == 'python3'
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, cell.source
    assert f'({COLAB}/{path.name})' in notebook.cells[0].source
    assert {tag for cell in notebook.cells for tag in cell.metadata.get('tags', [])} == TAGS[
        path.stem
    ]


@each_notebook
def test_a_notebook_names_no_file_of_one_machine(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not ABSOLUTE.search(cell.source), cell.source


@pytest.mark.parametrize('source', ["'/data/x'", '--to=/x', '`~/x`'.strip('`'), r'("C:\x")'])
def test_the_check_sees_a_file_of_one_machine(source):
    assert ABSOLUTE.search(f'run({source}')
    assert not ABSOLUTE.search("f'{x}/y' https://x.org/y a/b 1 / x")


def test_notebooks_install_helios_alike_and_begin_in_a_new_directory():
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    (source,) = {install_cell(notebook).source for notebook in notebooks}
    assert "find_spec('helios_jax') is None" in source
    assert '%pip install' in source.splitlines()[-1]
    for notebook in notebooks:
        (cell,) = tagged(notebook, 'parameters')
        assert 'WORKDIR = tempfile.mkdtemp(' in cell.source


@each_notebook
def test_the_guide_opens_each_notebook_in_colab(path):
    assert f'svg)]({COLAB}/{path.name})' in GUIDE.read_text()


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_twice_in_one_kernel(path, kernel, tmp_path):
    first, again = PARAMETERS[path.stem], PARAMETERS[path.stem] | AGAIN.get(path.stem, {})
    notebook = nbformat.read(path, as_version=4)
    override(notebook, first)
    where = {'metadata': {'path': str(tmp_path)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name=kernel, resources=where)
    with client.setup_kernel():
        run_all(client)
        check_outputs(path.stem, notebook)
        client.nb = nbformat.read(path, as_version=4)
        override(client.nb, again)
        run_all(client)

    logs = [*(tmp_path / 'temporary').rglob('metrics.jsonl')]
    assert len(logs) == RUNS.get(path.stem, 2)
    for log in logs:
        losses = [line for line in metrics.read(log) if 'loss' in line]
        assert len(losses) > 1 and losses[-1]['step'] == first['STEPS']


def run_all(client: NotebookClient) -> None:
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)  # raises if the cell does


def check_outputs(name: str, notebook: nbformat.NotebookNode) -> None:
    assert not install_cell(notebook).outputs
    for cell in tagged(notebook, 'plot'):
        (png,) = images(cell)
        pixels = image.imread(io.BytesIO(base64.b64decode(png)))[..., :3]
        # Axes and letters are grey, what is plotted has a colour.
        assert (np.ptp(pixels, axis=-1) > 0.3).sum() > 50, 'a plot of nothing'
    for cell in tagged(notebook, 'text'):
        text, prompt = printed(cell), PARAMETERS[name]['PROMPT']
        assert text.startswith(prompt)
        assert len(text.strip()) > len(prompt)
    for cell in tagged(notebook, 'table'):
        for label in TABLES[name]:
            assert re.search(rf'{label} .*\d', shown(cell)), shown(cell)
    for cell in tagged(notebook, 'benchmark'):
        installed = importlib.util.find_spec('lm_eval')
        assert ('|python_words|' if installed else 'pip install') in shown(cell)
