"""What holds for every notebook: tags, sizes, profiles, export in step, one address, earlier modules only."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import address
import export
import render
import run
import store
from sora_lite import lab

ROOT = Path(__file__).resolve().parent.parent
PATHS = run.chapters()
NOTEBOOKS = {p.stem: nbformat.read(p, 4) for p in PATHS}
every = pytest.mark.parametrize("name", NOTEBOOKS)


def tagged(nb, tag):
    return [c for c in nb.cells if tag in c.metadata.get("tags", [])]


def modules_of(nb) -> list[str]:
    found = re.findall(r"#\| (?:default_exp|export) (\w+)", "\n".join(c.source for c in nb.cells))
    return list(dict.fromkeys(found))


@every
def test_one_parameters_cell_of_plain_literals(name):
    cells = tagged(NOTEBOOKS[name], "parameters")
    assert len(cells) == 1
    for node in ast.parse(cells[0].source).body:
        assert isinstance(node, ast.Assign), ast.unparse(node)
        ast.literal_eval(node.value)
    assert {"profile", "seed", "device"} <= set(run.declared(ROOT / "notebooks" / f"{name}.ipynb"))


NUMBERS = [(name, key) for name in ("00_overview", "01_worlds", "02_compression", "03_patches", "04_diffusion", "05_dit", "06_scaling",
                                    "07_sizes", "08_language", "09_edit", "10_blend", "11_rollout")
           for key, value in run.declared(ROOT / "notebooks" / f"{name}.ipynb").items()
           if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "seed"]
LISTS = [("05_dit", "width", 0), ("05_dit", "depth", 0),
         ("06_scaling", "sizes", [[24, 2], [30, 2], [48, 2]]), ("06_scaling", "sizes", [[24, 2], [32, 0], [48, 2]]),
         ("06_scaling", "budgets", [0.5, 0.25]), ("06_scaling", "figure_ratios", []), ("06_scaling", "figure_ratios", [2, 4])]


@pytest.mark.parametrize("name, key, value", [(name, key, -1) for name, key in NUMBERS] + LISTS)
def test_a_number_that_cannot_be_is_refused_at_once_by_name(name, key, value):
    cells = [c for c in NOTEBOOKS[name].cells if c.cell_type == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    with pytest.raises(ValueError, match=key):
        exec(cells[at + 1].source, run.declared(ROOT / "notebooks" / f"{name}.ipynb") | {key: value})


def test_a_kill_while_a_result_is_marked_loses_nothing_and_a_broken_result_is_none(tmp_path, monkeypatch):
    path = tmp_path / PATHS[0].name
    path.write_text(PATHS[0].read_text())
    before = path.read_text()

    def killed(nb, to, *_, **__):
        Path(to).write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nbformat, "write", killed)
        run.clean(path, "a mark")
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    assert run.stored_mark(path) is None


def test_outputs_are_stored_from_a_run_of_the_same_sources_only(tmp_path):
    chapter, made, cell = tmp_path / "c.ipynb", tmp_path / "made.ipynb", nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[cell("x = 1"), cell("print(x)")])
    nbformat.write(nb, chapter)
    assert store.store(chapter, made) == "no run"
    nb.cells.insert(1, cell("x = 2", metadata=dict(tags=["injected-parameters"])))
    nb.cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    nbformat.write(nb, made)
    assert store.store(chapter, made) == "stored"
    stored = nbformat.read(chapter, 4).cells
    assert [c.source for c in stored] == ["x = 1", "print(x)"] and stored[1].outputs[0].text == "2\n"
    nb.cells[2].source, before = "print(2 * x)", chapter.read_text()
    nbformat.write(nb, made)
    assert "another version" in store.store(chapter, made) and chapter.read_text() == before


@every
def test_stored_outputs_are_small_whole_and_without_machine_paths(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size <= 1_000_000
    for cell in NOTEBOOKS[name].cells:
        assert "papermill" not in cell.metadata, "papermill's timings have no place in what is stored"
        for out in cell.get("outputs", []):
            assert out.output_type != "error", out.get("evalue")
            assert len(str(out)) <= 150_000, cell.source[:80]
            assert str(ROOT) not in str(out), "a path of the machine that ran it"
        assert cell.get("outputs", []) == run.tidy(cell.get("outputs", [])), "run.tidy would change these outputs"


def test_progress_bars_are_not_kept_and_prints_come_in_one_piece():
    say = lambda text, name="stdout": nbformat.v4.new_output("stream", name=name, text=text)
    widget = lambda text: nbformat.v4.new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": text})
    slider = widget("IntSlider(value=3)")
    kept = run.tidy([say("a"), say("50%|", "stderr"), widget("09-verb, 2 at once:   0%|    | 0/12"), say("b\n"), slider, say("c")])
    assert [out.get("text") for out in kept] == ["ab\n", None, "c"] and kept[1] is slider


@pytest.mark.parametrize("profile", lab.PROFILES)
def test_profiles_name_only_known_parameters(profile):
    values = yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text()) or {}
    assert set(values) <= set(NOTEBOOKS)
    for path in PATHS:
        run.parameters(path, profile, {})


def test_an_unknown_parameter_ends_the_run_at_once():
    done = subprocess.run([sys.executable, "book/run.py", "--profile", "smoke", "--only", "03", "-p", "sed", "1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "no parameter sed" in done.stderr


def test_a_chapter_that_is_not_there_ends_the_run_at_once():
    assert [p.stem for p in run.chapters(["05", "A"])] == ["A_lab", "05_dit"]
    with pytest.raises(SystemExit, match="no notebook's name begins with 5: there are A_lab, 01_worlds"):
        run.chapters(["05", "5"])


def test_a_chapter_is_run_again_when_an_earlier_one_was_made_anew(tmp_path):
    first, last = PATHS[0], PATHS[-1]
    before = run.fingerprint(last, {}, tmp_path)
    assert run.fingerprint(last, {}, tmp_path) == before != run.fingerprint(last, {"seed": 1}, tmp_path)
    (tmp_path / first.name).write_text(first.read_text())
    run.clean(tmp_path / first.name, "a mark")
    assert run.stored_mark(tmp_path / first.name) == "a mark"
    assert run.fingerprint(last, {}, tmp_path) != before


def test_export_is_in_step(tmp_path):
    written = [m for path in PATHS for m in export.export(path, tmp_path / "sora_lite")]
    assert len(written) == len(set(written)), "two notebooks write one module"
    assert {p.stem for p in (ROOT / "sora_lite").glob("[a-z]*.py")} == set(written)
    for module in written:
        code = lambda folder: [line for line in (folder / f"{module}.py").read_text().splitlines()
                               if not line.startswith(("# %%", "# AUTOGENERATED"))]
        assert code(ROOT / "sora_lite") == code(tmp_path / "sora_lite"), f"{module}: run python book/export.py"


@every
def test_a_chapter_imports_only_earlier_modules(name):
    order = [p.stem for p in PATHS]
    later = {m for other in order[order.index(name) + 1:] for m in modules_of(NOTEBOOKS[other])}
    code = "\n".join(c.source for c in NOTEBOOKS[name].cells if c.cell_type == "code")
    assert not set(re.findall(r"from sora_lite\.(\w+) import", code)) & later


def test_the_address_stands_in_one_place(monkeypatch):
    assert [p.name for p in address.files() if p.read_text() != address.in_step(p)] == [], \
        "run python book/address.py --write"
    old, new = address.address(), "https://github.com/somebody/another-name"
    monkeypatch.setattr(address, "address", lambda: new)
    for path in address.files():                          # nothing that follows from the address keeps the old one
        assert old.removeprefix("https://github.com/") not in address.in_step(path), path.name
        assert (new in address.in_step(path)) == (path.suffix == ".ipynb"), path.name


def test_the_set_up_cell_is_the_same_everywhere_and_leaves_torch_alone():
    cells = {name: tagged(nb, "setup") for name, nb in NOTEBOOKS.items()}
    assert all(len(c) == 1 for c in cells.values()), {n: len(c) for n, c in cells.items()}
    assert len({c[0].source for c in cells.values()}) == 1
    source = next(iter(cells.values()))[0].source
    version = re.search(r'version = "([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'"v{version}"' in source
    needs = re.findall(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert needs == ["torch>=2.4"], "a pin here would replace Colab's own torch"


def test_the_package_needs_no_notebook_tools():
    code = ("import sys; [sys.modules.__setitem__(m, None) for m in "
            "('nbdev', 'papermill', 'jupyter_book', 'ipywidgets', 'jupytext', 'accelerate', 'webdataset', 'sklearn', "
            "'skimage', 'crafter')]\n" + "\n".join(f"import sora_lite.{p.stem}" for p in (ROOT / "sora_lite").glob("[a-z]*.py")))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every
def test_every_cell_runs_and_marked_outputs_are_as_stored(name, tmp_path):
    """nbval reruns the chapter at the smoke profile, in a run folder of its own; cells tagged `nbval-check-output` must
    print what is stored."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    nb = parameterize_notebook(load_notebook_node(str(path)), run.parameters(path, "smoke", {}))
    nb.cells.insert(0, nbformat.v4.new_code_cell(f"import os; os.chdir({str(ROOT)!r})"))
    for cell in nb.cells:
        if cell.get("outputs"):
            cell.execution_count = 1                       # nbval wants to see that the cell was run
    nbformat.write(nb, tmp_path / path.name)
    done = subprocess.run([sys.executable, "-m", "pytest", "--nbval-lax", "-qx", "-p", "no:cacheprovider", path.name], cwd=tmp_path,
                          env=os.environ | {"SORA_LITE_RUN": str(tmp_path.parent / "smoke-runs")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_a_chapter_runs_with_its_parameters_and_an_error_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("SORA_LITE_RUN", "")                # `execute` sets it; afterwards it is as it was
    cell, chapter, out = nbformat.v4.new_code_cell, tmp_path / "c.ipynb", tmp_path / "out.ipynb"
    cells = [cell("n = 1", metadata=dict(tags=["parameters"])), cell("print(10 * n)"), cell("1 / (n - 3)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(
        name="python3", display_name="Python 3", language="python"))), chapter)
    run.execute(chapter, out, {"n": 2}, tmp_path / "run")
    printed = [o.text for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if o.output_type == "stream"]
    assert printed == ["20\n"]
    with pytest.raises(SystemExit, match=r"(?s)c.ipynb: cell \d+ failed.*1 / \(n - 3\).*ZeroDivisionError.*out.part.ipynb"):
        run.execute(chapter, out, {"n": 3}, tmp_path / "run")
    assert nbformat.read(out, 4).cells and (tmp_path / "out.part.ipynb").is_file()      # the good result is still there


