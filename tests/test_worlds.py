"""The worlds of real pixels: one interface, exact captions, shards, and folders with bad files in them."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sora_lite.video import write
from sora_lite.worlds import (ACTIONS, MOVES, PHOTOGRAPHS, Crafter, Folder, Photographs, crafter_caption,
                              photograph, read_captions, window, world_of)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crafter")
    Crafter(folder, steps=400)
    return folder


@pytest.fixture
def clips(tmp_path):
    """A folder of two good videos (one captioned) in two sizes, and three bad ones."""
    write(tmp_path / "a.mp4", torch.zeros(3, 16, 32, 48), fps=8)
    (tmp_path / "a.txt").write_text("a grey wall\n")
    write(tmp_path / "deep" / "b.webm", torch.ones(3, 30, 24, 24), fps=10)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "letter.mov").write_text("Dear reader, this is not a video.")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[:len(whole) // 2])
    return tmp_path


# ---- the interface

def test_every_world_gives_clips_and_batches(shards, clips):
    sized = dict(height=32, width=48, frames=9, fps=8)
    for world in (Crafter(shards, steps=400, frames=9), Photographs(**sized), Folder(clips, **sized)):
        clip = world.sample(seeded())
        assert clip.video.shape == (3, 9, world.height, world.width) and clip.video.dtype == torch.float32
        assert clip.video.abs().max() <= 1 and clip.fps == 8 and clip.source
        video, captions = world.batch(3, seeded())
        assert video.shape == (3, 3, 9, world.height, world.width) and len(captions) == 3
        assert world.__class__.__name__ in repr(world)


def test_the_same_seed_gives_the_same_clip(shards, clips):
    for world in (Crafter(shards, steps=400), Photographs(), Folder(clips)):
        a, b, c = (world.sample(seeded(s)) for s in (5, 5, 6))
        assert torch.equal(a.video, b.video) and a.caption == b.caption
        assert a.video.shape != c.video.shape or not torch.equal(a.video, c.video) or isinstance(world, Folder)


# ---- Crafter

def test_crafter_is_recorded_once_and_the_same_everywhere(shards, tmp_path):
    before = [p.stat().st_mtime_ns for p in shards.iterdir()]
    a, b = Crafter(shards, steps=400), Crafter(tmp_path, steps=400)
    assert [p.stat().st_mtime_ns for p in shards.iterdir()] == before
    assert all(np.array_equal(a.rows[key], b.rows[key]) for key in a.rows)
    assert not [p for p in tmp_path.iterdir() if "part" in p.name]


def test_crafter_clips_stay_within_an_episode(shards):
    world = Crafter(shards, steps=400, frames=33)
    for start in world.starts:
        assert len(set(world.rows["episode"][start:start + 33])) == 1


def test_crafter_state_tells_what_happened(shards):
    """A step to the right moves the player to the right or not at all, never elsewhere; and so for all."""
    rows = Crafter(shards, steps=400).rows
    moves = {"move_left": (-1, 0), "move_right": (1, 0), "move_up": (0, -1), "move_down": (0, 1)}
    went = 0
    for i in range(len(rows["actions"]) - 1):
        if rows["episode"][i] == rows["episode"][i + 1]:
            step = tuple(int(x) for x in rows["place"][i + 1] - rows["place"][i])
            assert step in ((0, 0), moves.get(ACTIONS[rows["actions"][i]], (0, 0)))
            went += step != (0, 0)
    assert went > 100, "the player gets about"
    assert len({d for d in rows["deeds"] if d}) >= 2, "and does things"


def test_crafter_captions_say_what_the_state_says():
    names = ["nothing", "water", "grass", "stone", "path", "sand", "tree", "lava", "coal", "iron", "diamond",
             "table", "furnace", "player", "cow", "zombie", "skeleton", "arrow", "plant"]
    near = np.zeros((5, 19), int)
    near[:, 2], near[:, 6], near[:, 14] = 40, 12, 1
    part = dict(place=np.array([[9 - i, 5] for i in range(5)]), deeds=np.array(["", "collect_wood", "", "", ""]),
                near=near, light=np.full(5, 0.1))
    assert crafter_caption(part, names) == ("a player walks left and chops wood, grass and tree around, "
                                            "a cow nearby, at night")


def test_crafter_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="play more steps"):
        Crafter(tmp_path, steps=5, frames=17)
    (tmp_path / "crafter_64_9_0.npz").write_bytes(b"PK half a shard")
    with pytest.raises(ValueError, match="crafter_64_9_0.npz is no whole shard"):
        Crafter(tmp_path, steps=9)


# ---- Photographs

@settings(max_examples=60, deadline=None, derandomize=True)
@given(move=st.sampled_from(list(MOVES)), frames=st.integers(1, 40), x=st.floats(0.02, 1), y=st.floats(0.02, 1),
       place=st.floats(0, 1))
def test_the_camera_never_leaves_the_photograph(move, frames, x, y, place):
    path = window(move, frames, (x, y), place)
    assert path.shape == (frames, 4)
    assert (path[:, :2].abs() + path[:, 2:] <= 1 + 1e-5).all() and (path[:, 2:] > 0).all()


def test_the_camera_shows_the_window_it_names():
    world = Photographs(height=32, width=32, frames=5)
    ramp = torch.linspace(-1, 1, 400)
    world.pictures["coffee"] = torch.stack([ramp.expand(300, 400), torch.linspace(-1, 1, 300)[:, None].expand(300, 400),
                                            torch.zeros(300, 400)])
    for move in MOVES:
        clip = world.film("coffee", move, view=0.5, place=0.3)
        for t, (x, y, half_x, half_y) in enumerate(clip.state["window"]):
            red, green = clip.video[0, t], clip.video[1, t]          # they tell where each pixel looks
            assert red.mean().item() == pytest.approx(x, abs=0.01)
            assert green.mean().item() == pytest.approx(y, abs=0.01)
            assert (red[0, -1] - red[0, 0]).item() == pytest.approx(2 * half_x * 31 / 32, abs=0.02)
            assert (green[-1, 0] - green[0, 0]).item() == pytest.approx(2 * half_y * 31 / 32, abs=0.02)


def test_photographs_need_no_network():
    """In a fresh interpreter in which no socket can be opened."""
    code = ("import socket\n"
            "def no(*a, **k): raise OSError('no network here')\n"
            "socket.socket.connect = no; socket.getaddrinfo = no\n"
            "from sora_lite.worlds import *\n"
            "for name in PHOTOGRAPHS:\n"
            "    p = photograph(name)\n"
            "    assert p.shape[0] == 3 and min(p.shape[1:]) >= 256 and p.std() > 0.1 and p.abs().max() <= 1, name\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fine_patterns_do_not_alias():
    """Stripes finer than the clip's pixels come out grey, not as bands."""
    world = Photographs(height=16, width=16, frames=3)
    world.pictures["coins"] = ((torch.arange(512) // 2) % 2 * 2.0 - 1).expand(3, 512, 512)
    assert world.film("coins", "pan-right", 0.9).video.abs().max() < 0.2


def test_one_frame_is_a_picture_without_a_move():
    clip = Photographs(frames=1).film("chelsea", "pan-left")
    assert clip.video.shape == (3, 1, 64, 64) and clip.caption == PHOTOGRAPHS["chelsea"]
    assert Photographs(frames=2).film("chelsea", "pan-left").caption == "a cat, the camera pans left"
    assert photograph("camera").shape[0] == 3, "a grey photograph has three channels too"


# ---- Folder

def test_bad_files_are_named_listed_and_left_out(clips, capsys):
    world = Folder(clips)
    assert sorted(p.name for p in world.files) == ["a.mp4", "b.webm"]
    assert sorted(p.name for p in world.bad) == ["empty.mp4", "half.mp4", "letter.mov"]
    printed = capsys.readouterr().out
    for line in ("empty.mp4 is empty", "half.mp4 ", "letter.mov is not a video"):
        assert f"left out: {line}" in printed
    assert "2 videos" in repr(world) and "3 left out" in repr(world)


def test_native_size_and_rate_and_clips_cut_by_seconds(clips):
    world = Folder(clips, seconds=1.0)
    shapes = {(world.sample(seeded(s)).video.shape, world.sample(seeded(s)).fps) for s in range(12)}
    assert shapes == {((3, 8, 32, 48), 8.0), ((3, 10, 24, 24), 10.0)}
    with pytest.raises(ValueError, match="do not stack"):
        world.batch(12, seeded())


def test_short_files_hold_their_last_frame(clips):
    world = Folder(clips, height=16, width=16, frames=50, fps=10)
    video, _ = world.batch(2, seeded())
    assert video.shape == (2, 3, 50, 16, 16)


def test_captions_beside_in_a_table_or_in_lines(clips):
    (clips / "captions.csv").write_text("file,caption\na.mp4,from the table\nb.webm,\"white, all over\"\n")
    world = Folder(clips)
    a, b = clips / "a.mp4", clips / "deep" / "b.webm"
    assert world.caption(a) == "a grey wall" and world.caption(b) == "white, all over"
    rows = [{"file": "deep/b.webm", "caption": "from the lines"}]
    (clips / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert Folder(clips).caption(b) == "from the lines"


@settings(max_examples=30, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["x.mp4", "ü.mov", "a b.gif"]),
                       st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=20)))
