"""The loop: resumes to the bit after a kill, stops at NaN with the last checkpoint whole, writes atomically."""
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from sora_lite.train import Engine, Muon, Pretrained, compiled, fit, orthogonalize, rate
from sora_lite.video import write_atomically

SCRIPT = """
import sys, time, torch
from torch import nn
from sora_lite.train import fit
torch.manual_seed(0); torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
def batch(step, g):
    time.sleep(float(sys.argv[2])); return torch.randn(16, 8, generator=g)
def loss(model, x, g):
    return (model(x + 0.1 * torch.randn(x.shape, generator=g)).float() - x).square().mean()
fit(model, batch, loss, steps=60, save_every=10, folder=sys.argv[1], desc="t")
torch.save(model.state_dict(), sys.argv[1] + "/final.pt")
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = lambda folder, pause: [sys.executable, "-c", SCRIPT, str(folder), str(pause)]
    subprocess.run(run(whole, 0), check=True, capture_output=True)
    process = subprocess.Popen(run(cut, 0.05), stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (cut / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (cut / "last.pt").exists() and not (cut / "final.pt").exists()
    subprocess.run(run(cut, 0), check=True, capture_output=True)
    a, b = (torch.load(f / "final.pt", weights_only=True) for f in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def tiny(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    history = fit(model, lambda k, g: torch.randn(8, 4, generator=g),
                  options.pop("loss", lambda m, x, g: m(x).float().square().mean()), **dict(steps=12) | options)
    return model, history


@pytest.mark.parametrize("options", [dict(steps=-1), dict(save_every=0), dict(ema=1.0), dict(ema=-0.1), dict(decay=-0.5)])
def test_steps_that_cannot_be_counted_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="steps of 0 or more, save_every of 1 or more, 0 <= ema < 1 and decay of 0 or more"):
        tiny(folder=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_nan_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path):
    calls = []

    def loss(m, x, g):
        calls.append(1)
        return m(x).square().mean() * (float("nan") if len(calls) > 7 else 1.0)

    with pytest.raises(FloatingPointError, match="step 7.*last.pt"):
        tiny(loss=loss, folder=tmp_path, save_every=5)
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert kept["history"]["steps"] == 5 and all(v.isfinite().all() for v in kept["model"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    calls = []

    def loss(m, x, g):                                       # zero, and its gradient 0 / 0, from step 9 on
        calls.append(1)
        return (m(x) * (0.0 if len(calls) > 9 else 1.0)).abs().sqrt().mean()

    with pytest.raises(FloatingPointError, match="gradient is not finite at step 9.*last.pt"):
        tiny(loss=loss, folder=tmp_path, save_every=5)
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert kept["history"]["steps"] == 5 and all(v.isfinite().all() for v in kept["model"].values())


def test_a_disk_that_fills_up_in_mid_training_costs_nothing_that_was_kept(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def loss(m, x, g):
        calls.append(1)
        if len(calls) == 8:                                  # from here on no file may grow beyond 2000 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        return m(x).float().square().mean()

    try:
        with pytest.raises(OSError, match="could not write .*last.pt.*free some space"):
            tiny(loss=loss, folder=tmp_path, save_every=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["history"]["steps"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert torch.equal(tiny(folder=tmp_path)[0].weight, tiny()[0].weight)


def test_a_truncated_checkpoint_and_one_of_another_run_are_refused(tmp_path):
    tiny(folder=tmp_path)
    with pytest.raises(ValueError, match="belongs to another run"):
        tiny(folder=tmp_path, seed=5)
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        tiny(folder=tmp_path)


def test_numbers_of_numpy_and_paths_in_a_plan_do_not_spoil_its_checkpoints(tmp_path):
    import numpy as np
    plan = dict(lr=np.geomspace(1e-4, 1e-2, 3)[1], settings={"pool": np.int64(4), "from": tmp_path, "size": (2, 3)})
    first = tiny(folder=tmp_path, **plan)[0]
    again, history = tiny(folder=tmp_path, **plan)
    assert history.steps == 12 and torch.equal(first.weight, again.weight)
    with pytest.raises(ValueError, match="belongs to another run"):
        tiny(folder=tmp_path, **plan | dict(settings=plan["settings"] | {"size": (2, 4)}))


@pytest.mark.parametrize("device, there, compiler, said", [
    ("cpu", ["c++", "clang++"], None, "no C++ compiler g++ was found"), ("cpu", ["g++"], None, ""), ("cpu", ["g++"], "/opt/mine", "/opt/mine"),
    ("cpu", ["/opt/mine"], "/opt/mine", ""), ("cuda", ["gcc"], None, ""), ("cuda", [], None, "no C compiler was found")])
def test_without_the_compiler_that_pytorch_calls_nothing_is_compiled(device, there, compiler, said, monkeypatch, capsys):
    module = nn.Linear(2, 2)
    monkeypatch.setattr("sora_lite.train.shutil.which", lambda name: name if name in there else None)
    monkeypatch.setattr("sora_lite.train.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("sora_lite.train.sys.platform", "linux")
    for name, value in (("CXX", compiler), ("CC", None)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    with compiled([module], device):
        assert (module._compiled_call_impl is None) == bool(said)
    printed = capsys.readouterr().out
    assert said in printed and ("goes on without torch.compile" in printed) == bool(said)


OTHERS = [dict(lr=1e-4), dict(matrix_lr=1e-4), dict(warmup=3), dict(decay=0.1), dict(ema=0.5), dict(clip=9.0), dict(bf16=False),
          dict(schedule="cosine"), dict(settings=dict(batch=16)), dict(settings=None)]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_checkpoint_made_with_other_settings_is_refused(tmp_path, other):
    tiny(folder=tmp_path, settings=dict(batch=8))
    assert tiny(folder=tmp_path, settings=dict(batch=8))[1].steps == 12                 # with its own it is taken on
    with pytest.raises(ValueError, match="belongs to another run"):
        tiny(folder=tmp_path, **dict(settings=dict(batch=8)) | other)


class Counting(nn.Linear):
    """A layer that, like a VQ codebook, changes a buffer in its forward pass."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


