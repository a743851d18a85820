"""The repository's public address stands in _config.yml; this writes what follows from it: `python book/address.py --write`.

What follows: the links of the README (and its Colab links), and the set-up cell of every notebook, whose version is the
package's. Without --write, it lists the files that are not in step, and fails if there are any.
"""
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def address() -> str:
    """The public address, without a slash at its end."""
    return yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"].rstrip("/")


def version() -> str:
    """The package's version, from pyproject.toml."""
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def in_step(path: Path) -> str:
    """A file's text as the address and the version would have it."""
    quote = r'\"' if path.suffix == ".ipynb" else '"'       # a notebook is JSON
    text, url = path.read_text(), address()
    owner_name = url.removeprefix("https://github.com/")
    text = re.sub(r'(address, version = ).*?(\\n)', lambda m: f'{m[1]}{quote}{url}{quote}, {quote}v{version()}{quote}{m[2]}', text)
    return re.sub(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob)", rf"\g<1>{owner_name}\2", text)


def files() -> list[Path]:
    """All files that name the address."""
    return [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


if __name__ == "__main__":
    stale = [path for path in files() if path.read_text() != in_step(path)]
    for path in stale:
        if "--write" in sys.argv:
            path.write_text(in_step(path))
        print(path.relative_to(ROOT), "written" if "--write" in sys.argv else "is not in step with _config.yml")
    sys.exit(bool(stale) and "--write" not in sys.argv)
