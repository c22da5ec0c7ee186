"""The notebook for Colab and Kaggle runs from top to bottom, and its stored outputs are complete."""

import re
from pathlib import Path

import nbformat
import pytest
from helpers import ENVIRONMENT, REPOSITORY
from nbclient import NotebookClient

NOTEBOOK = REPOSITORY / "notebooks/homework.ipynb"
INSTALLATION = 'subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", "."], check=True)\n'


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown_text(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_stored_outputs_are_complete() -> None:
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    texts = "".join(map(shown_text, cells))
    assert not re.search(r"Traceback|/home/|/root/|/tmp/|/work/", texts)
    assert "200 steps done" in shown_text(cells[3]) and "by the grader's call" in shown_text(cells[7])
    assert any("image/png" in output.get("data", {}) for output in cells[4].outputs)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, on the first rows of the sample; packages are not installed again."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    rows = (REPOSITORY / "data/eval.json").read_text(encoding="utf-8").split("\n },\n")
    (tmp_path / "rows.json").write_text("\n },\n".join(rows[:8]) + "\n }\n]\n", encoding="utf-8")
    install, choose, *_ = code_cells(notebook)
    for cell, old, new in (
        (install, INSTALLATION, ""),
        (choose, "STEPS = None", "STEPS = 2"),
        (choose, 'RUN = f"outputs/{MODEL}-notebook"', f"RUN = {str(tmp_path / 'run')!r}"),
    ):
        assert cell.source.count(old) == 1
        cell.source = cell.source.replace(old, new)
    choose.source += f"\nsettings += ['data.eval={tmp_path}/rows.json']"
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert "2 steps done" in shown_text(code_cells(notebook)[3])
    assert (tmp_path / "run/report.html").is_file() and (tmp_path / "run-pack/adapter_checkpoint").is_dir()
