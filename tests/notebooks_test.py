"""Every notebook runs from top to bottom with this interpreter, and is stored without outputs.

Tags mark what a notebook promises: `parameters` the cell that readers change, `plot` a cell that
shows an image, `text` one that prints what the model wrote behind PROMPT.
"""

import ast
import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from ipykernel.kernelspec import write_kernel_spec
from matplotlib import image
from nbclient import NotebookClient

from helios_jax.train import metrics

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath('notebooks').glob('*.ipynb'))
COLAB = 'https://colab.research.google.com/github/helios-jax/helios_jax/blob/main/notebooks'
CELL_SECONDS = 300

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get('tags', [])]
    assert cells, f'no cell has the tag {tag!r}'
    return cells


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
def kernel(tmp_path, monkeypatch):
    """The kernel `python3` is this interpreter, on one CPU device, whatever the user installed."""
    write_kernel_spec(tmp_path / 'jupyter' / 'kernels' / 'python3')
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
    monkeypatch.delenv('MPLBACKEND', raising=False)
    return 'python3'


def printed(cell: nbformat.NotebookNode) -> str:
    return ''.join(o.text for o in cell.outputs if o.output_type == 'stream' and o.name == 'stdout')


def images(cell: nbformat.NotebookNode) -> list[str]:
    return [o.data['image/png'] for o in cell.outputs if 'image/png' in o.get('data', {})]


def test_there_are_notebooks():
    assert 'quickstart' in [path.stem for path in NOTEBOOKS]


@each_notebook
def test_a_notebook_is_stored_clean_and_opens_in_colab(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == 'python3'
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, cell.source
    assert f'({COLAB}/{path.name})' in notebook.cells[0].source


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    parameters = {'STEPS': 2, 'WORKDIR': str(tmp_path / 'run'), 'PROMPT': 'class Sun:\n'}
    override(notebook, parameters)
    where = {'metadata': {'path': str(tmp_path)}}
    NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name=kernel, resources=where
    ).execute()  # raises at the first cell that does

    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in tagged(notebook, 'plot'):
        (png,) = images(cell)
        pixels = image.imread(io.BytesIO(base64.b64decode(png)))[..., :3]
        # Axes and letters are grey, what is plotted has a colour.
        assert (np.ptp(pixels, axis=-1) > 0.3).sum() > 50, 'a plot of nothing'
    for cell in tagged(notebook, 'text'):
        text = printed(cell)
        assert text.startswith(parameters['PROMPT'])
        assert len(text.strip()) > len(parameters['PROMPT'])
    losses = [line for line in metrics.read(tmp_path / 'run' / 'metrics.jsonl') if 'loss' in line]
    assert len(losses) > 1 and losses[-1]['step'] == parameters['STEPS']
