"""The harness of the benchmarks; and, where diffusers is installed, every row at a size at which it means nothing."""
import importlib.util
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import harness  # noqa: E402

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason=(
    "diffusers is not installed: pip install -r tests/benchmarks/requirements.txt, or `make bench` once"))


# the clock

def test_rounds_run_every_arm_once_and_stop_by_number_or_by_time():
    calls = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    times, first = harness.interleaved(arms, seconds=60, device=CPU, most=5, warm=2)
    assert {name: len(seen) for name, seen in times.items()} == dict.fromkeys("abc", 5) and set(first) == set("abc")
    assert calls[:6] == list("aabbcc")                                   # two to warm up
    rounds = [calls[6 + 3 * i:9 + 3 * i] for i in range(5)]
    assert all(sorted(r) == list("abc") for r in rounds) and len(set(map(tuple, rounds))) > 1
    times, _ = harness.interleaved(arms, seconds=0, device=CPU, least=3)
    assert len(times["a"]) == 3
    slow, _ = harness.interleaved({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, seconds=0, device=CPU, least=3)
    assert min(slow["slow"]) >= 0.05 > max(slow["fast"])
    with pytest.raises(ValueError, match="an arm and at least one round"):
        harness.interleaved({}, seconds=1, device=CPU)


def test_turns_give_each_arm_its_seconds_and_go_on_from_what_was_used():
    calls = {"slow": 0, "fast": 0}

    def arm(name, seconds):
        def work():
            calls[name] += 1
            return seconds
        return work

    had = harness.in_turn({"slow": arm("slow", 4.0), "fast": arm("fast", 1.0)}, seconds=8, desc="")
    assert calls == {"slow": 2, "fast": 8} and had == {"slow": 8.0, "fast": 8.0}
    harness.in_turn({"slow": arm("slow", 4.0), "fast": arm("fast", 1.0)}, seconds=8, desc="", used={"fast": 6.0, "slow": 8.0})
    assert calls == {"slow": 2, "fast": 10}
    had = harness.in_turn({"slow": arm("slow", 1.0), "fast": arm("fast", 1.0)}, seconds={"slow": 6, "fast": 2}, desc="")
    assert had == {"slow": 6.0, "fast": 2.0}
    had = harness.in_turn({"slow": arm("slow", 1.0), "fast": arm("fast", 1.0)}, seconds=2, desc="", used={"fast": 9.0})
    assert had == {"slow": 2.0, "fast": 9.0}        # had more than it is due: nothing is left for it, and the bar stands it


def test_garbage_is_collected_again_after_an_arm_fails():
    import gc

    def fails():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("broken")

    calls = []
    with pytest.raises(RuntimeError, match="broken"):
        harness.interleaved({"a": fails}, seconds=0, device=CPU, warm=1)
    assert gc.isenabled()


# numbers

def test_spread_and_ratio():
    assert harness.spread([3, 1, 2]) == dict(median=2, q1=1.5, q3=2.5, n=3)
    assert harness.spread([7.0]) == dict(median=7.0, q1=7.0, q3=7.0, n=1)
    assert harness.ratio([4, 9], [2, 3])["median"] == 2.5                # of each round, not of the medians
    for bad in (lambda: harness.spread([]), lambda: harness.ratio([1, 2], [1])):
        with pytest.raises(ValueError):
            bad()
    assert harness.show(dict(median=2.0, q1=1.5, q3=2.5, n=3), ".1f") == "2.0 (1.5 to 2.5)"


def test_slope_finds_the_exponent_and_its_error():
    x = [1, 2, 4, 8, 16]
    k, error = harness.slope(x, [3 * n ** 1.5 for n in x])
    assert abs(k - 1.5) < 1e-9 and error < 1e-6
    k, error = harness.slope(x, [n * (1.2 if i % 2 else 0.8) for i, n in enumerate(x)])
    assert 0.01 < error < 0.5 and abs(k - 1) < 3 * error
    assert math.isnan(harness.slope([1, 2], [1, 2])[1])
    with pytest.raises(ValueError, match="two points above zero"):
        harness.slope([1, 0], [1, 1])


def test_flops_of_products_and_of_attention():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    assert harness.flops(lambda: a @ b) == 2 * 8 * 16 * 4
    q = torch.randn(1, 2, 32, 8)
    assert harness.flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 32 * 32 * 8


def test_equal_says_what_is_and_refuses_what_is_not():
    assert harness.equal("tokens", {"ours": 80, "Wan": 80}) == "tokens (80)"
    assert "1,000 to 1,040" in harness.equal("parameters", {"ours": 1000, "Wan": 1040}, 0.05)
    with pytest.raises(ValueError, match="ours has 80 and Wan 81: nothing is compared"):
        harness.equal("tokens", {"ours": 80, "Wan": 81})
    with pytest.raises(ValueError, match="equal within 5%"):
        harness.equal("parameters", {"ours": 1000, "Wan": 1060}, 0.05)


def test_seen_counts_what_enters_a_block_and_its_format():
    block = nn.Sequential(nn.Linear(8, 8))
    with harness.Seen(block) as seen, torch.autocast("cpu", torch.bfloat16):
        block(torch.zeros(5, 8))
    assert seen.numbers == 40 and seen.dtype == torch.bfloat16
    block(torch.zeros(1, 8))
    assert seen.numbers == 40                                            # the hooks are gone


# the result

def test_verdicts_tables_and_files(tmp_path):
    row = dict(median=2.1, q1=1.9, q3=2.2, n=5)
    said = harness.verdict("faster", row, 2.0)
    assert said["met"] and "both sides" in said["sentence"]
    assert "MISSED" in harness.verdict("faster", row, 2.5)["sentence"]
    result = dict(title="A row", equal=["tokens (80)"], verdicts=[said], remarks=["a remark"],
                  tables=[dict(title="T", rows=[{"name": "ours", "ms": row}], columns={"name": "", "ms": ".1f"})])
    harness.keep(tmp_path, "row9", result)
    page = (tmp_path / "row9.md").read_text()
    assert "| ours | 2.1 (1.9 to 2.2) |" in page and "- Equal: tokens (80)." in page and "- a remark" in page
    assert "| faster | 2.1 (1.9 to 2.2) | 2 | met, on the line |" in page
    assert json.loads((tmp_path / "row9.json").read_text())["verdicts"][0]["met"]
    never = dict(what="90%", met=False, target=3.0, measured=None, sentence="ours did not reach it")     # as row 3 says it
    assert "| 90% | not reached | 3 | **missed** |" in (text := harness.markdown(result | dict(verdicts=[never])))
    assert "- ours did not reach it" in text
    harness.draw([dict(verdicts=[never])], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_kept_rows_stand_on_the_books_page_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    page = tmp_path / "book" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text(f"# Beside its peers\n\n{harness.MARK}\n*Not measured yet.*\n")
    host = dict(device="a chip", cores=2, threads=2, instructions="AVX2", torch="2", diffusers="0", commit="abc", when="today")
    row = lambda title, **more: dict(title=title, equal=[], tables=[], machine=host, **more)
    harness.keep_in_book({"5": row("growth", seconds=90)})
    harness.keep_in_book({"3": row("a night", hours=8.0)})
    harness.keep_in_book({"5": row("growth", seconds=90) | dict(machine=host | dict(changed=True))})
    assert page.read_text().count("abc and changes to it") == 1
    text = page.read_text()
    assert text.startswith("# Beside its peers") and "Not measured" not in text and text.count(harness.MARK) == 1
    assert "benchmarks.svg" not in text                                  # nothing had a target
    asked = [harness.verdict("faster", dict(median=2.1, q1=2.0, q3=2.2, n=5), target) for target in (1.5, 3.0)]
    harness.keep_in_book({"1": row("a step", seconds=60, verdicts=asked)})
    assert "](static/benchmarks.svg)" in page.read_text() and (page.parent / "static" / "benchmarks.svg").stat().st_size > 1000
    assert text.index("a night") < text.index("8.0 hours") < text.index("growth") < text.index("2 min")


def test_instructions_name_the_limit(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    assert "up to AVX512_CORE_FP16" in harness.instructions()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert "free to choose" in harness.instructions()


# the rows

def bench(script, *args, out):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(out / "compiled")}
    return subprocess.run([sys.executable, str(ROOT / "tests" / "benchmarks" / script), *args, "--out", str(out)],
                          cwd=ROOT, env=env, capture_output=True, text=True)


@needs_diffusers
def test_every_contender_has_the_parameters_and_answers_in_latents():
    import peers

    grid, sizes = (2, 2, 2), dict(width=64, depth=2, heads=4, conv_depth=0)
    made = {name: peers.build(name, grid, sizes)[0] for name in ("ours", *peers.BESIDE)}
    harness.equal("parameters", {k: harness.parameters(m) for k, m in made.items()}, harness.TOLERANCE)
    latents, words = torch.randn(2, 24, 2, 4, 4), torch.randn(2, 16, 96)
    for name, model in made.items():
        with harness.Seen(model.blocks[0]) as seen:
            said = model(latents, torch.rand(2), words)
        assert said.shape == latents.shape and said.dtype == torch.float32, name
        assert seen.numbers == 2 * math.prod(grid) * model.width, name
        said.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters()), name
        early = model(latents, torch.zeros(2), words)                    # times and words are heard
        assert not torch.allclose(early, model(latents, torch.ones(2), words)), name
        assert not torch.allclose(early, model(latents, torch.zeros(2), words + 1)), name
    with pytest.raises(ValueError, match="no sizes give"):
        peers.sized(peers.Latte, 5_000, grid, 2)


@needs_diffusers
def test_a_peer_as_dit_says_the_same_and_refuses_other_sizes():
    import peers
    from sora_lite.patches import coordinates, patchify

    model, _ = peers.build("Wan", (2, 2, 2), dict(width=64, depth=2, heads=4, conv_depth=0))
    latents, words, t = torch.randn(2, 24, 2, 4, 4), torch.randn(2, 16, 96), torch.rand(2)
    dit, tokens = peers.AsDiT(model), patchify(latents, peers.PATCH)[0].flatten(0, 1)
    coords = coordinates((2, 2, 2)).repeat(2, 1)
    said = dit(tokens, t.repeat_interleave(8), coords, [8, 8], (words.flatten(0, 1), [16, 16]))
    assert torch.allclose(said, patchify(model(latents, t, words), peers.PATCH)[0].flatten(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match="clips of 8 tokens"):
        dit(tokens, t.repeat_interleave(8), coords, [16], (words.flatten(0, 1)[:16], [16]))


@needs_diffusers
@pytest.mark.parametrize("row", [1, 2, 4, 5])
def test_rows_run(row, tmp_path):
    done = bench("bench.py", "--tiny", "--rows", str(row), "--forms", "eager", out=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / f"row{row}.json").read_text())
    assert result["equal"] and all(table["rows"] for table in result["tables"]) and result["machine"]["diffusers"]
    if row == 1:        # with convolutions and without, at equal parameters, each with its operations
        assert {v["what"] for v in result["verdicts"]} == {
            f"small: {ours} faster than {peer}, both eager" for ours in ("ours", "ours, plain") for peer in ("Wan", "CogVideoX")}
        rows = {r["contender"]: r for r in result["tables"][0]["rows"]}
        assert rows["ours"]["GFLOP a step"] > 1.1 * rows["ours, plain"]["GFLOP a step"] > 0
    if row == 4:        # networks in one loop, and two of diffusers' pipelines as they are
        assert {r["sampler"].split(": ")[1] for r in result["tables"][1]["rows"]} == {
            "multistep", "Euler", "WanPipeline", "CogVideoXPipeline"}
    if row == 2:        # both scales of both peers, each with its speeds and its fidelity
        assert len(result["tables"][0]["rows"]) == 5 and len(result["verdicts"]) == 12
        assert {v["what"] for v in result["verdicts"] if v["what"].startswith("PSNR")} == {
            f"PSNR above {peer}, equal {what}" for peer in ("CogVideoX", "Wan") for what in ("parameters", "operations")}


@needs_diffusers
def test_wans_pipeline_makes_what_our_loop_over_it_makes():
    import batches
    import peers
    from sora_lite.shapes import vocabulary
    from sora_lite.text import TextEncoder

    model, _ = peers.build("Wan", (2, 2, 2), dict(width=64, depth=2, heads=4, conv_depth=0))
    parts, start = (TextEncoder(vocabulary()), model, 2.0), torch.randn(2, 24, 2, 4, 4)
    asked = ["a red circle", "a small blue star"], 4, 3.0, start
    loop, whole = batches.Loop(*parts)(*asked), batches.Whole("Wan", *parts)(*asked)
    assert (loop - whole).abs().max() < 0.1 < 1 < (loop - start).abs().max()        # rounded to bfloat16 at each step


@needs_diffusers
def test_autoencoders_that_are_compared_have_the_size_of_ours():
    import autoencoders

    device, ours = torch.device("cpu"), autoencoders.OurVAE()
    for kind in autoencoders.PEERS.values():
        peer = {what: kind(*scale) for what, scale in kind.scales.items()}
        harness.equal("parameters", dict(ours=harness.parameters(ours), peer=harness.parameters(peer["parameters"])),
                      harness.TOLERANCE)
        harness.equal("operations", dict(ours=autoencoders.operations(ours, device),
                                         peer=autoencoders.operations(peer["operations"], device)), 2 * harness.TOLERANCE)


@needs_diffusers
def test_processes_that_never_end_are_stopped_with_a_sentence():
    import bench as script
    import growth

    with pytest.raises(TimeoutError, match="2 processes did not end within 0.1 seconds"):
        growth.processes([2], model=script.SMALL, grid=(2, 2, 2), batch=1, rounds=1, cores=2, patience=0.1)
    assert not torch.multiprocessing.active_children()


@needs_diffusers
def test_tiny_is_never_kept(tmp_path):
    done = bench("bench.py", "--tiny", "--keep", out=tmp_path)
    assert done.returncode == 2 and "should be kept" in done.stderr


@needs_diffusers
def test_minutes_to_a_mark_and_the_best_rate():
    import fidelity

    curve = [(1.0, 0.4, 0.8), (2.0, 0.7, 0.9), (3.0, 0.9, 1.0)]
    assert fidelity.minutes_to(curve, 0.8) == pytest.approx(2.5) and fidelity.minutes_to(curve, 0.95) is None
    assert fidelity.minutes_to([(2.0, 0.8, 0.9)], 0.4) == pytest.approx(1.0)
    arm = lambda lr, *right: type("Arm", (), dict(lr=lr, curve=[(k, 0.0, r) for k, r in enumerate(right, 1)]))()
    arms = [arm(1, 0.6, 0.6), arm(2, 0.5, 0.7, 0.9), arm(3, 0.5, 0.5)]
    assert fidelity.best_rate(arms, 1) == 1 and fidelity.best_rate(arms, 2) == 2   # whatever came after the sweep
    edges = [fidelity.at_edge(rate, (1, 2, 3)) for rate in (1, 2, 3)]
    assert edges == [" (the smallest tried)", "", " (the largest tried)"] and fidelity.at_edge(1, (1,)) == ""


@needs_diffusers
def test_every_training_is_a_line_of_the_picture(tmp_path):
    import fidelity
    from sora_lite.lab import COLORS

    ends = ("ours", 0.9), ("ours", 0.8), ("Wan", 0.1)
    rows = [dict(recipe=name, curve=[(1.0, 0.0, 0.5), (2.0, share, 1.0)]) for name, share in ends]
    shown = fidelity.draw(rows, tmp_path / "fidelity.svg")
    text = (tmp_path / "fidelity.svg").read_text()
    lines = lambda color: text.count(f"fill: none; stroke: {COLORS[color].lower()}; stroke-width: 1.5")     # with the legend's
    assert (lines("blue"), lines("orange")) == (2 + 1, 1 + 1) and text.count("plain, Wan") == text.count(">ours<") == 1
    assert "(static/fidelity.svg)" in shown
    page = harness.markdown(dict(title="a night", equal=[], tables=[], picture=shown))
    assert page == f"## a night\n\n{shown}\n"


@needs_diffusers
def test_a_killed_night_goes_on_and_a_broken_checkpoint_is_named(tmp_path):
    run = lambda: bench("fidelity.py", "--tiny", "--eager", out=tmp_path)
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    read = lambda: {(row["recipe"], row["seed"]): row["steps"] for row in
                    json.loads((tmp_path / "row3.json").read_text())["tables"][0]["rows"]}
    assert str(tmp_path) not in (tmp_path / "row3.json").read_text()     # the book keeps this: no path of a machine in it
    first, times = read(), {p.name: p.stat().st_mtime_ns for p in (tmp_path / "fidelity").glob("*-?.pt")}
    lost = next(p for p in (tmp_path / "fidelity").glob("Wan-*-1.pt"))   # as if the run had ended before it
    record = tmp_path / "fidelity" / "record.json"
    kept = json.loads(record.read_text())
    known = kept["trainings"].pop(lost.stem)
    lost.unlink()
    record.write_text(json.dumps(kept))
    assert run().returncode == 0 and lost.is_file()
    assert {k: n for k, n in read().items() if k != ("Wan", 1)} == {k: n for k, n in first.items() if k != ("Wan", 1)}
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "fidelity").glob("*-?.pt") if p != lost}
    assert again == {k: t for k, t in times.items() if k != lost.name}   # nothing else was trained again
    assert json.loads(record.read_text())["trainings"][lost.stem] == known      # and this as it had been
    lost.write_bytes(lost.read_bytes()[:1000])
    done = run()
    assert done.returncode != 0 and lost.name in done.stderr and "delete it" in done.stderr
    for path in (tmp_path / "fidelity").glob("*-?.pt"):       # another machine: the record alone, and nothing is trained
        path.unlink()
    before, page = record.read_text(), (tmp_path / "row3.md").read_text()
    assert run().returncode == 0 and not list((tmp_path / "fidelity").glob("*-?.pt"))
    assert record.read_text() == before and (tmp_path / "row3.md").read_text() == page
    kept["trainings"][lost.stem] = known | dict(plan=known["plan"] | dict(batch=99))
    record.write_text(json.dumps(kept))
    done = run()
    assert done.returncode != 0 and lost.stem in done.stderr and "another run" in done.stderr


@needs_diffusers
def test_a_row_that_goes_on_from_the_books_record_is_of_the_same_plan(tmp_path):
    done = bench("fidelity.py", "--tiny", "--go-on", out=tmp_path)
    assert done.returncode != 0 and "record.json" in done.stderr and "another run" in done.stderr
