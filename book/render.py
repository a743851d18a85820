"""Render the book from the notebooks of a run: `python book/render.py --profile toy`."""
import argparse
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("seconds", "fidelity", "psnr")


def ledger_rows(folder: Path) -> list[dict]:
    """The newest row of each (chapter, what) in a run's ledger."""
    file = folder / "ledger.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return sorted({(r["chapter"], r["what"]): r for r in rows}.values(), key=lambda r: (r["chapter"], r["when"]))


def ledger_table(rows: list[dict]) -> str:
    """The ledger as a Markdown table, one row a run."""
    columns = ["chapter", "what", "seconds", "parameters", "tflops", "psnr", "fidelity", "peak_gb", "device", "commit"]
    head = "| " + " | ".join(columns) + " |\n|" + "--|" * len(columns) + "\n"
    return head + "".join("| " + " | ".join(str(r.get(c, "")) for c in columns) + " |\n" for r in rows)


def without_repeats(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A run's notebook without the cell of parameters that papermill put in, if it only repeats those above it."""
    plain = lambda cell: {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(cell.source).body
                          if isinstance(n, ast.Assign)}
    tagged = lambda tag: [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    given = {name: value for cell in tagged("parameters") for name, value in plain(cell).items()}
    repeats = [cell for cell in tagged("injected-parameters") if plain(cell).items() <= given.items()]
    notebook.cells = [cell for cell in notebook.cells if cell not in repeats]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="toy")
    run = ROOT / "runs" / parser.parse_args().profile
    source, rows = ROOT / "_build" / "source", ledger_rows(run)
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, source)
    for name in ("book", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for notebook in run.glob("[0-9A]*.ipynb"):
        if not notebook.name.endswith(".part.ipynb"):
            nbformat.write(without_repeats(nbformat.read(notebook, 4)), source / "notebooks" / notebook.name)
    page = source / "book" / "ledger.md"
    if rows:
        page.write_text(page.read_text().split("<!-- rows -->")[0] + "<!-- rows -->\n\n" + ledger_table(rows))
    print("rendering the book", flush=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source), "-W", "-n", "--keep-going", "-q",
               "--path-output", str(ROOT)]
    if subprocess.run(command).returncode:
        raise SystemExit("the book did not render: the first warning above says why")
    print(f"\nThe book: {ROOT / '_build' / 'html' / 'index.html'}\nThe ledger: {run / 'ledger.jsonl'}\n")
    for r in rows:
        shown = "  ".join(f"{k} {r[k]}" for k in SHOWN if k in r)
        print(f"  {r['chapter']:>2}  {r['what']:38} {shown}")


if __name__ == "__main__":
    main()