def count(folder, **options):
    torch.manual_seed(0)
    model = Counting()
    fit(model, lambda k, g: torch.randn(8, 4, generator=g), options.pop("loss", lambda m, x, g: m(x).float().square().mean()),
        steps=12, folder=folder, save_every=5, **options)
    return model.state_dict()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupt_while_a_checkpoint_is_written_keeps_the_buffers_of_its_step(tmp_path, monkeypatch):
    whole, real, calls = count(tmp_path / "whole"), Engine.save, []

    def save(*args):
        calls.append(1)
        return interrupt() if len(calls) == 1 else real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "save", save)
        count(tmp_path / "cut")
    kept = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert kept["model"]["seen"] == kept["history"]["steps"] > 0
    again = count(tmp_path / "cut")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_run_that_goes_on_with_the_same_model_forgets_the_gradient_that_was_cut(tmp_path, monkeypatch):
    calls, real, made = [], torch.nn.utils.clip_grad_norm_, {}

    def go(name):
        fit(made[name], lambda k, g: torch.randn(8, 4, generator=g), lambda m, x, g: m(x).float().square().mean(),
            steps=12, clip=1e9, folder=tmp_path / name, save_every=5)

    def clip(*args):
        calls.append(1)
        return interrupt() if len(calls) == 8 else real(*args)

    for name in ("whole", "cut"):
        torch.manual_seed(0)
        made[name] = nn.Linear(4, 4)
    go("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        go("cut")
    go("cut")
    assert torch.equal(made["whole"].weight, made["cut"].weight)


@pytest.mark.parametrize("where, kept", [("loss", 7), ("optimiser", 5), ("average", 5), ("watch", 5)])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, where, kept):
    """An interrupt before the weights change is saved; one among the changes leaves the checkpoint before."""
    whole, calls = count(tmp_path / "whole"), []

    def at_the_eighth(real, times=1):
        def call(*args, **options):
            calls.append(1)
            done = real(*args, **options)
            return interrupt() if len(calls) == 8 * times else done
        return call

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "optimiser":
            patch.setattr(Muon, "step", at_the_eighth(Muon.step))
        if where == "average":
            patch.setattr(torch, "_foreach_lerp_", at_the_eighth(torch._foreach_lerp_, times=2))      # Muon's, then the average's
        loss = lambda m, x, g: m(x).float().square().mean()
        count(tmp_path / "cut", loss=at_the_eighth(loss) if where == "loss" else loss,
              **dict(watch=interrupt, watch_at=[8]) if where == "watch" else {})
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["history"]["steps"] == kept
    again = count(tmp_path / "cut")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def full(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="free some space"):
        write_atomically(path, full)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_really_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError, match="free some space"):
        write_atomically(tmp_path / "x", lambda p: open("/dev/full", "w").write("x" * 100_000))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("shape", [(1, 32, 64), (2, 64, 32), (1, 48, 48)])
