"""Every notebook runs in a kernel of its own, and every cell that draws shows a picture."""

import ast
import base64
import inspect
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# A cell draws if it uses any of these.
DRAWING = ("matplotlib.", "IPython.display.", "bert_jax.tools.viz.", "bert_jax.tools.report.", "jax.debug.visualize_")
RICH = {"image/png", "image/svg+xml", "text/html", "text/markdown"}


def aliases(sources):
    """The names that cells import, and what they stand for."""
    found = {}
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def draws(source, aliases):
    nodes = ast.walk(ast.parse(source))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}
    whole = (".".join([aliases.get(head, head), *rest]) for head, *rest in (name.split(".") for name in names))
    return any(f"{name}.".startswith(DRAWING) for name in whole)


def test_drawing_cells_are_found_by_what_they_use():
    names = aliases(
        ["import numpy as np", "from bert_jax.tools import viz as pictures, report", "import matplotlib.pyplot as p"]
    )
    for source in ("pictures.attention(m)", "p.subplots()", "a = [report.curve(j, 'f1')]", "bert_jax.tools.viz.f()"):
        assert draws(source, names), source
    for source in ("import matplotlib.pyplot as p", "np.array(viz)", "bert_jax.tools.visual()", "jax.debug.print('a')"):
        assert not draws(source, names), source


def check_gradient(score, embedded, gradient, tokens):
    """Runs in the kernel of `look_inside`: both equal tokens have a gradient, which is the numerical one."""
    first, second = (place for place, token in enumerate(tokens) if token == "the")
    assert np.linalg.norm(gradient[0, first]) > 0.01  # 0 where a gradient by token gave it to the last of them
    assert np.linalg.norm(gradient[0, second]) > 0.01
    assert np.linalg.norm(gradient[0, first] - gradient[0, second]) > 0.01
    direction = np.random.default_rng(0).normal(size=gradient.shape[-1]).astype(np.float32)
    for place in (first, second):
        step = np.zeros(gradient.shape, np.float32)
        step[0, place] = 0.01 * direction
        numerical = (score(embedded + step) - score(embedded - step)) / 0.02
        assert abs(numerical - gradient[0, place] @ direction) < 0.01 * abs(numerical) + 0.001


# The number of figures in each notebook.
PICTURES = {
    "batch_prediction": 2,
    "evaluate_fill_mask": 3,
    "fill_mask": 5,
    "finetune_emotion": 4,
    "finetune_ner": 3,
    "finetune_qa": 2,
    "interventions": 5,
    "look_inside": 6,
    "many_devices": 3,
    "pretrain": 3,
    "real_time_endpoint": 3,
}
CHECKS = {"look_inside": f"{inspect.getsource(check_gradient)}\ncheck_gradient(score, embedded, gradient, tokens)"}


def test_notebooks_are_stored_without_outputs():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_pictures(path):
    import nbformat
    from matplotlib.image import imread
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if path.stem in CHECKS:
        notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[path.stem]))
    # The settings of these tests are not a user's.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION")
    }
    NotebookClient(notebook, timeout=900).execute(cwd=path.parent, env=environment)
    if place := os.environ.get("BERT_JAX_EXECUTED_NOTEBOOKS"):  # for the pages of the documentation
        executed = notebook.copy()
        executed.cells = [cell for cell in notebook.cells if cell.get("source") != CHECKS.get(path.stem)]
        nbformat.write(executed, Path(place) / path.name)

    names = aliases(cell.source for cell in cells)
    drawing = [cell for cell in cells if draws(cell.source, names)]
    assert drawing
    pictures = sum("image/png" in output.get("data", ()) for cell in cells for output in cell.outputs)
    assert pictures == PICTURES[path.stem]
    for cell in cells:
        shown = [output.data for output in cell.outputs if output.output_type in ("display_data", "execute_result")]
        if cell in drawing:
            assert any(RICH & data.keys() for data in shown), f"no picture of\n{cell.source}"
        for data in shown:
            if "image/png" in data:
                assert np.ptp(imread(io.BytesIO(base64.b64decode(data["image/png"])))) > 0, f"empty: {cell.source}"
            elif not RICH & data.keys():  # such as <Figure size 600x470 with 2 Axes>, for want of a picture
                assert not re.fullmatch(r"<.*>", data["text/plain"], re.DOTALL), f"a bare object of\n{cell.source}"