def test_any_caption_comes_back(tmp_path, captions):
    import csv
    with open(tmp_path / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *captions.items()])
    assert read_captions(tmp_path) == captions


@pytest.mark.parametrize("caption", ["one\u2028two", "one\u0085two", "one\u2029"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", ""])
def test_a_caption_in_lines_may_hold_what_unicode_calls_a_line_end(tmp_path, caption, end):
    line = json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_bytes((line + end).encode())
    assert read_captions(tmp_path) == {"a.mp4": caption}


@pytest.mark.parametrize("text, line", [
    ('file,caption\na.mp4,"a red circle\nb.mp4,two\nc.mp4,three\n', 2),               # would take b and c into a's caption
    ('file,caption\na.mp4,one\nb.mp4,"a red circle\nc.mp4,"three, four"\n', 3),
    ('file,caption\na.mp4,"say "hi" to"\n', 2), ('"file,caption\na.mp4,one\n', 1),
    ('file,caption\na.mp4,"one\ntwo"\nb.mp4,' + "x" * 140_000, 4)])
def test_a_quote_that_is_not_closed_is_named_and_swallows_no_caption(tmp_path, text, line):
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(ValueError, match=f"captions.csv, line {line}: .*close every double quote"):
        read_captions(tmp_path)


def test_wrong_caption_files_are_named(clips):
    (clips / "captions.csv").write_text("name,text\na.mp4,x\n")
    with pytest.raises(ValueError, match="captions.csv needs the columns file and caption"):
        Folder(clips)
    (clips / "captions.csv").write_text("file,caption\na.mp4,a ball\nb.webm,a ball rolls left, then stops\n")
    with pytest.raises(ValueError, match="captions.csv, line 3: .* in double quotes"):
        Folder(clips)
    (clips / "captions.csv").unlink()
    (clips / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "x"}\nnot json\n')
    with pytest.raises(ValueError, match="captions.jsonl, line 2"):
        Folder(clips)


def test_captions_of_no_video_are_told(clips, capsys):
    (clips / "captions.csv").write_text("file,caption\na,a grey wall\ndeep/b.webm,white\n")
    Folder(clips)
    said = capsys.readouterr().out
    assert "1 of 2 captions" in said and "'a', for one" in said and "with its ending" in said
    (clips / "captions.csv").write_text("file,caption\na.mp4,a grey wall\ndeep/b.webm,white\n")
    Folder(clips)
    assert "captions" not in capsys.readouterr().out


def test_videos_without_a_caption_are_told(clips, capsys):
    Folder(clips)
    said = capsys.readouterr().out
    assert "1 of 2 videos have no caption ('deep/b.webm', for one): put it into a .txt beside" in said
    (clips / "deep" / "b.txt").write_text("white")
    Folder(clips)
    assert "caption" not in capsys.readouterr().out


def test_a_folder_without_one_good_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no video"):
        Folder(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match="empty.mp4 is empty"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="go together"):
        Folder(tmp_path, height=32)


def test_a_file_that_goes_bad_later_does_not_stop_a_training(clips):
    world = Folder(clips, height=16, width=16, frames=4, fps=8)
    (clips / "a.mp4").write_bytes(b"overwritten by somebody")
    video, _ = world.batch(8, seeded())
    assert video.shape[0] == 8 and (video > 0.9).all(), "only the white clip is left"
    assert any(p.name == "a.mp4" for p in world.bad)


def test_a_caption_that_cannot_be_read_is_named_at_once(clips, capsys):
    (clips / "a.txt").write_bytes("ein gr\u00fcner Kreis".encode("latin-1"))
    assert [p.name for p in Folder(clips).files] == ["b.webm"]
    assert "left out: a.txt is not text in UTF-8" in capsys.readouterr().out
    (clips / "captions.csv").write_bytes("file,caption\nb.webm,wei\u00df\n".encode("latin-1"))
    with pytest.raises(ValueError, match="captions.csv is not text in UTF-8"):
        Folder(clips)
    (clips / "captions.csv").unlink()
    (clips / "captions.jsonl").write_text('{"file": "b.webm", "caption": null}\n')
    assert Folder(clips).caption(clips / "deep" / "b.webm") == ""


def test_a_mixture_draws_on_all_its_worlds_and_a_world_is_found_by_name(clips, tmp_path, generator):
    mixed = world_of("shapes+photographs", 32, 48, 5, fps=4)
    drawn = [mixed.sample(generator) for _ in range(24)]
    assert {clip.video.shape for clip in drawn} == {(3, 5, 32, 48)} and {clip.fps for clip in drawn} == {4}
    assert 4 < sum("background" in clip.caption for clip in drawn) < 20            # only Shapes name one
    assert mixed.batch(3, generator)[0].shape == (3, 3, 5, 32, 48) and "Photographs" in repr(mixed)
    assert len(world_of(str(clips), 32, 32, 5).files) == 2
    for wrong in ("circles", "shapes+circles", str(tmp_path / "nowhere"), ""):
        with pytest.raises(ValueError, match="the world must be shapes, crafter, photographs, several"):
            world_of(wrong)
