"""The lab bench: checked beginnings, run folders, weights that are found, the ledger, stills that fit."""
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sora_lite import _tiles_are_hidden, lab


@pytest.fixture(autouse=True)
def a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SORA_LITE_RUN", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize("values, named", [(("huge", 0, "cpu"), "huge"), (("toy", -1, "cpu"), "seed"),
                                           (("toy", "0", "cpu"), "seed"), (("toy", 0, "abacus"), "abacus")])
def test_a_bad_beginning_names_the_parameter(values, named):
    with pytest.raises(ValueError, match=named):
        lab.start(*values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_says_the_remedy():
    with pytest.raises(ValueError, match="device='cpu'"):
        lab.start("toy", 0, "cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_mps_without_an_apple_gpu_says_the_remedy():
    with pytest.raises(ValueError, match="device='cpu'"):
        lab.start("toy", 0, "mps")


def test_start_seeds_torch_and_numpy():
    drawn = []
    for _ in range(2):
        assert lab.start("smoke", 3) == torch.device("cpu")
        drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist()))
    assert drawn[0] == drawn[1]


def test_weights_of_this_run_go_before_those_of_data(a_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="make book"):
        lab.weights("vae")
    for folder, said in ((tmp_path / "data" / "vae", "data/"), (a_run / "weights" / "vae", "this run")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert lab.weights("vae") == folder
        assert said in capsys.readouterr().out


def test_ledger_rows_are_appended_and_complete(a_run):
    lab.ledger("2", "vae", seconds=1.26, psnr=31.23456789)
    lab.ledger("5", "dit", seconds=2, fidelity=0.9)
    rows = [json.loads(line) for line in (a_run / "ledger.jsonl").read_text().splitlines()]
    assert [r["chapter"] for r in rows] == ["2", "5"]
    assert rows[0]["psnr"] == 31.2346 and rows[0]["seconds"] == 1.3
    assert all({"device", "torch", "commit", "when", "peak_gb", "profile"} <= set(r) for r in rows)


def test_stills_keep_size_and_range():
    video = torch.linspace(-2, 2, 3 * 5 * 4 * 6).view(3, 5, 4, 6)
    assert lab.image(video[:, 0]).shape == (4, 6, 3)
    assert lab.image(video[:, 0]).dtype == np.uint8
    assert lab.strip(video, n=3).shape == (4, 3 * 6 + 2 * 2, 3)
    assert lab.strip(video, n=9).shape == (4, 5 * 6 + 4 * 2, 3)        # no more stills than frames
    assert (lab.image(torch.ones(3, 2, 2)) == 255).all() and (lab.image(-torch.ones(3, 2, 2)) == 0).all()


def test_a_sheet_of_noise_stays_within_one_output(monkeypatch):
    """The heaviest picture there is must fit into the 150 kB of a stored output."""
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    noise = torch.randn(3, 9, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    lab.show_strips([noise] * 5, [f"noise {i}" for i in range(5)])
    assert len(shown[0].data) * 4 / 3 < 150_000


def test_colours_are_legible_on_white():
    def contrast(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 1.05 / (np.dot(linear, (0.2126, 0.7152, 0.0722)) + 0.05)

    assert contrast(lab.COLORS["ink"]) > 7
    assert all(contrast(c) >= 2.7 for c in lab.SERIES)
    assert len(set(lab.SERIES)) == 6


@pytest.mark.parametrize("level, flags, hidden", [(28, "avx512f amx_bf16 amx_tile", True), (32, "avx512f amx_bf16 amx_tile", False),
                                                  (22, "avx2 avx512f", False)])
def test_a_machine_that_hides_its_tiles_is_known_by_its_cpuid_level(level, flags, hidden):
    processor = f"processor\t: 0\ncpuid level\t: {level}\nflags\t\t: fpu {flags} sse\n"
    assert _tiles_are_hidden(processor + "\n" + processor) is hidden
    assert not _tiles_are_hidden("Processor: something else\n")


def test_an_experiment_is_made_once_per_setting_and_source():
    lab.start("smoke", 0)
    made = torch.zeros(1)                                   # what is in a tensor does not count

    def make():
        made.add_(1)
        return {"loss": [1.5, 2.0]}

    for _ in range(2):
        assert lab.cached("06-test", make, steps=3) == {"loss": [1.5, 2.0]}
    assert made == 1
    lab.cached("06-test", make, steps=4), lab.cached("06-test", functools.partial(make), steps=3)
    assert made == 3
    assert {p.suffix for p in (lab.run_dir() / "cache").iterdir()} == {".safetensors"}   # nothing half-written is left


NOTEBOOK = """
import functools
import torch
from sora_lite import lab

SIZES = {"small": 1, "large": [2, 3]}
STEPS = 4
KINDS = {"red", "green", "blue"}
WEIGHTS = torch.zeros(2)
WORLD = lab.Path(".")                                       # an object whose contents are not looked into


class Base:
    def inherited(self): return 5


class Model(torch.nn.Module, Base):
    channels = 6

    def forward(self, x): return x + self.bias

    @property
    def bias(self): return 7

    @classmethod
    def made(cls): return [8]

    @functools.cached_property
    def kept(self): return 9


model = torch.nn.Sequential(Model())
method = Model().forward


def factor(): return 10
def unused(): return 11
def deep(): return factor() * STEPS
def default(x=SIZES["small"]): return x
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n == 12 or even(n - 1)
def in_a_list(): return 13
def nested(): return sum((lambda x: x * in_a_list())(k) for k in range(3))


@torch.no_grad()
def decorated(): return 14


@functools.lru_cache
def remembered(): return 15


def closed(number):
    return lambda: number + len(WEIGHTS)


WAYS = [("deep", deep), ("other", lambda x: x
         + 16)]
inner = closed(17)


def make(x=0):
    time = torch.rand(1)                                    # a local name, as that of a global one
    return deep(), SIZES, KINDS, even(x), nested(), default(), decorated(), remembered(), WAYS, inner(), model(x), method, WORLD


time = 18
"""
# what is changed in the notebook, and whether the result of `make` depends on it
CHANGES = [("return 10\n", "return 100\n", True), ("STEPS = 4", "STEPS = 40", True), ("[2, 3]", "[2, 30]", True),
           ('"small": 1', '"small": 10', True), ('"green"', '"grey"', True), ("return 5", "return 50", True),
           ("channels = 6", "channels = 60", True), ("return 7", "return 70", True), ("[8]", "[80]", True),
           ("return 9", "return 90", True), ("n == 12", "n == 120", True), ("return 13", "return 130", True),
           ("return 14", "return 140", True), ("return 15", "return 150", True), ("+ 16", "+ 160", True),
           ("closed(17)", "closed(170)", True), ("odd(n - 1)", "not odd(n - 1)", True), ("make(x=0)", "make(x=1)", True),
           ("return 11", "return 110", False), ("time = 18", "time = 180", False), ("zeros(2)", "ones(2)", False),
           ("# a local name", "# a comment", False)]


def path_in(source: str, make: str = "make") -> str:
    """Where a notebook of this source would keep what its function `make` makes."""
    scope = {"__name__": "__main__", "functools": functools}
    exec(compile(source, "a cell", "exec"), scope)
    return lab.cache_path("a", eval(make, scope)).name


@pytest.mark.parametrize("old, new, counts", CHANGES, ids=[old for old, _, _ in CHANGES])
def test_results_are_kept_under_the_code_and_constants_that_made_them(old, new, counts):
    assert old in NOTEBOOK
    assert (path_in(NOTEBOOK) != path_in(NOTEBOOK.replace(old, new))) is counts


def test_partials_and_lambdas_are_looked_through():
    forms = ["lambda: make()", "lambda: make(1)", "functools.partial(make, 1)", "functools.partial(make, x=1)",
             "functools.partial(make, 2)", "functools.partial(make, deep)", "functools.partial(make, [odd])", "method"]
    assert len({path_in(NOTEBOOK, form) for form in forms}) == len(forms)
    changed = NOTEBOOK.replace("return 10\n", "return 100\n")
    assert all(path_in(NOTEBOOK, form) != path_in(changed, form) for form in forms[:-1])


def test_a_path_is_the_same_in_every_process():
    code = (f"import functools; from sora_lite import lab; scope = dict(__name__='__main__')\n"
            f"exec({NOTEBOOK!r}, scope); [scope['deep']() for _ in range(99)]; print(lab.cache_path('a', scope['make']).name)")
    run = lambda seed: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                      env=os.environ | {"PYTHONHASHSEED": seed}).stdout
    assert run("1") == run("2")


def test_tensors_of_an_experiment_come_back_as_they_were():
    lab.start("smoke", 0)
    whole = {"said": ["a circle"], "made": torch.arange(6).view(2, 3).half(), "turned": torch.eye(3)[:2].T}
    for _ in range(2):
        back = lab.cached("06-tensors", lambda: whole)
        assert back.keys() == whole.keys() and back["said"] == whole["said"]
        assert all(torch.equal(back[k], whole[k]) and back[k].dtype == whole[k].dtype for k in ("made", "turned"))


def test_what_is_no_module_may_stand_among_the_modules(tmp_path, monkeypatch):
    """Cython leaves an object without a name there (as on Colab)."""
    monkeypatch.setenv("SORA_LITE_RUN", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cython.parallel", object())
    assert lab.cached("00-test", lambda: 3) == 3


def test_cached_each_makes_side_by_side_what_is_missing_and_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SORA_LITE_RUN", str(tmp_path))
    calls = tmp_path / "calls"
    calls.mkdir()

    def make(x, power):
        import os
        (calls / f"{x}-{os.getpid()}").touch()
        return dict(value=float(x**power), table=torch.full((2,), float(x)))

    def named(name, make):
        return name + make

    assert lab.cached_each("06-named", named, {0: dict(name="a", make="b")}) == {0: "ab"}    # settings of any name

    first = lab.cached_each("06-each", make, {"c": dict(x=3, power=2), "a": dict(x=1, power=2)})
    assert [(k, r["value"]) for k, r in first.items()] == [("c", 9), ("a", 1)] and first["c"]["table"].tolist() == [3, 3]
    again = lab.cached_each("06-each", make, {x: dict(x=x, power=2) for x in (1, 2, 3)})
    assert {k: r["value"] for k, r in again.items()} == {1: 1, 2: 4, 3: 9}
    assert sorted(p.name.split("-")[0] for p in calls.iterdir()) == ["1", "2", "3"]     # none was made twice

    def fails(x):
        if x == 2:
            raise ValueError("two is too many")
        return x

    with pytest.raises(ValueError, match="two is too many"):
        lab.cached_each("06-fails", fails, {x: dict(x=x) for x in (1, 2)})


def test_a_name_with_a_dot_keeps_its_settings_apart():
    lab.start("smoke", 0)
    assert [lab.cached("06-lr0.1", lambda: 1, a=1), lab.cached("06-lr0.1", lambda: 2, a=2), lab.cached("06-lr0.1", lambda: 1, a=1)] == [1, 2, 1]
    assert lab.cached_each("06-lr0.2", lambda a: a, {k: dict(a=k) for k in (1, 2)}) == {1: 1, 2: 2}


def test_where_no_weights_are_there_is_no_fingerprint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in .*nowhere"):
        lab.fingerprint(tmp_path / "nowhere")


def test_the_lab_opens_where_there_is_no_resource_module(tmp_path):
    """As on Windows."""
    script = ("import sys; sys.modules['resource'] = None\n"
              "from sora_lite import lab, shards, studio\n"
              "lab.start('smoke', 0)\n"
              "assert 'peak_gb' not in lab.ledger('00', 'x', seconds=1.0)")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_fingerprint_changes_with_the_weights_and_not_with_the_rest(tmp_path):
    from safetensors.torch import save_file
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    before = lab.fingerprint(tmp_path)
    (tmp_path / "provenance.json").write_text("{}")
    assert lab.fingerprint(tmp_path) == before
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert lab.fingerprint(tmp_path) != before


def test_fingerprint_of_a_model_and_of_a_tensor_changes_with_any_number():
    model, x = torch.nn.Linear(3, 2), torch.arange(6.0).half().view(2, 3).T
    before = lab.fingerprint(model), lab.fingerprint(x)
    assert (lab.fingerprint(model), lab.fingerprint(x.clone())) == before and before[0] != before[1]
    with torch.no_grad():
        model.bias[1] += 1
    x[2, 0] += 1
    assert not set(before) & {lab.fingerprint(model), lab.fingerprint(x)}