def test_orthogonalize_levels_singular_values(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_learns_a_linear_map():
    torch.manual_seed(0)
    goal, model = torch.randn(16, 16) / 4, nn.Linear(16, 16, bias=False)
    optimizer, x = Muon(model.parameters(), lr=0.02), torch.randn(256, 16)
    losses = []
    for _ in range(100):
        loss = (model(x) - x @ goal.T).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_rate_rises_stays_and_falls():
    values = [rate(k, 100, warmup=10, decay=0.4) for k in range(100)]
    assert values[0] == 0.1 and values[10] == values[59] == 1.0 and values[99] == pytest.approx(1 / 40)
    assert rate(0, 100, warmup=0) == 1.0
    with pytest.raises(ValueError, match="wsd or cosine"):
        rate(0, 10, schedule="step")


class Kept(nn.Linear, Pretrained):
    def __init__(self, size=3):
        super().__init__(size, size)
        self.config = dict(size=size)


def test_weights_travel_and_broken_ones_are_named(tmp_path):
    model = Kept(5)
    model.save_pretrained(tmp_path / "m", note="x")
    assert json.loads((tmp_path / "m" / "provenance.json").read_text()) == {"note": "x"}
    model.save_pretrained(tmp_path / "m")                                # of these nobody knows where they are from
    assert not (tmp_path / "m" / "provenance.json").exists()
    back = Kept.from_pretrained(tmp_path / "m")
    assert torch.equal(back.weight, model.weight.bfloat16().float())
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="truncated"):
        Kept.from_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="config.json"):
        Kept.from_pretrained(tmp_path / "nothing")


def train_a_line(steps, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    seen = {}
    if options:
        options["watch"] = lambda step: seen.update({step: (model.weight.detach().clone(), model.training)})
    fit(model, lambda step, g: torch.randn(8, 4, generator=g), lambda m, x, g: (m(x) - x).square().mean(),
        steps=steps, decay=0, bf16=False, **options)
    return model.weight.detach(), seen


def test_watching_shows_what_a_shorter_training_makes_and_changes_nothing():
    short, long = train_a_line(5)[0], train_a_line(30)[0]
    watched, seen = train_a_line(30, watch_at=iter((5, 30)))             # looked into more than once
    assert sorted(seen) == [5, 30] and not any(training for _, training in seen.values())
    assert torch.equal(seen[5][0], short) and torch.equal(seen[30][0], long) and torch.equal(watched, long)


@pytest.mark.parametrize("said", ["", '{"size": 5', '{"side": 5}', '{"size": 4}'])
def test_a_configuration_that_is_broken_or_anothers_is_named(tmp_path, said):
    Kept(5).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(said)
    with pytest.raises(ValueError, match=str(tmp_path / "m")):
        Kept.from_pretrained(tmp_path / "m")
