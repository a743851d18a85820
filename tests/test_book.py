"""The book renders from the outputs that are stored, without a warning, and its pages fetch nothing from elsewhere."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """The folder of the rendered book, after a build in which a warning is an error."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run([*command, "--path-output", out], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out / "_build" / "html"


@pytest.fixture(scope="module")
def pages(html) -> dict[str, str]:
    """HTML of every page by its path, without what is embedded in it."""
    bare = lambda text: re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    return {path.relative_to(html).as_posix(): bare(path.read_text()) for path in html.rglob("*.html")
            if "_static" not in path.parts}


def test_every_chapter_is_a_page_with_formulas_and_without_a_traceback(pages):
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {f"notebooks/{name}.html" for name in chapters} <= set(pages)
    for name, text in pages.items():
        assert "Traceback (most recent call last)" not in text and "[undefined]" not in text, name
    assert all("MathJax" in pages[f"notebooks/{name}.html"] for name in ("04_diffusion", "05_dit"))


def test_what_a_page_loads_lies_beside_it_and_nothing_comes_from_elsewhere(pages, html):
    loads = re.compile(r"<(?:script|img|video|source|audio|iframe|embed)\b[^>]*?\bsrc=[\"']([^\"']+)"
                       r"|<link\b(?=[^>]*\brel=[\"'](?:stylesheet|preload|icon))[^>]*?\bhref=[\"']([^\"']+)", re.I)
    assert loads.findall('<script defer src="//a.b/c.js"><link href="http://d/e.css" rel="stylesheet">') == [
        ("//a.b/c.js", ""), ("", "http://d/e.css")]
    for name, text in pages.items():
        found = {a or b for a, b in loads.findall(text)}
        assert name == "index.html" or any(".css" in link for link in found), name      # that one only leads on
        for link in found:
            if not link.startswith("data:"):
                assert not re.match(r"(\w+:)?//", link), (name, link)
                assert ((html / name).parent / link.split("?")[0].split("#")[0]).is_file(), (name, link)
