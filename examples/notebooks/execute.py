"""Executes the notebooks beside this file, and saves them with what their cells returned.

    python examples/notebooks/execute.py                  all of them, in place: `make notebooks`
    python examples/notebooks/execute.py --smoke --out DIR    few steps, saved elsewhere

A notebook is saved only if every cell ran and none wrote to stderr: a warning is an error here as
in all tests. What is saved has no times and no names of machines, so that executing a notebook
again changes its outputs and nothing else. It carries a digest of the code that was executed,
which shows where a cell was changed and not run again.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
#: Where the saved digest is, in a notebook's metadata.
DIGEST = "executed_code"
#: A cell trains for seconds; a busy machine may be many times slower.
CELL_SECONDS = 900


def digest(notebook: Any) -> str:
    """Returns a hash of all code cells, in order."""
    code = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join("".join(source) for source in code).encode()).hexdigest()


def execute(path: Path, *, smoke: bool = False) -> Any:
    """Runs a notebook from top to bottom in a fresh kernel and a fresh configuration.

    Args:
        path: The notebook. Its kernel starts in the folder that it is in, as Jupyter's does.
        smoke: Whether to run few steps.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: With its traceback, if a cell fails.
        RuntimeError: If a cell writes to stderr, with the cell and what it wrote.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as own:
        # What a user's profile changes would be in the outputs.
        folders = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
        os.environ |= dict.fromkeys(folders, own)
        os.environ["MUONCLIP_SMOKE"] = "1" if smoke else ""
        # By files, and not by ports: no one else on the machine can read along.
        transport = {"transport": "ipc", "ip": f"{own}/kernel"}
        client = NotebookClient(
            notebook,
            config=Config({"KernelManager": transport}),
            timeout=CELL_SECONDS,
            startup_timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env=dict(os.environ))
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(
                    f"A cell of {path.name} wrote to stderr:\n\n{output.text}\nIt is:\n\n"
                    f"{cell.source}"
                )
    # Kernels add the version of Python, which is no one's change.
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata[DIGEST] = digest(notebook)
    return notebook


def main(arguments: list[str] | None = None) -> None:
    """Executes the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that all cells run")
    parser.add_argument("--out", type=Path, help="a folder to save in; None saves in place")
    options = parser.parse_args(arguments)
    if options.smoke and options.out is None:
        parser.error("--smoke would overwrite the pictures with those of few steps; give --out.")
    for path in options.notebooks:
        notebook = execute(path, smoke=options.smoke)
        saved = path if options.out is None else options.out / path.name
        saved.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, saved)
        print(f"{path.name}: {saved.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
