"""Write the package from the notebooks: `python book/export.py`.

nbdev does the work. Its own command takes the default module of a notebook as new and appends the others to files
that must be there already; here a module has one notebook, so each is written anew.
"""
from pathlib import Path

from nbdev.export import ExportModuleProc
from nbdev.maker import ModuleMaker
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent


def export(notebook: Path, package: Path) -> list[str]:
    """Write all modules of a notebook into the folder `package`; returns their names."""
    cells = ExportModuleProc()
    NBProcessor(notebook, [cells]).process()
    names = []
    for module, exported in cells.modules.items():
        if any(cell.cell_type == "code" for cell in exported):
            names.append(cells.default_exp if module == "#" else module)
            maker = ModuleMaker(dest=package, name=names[-1], nb_path=notebook, is_new=True)
            maker.make(exported, cells.in_all[module], lib_path=package)
    return names


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(path.name, "->", ", ".join(export(path, ROOT / "sora_lite")) or "no module")
