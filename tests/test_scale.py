"""Many processes compute what one does; a killed one is named; shards lose and repeat nothing; formulas meet counts."""
import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sora_lite import scale, scaling
from sora_lite.budget import (Batch, Machine, activation_bytes, bill, flops_of_step, how_to_shard, muon_cost, peak_bytes,
                              peak_of_training, peak_rate, shape_of, state_bytes, training_flops, video_tokens)
from sora_lite.crew import Crew, accelerator, recomputed
from sora_lite.pipeline import SoraLite, flow_loss
from sora_lite.recipes import CARDS, MovingMNIST, Videos, openvid, panda70m, something_something, ucf101
from sora_lite.scale import Settings, build, launch, main, run, what_ended
from sora_lite.shapes import Shapes
from sora_lite.shards import Stream, card_of, longest_caption, read_shards, vocabulary_of, write_shards
from sora_lite.text import words_of
from sora_lite.train import fit, optimizers, orthogonalize
from sora_lite.vae import VideoVAE
from sora_lite.video import Clip, write
from sora_lite.worlds import Folder, Mixture

SCRIPT = Path(__file__).with_name("crew_script.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def command(processes: int, *script: str) -> list[str]:
    if processes == 1:
        return [sys.executable, *script]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port),
            *script]


def train(out, strategy="ddp", processes=2, parts=4, steps=10, stop=0, pause=0.0):
    done = subprocess.run(command(processes, str(SCRIPT), str(out), strategy, *map(str, (parts, steps, stop, pause))),
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if not stop:
        return torch.load(out / "final.pt", weights_only=True), json.loads((out / "history.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of it, without Accelerate."""
    out = tmp_path_factory.mktemp("alone")
    return train(out, "alone", 1)


def same(run, other):
    """The same weights and losses; the same size of each gradient in the steps that both took since they were started."""
    near = lambda a, b: torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5)
    for name in other[0]:
        near(run[0][name], other[0][name])
    (a, b) = run[1], other[1]
    near(a["losses"], b["losses"])
    near(a["figures"]["far"], b["figures"]["far"])
    near(a["norms"], b["norms"][-len(a["norms"]):])
    if a["watched"]:                                         # step 2 was before a resumed run's first
        near(a["watched"], b["watched"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_what_one_makes(tmp_path, alone, strategy):
    same(train(tmp_path, strategy), alone)


@pytest.mark.parametrize("first, then", [(("ddp", 1), ("fsdp", 2)), (("fsdp", 2), ("ddp", 1))])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, first, then):
    train(tmp_path, *first, stop=6)
    kept = 4 if first[1] > 1 else 6                                      # one process saves when it is interrupted
    assert [p.name for p in tmp_path.glob("step-*")] == [f"step-{kept:08d}"] and not (tmp_path / "final.pt").exists()
    same(train(tmp_path, *then), alone)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000010"]


@pytest.mark.parametrize("where, at, kept", [("loss", 0, 0), ("loss", 7, 7), ("watch", 8, 5)])
def test_a_crew_of_one_saves_when_it_is_interrupted(tmp_path, where, at, kept):
    def train(folder, **options):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        loss = options.pop("loss", lambda m, x, g: m(x[1]).square().mean())
        fit(model, lambda k, g: (k, torch.randn(8, 4, generator=g)), loss, steps=12, bf16=False, folder=tmp_path / folder,
            save_every=5, engine=Crew(accelerator("cpu")), **options)
        return model.weight

    def interrupt(m=None, x=(at, None), g=None):
        if x[0] == at:
            raise KeyboardInterrupt
        return m(x[1]).square().mean()

    with pytest.raises(KeyboardInterrupt):
        train("cut", **({"loss": interrupt} if where == "loss" else {"watch": interrupt, "watch_at": [at]}))
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [f"step-{kept:08d}"]
    assert torch.equal(train("cut"), train("whole"))


# shards

class Colours:
    """A list of clips: item i is 5 frames whose brightness says i."""

    def __init__(self, n=23, bad=()):
        self.n, self.bad = n, bad

    def __repr__(self):
        return f"Colours({self.n})"

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise ValueError(f"clip {i} is broken")
        return Clip(torch.full((3, 5, 16, 16 + 8 * (i % 2)), i / 50), 8, f"number {i}", source=f"{i}.mp4")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    return VideoVAE(4, widths=(8, 8)).save_pretrained(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def folder(tmp_path, vae):
    write_shards(tmp_path / "shards", Colours(), vae, per_shard=3, jobs=1)
    return tmp_path / "shards"


def indices(samples):
    return [about["index"] for _, _, about in samples]


@pytest.mark.parametrize("world, workers", [(1, 0), (3, 0), (2, 2), (8, 0)])
def test_ranks_and_workers_read_every_clip_once(folder, world, workers):
    seen = [indices(read_shards(folder, seed=1, rank=r, world=world, workers=workers, shuffle=4)) for r in range(world)]
    assert sorted(sum(seen, [])) == list(range(23))
    again = [indices(read_shards(folder, seed=1, rank=r, world=world, workers=workers, shuffle=4)) for r in range(world)]
    assert seen == again
    other = [indices(read_shards(folder, seed=1, epoch=1, rank=r, world=world, shuffle=4)) for r in range(world)]
    assert sorted(sum(other, [])) == list(range(23)) and sum(other, []) != sum(seen, [])


def test_a_shard_says_what_it_holds_and_latents_are_the_autoencoders(folder, vae):
    latents, text, about = next(s for s in read_shards(folder) if s[2]["index"] == 7)
    model = VideoVAE.from_pretrained(vae)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model.encode(Colours()[7].video[None])[0]
    torch.testing.assert_close(latents.float(), wanted.float(), atol=0.02, rtol=0.02)
    assert text == "number 7" and about["source"] == "7.mp4" and about["vae"] and about["world"] == "Colours(23)"
    assert "number" in vocabulary_of(folder) and "22" in vocabulary_of(folder)
    assert longest_caption(folder) == max(len(words_of(caption)) for _, caption, _ in read_shards(folder))


def test_writing_goes_on_where_it_stopped_and_refuses_a_mixture(folder, vae, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.glob("*.tar")}
    kept = (folder / "shard-000001.tar").stat().st_mtime_ns
    (folder / "shard-000004.tar").unlink()
    write_shards(folder, Colours(), vae, per_shard=3, jobs=1)
    assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == before
    assert (folder / "shard-000001.tar").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="made otherwise .seed 0, not 5"):
        write_shards(folder, Colours(), vae, per_shard=3, seed=5, jobs=1)
    with pytest.raises(ValueError, match="say how many"):
        write_shards(tmp_path / "x", Shapes(32, 32, 5), vae)
    with pytest.raises(FileNotFoundError, match="write_shards"):
        read_shards(tmp_path / "nothing")
    with pytest.raises(ValueError, match="8 shards, too few for 9"):
        read_shards(folder, rank=0, world=9)


def test_a_folder_of_shards_grows_and_refuses_what_is_too_much(tmp_path, vae):
    world = lambda **options: Shapes(32, 32, 5, **options)
    write_shards(tmp_path, world(), vae, clips=5, per_shard=2, jobs=1)
    first = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    write_shards(tmp_path, world(), vae, clips=9, per_shard=2, jobs=1)          # the third had one clip and gets a second
    assert sorted(indices(read_shards(tmp_path))) == list(range(9)) and card_of(tmp_path)["clips"] == 9
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == first
    write_shards(tmp_path / "at once", world(), vae, clips=9, per_shard=2, jobs=1)
    for path in (tmp_path / "at once").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    for clips in (8, 3):                                                # a shard too many; a clip too many
        with pytest.raises(ValueError, match=f"more than the {clips} clips asked for, shard-00000[14].tar"):
            write_shards(tmp_path, world(), vae, clips=clips, per_shard=2, jobs=1)
    with pytest.raises(ValueError, match="made otherwise .options"):    # the world's name does not say so
        write_shards(tmp_path, world(pillar=0.5), vae, clips=9, per_shard=2, jobs=1)


def test_any_shard_of_another_making_is_refused_not_only_the_first(folder, vae, tmp_path):
    torch.manual_seed(1)
    other = VideoVAE(4, widths=(8, 8)).save_pretrained(tmp_path / "vae")
    write_shards(tmp_path / "other", Colours(), other, per_shard=3, jobs=1)
    for suffix in (".tar", ".json"):
        (folder / f"shard-000005{suffix}").write_bytes((tmp_path / "other" / f"shard-000005{suffix}").read_bytes())
    for call in (lambda: write_shards(folder, Colours(), vae, per_shard=3, jobs=1), lambda: card_of(folder)):
        with pytest.raises(ValueError, match="shard-000005.tar was made otherwise .another vae"):
            call()
    (folder / "shard-000005.json").write_text("{")
    with pytest.raises(ValueError, match="shard-000005.json, the index of a shard, cannot be read"):
        card_of(folder)


def test_a_kill_while_a_shard_is_made_again_leaves_no_contradiction(tmp_path, vae, monkeypatch):
    write_shards(tmp_path, Shapes(32, 32, 5), vae, clips=1, per_shard=2, jobs=1)
    from sora_lite import shards

    def killed(path, write):
        if path.suffix == ".tar":
            raise KeyboardInterrupt
        return written(path, write)

    written = shards.write_atomically
    monkeypatch.setattr(shards, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, Shapes(32, 32, 5), vae, clips=2, per_shard=2, jobs=1)
    monkeypatch.setattr(shards, "write_atomically", written)
    write_shards(tmp_path, Shapes(32, 32, 5), vae, clips=2, per_shard=2, jobs=1)
    assert sorted(indices(read_shards(tmp_path))) == [0, 1]


def test_machines_share_the_work_in_parallel(tmp_path, vae):
    shapes = Shapes(32, 32, 5)
    for part in (0, 1):
        write_shards(tmp_path, shapes, vae, clips=8, per_shard=2, share=(part, 2), jobs=2 - part)
    assert sorted(indices(read_shards(tmp_path))) == list(range(8))
    captions = {text for _, text, _ in read_shards(tmp_path)}
    assert len(captions) > 4                                           # each shard draws numbers of its own
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="share must be which, from 0 up, of how many"):
            write_shards(tmp_path / "none", shapes, vae, clips=8, share=share)


def test_damage_is_named_and_skipped(folder, vae):
    cut, flipped = folder / "shard-000002.tar", folder / "shard-000005.tar"
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    data = bytearray(flipped.read_bytes())
    data[data.index(b"latents.safetensors") + 512 + 120] ^= 255          # in the first sample's numbers
    flipped.write_bytes(bytes(data))
    with pytest.warns(UserWarning) as warned:
        seen = indices(read_shards(folder, shuffle=1))
    said = " ".join(str(w.message) for w in warned)
    assert "shard-000002.tar" in said and "shard-000005.tar" in said and "00000015" in said
    assert set(range(23)) - set(seen) <= {6, 7, 8, 15} and 15 not in seen and len(seen) == len(set(seen))
    (folder / "shard-000003.tar").write_bytes(b"no tar at all" * 100)
    with pytest.warns(UserWarning, match="shard-000003.tar"):
        seen = indices(read_shards(folder, shuffle=1))
    assert not {9, 10, 11} & set(seen) and {12, 13, 14, 22} <= set(seen)


@pytest.mark.filterwarnings("ignore:shard ")
def test_a_wrong_byte_anywhere_costs_clips_but_never_changes_or_breaks_what_is_read(folder):
    shard = folder / "shard-000002.tar"
    good, whole = shard.read_bytes(), {about["index"]: (z, text) for z, text, about in read_shards(folder, shuffle=1)}
    texts = [good.index(b"number 6"), good.index(b'"crc32"') + 10, good.index(b'{"world"')]
    for at in (*range(0, len(good), 211), *texts):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        seen = [(about["source"], z, text) for z, text, about in read_shards(folder, shuffle=1)]
        assert len(seen) >= 23 - 3
        for _, z, text in seen:
            assert torch.equal(z, whole[int(text.split()[1])][0])


def test_what_cannot_be_read_is_left_out_of_a_shard(tmp_path, vae):
    with pytest.warns(UserWarning, match="clip 4 is broken"):
        write_shards(tmp_path, Colours(6, bad=[4]), vae, per_shard=3, jobs=1)
    assert sorted(indices(read_shards(tmp_path))) == [0, 1, 2, 3, 5]


def test_a_stream_goes_on_at_any_step(folder):
    through = Stream(folder, 4, part=1, parts=2, seed=3)
    batches = [through(step, None)[1] for step in range(9)]              # 3 epochs and more
    for step in (7, 2):
        assert Stream(folder, 4, part=1, parts=2, seed=3)(step, None)[1] == batches[step]
    assert through(4, None)[1] == batches[4]
    first_epoch = sum(batches[:2], [])
    other = Stream(folder, 4, part=0, parts=2, seed=3)
    assert not set(first_epoch) & set(sum((other(k, None)[1] for k in range(2)), []))


# one command

def kill_in_mid_run(process, rank=1):
    """SIGKILL one rank of a running training as soon as there is a checkpoint; returns what was printed."""
    said, pid = "", None
    for line in iter(process.stdout.readline, ""):
        said += line
        if found := re.search(rf"rank {rank}\b.*? is process (\d+)", line):
            pid = int(found[1])
            break
    deadline = time.time() + 120
    while not list(process.folder.glob("step-*")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return said + process.stdout.read()


def test_a_killed_process_is_named_and_a_restart_goes_on(tmp_path, alone):
    process = subprocess.Popen(command(2, str(SCRIPT), str(tmp_path), "ddp", "4", "10", "0", "0.3"), env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process.folder = tmp_path
    said = kill_in_mid_run(process)
    assert process.wait(60) != 0 and not (tmp_path / "final.pt").exists()
    assert what_ended(said) == "rank 1 was ended by signal 9 (SIGKILL), and the others were stopped", said[-3000:]
    same(train(tmp_path, "ddp", 1), alone)


def settings_of(tmp_path, vae, **options):
    given = dict(out=str(tmp_path / "out"), vae=str(vae), clips=8, per_shard=2, frames=9, height=32, width=32, model_width=16,
                 depth=1, heads=2, conv_depth=1, conv_width=8, steps=4, parts=2, batch_size=2, save_every=2, timeout=60.0)
    return Settings.of(given | options)


def test_launch_trains_from_a_world_on_two_processes_and_saves_a_pipeline(tmp_path, vae, capfd):
    how = dict(warmup=1, bf16=False)                                    # steps of full size, in full precision
    settings = settings_of(tmp_path / "one", vae, **how)
    one = launch(settings)
    two = launch(settings_of(tmp_path / "two", vae, strategy="fsdp", recompute=True, **how), processes=2)
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(two["losses"]), rtol=1e-3, atol=1e-3)
    a, b = (SoraLite.from_pretrained(tmp_path / name / "out" / "weights") for name in ("one", "two"))
    fresh = build(settings, vocabulary_of(tmp_path / "one" / "out" / "shards"), 4).state_dict()
    way_a, way_b = (torch.cat([(x - fresh[name].bfloat16().float()).flatten() for name, x in made.model.state_dict().items()])
                    for made in (a, b))                                 # saved in half precision, and so is the start
    assert way_a.abs().max() > 5e-3                                     # it went somewhere,
    assert torch.nn.functional.cosine_similarity(way_a, way_b, dim=0) > 0.99       # and both the same way
    assert a.defaults["frames"] == 9


def test_a_failed_launch_is_a_sentence_and_parts_must_be_dealt_out_evenly(tmp_path, vae, folder):
    for path in folder.glob("*.tar"):
        path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ChildProcessError, match="found no whole clip.*no checkpoint yet"):
        launch(settings_of(tmp_path, vae, data=str(folder)))
    crew = Crew(SimpleNamespace(device=torch.device("cpu"), is_main_process=False, process_index=1, num_processes=2))
    assert crew.mine(6) == [1, 3, 5]
    with pytest.raises(ValueError, match="3 parts cannot be shared evenly among 2 processes: make parts a multiple of 2"):
        crew.mine(3)


def test_settings_are_checked(tmp_path, capsys, monkeypatch):
    file = tmp_path / "settings.yaml"
    file.write_text("stepz: 3\n")
    assert main(["--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "'stepz'" in said and "did you mean steps" in said and "batch_size" in said and str(file) in said
    for bad, word in (({"steps": "many"}, "steps must be of type int"), ({"steps": 0}, "steps is too small"),
                      ({"strategy": "zero"}, "ddp or fsdp"), ({"bf16": 1}, "bf16 must be of type bool"),
                      ({"device": "tpu"}, "cpu or cuda"), ({"lr": -1.0}, "lr must be a number above 0"),
                      ({"warmup": -1}, "warmup is too small"), ({"timeout": float("nan")}, "timeout must be a number")):
        with pytest.raises(ValueError, match=word):
            Settings.of(bad)
    file.write_text("lr: 1e-3\nmatrix_lr: 2E-2\ntimeout: 60\n")           # to YAML the first two are words
    assert (Settings.read(file).lr, Settings.read(file).matrix_lr) == (1e-3, 2e-2)
    file.write_text(json.dumps(dataclasses.asdict(Settings(lr=1e-5))))       # as `launch` writes it
    assert Settings.read(file).lr == 1e-5
    file.write_text("lr: fast\n")
    with pytest.raises(ValueError, match="lr must be of type float, got 'fast'"):
        Settings.read(file)
    file.write_text("steps: [")
    with pytest.raises(ValueError, match="not a YAML file"):
        Settings.read(file)
    with pytest.raises(FileNotFoundError, match="no file of settings"):
        Settings.read(tmp_path / "other.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="PyYAML: pip install 'sora_lite.scale.'"):
        Settings.read(file)


def test_what_a_machine_cannot_train_is_a_sentence_before_anything_runs(tmp_path, vae, folder, monkeypatch, capsys):
    torch.manual_seed(1)
    other = VideoVAE(4, widths=(8, 8)).save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shards = dict(data=str(folder))                                      # 8 of them
    for bad, processes, said in (({"device": "cuda"}, 1, "device is cuda .* sees 0 GPU"), ({"parts": 3}, 2, "make parts a multiple of 2"),
                                 ({"data": "nowhere"}, 1, "shapes, crafter, photographs, several of them joined by"),
                                 ({"parts": 8}, 1, "8 parts need as many shards, but there are 4"), (shards | {"parts": 9}, 1, "there are 8"),
                                 (shards | {"vae": str(other)}, 1, "coded by another autoencoder"),
                                 (shards | {"vae": str(tmp_path / "vea")}, 1, "vea holds no config.json"),
                                 ({"vae": str(tmp_path)}, 1, "holds no config.json"), ({"heads": 3}, 1, "even number of channels"),
                                 ({"frames": 8}, 1, "nearest size"), ({"height": 40}, 1, "nearest")):
        settings = settings_of(tmp_path, **{"vae": vae} | bad)
        before = torch.get_rng_state()
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            launch(settings, processes)
        assert not (tmp_path / "out").exists() and torch.equal(torch.get_rng_state(), before)
    file = tmp_path / "settings.yaml"
    file.write_text("device: cuda\n")
    assert main(["--config", str(file)]) == 2 and "sees 0 GPU" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_in_a_sentence_and_shows_where_a_bug_is(tmp_path, vae, capfd, monkeypatch):
    file = tmp_path / "settings.yaml"
    settings = lambda **options: file.write_text(json.dumps(dataclasses.asdict(settings_of(tmp_path, vae, **options))))
    (tmp_path / "films").mkdir()
    settings(data=str(tmp_path / "films"))                               # found out by `run`, not by `check`
    assert main(["--config", str(file)]) == 2
    said = capfd.readouterr().err
    assert "Error: " in said and "films holds no video" in said and "Traceback" not in said
    assert what_ended(said).startswith("the training ended: Error: ")
    settings()
    for bug in (ValueError("not enough values to unpack"), TypeError("no")):
        monkeypatch.setattr(scale, "card_of", lambda data: raised(bug))
        with pytest.raises(type(bug), match=str(bug)):
            main(["--config", str(file)])


def raised(error):
    raise error


def test_a_run_on_shards_saves_their_size_whatever_the_settings_say(tmp_path, vae):
    world = Mixture(Shapes(16, 32, 5, fps=4) for _ in range(2))
    write_shards(tmp_path / "shards", world, vae, clips=2, per_shard=2, jobs=1)
    settings = settings_of(tmp_path, vae, data=str(tmp_path / "shards"), height=40, steps=1, parts=1)
    scale.check(settings)                                                # the height of what need not be made
    defaults = SoraLite.from_pretrained(run(settings)).defaults
    assert {name: defaults[name] for name in ("frames", "height", "width", "fps")} == dict(frames=5, height=16, width=32, fps=4)


def test_data_without_a_single_caption_is_named_and_trains_the_empty_prompt(tmp_path, vae, capfd):
    film(tmp_path / "films" / "0.mp4")
    weights = run(settings_of(tmp_path, vae, data=str(tmp_path / "films"), steps=1))
    said = capfd.readouterr().out
    assert "1 of 1 videos have no caption" in said and "films has a caption: the model will know no word" in said
    assert SoraLite.from_pretrained(weights)(None, num_inference_steps=1).isfinite().all()


def test_a_run_refuses_a_checkpoint_of_other_settings(tmp_path, vae, capfd):
    settings = lambda **options: settings_of(tmp_path, vae, **options)
    run(settings(steps=2))
    assert len(json.loads((run(settings(steps=2, save_every=1, recompute=True)).parent / "history.json").read_text())["losses"]) == 2
    for other in ({"batch_size": 3}, {"depth": 2}, {"bf16": False}, {"warmup": 3}, {"clips": 12}):
        with pytest.raises(ValueError, match="step-00000002 belongs to another run"):
            run(settings(steps=2, **other))


def test_peaks_are_those_of_the_gpu_and_not_of_one_with_a_shorter_name(monkeypatch):
    for name, peak in (("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 80GB HBM3", 989e12),
                       ("NVIDIA A100-SXM4-40GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert peak_rate(torch.device("cuda"))[0] == peak, name


@pytest.mark.parametrize("bad, said", [
    ({"processes": 0}, "processes must be a whole number"), ({"parts": 3}, "parts must be a multiple of processes"),
    ({"parts": 2.0}, "parts must be"), ({"batch_size": 0}, "batch_size must be"), ({"train_steps": -1}, "train_steps must be"),
    ({"frames": -3}, "frames must be"), ({"frames": 8}, "frames 1 . 4k"), ({"side": 0}, "side must be"), ({"side": 40}, "side must be"),
    ({"shard_clips": 0}, "shard_clips must be"), ({"shards": 2}, "shards at least parts"), ({"width": 0}, "width must be"),
    ({"width": 40}, "width must be"), ({"depth": "two"}, "depth must be"), ({"strategy": "zero"}, "strategy 'zero'"),
    ({"device": "mps"}, "device 'mps'"), ({"compile_blocks": 1}, "compile_blocks must be"), ({"recompute": "no"}, "recompute must be"),
    ({"mfu_clips": 0}, "mfu_clips must be"), ({"mfu_tokens": [0]}, "mfu_tokens must be"), ({"mfu_tokens": 64}, "mfu_tokens must be"),
    ({"mfu_models": {"S": [40, 1]}}, "mfu_models must be"), ({"mfu_models": {"S": [48]}}, "mfu_models must be"),
    ({"mfu_models": [48, 1]}, "mfu_models must be")])
def test_impossible_parameters_of_the_chapter_end_it_at_once(bad, said, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cells = [c.source for c in nbformat.read(ROOT / "notebooks" / "16_scale.ipynb", 4).cells if c.cell_type == "code"]
    at = next(i for i, source in enumerate(cells) if source.startswith("profile ="))
    space = {}
    exec(cells[at], space)
    space |= bad
    with pytest.raises(ValueError, match=said):
        exec(cells[at + 1].split("folder =")[0], space)


# the planner

def toy(width, depth, clips, grid, **options):
    patch, (t, h, w) = options.get("patch", (1, 1, 1)), grid
    torch.manual_seed(0)
    data = [torch.randn(24, t, h, w) for _ in range(clips)], ["a small red circle moves left on a navy background"] * clips
    return scaling.build(width, depth, **options), data, Batch([t * h * w // (patch[1] * patch[2])] * clips, [16] * clips)


def step(model, data, masked=0.0):
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = flow_loss(model, data, torch.Generator().manual_seed(0), patch=model.dit.patch, masked=masked, unconditional=0.0)
    loss.backward()


@pytest.mark.parametrize("masked", [0.0, 1.0])
@pytest.mark.parametrize("width, depth, clips, grid, options", [
    (64, 1, 8, (5, 2, 2), {}), (48, 2, 6, (3, 8, 8), {}), (128, 3, 4, (5, 4, 4), {"mlp_ratio": 4.0}),
    (96, 2, 5, (5, 8, 8), dict(patch=(1, 2, 2), conv_depth=2, conv_width=48))])
def test_flops_by_formula_are_those_counted(width, depth, clips, grid, options, masked):
    model, data, batch = toy(width, depth, clips, grid, **options)
    batch.levels = 2 if masked else 1
    with FlopCounterMode(display=False) as counter:
        step(model, data, masked)
    assert flops_of_step(model, batch)["total"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter, recomputed([*model.dit.blocks, *model.dit.stem, *model.dit.head]):
        step(model, data, masked)
    assert flops_of_step(model, batch, recompute=True)["total"] == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("width, depth, clips, grid", [(64, 2, 8, (5, 2, 2)), (48, 2, 6, (3, 8, 8)), (128, 3, 4, (5, 4, 4))])
def test_memory_by_formula_is_that_measured(width, depth, clips, grid):
    model, data, batch = toy(width, depth, clips, grid)
    for recompute in (False, True):
        kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(x):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            with recomputed(model.dit.blocks) if recompute else nullcontext(), torch.autocast("cpu", torch.bfloat16):
                flow_loss(model, data, torch.Generator().manual_seed(0), patch=(1, 1, 1), masked=0.0, unconditional=0.0)
        parts = activation_bytes(model, batch, recompute=recompute)
        parts.pop("one block at work", 0)                                # this was a forward pass only
        assert sum(parts.values()) == pytest.approx(
            sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own), rel=0.05)
        model.zero_grad()
    state = state_bytes(model)
    peak = peak_bytes(lambda: step(model, data)) + sum(state.values()) - state["gradients"]
    assert peak_of_training(model, batch) == pytest.approx(peak, rel=0.05)


def test_recomputed_blocks_can_be_compiled():
    """torch.compile passes over a forward that is PyTorch's own function, without a word."""
    model, data, _ = toy(32, 3, 2, (2, 2, 2))
    graphs, alone = [], list(model.parameters())
    step(model, data)
    gradients = [p.grad.clone() for p in alone]
    model.zero_grad()

    def seen(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with recomputed(model.dit.blocks):
        for block in model.dit.blocks:
            block.compile(backend=seen)
        step(model, data)
    torch.compiler.reset()
    assert len(graphs) == 1                                              # one for three blocks of a kind
    for p, gradient in zip(alone, gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=0.02, atol=1e-3)


def test_state_is_what_a_training_holds():
    model, data, _ = toy(32, 1, 2, (2, 2, 2))
    opts = optimizers(model, 1e-3, 0.02)
    step(model, data)
    for o in opts:
        o.step()
    held = sum(x.nbytes for o in opts for slots in o.state.values() for x in slots.values() if x.dim())
    state = state_bytes(model)
    assert state["optimiser"] == held and state["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    with torch.device("meta"):
        assert state_bytes(scaling.build(32, 1)) == state


@pytest.mark.parametrize("width, depth, grid", [(128, 4, (5, 4, 4)), (256, 8, (5, 8, 8)), (512, 4, (5, 8, 8))])
def test_bills_and_plans_rest_on_what_was_counted(width, depth, grid):
    """`training_flops` and `how_to_shard` know a model by its size alone: here, beside formulas that are held to measurements."""
    with torch.device("meta"):
        model = scaling.build(width, depth)
    tokens = math.prod(grid)
    counted = flops_of_step(model, Batch([tokens], [16]))
    blocks = sum(p.numel() for b in model.dit.blocks for part in (b.attention, b.mlp) for p in part.parameters())
    weights, attention = training_flops(blocks, depth, width, tokens)
    assert weights == pytest.approx(counted["weights"], rel=0.05) and attention == pytest.approx(counted["attention"], rel=0.05)
    kept = activation_bytes(model, Batch([tokens], [16]), fused=True)["blocks"] / (tokens * width * depth)
    parameters = 12 * 2 * 4096 ** 2 * 16                                 # of these, all on one GPU with room for everything
    plan, (deep, wide) = how_to_shard(parameters, 1000, Machine(memory=1e15)), shape_of(parameters)
    assert plan["strategy"] == "one GPU" and plan["activations"] / (1000 * deep * wide) == pytest.approx(kept, rel=0.05)


def test_the_planner_counts_tokens_bills_and_shards():
    assert video_tokens(60, 30, 1080, 1920) == 451 * 68 * 120
    assert video_tokens(1 / 24, 24, 256, 256, (4, 8, 8)) == 16 * 16                    # an image is a video of one frame
    b = bill(1e9, 8192, 1e6, utilisation=0.5)
    assert b["hours"] == pytest.approx(b["flops"] / (989e12 * 0.5 * 3600)) and 0 < b["attention"] < 1
    depth, width = shape_of(7e9)
    assert 12 * depth * width ** 2 == pytest.approx(7e9, rel=0.1)
    small, large = how_to_shard(1e9, 8192, Machine()), how_to_shard(11e9, 76_032, Machine())
    assert small["strategy"] == "one GPU" and "FSDP" in large["strategy"] and "recomputed" in large["strategy"]
    assert large["state"] + large["activations"] + large["gathered"] <= 80e9
    assert "split" in how_to_shard(11e9, 3_000_000, Machine())["strategy"]
    assert how_to_shard(5e12, 10_000, Machine(memory=200e9), most=4096)["gpus"] == 4096
    for call, word in ((lambda: bill(1e9, 10, 1, utilisation=1.2), "utilisation"), (lambda: video_tokens(0, 1, 1, 1), "positive"),
                       (lambda: how_to_shard(1e12, 10 ** 8, Machine(), most=8), "8 H100s do not hold"),
                       (lambda: activation_bytes(toy(96, 1, 1, (1, 2, 2), conv_depth=1)[0], Batch([1], [16])), "conv_depth=0")):
        with pytest.raises(ValueError, match=word):
            call()


# recipes, on small files of each set's form

def film(path, brightness=0.0, frames=6):
    video = torch.full((3, frames, 24, 32), brightness)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".avi":
        return write(path, video, fps=12)
    with av.open(str(path), "w", format="avi") as out:                   # as UCF-101: MPEG-4 in AVI
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        picture = np.full((24, 32, 3), int((brightness + 1) * 127.5), np.uint8)
        for _ in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def check(videos, captions, brightness):
    assert [videos[i].caption for i in range(len(videos))] == captions
    clip = videos[0]
    assert clip.video.shape == (3, 9, 16, 16) and float(clip.video.mean()) == pytest.approx(brightness, abs=0.1)
    assert "9 frames of 16x16" in repr(videos)


SIZE = dict(height=16, width=16, frames=9, fps=8.0)


def test_ucf101(tmp_path, capsys):
    film(tmp_path / "UCF-101" / "ApplyEyeMakeup" / "v_ApplyEyeMakeup_g08_c01.avi", 0.5)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nYoYo/v_YoYo_g01_c01.avi 101\r\n")
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi\n")
    videos = ucf101(tmp_path, **SIZE)
    check(videos, ["apply eye makeup"], 0.5)
    assert "1 of 2" in capsys.readouterr().out and videos.missing[0].endswith("v_YoYo_g01_c01.avi")
    assert len(ucf101(tmp_path, "testlist01")) == 1
    with pytest.raises(FileNotFoundError, match="UCF-101: there is no .*testlist09"):
        ucf101(tmp_path, "testlist09")


def test_something_something(tmp_path):
    film(tmp_path / "20bn-something-something-v2" / "78687.webm", -0.5)
    (tmp_path / "labels").mkdir()
    labels = tmp_path / "labels" / "train.json"
    labels.write_text(json.dumps([dict(id="78687", label="holding potato next to vicks", template="Holding [something]",
                                       placeholders=["potato"])]))
    check(something_something(tmp_path, **SIZE), ["holding potato next to vicks"], -0.5)
    labels.write_text('{"id": 3}')
    with pytest.raises(ValueError, match="list of objects with id and label"):
        something_something(tmp_path)
    labels.write_text('[{"id": 3, "label": "x"}]')
    with pytest.raises(FileNotFoundError, match="none of the 1 videos"):
        something_something(tmp_path)


def test_openvid(tmp_path):
    film(tmp_path / "video" / "celebv_a.mp4", 0.2)
    table = tmp_path / "data" / "train" / "OpenVid-1M.csv"
    table.parent.mkdir(parents=True)
    table.write_text('video,caption,aesthetic score,fps\ncelebv_a.mp4,"A man, smiling, says ""yes""",5.1,24\n')
    check(openvid(tmp_path, **SIZE), ['A man, smiling, says "yes"'], 0.2)
    table.write_text("video,caption\nceleb.mp4\ncelebv_a.mp4\n")            # rows that end early
    assert [caption for _, caption in openvid(tmp_path).files] == [""]
    table.write_text("name,text\na,b\n")
    with pytest.raises(ValueError, match="columns video and caption"):
        openvid(tmp_path)


def test_panda70m(tmp_path):
    for i, brightness in enumerate((0.0, 0.3, 0.1)):
        film(tmp_path / "00000" / f"0000_{i:05d}.mp4", brightness)
    (tmp_path / "00000" / "0000_00000.txt").write_text("a dog runs")
    (tmp_path / "00000" / "0000_00001.json").write_text('{"caption": "a cat, \'sleeping\'"}')
    (tmp_path / "00000" / "0000_00002.txt").write_text("['two men talk', 'a street']")
    check(panda70m(tmp_path, **SIZE), ["a dog runs", "a cat, 'sleeping'", "two men talk"], 0.0)
    (tmp_path / "00000" / "0000_00002.txt").write_text("[]")
    assert [caption for _, caption in panda70m(tmp_path).files] == ["a dog runs", "a cat, 'sleeping'", ""]
    with pytest.raises(FileNotFoundError, match="Panda-70M"):
        panda70m(tmp_path / "no")


def test_moving_mnist(tmp_path, vae):
    array = np.zeros((20, 3, 64, 64), np.uint8)
    array[:, 1] = 255
    np.save(tmp_path / "mnist_test_seq.npy", array)
    videos = MovingMNIST(tmp_path, height=16, width=16, frames=9)
    assert len(videos) == 3 and videos[0].video.shape == (3, 9, 16, 16)
    assert float(videos[0].video.max()) == -1 and float(videos[1].video.min()) == 1
    write_shards(tmp_path / "shards", videos, vae, per_shard=2, jobs=1)
    assert sorted(indices(read_shards(tmp_path / "shards"))) == [0, 1, 2]
    np.save(tmp_path / "mnist_test_seq.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match="must hold bytes"):
        MovingMNIST(tmp_path)
    (tmp_path / "mnist_test_seq.npy").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="no whole array"):
        MovingMNIST(tmp_path)
    with pytest.raises(FileNotFoundError, match="Moving MNIST"):
        MovingMNIST(tmp_path / "no")


def test_each_card_has_what_one_must_know():
    for name, card in CARDS.items():
        assert re.search(r"\d (MB|GB|TB)", card.size), name
        assert card.clips and card.licence and card.page.startswith("https://") and card.get and card.files and callable(card.load)


def test_what_muon_adds_is_what_is_counted():
    model = scaling.build(64, 2)
    shapes = [p.reshape(len(p), -1) for o in optimizers(model, 1e-3, 0.02) if type(o).__name__ == "Muon"
              for group in o.param_groups for p in group["params"]]
    with FlopCounterMode(display=False) as counter:
        for p in shapes:
            orthogonalize(p[None].detach())
    cost = muon_cost(model)
    assert cost["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost["gathered"] == 4 * sum(p.numel() for p in shapes)


def test_a_folder_of_videos_goes_into_shards(tmp_path, vae):
    for i in range(3):
        film(tmp_path / "films" / f"{i}.mp4", i / 4)
    for i in range(2):                                       # the third has no caption
        (tmp_path / "films" / f"{i}.txt").write_text(f"film {i}")
    world = Folder(tmp_path / "films", height=16, width=16, frames=5, fps=8)
    write_shards(tmp_path / "shards", world, vae, clips=6, per_shard=3, jobs=1)
    samples = list(read_shards(tmp_path / "shards"))
    assert len(samples) == 6 and {text for _, text, _ in samples} <= {"film 0", "film 1", ""}
    assert all(about["source"].endswith(".mp4") and about["video"] == [3, 5, 16, 16] for _, _, about in samples)


def test_shards_of_films_that_have_changed_are_refused(tmp_path, vae):
    films, frames = tmp_path / "films", dict(height=16, width=16, frames=5, fps=8)
    for i in range(2):
        film(films / f"{i}.mp4", i / 4)
        (films / f"{i}.txt").write_text(f"film {i}")
    write = lambda: write_shards(tmp_path / "shards", Folder(films, **frames), vae, clips=4, per_shard=2, jobs=1)
    before = [path.stat().st_mtime_ns for path in write()]
    assert [path.stat().st_mtime_ns for path in write()] == before            # nothing has changed, nothing is made
    (films / "0.txt").write_text("another film")
    with pytest.raises(ValueError, match="was made otherwise .*options"):
        write()
    (films / "0.txt").write_text("film 0")
    write()
    film(films / "1.mp4", 0.25, frames=12)
    with pytest.raises(ValueError, match="was made otherwise .*options"):
        write()
    lists = [Videos("mine", [(films / f"{i}.mp4", "a film")], **frames) for i in range(2)]
    write_shards(tmp_path / "listed", lists[0], vae, per_shard=2, jobs=1)
    with pytest.raises(ValueError, match="was made otherwise .*options"):
        write_shards(tmp_path / "listed", lists[1], vae, per_shard=2, jobs=1)


def test_films_without_captions_are_trained_on(tmp_path, vae, capfd):
    for i in range(3):
        film(tmp_path / "films" / f"{i}.mp4", i / 4)
    (tmp_path / "films" / "0.txt").write_text("a grey wall")
    made = run(settings_of(tmp_path, vae, data=str(tmp_path / "films"), clips=4, per_shard=2, steps=2, parts=1, fps=6))
    defaults = SoraLite.from_pretrained(made).defaults
    assert defaults["frames"] == 9 and defaults["fps"] == 6
    assert {about["fps"] for _, _, about in read_shards(made.parent / "shards")} == {6}


def test_a_broken_sharded_checkpoint_and_one_of_another_run_are_named(tmp_path):
    crew = Crew(accelerator("cpu"))

    def train(**options):
        torch.manual_seed(0)
        return fit(nn.Linear(4, 4), lambda k, g: torch.randn(8, 4, generator=g), lambda m, x, g: m(x).square().mean(),
                   **dict(steps=4, bf16=False, folder=tmp_path, engine=crew) | options)

    train()
    assert len(train().losses) == 4                                      # nothing left to do
    with pytest.raises(ValueError, match="step-00000004 belongs to another run"):
        train(lr=1.0)
    file = next((tmp_path / "step-00000004").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-00000004 cannot be read"):
        train()
    with pytest.raises(ValueError, match="2 parts needs one batch function, or one for each"):
        fit(nn.Linear(1, 1), [len], len, steps=1, parts=2)
