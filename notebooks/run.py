"""Run the notebooks: `--update` writes their twins, `--show 01` shows one's results.

A notebook is written as a percent script (`NN_title.py`); its executed twin
(`NN_title.ipynb`) is made from it here and never edited by hand.
"""

import argparse
import pathlib
import sys

import jupytext
import nbconvert
import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = pathlib.Path(__file__).parent
BUILD = HERE.parent / "build"


def scripts(prefix=""):
    """Return the percent scripts whose name starts so."""
    return sorted(p for p in HERE.glob("[0-9][0-9]_*.py") if p.name.startswith(prefix))


def executed(script, progress=True):
    """Return the notebook of a percent script, executed."""
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            }
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # stable, so that a rerun changes no more
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar = tqdm(total=len(code), desc=script.stem, unit="cell", disable=not progress)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
        on_cell_executed=lambda **_: bar.update(),
    )
    with bar:
        client.execute()
    for cell in code:
        cell.metadata.pop("execution", None)  # times of this run
    return notebook


def printed(notebook):
    """Yield what the cells of an executed notebook printed."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stdout":
                yield output.text.rstrip()


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the twins")
    parser.add_argument("--show", metavar="NN", help="show one, leave it in build/")
    arguments = parser.parse_args()
    if not arguments.update and not arguments.show:
        parser.error("one of --update and --show is needed")
    chosen = scripts(arguments.show or "")
    if not chosen:
        sys.exit(f"no notebook starts with {arguments.show}")
    for script in chosen:
        notebook = executed(script)
        if arguments.update:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
            continue
        BUILD.mkdir(exist_ok=True)
        page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
        (BUILD / f"{script.stem}.html").write_text(page)
        nbformat.write(notebook, BUILD / f"{script.stem}.ipynb")
        print("\n\n".join(printed(notebook)))
        print(f"\nin build/: {script.stem}.ipynb and {script.stem}.html")


if __name__ == "__main__":
    main()
