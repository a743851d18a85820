"""Run the chapters through papermill: `python book/run.py --profile toy`.

Each notebook is executed in order with its profile's parameters; the result lies in runs/<profile>/. A chapter
whose notebook, package, parameters and earlier chapters are as they were is not run again, so a killed run goes
on where it stopped.
"""
import argparse
import ast
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.engines import NBClientEngine, papermill_engines

from sora_lite.video import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


class Live(NBClientEngine):
    """Papermill's engine, saying which cell runs; the cells' own progress bars are passed through."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        start, total = nb_man.cell_start, len(nb_man.nb.cells)

        def cell_start(cell, cell_index=None, **kwargs):
            if cell.cell_type == "code":
                line = next((l for l in cell.source.splitlines() if l.strip() and not l.startswith("#")), "")
                print(f"\r\033[K  cell {cell_index + 1}/{total}  {line[:70]}", end="", flush=True, file=sys.stderr)
            return start(cell, cell_index, **kwargs)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("live", Live)


def chapters(only: list[str] | None = None) -> list[Path]:
    """All notebooks in reading order (the lab bench first), or those whose names begin with one of `only`."""
    found = sorted(NOTEBOOKS.glob("*.ipynb"), key=lambda p: (p.name[0].isdigit(), p.name))
    # chapter 00 shows the weights; it runs last so that it can show this run's own
    found = [p for p in found if not p.name.startswith("00")] + [p for p in found if p.name.startswith("00")]
    if lost := [o for o in only or () if not any(p.name.startswith(o) for p in found)]:
        raise SystemExit(f"no notebook's name begins with {', '.join(lost)}: there are {', '.join(p.stem for p in found)}")
    return [p for p in found if not only or any(p.name.startswith(o) for o in only)]


def declared(path: Path) -> dict:
    """The literals in a notebook's `parameters` cell."""
    for cell in nbformat.read(path, 4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(cell.source).body
                    if isinstance(n, ast.Assign)}
    raise SystemExit(f"{path.name} has no cell tagged 'parameters'")


def parameters(path: Path, profile: str, given: dict) -> dict:
    """A chapter's parameters in a profile; ends the run at once for one that the chapter does not have."""
    file = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in file.parent.glob("*.yaml")))
        raise SystemExit(f"profile {profile!r} is unknown: there are {known}")
    values = {"profile": profile} | (yaml.safe_load(file.read_text()) or {}).get(path.stem, {}) | given
    unknown = set(values) - set(declared(path))
    if unknown:
        raise SystemExit(f"{path.name} has no parameter {', '.join(sorted(unknown))}: "
                         f"it has {', '.join(declared(path))}")
    return values


def stored_mark(path: Path) -> str | None:
    """The fingerprint under which a result was made; None where there is no whole result."""
    try:
        return nbformat.read(path, 4).metadata.get("sora_lite", {}).get("fingerprint") if path.is_file() else None
    except ValueError:                                    # cut short: it is made again
        return None


def fingerprint(path: Path, values: dict, folder: Path) -> str:
    """What a result depends on: the notebook's sources, its parameters, the package, and the run's earlier chapters."""
    earlier = [p.name for p in chapters()]
    marks = [stored_mark(folder / name) for name in earlier[:earlier.index(path.name)]]
    cells = [c.source for c in nbformat.read(path, 4).cells]
    package = "".join(p.read_text() for p in sorted((ROOT / "sora_lite").glob("*.py")))
    return hashlib.sha256(json.dumps([cells, values, package, marks], sort_keys=True).encode()).hexdigest()


def tidy(outputs: list) -> list:
    """Outputs as the book keeps them: without progress bars, which have done their work, and what was printed in one piece."""
    kept = []
    for out in outputs:
        data = out.get("data", {})
        if out.get("name") == "stderr" or ("application/vnd.jupyter.widget-view+json" in data
                                           and "%|" in str(data.get("text/plain"))):
            continue
        if kept and out.output_type == kept[-1].output_type == "stream":
            kept[-1].text += out.text
        else:
            kept.append(out)
    return kept


def clean(path: Path, mark: str) -> None:
    """Drop papermill's timings from a result and keep our fingerprint in its place."""
    nb = nbformat.read(path, 4)
    nb.metadata.pop("papermill", None)
    nb.metadata["sora_lite"] = {"fingerprint": mark}
    for cell in nb.cells:
        for key in ("papermill", "execution", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    write_atomically(path, lambda beside: nbformat.write(nb, beside))


def execute(path: Path, out: Path, values: dict, profile_dir: Path) -> float:
    """Run one chapter; returns its seconds. An error ends the run and says which cell it was."""
    begun = time.time()
    os.environ["SORA_LITE_RUN"] = str(profile_dir)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    part = out.with_suffix(".part.ipynb")
    try:
        papermill.execute_notebook(path, part, values, engine_name="live", kernel_name="python3", cwd=str(ROOT),
                                   progress_bar=False, stderr_file=sys.stderr, stdout_file=None,
                                   log_output=False, request_save_on_cell_execute=False)
    except papermill.PapermillExecutionError as error:
        raise SystemExit(f"\n{path.name}: cell {error.exec_count} failed\n\n{error.source}\n\n"
                         f"{error.ename}: {error.evalue}\n\nThe notebook as far as it came: {part}")
    part.replace(out)
    return time.time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--only", nargs="+", help="chapters by the start of their names: --only 02 05")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--force", action="store_true", help="run chapters again that are up to date")
    args = parser.parse_args()
    given = {name: yaml.safe_load(value) for name, value in args.parameter}
    plan = [(path, parameters(path, args.profile, given)) for path in chapters(args.only)]
    folder = ROOT / "runs" / args.profile
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    for number, (path, values) in enumerate(plan, 1):
        out, mark = folder / path.name, fingerprint(path, values, folder)
        if stored_mark(out) == mark and not args.force:
            print(f"[{number}/{len(plan)}] {path.stem}: up to date")
            continue
        print(f"[{number}/{len(plan)}] {path.stem} ({args.profile})", flush=True)
        seconds = execute(path, out, values, folder)
        clean(out, mark)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)   # they served a killed run; this one is done
        print(f"\r\033[K  done in {seconds:.0f} s, {(time.time() - begun) / 60:.1f} min in all", flush=True)


if __name__ == "__main__":
    main()
