"""Rolling forwards: tables of noise, rounds, files that survive a kill, and how drift is measured."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite import oracle, video
from sora_lite.dit import DiT
from sora_lite.drift import (LASTING, boundary_steps, cast_of, features, film, frechet, jackknife, main_components,
                             read_windows, windows)
from sora_lite.edit import between
from sora_lite.patches import patchify
from sora_lite.pipeline import SoraLite
from sora_lite.rollout import WAYS, Rollout, join, noise_table, noised, prompt_at, roll_to_file, write_piece
from sora_lite.shapes import MOTIONS, Shapes, vocabulary
from sora_lite.text import TextEncoder
from sora_lite.vae import VideoVAE

ROOT = Path(__file__).resolve().parent.parent
RED, BLUE = "a red circle", "a small blue star moves left on a black background"


def lively(module):
    """Weights that start at zero would hide a wrong path: draw them all, small enough to roll on for long."""
    for p in module.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return module.eval()


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    text = TextEncoder(vocabulary(), width=32, depth=1, heads=2)
    dit = DiT(channels=16, width=32, depth=1, heads=2, words_width=32, conv_depth=0)
    vae = VideoVAE(channels=4, widths=(16, 24), encoder=(1, 1), decoder=(1, 1))
    return SoraLite(lively(vae), lively(text), lively(dit),
                    defaults=dict(frames=17, height=32, width=32, num_inference_steps=3, guidance_scale=1.5))


# tables

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WAYS), st.integers(2, 8), st.data(), st.integers(1, 12), st.floats(0, 0.9), st.floats(1, 6))
def test_a_table_takes_every_frame_from_noise_to_nothing(way, window, data, steps, level, shift):
    context = data.draw(st.integers(1, window - 1))
    times, done = noise_table(way, window, context, steps, level=level, shift=shift)
    assert times.shape[1] == window and 1 <= done <= window - context
    held, new = times[:, :context], times[:, context:]
    assert (held == (torch.tensor(level) if way == "noisy" else 0)).all()
    assert (new.diff(dim=0) <= 0).all() and (new.diff(dim=1) >= 0).all()          # falling in time, rising in place
    assert (new[-1, :done] == 0).all() and ((new[0, -done:] - 1).abs() < 1e-6).all()   # finished; enters as noise
    assert torch.equal(new[-1, done:], new[0, :new.shape[1] - done])              # where the one before it stood


@pytest.mark.parametrize("wrong, sentence", [
    (("rolling", 5, 2, 4), "way 'rolling' is unknown.*overlap"), (("ramp", 5, 5, 4), "context must be 1 to 4"),
    (("overlap", 5, 0, 4), "context must be 1 to 4"), (("overlap", 5, 2, 0), "at least one step")])
def test_bad_tables_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        noise_table(*wrong)
    with pytest.raises(ValueError, match="must lie in"):
        noise_table("noisy", 5, 2, 4, level=1.0)


def test_noise_has_a_level_for_each_frame(generator):
    z = torch.randn(2, 3, 4, 2, 2, generator=generator)
    made = noised(z, torch.tensor([0.0, 0.5, 1.0, 0.0]), torch.Generator().manual_seed(1))
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made[:, :, [0, 3]], z[:, :, [0, 3]])
    assert torch.allclose(made[:, :, 1], (z + eps)[:, :, 1] / 2, atol=1e-6)
    assert torch.allclose(made[:, :, 2], eps[:, :, 2], atol=1e-6)


# from window to window

def test_a_round_of_overlap_is_chapter_9_s_between(pipe):
    roll = Rollout(pipe, [[(RED, 9)], [(BLUE, 9)]], seed=3)
    first = roll.step()
    begin, generator = pipe.vae.encode(first[:, :, -5:]), torch.Generator().manual_seed(3 * 1_000_003 + 1)
    noise, _ = patchify(torch.cat([begin, torch.randn(2, 4, 3, 4, 4, generator=generator)], 2))
    made = between(pipe, first[:, :, -5:], None, 12, [RED, BLUE], context=2, noise=noise)
    second = roll.step()
    assert second.shape[2] == 12 and (second - made).abs().max() < 1e-4
    assert (second - first[:, :, -1:]).abs().max() > 1e-3         # and something is made at all


@pytest.mark.parametrize("way", WAYS)
def test_frames_and_state_have_their_sizes_and_the_state_does_not_grow(pipe, way, tmp_path):
    sizes = []
    roll = Rollout(pipe, [[(RED, 5)]], way=way)
    for pictures in roll:
        assert torch.equal(roll.tail[:, :, -pictures.shape[2]:], pictures[:, :, -5:]) or roll.made == roll.frames
        assert pictures.shape[:2] == (1, 3) and pictures.shape[3:] == (32, 32)
        assert pictures.isfinite().all() and pictures.abs().max() <= 1
        roll.save(tmp_path / "state.safetensors")
        sizes.append((tmp_path / "state.safetensors").stat().st_size)
    assert roll.made == roll.frames == 41
    assert max(sizes) - min(sizes) < 64                          # the numbers of round and frame in the header
    again = Rollout(pipe, [[(RED, 5)]], way=way).video()
    assert again.shape == (1, 3, 41, 32, 32)
    assert not torch.equal(Rollout(pipe, [[(RED, 5)]], way=way, seed=1).video(), again)


@pytest.mark.parametrize("context", [1, 4])
def test_other_contexts_and_sizes(pipe, context):
    made = Rollout(pipe, [[(RED, 4)]], way="ramp", context=context, height=16, width=48).video()
    assert made.shape == (1, 3, 33, 16, 48)


def test_the_first_window_is_the_pipeline_s_own(pipe):
    made = Rollout(pipe, [[(RED, 2)]], seed=5).video()
    own = pipe(RED, generator=torch.Generator().manual_seed(5 * 1_000_003))
    assert (made - own).abs().max() < 1e-4


# storyboards

def test_the_prompt_follows_the_scenes_and_the_context_stays(pipe):
    scenes = [(RED, 1.0), (BLUE, 0.5), (RED, 9.0)]
    assert [prompt_at(scenes, s) for s in (0, 0.99, 1.0, 1.49, 1.5, 99)] == [RED, RED, BLUE, BLUE, RED, RED]
    one, two = (Rollout(pipe, [[(RED, 3.0), (after, 3.0)]]).video() for after in (RED, BLUE))
    changed = (one - two).abs().mean((0, 1, 3, 4))
    assert changed[:29].max() == 0 and changed[29:].max() > 1e-4   # the round from frame 29 on is the first of the new scene


@pytest.mark.parametrize("scenes, sentence", [
    ([], "no frames"), ([(RED, 0)], "number above 0"), ([(RED, math.inf)], "number above 0"), ([(RED,)], "its seconds"),
    ([("a crimson disc", 3)], "never saw the word 'crimson'"), ([("", 3)], "prompt is empty"), (RED, "no frames")])
def test_bad_storyboards_are_refused(pipe, scenes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        roll_to_file(pipe, scenes, tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []


def test_other_bad_settings_are_refused(pipe):
    with pytest.raises(ValueError, match="same seconds"):
        Rollout(pipe, [[(RED, 3)], [(RED, 4)]])
    with pytest.raises(ValueError, match="must be a storyboard"):
        Rollout(pipe, [])
    assert Rollout(pipe, [[(RED, 1.1), (RED, 2.2)], [(RED, 3.3)]]).frames == Rollout(pipe, [[(RED, 3.3)]]).frames
    with pytest.raises(ValueError, match="stepps is no option of the pipeline.*num_inference_steps"):
        Rollout(pipe, [[(RED, 3)]], stepps=4)
    with pytest.raises(ValueError, match="nearest"):
        Rollout(pipe, [[(RED, 3)]], height=30)


# files

def frames_of(path):
    return video.read(path).video


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_pieces_are_joined_frame_by_frame(tmp_path, suffix):
    greys = torch.linspace(-0.9, 0.9, 24).view(1, 24, 1, 1).expand(3, 24, 32, 48)
    pieces = [write_piece(tmp_path / f"{i:05}{suffix}", part, 8, 18) for i, part in enumerate(greys.split([9, 8, 7], 1))]
    clip = video.read(join(pieces, tmp_path / "whole" / f"all{suffix}"))
    assert clip.video.shape == (3, 24, 32, 48) and clip.fps == pytest.approx(8, rel=0.05)
    assert (clip.video - greys).abs().mean((0, 2, 3)).max() < 0.05


def test_a_piece_has_the_same_bytes_each_time(tmp_path, generator):
    blobs = torch.rand(1, 3, 24, 8, 8, generator=generator)
    noise = torch.nn.functional.interpolate(blobs, (24, 64, 64), mode="trilinear")
    made = {write_piece(tmp_path / "a.mp4", noise[0] * 2 - 1, 8, 18).read_bytes() for _ in range(12)}
    assert len(made) == 1


def test_pieces_that_cannot_be_joined(tmp_path):
    (tmp_path / "00000.mp4").write_bytes(b"no video")
    with pytest.raises(OSError, match="could not write.*ffmpeg could not make it"):
        join([tmp_path / "00000.mp4"], tmp_path / "all.mp4")
    assert not (tmp_path / "all.mp4").exists()


class Stop(Exception):
    pass


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_rollout_goes_on_to_the_same_frames(pipe, way, tmp_path):
    scenes, seen = [(RED, 3), (BLUE, 3)], []

    def stop(made):
        seen.append(sorted(p.name for p in (tmp_path / "b.mp4.parts").glob("*.mp4")))
        if made > 35:
            raise Stop

    whole = roll_to_file(pipe, scenes, tmp_path / "a.mp4", way=way, save_every=1.5)
    with pytest.raises(Stop):
        roll_to_file(pipe, scenes, tmp_path / "b.mp4", way=way, save_every=1.5, watch=stop)
    assert seen[-1] and not (tmp_path / "b.mp4").exists()        # made as it goes, and not yet whole
    begun = []
    resumed = roll_to_file(pipe, scenes, tmp_path / "b.mp4", way=way, save_every=1.5, watch=begun.append)
    assert begun[0] > 17                                          # it did not begin anew
    assert frames_of(whole).shape[1] == 49
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_kill_9_and_go_on_to_the_same_bytes(pipe, tmp_path):
    way, suffix = "ramp", ".mp4"
    pipe.save_pretrained(tmp_path / "weights")
    script = ("import os, sys, torch; torch.set_num_threads(int(sys.argv[4])); "
              "from sora_lite.pipeline import SoraLite; from sora_lite.rollout import roll_to_file; "
              "roll_to_file(SoraLite.from_pretrained(sys.argv[1]), [('a red circle', 6)], sys.argv[2], way=sys.argv[3], "
              "save_every=1, watch=lambda made: made > 30 and os.kill(os.getpid(), 9))")
    killed = tmp_path / f"b{suffix}"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "weights"), str(killed), way,
                           str(torch.get_num_threads())], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / f"b{suffix}.parts" / "state.safetensors").is_file() and not killed.exists()
    same, begun = SoraLite.from_pretrained(tmp_path / "weights"), []
    roll_to_file(same, [(RED, 6)], killed, way=way, save_every=1, watch=begun.append)
    whole = roll_to_file(same, [(RED, 6)], tmp_path / f"a{suffix}", way=way, save_every=1)
    assert begun[0] > 20 and frames_of(killed).shape[1] == 49    # it did not begin anew
    assert killed.read_bytes() == whole.read_bytes()


def interrupted(pipe, path, **options):
    def stop(made):
        raise Stop

    with pytest.raises(Stop):
        roll_to_file(pipe, [(RED, 5)], path, save_every=1, watch=stop, **options)
    return path.with_name(path.name + ".parts") / "state.safetensors"


def test_the_state_of_another_rollout_is_named(pipe, tmp_path):
    path = tmp_path / "out.mp4"
    state = interrupted(pipe, path)
    for change, name in ((dict(seed=1), "seed"), (dict(way="ramp"), "way"), (dict(quality=20), "quality")):
        with pytest.raises(ValueError, match=f"state of another rollout: it differs in {name}"):
            roll_to_file(pipe, [(RED, 5)], path, **dict(save_every=1) | change)
    with pytest.raises(ValueError, match="differs in storyboards"):
        roll_to_file(pipe, [(BLUE, 5)], path, save_every=1)
    with torch.no_grad():
        parameter = next(pipe.model.parameters())
        parameter[0] += 1
        with pytest.raises(ValueError, match="differs in weights"):
            roll_to_file(pipe, [(RED, 5)], path, save_every=1)
        parameter[0] -= 1
    assert state.is_file()                                       # nothing was lost by asking


@pytest.mark.parametrize("damage", [b"", b"no state at all", None])
def test_a_damaged_state_is_named(pipe, damage, tmp_path):
    path = tmp_path / "out.mp4"
    state = interrupted(pipe, path)
    state.write_bytes(state.read_bytes()[:200] if damage is None else damage)
    with pytest.raises(ValueError, match="no whole state of a rollout.*delete"):
        roll_to_file(pipe, [(RED, 5)], path, save_every=1)


def test_places_that_cannot_be_written_and_suffixes_that_cannot_be(pipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be made there.*Choose a folder"):
        roll_to_file(pipe, [(RED, 3)], tmp_path / "file" / "out.mp4")
    with pytest.raises(ValueError, match="choose .mp4"):
        roll_to_file(pipe, [(RED, 3)], tmp_path / "out.webm")
    with pytest.raises(ValueError, match="a time above 0"):
        roll_to_file(pipe, [(RED, 3)], tmp_path / "out.mp4", save_every=0)
    for quality in "good", -1, 52:
        with pytest.raises(ValueError, match=f"at quality {quality}: .* from 0 .best. to 51"):
            roll_to_file(pipe, [(RED, 3)], tmp_path / "out.mp4", quality=quality)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("name", ["12:30.mp4", "-out.mp4"])
def test_names_that_ffmpeg_would_misread(pipe, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roll_to_file(pipe, [(RED, 1)], name, seed=torch.tensor(3).numpy())           # NumPy's numbers are numbers
    assert [p.name for p in tmp_path.iterdir()] == [name] and video.read(tmp_path / name).video.shape[1] == 9


def test_all_of_a_video_that_has_begun_is_refused(pipe):
    roll = Rollout(pipe, [[(RED, 4)]])
    roll.step()
    with pytest.raises(ValueError, match="17 of 33 frames are made already, and not kept"):
        roll.video()


def test_a_state_holds_no_path_and_its_plan_is_whole(pipe, tmp_path):
    roll = Rollout(pipe, [[(RED, 5)]], way="noisy", level=0.2)
    roll.step()
    assert json.loads(json.dumps(roll.plan)) == roll.plan
    assert {"way", "context", "level", "seed", "storyboards", "weights", "guidance_scale"} <= set(roll.plan)
    assert str(ROOT) not in json.dumps(roll.plan)


# worlds that last, and drift

def test_a_long_film_begins_as_the_clip_and_never_leaves(generator):
    world = Shapes(48, 80, split="test")
    cast = cast_of(world, LASTING, 15, generator)
    names = list(MOTIONS)
    assert [names[i] for i in cast["motion"][:, 0].tolist()] == list(LASTING) * 3
    long = film(world, cast, 97)
    assert long.shape == (15, 3, 97, 48, 80)
    assert (long[:, :, :17] - world.render(cast)).abs().max() < 0.02
    with pytest.raises(ValueError, match="only these motions last"):
        film(world, cast_of(world, ["left"], 1, generator), 20)


def test_real_long_films_are_read_right_and_lost_figures_are_not(generator):
    world = Shapes(split="test")
    cast = cast_of(world, LASTING, 10, generator)
    scenes, long = world.scenes(cast), film(world, cast, 65)
    right = read_windows(scenes, long)
    assert right.shape == (10, 4, 7) and right[..., -1].mean() > 0.9
    long[0, :, 32:] = long[0, :, :1, :1, :1]                      # the figure is gone from the third window on
    gone = read_windows(scenes[:1], long[:1])[0]
    assert gone[:2, -1].all() and not gone[2:, -1].any() and not gone[2:, oracle.ATTRIBUTES.index("count")].any()


def test_windows():
    long = torch.arange(40).view(1, 1, 40, 1, 1)
    assert windows(long)[0, :, 0, 0, 0, 0].tolist() == [0, 16]
    assert windows(long, 8, 8).shape == (1, 5, 1, 8, 1, 1)
    with pytest.raises(ValueError, match="17 frames does not fit into a video of 16"):
        windows(long[:, :, :16])


def test_seams_are_told_from_other_boundaries_of_latent_frames():
    steps = torch.ones(2, 64)
    steps[:, ::4] = 2.0                                           # a jump at every boundary, and none of the seams' own
    assert torch.allclose(boundary_steps(steps), torch.tensor([[2.0, 2.0, 1.0]] * 2))
    steps[:, [16, 28, 40, 52]] = 3.0                              # after 17 frames, and after every 12 more
    assert torch.allclose(boundary_steps(steps), torch.tensor([[3.0, 2.0, 1.0]] * 2))


def test_frechet_distance_of_known_gaussians(generator):
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])                    # covariance 1/2
    assert frechet(cross, cross) == pytest.approx(0, abs=1e-6)
    assert frechet(cross, cross + torch.tensor([3.0, 4])) == pytest.approx(25, abs=1e-6)
    assert frechet(cross, 2 * cross) == pytest.approx(2 * (0.5 ** 0.5 - 2 ** 0.5) ** 2, abs=1e-6)
    a, b = torch.randn(50, 3, generator=generator), torch.randn(40, 3, generator=generator) @ torch.randn(3, 3, generator=generator)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6) and frechet(a, b) > 0
    assert frechet(a[:1], a[1:2]) == pytest.approx(float((a[0] - a[1]).square().sum()), rel=1e-5)


def test_the_jackknife_of_a_mean_is_the_standard_error(generator):
    x = torch.randn(30, generator=generator, dtype=torch.double)
    mean, error = jackknife(lambda rows: float(rows.mean()), x)
    assert mean == pytest.approx(float(x.mean())) and error == pytest.approx(float(x.std() / 30 ** 0.5), rel=1e-6)


def test_main_components_have_spread_one(generator):
    x = torch.randn(200, 10, generator=generator) @ torch.randn(10, 10, generator=generator) + 5
    y = main_components(x, 4)(x)
    assert y.shape == (200, 4) and y.mean(0).abs().max() < 1e-4
    assert torch.allclose(y.T @ y / 200, torch.eye(4), atol=1e-3)


def test_features_see_motion_and_colour(pipe, generator):
    still = torch.rand(1, 3, 1, 16, 16, generator=generator).expand(1, 3, 9, 16, 16)
    moving = torch.rand(1, 3, 9, 16, 16, generator=generator)
    rows = features(pipe.vae, torch.cat([still, moving, still * 0.5]), batch=2)
    assert rows.shape == (3, 12) and rows[1, 8:].mean() > rows[0, 8:].mean()
    assert (rows[0, :4] - rows[2, :4]).abs().max() > 1e-3


def test_a_full_disk_keeps_the_state_that_was_saved(pipe, tmp_path):
    path, roll = tmp_path / "state.safetensors", Rollout(pipe, [[(RED, 5)]])
    roll.step()
    roll.save(path)
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="could not write .*state.safetensors.*free some space"):
            roll.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