def test_parameters_that_repeat_the_chapters_own_are_not_shown_twice():
    cell = lambda source, tag: nbformat.v4.new_code_cell(source, metadata=dict(tags=[tag]))
    book = lambda injected: nbformat.v4.new_notebook(cells=[
        cell('profile = "toy"\nsizes = [1, 2]\n', "parameters"), cell(injected, "injected-parameters"), nbformat.v4.new_code_cell("1")])
    assert len(render.without_repeats(book('# Parameters\nprofile = "toy"\n')).cells) == 2
    assert len(render.without_repeats(book('# Parameters\nprofile = "smoke"\n')).cells) == 3


def test_a_ledger_becomes_a_table_of_its_newest_rows(tmp_path):
    rows = [dict(chapter="05", what="dit", seconds=1.0, when="2026-01-01 10:00"), dict(chapter="02", what="vae", psnr=34.2, when="2026-01-01 09:00"),
            dict(chapter="05", what="dit", seconds=2.0, fidelity=0.8, when="2026-01-01 11:00")]
    (tmp_path / "ledger.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = render.ledger_table(render.ledger_rows(tmp_path)).splitlines()
    assert len(table) == 4 and "34.2" in table[2] and "| 2.0 |" in table[3] and "| 0.8 |" in table[3]
    assert render.ledger_rows(tmp_path / "nowhere") == []


def test_what_the_pages_refer_to_is_there():
    """Works cited, figures and exercises by name, pages of the contents: what a render would stop at."""
    pages = {p: p.read_text() for p in (ROOT / "book").glob("*.md")}
    figures = set()
    for path, notebook in zip(PATHS, NOTEBOOKS.values()):
        pages[path] = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        figures |= {c.metadata.get("mystnb", {}).get("figure", {}).get("name") for c in notebook.cells}
    known = set(re.findall(r"@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text()))
    labels = figures | {name for text in pages.values() for name in re.findall(r"^:(?:name|label): (\S+)", text, re.M)}
    for path, text in pages.items():
        cited = {key.strip() for keys in re.findall(r"\{cite\}`([^`]+)`", text) for key in keys.split(",")}
        assert cited <= known, (path.name, cited - known)
        named = {re.sub(r".*<(.+)>", r"\1", name) for name in re.findall(r"\{(?:numref|ref|prf:ref)\}`([^`]+)`", text)}
        assert named <= labels, (path.name, named - labels)
    files = re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text())
    assert all(any((ROOT / f"{name}{end}").is_file() for end in (".md", ".ipynb")) for name in files)
    assert set(NOTEBOOKS) == {Path(name).stem for name in files if name.startswith("notebooks/")}
