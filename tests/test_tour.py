"""The tour: it runs from its first cell to its last, and what is committed is a clean run of it."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import REPO
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from PIL import Image

TOUR = REPO / "tour.ipynb"
LARGEST = 400_000  # bytes: a repository keeps every version of it
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PATHS = r"(?<![\w.:/])/(home|Users|root|tmp|work|mnt|opt|private|usr|var)\b|\b[A-Z]:\\"
PATHS += "".join(f"|{re.escape(str(folder))}" for folder in (REPO, Path.home()))


def read() -> NotebookNode:
    """A copy of the notebook, to run or to break."""
    return nbformat.read(TOUR, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: NotebookNode) -> list[Image.Image]:
    """The figures that a cell shows."""
    data = [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in data if png]


def shown(cell: NotebookNode) -> list[str]:
    """What kinds of output a cell has: stdout, figure …"""
    kinds = ("figure" if "image/png" in each.get("data", {}) else "" for each in cell.outputs)
    return [kind or each.get("name", "") for kind, each in zip(kinds, cell.outputs, strict=True)]


def problems(notebook: NotebookNode) -> list[str]:
    """What is wrong with a notebook that has been run."""
    found = []
    for number, cell in enumerate(code(notebook), start=1):
        if cell.execution_count != number:
            found.append(f"cell {number} ran as number {cell.execution_count}")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number} has an error or a warning")
            text = {k: v for k, v in output.items() if k != "data"}
            text |= {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
            if re.search(PATHS, str(text)):
                found.append(f"cell {number} names a path of this machine")
        if any(np.asarray(picture.convert("L")).std() < 10 for picture in pictures(cell)):
            found.append(f"cell {number} has an empty figure")
    return found


def run(notebook: NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookNode:
    """Run it in the repository's root, in memory; what Jupyter writes goes to `folder`."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder / name))
    monkeypatch.setenv("TOUR_SAMPLES", "30")
    where = {"metadata": {"path": str(REPO)}}
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources=where, coalesce_streams=True
    )
    return client.execute()


def test_it_runs_and_shows_what_is_committed(tmp_path, monkeypatch):
    committed, again = read(), run(read(), tmp_path, monkeypatch)
    assert problems(again) == []
    assert list(map(shown, code(again))) == list(map(shown, code(committed)))
    assert len([p for cell in code(again) for p in pictures(cell)]) >= 8


def test_what_is_committed_is_clean_and_small():
    committed = read()
    nbformat.validate(committed)
    assert problems(committed) == []
    assert TOUR.stat().st_size < LARGEST
    assert committed.metadata == {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    assert not any(cell.metadata for cell in committed.cells)  # such as times of execution


def test_a_cell_that_fails_is_found(tmp_path, monkeypatch):
    broken = read()
    broken.cells = [new_code_cell("assert 4 == 5")]
    with pytest.raises(CellExecutionError, match="4 == 5"):
        run(broken, tmp_path, monkeypatch)


def blank() -> str:
    file = io.BytesIO()
    Image.new("RGB", (50, 50), "white").save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (new_output("stream", name="stderr", text="a warning"), "an error or a warning"),
        (new_output("error", ename="E", evalue="", traceback=[]), "an error or a warning"),
        (new_output("stream", name="stdout", text="in /home/me/x.pth"), "names a path"),
        (new_output("stream", name="stdout", text=r"in C:\Users\me"), "names a path"),
        (new_output("stream", name="stdout", text=f"{Path.home()}"), "names a path"),
        (new_output("display_data", data={"text/plain": "<X at '/tmp/a'>"}), "names a path"),
        (new_output("display_data", data={"image/png": blank()}), "an empty figure"),
    ],
)
def test_a_notebook_that_is_not_clean_is_found(output, problem):
    notebook = read()
    code(notebook)[-1].outputs.append(output)
    assert problem in " ".join(problems(notebook))
    notebook = read()
    notebook.cells.reverse()  # as if they had been run in another order
    assert "ran as number" in " ".join(problems(notebook))
