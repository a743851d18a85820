"""Store the outputs of a run in the notebooks: `python book/store.py --profile toy --only 03`.

Sources, tags and ids stay those of notebooks/; outputs come from runs/<profile>/, if the sources are the same.
"""
import argparse

import nbformat

from run import ROOT, chapters
from sora_lite.video import write_atomically


def store(path, run) -> str:
    """Copy outputs cell by cell; returns what happened."""
    if not run.is_file():
        return "no run"
    nb, done = nbformat.read(path, 4), nbformat.read(run, 4)
    made = [c for c in done.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    if [c.source for c in made] != [c.source for c in nb.cells]:
        return "the run is of another version: run it again"
    for cell, result in zip(nb.cells, made):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = result.outputs, None
            for out in cell.outputs:
                if "execution_count" in out:
                    out.execution_count = None
    write_atomically(path, lambda beside: nbformat.write(nb, beside))
    return "stored"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--only", nargs="+")
    args = parser.parse_args()
    for notebook in chapters(args.only):
        print(notebook.stem, store(notebook, ROOT / "runs" / args.profile / notebook.name))
