"""Every notebook runs from top to bottom, and prints what is stored in it."""

import contextlib
import io
import json

import matplotlib.pyplot as plt
import pytest

from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_notebook_runs_and_prints_what_it_shows(path):
    names, figures = {"__name__": "__main__"}, 0
    for cell in code_cells(path):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
        stored = [out for out in cell["outputs"] if out["output_type"] == "stream"]
        assert printed.getvalue() == "".join(line for out in stored for line in out["text"])
        figures += len(plt.get_fignums())
        plt.close("all")
    outputs = [out for cell in code_cells(path) for out in cell["outputs"]]
    assert figures == sum("image/png" in out.get("data", {}) for out in outputs) > 0


def test_there_is_a_notebook():
    assert NOTEBOOKS
