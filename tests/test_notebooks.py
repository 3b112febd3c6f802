"""The notebooks run, and their executed twins are theirs."""

import importlib.util
import pathlib
import re

import jupytext
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def runner():
    spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_twins_agree(script):
    twin = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    sources = [cell.source for cell in jupytext.read(script).cells]
    assert [cell.source for cell in twin.cells] == sources
    outputs = [out for cell in twin.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not [out for out in outputs if out.output_type == "error"]
    text = " ".join(
        str({k: v for k, v in out.items() if k != "data"}) for out in outputs
    )
    assert not re.search(r"/(home|root|usr|tmp|Users)/", text)


@pytest.mark.filterwarnings("ignore")  # the kernel's own process and event loop
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_notebooks_run(script):
    run = runner()
    notebook = run.executed(script, progress=False)
    assert all(
        cell.execution_count for cell in notebook.cells if cell.cell_type == "code"
    )
    assert list(run.printed(notebook))
