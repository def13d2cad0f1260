""" The notebooks: executed from a clean kernel, committed as they come out of it, and the grid that one reads. """
import base64
import csv
import glob
import io
import json
import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted(glob.glob('*.ipynb', root_dir=ROOT))


def committed(name):
    return nbformat.read(os.path.join(ROOT, name), as_version=4)


def outputs(notebook):
    """ of all cells; what a cell prints may come in any number of pieces, and counts as one """
    merged = []
    for cell in notebook.cells:
        for i, output in enumerate(cell.get('outputs', [])):
            if i and output.output_type == merged[-1].output_type == 'stream' and output.name == merged[-1].name:
                merged[-1] = nbformat.from_dict({**merged[-1], 'text': merged[-1].text + output.text})
            else:
                merged.append(output)
    return merged


def key_numbers(notebook):
    """ those of the last line of the last cell; they depend on no clock """
    text = outputs(notebook)[-1].text.splitlines()[-1]
    assert text.startswith('numbers: ')
    return json.loads(text.removeprefix('numbers: '))


def close(one, two):
    """ equal, but for the last digits of floats """
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    return one == pytest.approx(two, rel=1e-3)


def test_pieces_of_a_stream_count_as_one():
    made = [nbformat.v4.new_output('stream', name=name, text=text) for name, text in
            (('stdout', 'a'), ('stdout', 'b'), ('stderr', 'c'), ('stdout', 'd'))]
    cells = [nbformat.v4.new_code_cell(outputs=made), nbformat.v4.new_code_cell(outputs=made[:1])]
    assert [each.text for each in outputs(nbformat.v4.new_notebook(cells=cells))] == ['ab', 'c', 'd', 'a']


def test_there_are_two():
    assert NOTEBOOKS == ['scaling_laws.ipynb', 'transformer_sizing.ipynb']


@pytest.mark.slow
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_runs_and_is_current(name, monkeypatch):
    """ each assert in it holds, without network or warnings, and its numbers are those of the committed outputs """
    monkeypatch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')   # nobody listens there
    monkeypatch.setenv('PYTHONWARNINGS', 'error')
    notebook = committed(name)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=300, resources={'metadata': {'path': ROOT}}).execute()
    assert [output.text for output in outputs(notebook) if output.get('name') == 'stderr'] == []
    assert close(key_numbers(notebook), key_numbers(committed(name)))
    assert len(outputs(notebook)) == len(outputs(committed(name)))


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_committed_as_executed(name):
    """ top to bottom, from the first cell; outputs that are text or pictures, each picture with title and labels """
    from PIL import Image
    notebook = committed(name)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type in ('stream', 'display_data') for output in outputs(notebook))
    pictures = [output.data['image/png'] for output in outputs(notebook) if 'image/png' in output.get('data', {})]
    drawing = [cell.source for cell in code if 'plt.subplots' in cell.source]
    assert len(pictures) == len(drawing) >= 3
    for picture in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) > 250
    for source in drawing:   # figures whose axes share a label name it once
        assert re.search('title=f?"', source) and 'xlabel="' in source and 'ylabel' in source
    assert 'from model import' in ''.join(cell.source for cell in code)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_style(name):
    """ as in the scripts: 120 columns, ASCII, no notes to oneself, no paths of one machine """
    for cell in committed(name).cells:
        assert cell.source.isascii() and max(map(len, cell.source.splitlines())) <= 120
        words = cell.source + json.dumps(cell.get('outputs', ''))
        assert not re.search('TO' + 'DO|FIX' + 'ME|/home/|/root/|/work/', words)


@pytest.mark.slow
def test_the_grid(here, script, monkeypatch):
    """ one run of it, as the committed file has it; a second call finds it there and makes none """
    only = ['--path=runs.csv', '--least_iters=142', '--most_tokens=110000']
    prepare = os.path.join('data', 'scaling', 'prepare.py')
    script(prepare, *only)
    made = list(csv.DictReader(open('runs.csv')))
    theirs = list(csv.DictReader(open(os.path.join(ROOT, 'data', 'scaling', 'runs.csv'))))
    same = [row for row in theirs if row['iterations'] == '143']
    assert len(made) == len(same) == 1 and made[0].keys() == same[0].keys()
    for key in made[0].keys() - {'seconds'}:
        assert float(made[0][key]) == pytest.approx(float(same[0][key]), rel=1e-3)
    monkeypatch.setattr('subprocess.run', lambda *args, **kwargs: pytest.fail("it is there already"))
    script(prepare, *only)
    assert list(csv.DictReader(open('runs.csv'))) == made


def test_the_committed_grid():
    """ twelve points and more, from about 10 thousand to about 3 million parameters, several budgets, C = 6ND """
    rows = list(csv.DictReader(open(os.path.join(ROOT, 'data', 'scaling', 'runs.csv'))))
    parameters = {int(row['parameters']) for row in rows}
    assert len(rows) >= 12 and min(parameters) < 12_000 and max(parameters) > 3e6
    for row in rows:
        assert int(row['flops']) == 6 * int(row['parameters']) * int(row['tokens'])
        assert int(row['tokens']) == 768 * int(row['iterations'])
