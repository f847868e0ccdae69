"""The notebook runs, with the scripts as they are, and shows its pictures."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "benchmark/course/marvel.ipynb"


def pictures(notebook):
    """How many pictures its outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.notebook
def test_the_notebook_runs_and_draws_all_pictures(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("NOTEBOOK_RUNS", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert pictures(notebook) == stored == 6
    assert {path.name for path in tmp_path.iterdir()} == {"offline", "marvel", "aligned"}


def test_the_notebooks_outputs_name_no_folder_of_the_machine_that_ran_it():
    text = NOTEBOOK.read_text()
    assert '"image/png"' in text and str(ROOT) not in text and '"/' not in text
