"""Video files in and out: round trips, every kind of difficult file, refusals, and the diet of `show`."""
import errno
import os
import random
import resource
import struct
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sora_lite import video as video_module
from sora_lite.video import Clip, cover, probe, read, show, write, write_atomically

SLOW = settings(max_examples=25, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


def ramp(frames: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """A clip whose every frame has one grey of its own, so that frames can be told apart."""
    grey = torch.linspace(-0.9, 0.9, frames) if frames > 1 else torch.zeros(1)
    return grey[None, :, None, None].expand(3, frames, height, width).clone()


def greys(video: torch.Tensor) -> list[float]:
    return video.mean((0, 2, 3)).tolist()


def encode(path: Path, frames: list, times: list[int], *, codec="libx264", pix_fmt="yuv420p", rate=24,
           form="rgb24", options=None, aspect=None) -> Path:
    """Write pictures (uint8 tensors) with time stamps in units of 1/rate, by PyAV alone."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for picture, at in zip(frames, times):
            frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format=form)
            frame.pts, frame.time_base = at, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def flat(value: int, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.full((height, width, 3), value, dtype=torch.uint8)


# ---- round trips

@SLOW
@given(frames=st.integers(1, 7), height=st.integers(2, 37), width=st.integers(2, 37),
       suffix=st.sampled_from([".mp4", ".mov", ".mkv", ".webm", ".gif"]))
def test_any_size_and_length_comes_back(tmp_path, frames, height, width, suffix):
    video = ramp(frames, height, width)
    clip = read(write(tmp_path / f"clip{suffix}", video, fps=10))
    assert clip.video.shape == video.shape
    assert clip.fps == pytest.approx(10, rel=0.02)
    assert greys(clip.video) == pytest.approx(greys(video), abs=0.03)


@SLOW
@given(fps=st.one_of(st.integers(1, 60), st.sampled_from([23.976, 29.97, 59.94, 12.5])),
       suffix=st.sampled_from([".mp4", ".mkv", ".webm"]))
def test_each_frame_is_read_once_at_any_rate(tmp_path, fps, suffix):
    video = ramp(20)
    path = write(tmp_path / f"clip{suffix}", video, fps=fps)
    assert greys(read(path).video) == pytest.approx(greys(video), abs=0.03)
    middle = read(path, start=7 / fps, frames=5)
    assert greys(middle.video) == pytest.approx(greys(video[:, 7:12]), abs=0.03)


@SLOW
@given(kept=st.sets(st.integers(1, 40), min_size=2, max_size=15), fps=st.sampled_from([5, 10, 24, 30]))
def test_variable_frame_rate_is_read_by_time_stamps(tmp_path, kept, fps):
    times = [0, *sorted(kept)]
    path = encode(tmp_path / "vfr.mp4", [flat(6 * t) for t in times], times, options={"crf": "0"})
    seen = (read(path, fps=fps).video.mean((0, 2, 3)) + 1) * 127.5 / 6
    for i, value in enumerate(seen.tolist()):
        shown = max(t for t in times if t / 24 <= i / fps + 0.004)
        assert value == pytest.approx(shown, abs=0.5)
    assert len(seen) >= times[-1] / 24 * fps


def test_seeking_into_a_long_file_finds_the_frame(tmp_path):
    path = write(tmp_path / "long.mp4", ramp(200), fps=10)
    whole, part = read(path), read(path, start=15.0, seconds=1.0)
    assert part.video.shape[1] == 10
    assert torch.equal(part.video, whole.video[:, 150:160])


def test_resampling_and_fitting(tmp_path):
    path = write(tmp_path / "clip.mp4", ramp(16, 40, 60), fps=8)
    clip = read(path, fps=4, size=(24, 24))
    assert clip.video.shape == (3, 8, 24, 24) and clip.fps == 4
    assert greys(clip.video) == pytest.approx(greys(ramp(16))[::2], abs=0.03)
    assert read(path, fps=16, seconds=1).video.shape[1] == 16


def test_video_read_is_in_range_and_knows_its_source(tmp_path):
    path = write(tmp_path / "clip.mp4", torch.rand(3, 3, 16, 16) * 4 - 2)
    clip = read(path)
    assert clip.video.abs().max() <= 1 and clip.video.dtype == torch.float32
    assert clip.source == str(path)


def test_a_clip_is_written_as_it_was_read(tmp_path):
    """At its own rate, unless another is asked for; a tensor has none and plays at 8."""
    clip = read(write(tmp_path / "clip.mp4", ramp(5), fps=np.float32(12.5)))
    assert clip.fps == 12.5
    again = read(write(tmp_path / "again.mp4", clip))
    assert again.fps == 12.5 and greys(again.video) == pytest.approx(greys(clip.video), abs=0.03)
    assert read(write(tmp_path / "slow.mp4", clip, 5)).fps == 5
    assert read(write(tmp_path / "tensor.mp4", clip.video)).fps == 8


@pytest.mark.parametrize("suffix, fps", [(".mp4", 0.002), (".mp4", 1000), (".webm", 0.002), (".webm", 1000), (".mkv", 0.002),
                                         (".mkv", 1000), (".mov", 0.002), (".mov", 1000), (".gif", 0.002), (".gif", 100)])
def test_the_slowest_and_the_fastest_rate_come_back(tmp_path, suffix, fps):
    clip = read(write(tmp_path / f"clip{suffix}", ramp(5), fps))
    assert clip.video.shape[1] == 5 and clip.fps == pytest.approx(fps, rel=0.02)


# ---- difficult files, read right

def rotate(path: Path, turns: int) -> Path:
    """Write into an mp4's track header, as a phone does, that its picture is to be turned."""
    one, none = 0x00010000, 0
    cosine, sine = [(one, none), (none, one), (-one, none), (none, -one)][turns % 4]
    body = bytearray(path.read_bytes())
    at = body.find(b"tkhd") + 4 + 40                                # version 0: the matrix follows
    struct.pack_into(">9i", body, at, cosine, sine, 0, -sine, cosine, 0, 0, 0, 0x40000000)
    path.write_bytes(body)
    return path


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_is_honoured(tmp_path, turns):
    video = -torch.ones(3, 4, 32, 48)
    video[:, :, :8, :8] = 1                                         # a white upper left corner
    path = rotate(write(tmp_path / "phone.mp4", video), turns)
    upright = video.rot90(-turns, (2, 3))                           # the matrix turns clockwise
    back = read(path).video
    assert back.shape == upright.shape
    assert (back - upright).abs().mean() < 0.1
    assert (probe(path)["height"], probe(path)["width"]) == tuple(upright.shape[2:])


@pytest.mark.parametrize("codec, pix_fmt, suffix", [
    ("libx264", "yuv420p10le", ".mp4"), ("libx264", "yuv422p", ".mov"), ("ffv1", "yuv444p10le", ".mkv"),
    ("mpeg4", "yuv420p", ".avi"), ("ffv1", "gray", ".mkv"), ("mjpeg", "yuvj420p", ".avi")])
def test_deep_grey_and_old_formats(tmp_path, codec, pix_fmt, suffix):
    frames = [flat(v) for v in (20, 90, 160, 230)]
    path = encode(tmp_path / f"clip{suffix}", frames, [0, 1, 2, 3], codec=codec, pix_fmt=pix_fmt, rate=8)
    video = read(path).video
    assert video.shape == (3, 4, 32, 48)
    assert ((video.mean((0, 2, 3)) + 1) * 127.5).tolist() == pytest.approx([20, 90, 160, 230], abs=5)


def test_transparent_parts_are_black(tmp_path):
    picture = torch.full((32, 48, 4), 255, dtype=torch.uint8)
    picture[:, 24:, 3] = 0
    path = encode(tmp_path / "glass.mov", [picture] * 2, [0, 1], codec="png", pix_fmt="rgba", form="rgba")
    video = read(path).video
    assert video[..., :24].mean() > 0.98 and video[..., 24:].mean() < -0.98


def test_pixels_that_are_not_square(tmp_path):
    path = encode(tmp_path / "dvd.mp4", [flat(128)] * 2, [0, 1], aspect=Fraction(3, 2))
    assert read(path).video.shape == (3, 2, 32, 72)
    assert probe(path)["width"] == 72


def test_one_frame_is_a_picture(tmp_path):
    path = write(tmp_path / "still.mp4", ramp(1, 33, 47))
    assert read(path).video.shape == (3, 1, 33, 47)
    assert read(path, fps=8, frames=17).video.shape[1] == 1


@pytest.mark.parametrize("source, container, first", [("whole.webm", "webm", 0), ("whole.webm", "webm", 500),
                                                      ("whole.mp4", "matroska", 0), ("whole.mp4", "matroska", 500)])
def test_a_recording_whose_header_has_no_duration_is_as_long_as_its_packets(tmp_path, source, container, first):
    """As a browser or a camera writes it, to a pipe, which does not go back to fill in the header."""
    whole, live = write(tmp_path / source, ramp(80), fps=8), tmp_path / "live.webm"
    with av.open(str(whole)) as made, live.open("wb") as file, \
            av.open(SimpleNamespace(write=file.write), "w", format=container) as out:
        stream = out.add_stream_from_template(made.streams.video[0])
        for packet in made.demux():
            if packet.dts is not None:
                packet.pts, packet.dts = (t + round(first / packet.time_base) for t in (packet.pts, packet.dts))
                packet.stream = stream
                out.mux(packet)
    with av.open(str(live)) as made:
        assert not made.duration and not made.streams.video[0].duration
    assert probe(live) == probe(whole) == dict(width=16, height=16, fps=8, seconds=10)
    assert torch.equal(read(live, start=5, frames=9).video, read(whole, start=5, frames=9).video)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_probing_an_ordinary_file_reads_no_further_than_its_first_frame(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(video_module, "_times", None)
    assert probe(write(tmp_path / f"clip{suffix}", ramp(16), fps=8))["seconds"] == pytest.approx(2, abs=0.05)


def test_truncated_file_is_read_as_far_as_it_goes_with_a_warning(tmp_path):
    path = encode(tmp_path / "cut.mkv", [torch.randint(0, 255, (32, 48, 3), dtype=torch.uint8)
                                         for _ in range(48)], list(range(48)), codec="mjpeg", pix_fmt="yuvj420p")
    whole = read(path).video
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = read(path).video
    assert 10 < part.shape[1] < 40
    assert torch.equal(part[:, :10], whole[:, :10])


def test_mp4_that_breaks_off_warns(tmp_path):
    path = write(tmp_path / "whole.mp4", torch.rand(3, 40, 32, 32) * 2 - 1)
    body = path.read_bytes()
    head, moov = body.find(b"mdat") - 4, body.find(b"moov") - 4
    size, = struct.unpack_from(">I", body, head)
    broken = bytearray(body)                                       # silence the second half of the data
    broken[head + size // 2:head + size] = bytes(size - size // 2)
    assert moov > head
    path.write_bytes(broken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            part = read(path).video.shape[1]
        except ValueError as error:
            assert "whole.mp4" in str(error)
        else:
            assert part == 40 or any("whole.mp4" in str(w.message) for w in said)


# ---- refusals

def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), "fltp", "mono")
        silence.sample_rate, silence.pts = 16000, 0
        for frame in (silence, None):
            out.mux(stream.encode(frame))
    return path


@pytest.mark.parametrize("function", [read, probe])
def test_refusals_name_the_file_and_the_reason(tmp_path, function):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "letter.mp4").write_text("Dear reader, this is not a video.")
    (tmp_path / "noise.webm").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "luck.webm").write_bytes(random.Random(131).randbytes(5000))       # FFmpeg finds a container here, of nothing
    sound_only(tmp_path / "song.mp4")
    for name, reason, kind in (("empty.mp4", "empty", ValueError), ("letter.mp4", "not a video", ValueError),
                               ("noise.webm", "not a video", ValueError), ("luck.webm", "not a video", ValueError),
                               ("song.mp4", "sound only", ValueError),
                               ("lost.mp4", "no video file", FileNotFoundError),
                               (".", "no video file", FileNotFoundError)):
        with pytest.raises(kind, match=reason) as caught:
            function(tmp_path / name)
        assert name.strip(".") in str(caught.value)


def test_reading_past_the_end_is_said(tmp_path):
    path = write(tmp_path / "short.mp4", ramp(8), fps=8)
    with pytest.raises(ValueError, match="short.mp4 ends at second 1.00"):
        read(path, start=5)


@pytest.mark.parametrize("options", [dict(start=-1), dict(seconds=0), dict(fps=0), dict(frames=0),
                                     dict(size=(0, 10)), dict(size=(10, -5))])
def test_impossible_requests(tmp_path, options):
    with pytest.raises(ValueError, match="above 0"):
        read(tmp_path / "any.mp4", **options)


@pytest.mark.parametrize("size", [64, (64,), (3, 64, 64), "64"])
def test_a_size_that_is_no_height_and_width(tmp_path, size):
    with pytest.raises(ValueError, match=r"any.mp4: size is \(height, width\)"):
        read(tmp_path / "any.mp4", size=size)


@pytest.mark.parametrize("name, shape, fps", [("a.mp4", (3, 0, 8, 8), 8), ("a.mp4", (1, 2, 8, 8), 8),
                                              ("a.mp4", (2, 3, 4, 8, 8), 8), ("a.mp4", (3, 2, 8, 8), 0),
                                              ("a.xyz", (3, 2, 8, 8), 8), ("a.mp4", (3, 2, 8, 8), 1001),
                                              ("a.mp4", (3, 2, 8, 8), 0.0003), ("a.gif", (3, 2, 8, 8), 101)])
def test_what_cannot_be_written(tmp_path, name, shape, fps):
    with pytest.raises(ValueError, match="write needs a video|choose .mp4, .*an fps from 0.002 to 1000"):
        write(tmp_path / name, torch.zeros(shape), fps)
    with pytest.raises(ValueError, match="write needs a video|choose .mp4, .*an fps from 0.002 to 1000"):
        write(tmp_path / name, Clip(torch.zeros(shape), 8), fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quality", [-1, 52, 18.5, "good", None])
def test_a_quality_that_is_none_is_refused(tmp_path, quality):
    with pytest.raises(ValueError, match=r"a.mp4 .*a whole number from 0 \(best\) to 51"):
        write(tmp_path / "a.mp4", ramp(2), quality=quality)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing_half_made(tmp_path):
    """A real failing write: the system lets no file of this process grow beyond 1000 bytes."""
    path = write(tmp_path / "clip.mp4", ramp(3))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="could not write .*clip.mp4.*free some space") as caught:
            write(path, torch.rand(3, 8, 32, 32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_atomic_writing_cleans_up_after_any_error(tmp_path):
    def half(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "thing.json", half)
    assert not list(tmp_path.iterdir())


# ---- sizes and showing

@SLOW
@given(h=st.integers(1, 50), w=st.integers(1, 50), height=st.integers(1, 40), width=st.integers(1, 40))
def test_cover_gives_the_size_and_keeps_flat_colour(h, w, height, width):
    frames = torch.full((2, 3, h, w), 77, dtype=torch.uint8)
    out = cover(frames, height, width)
    assert out.shape == (2, 3, height, width) and (out == 77).all()


@pytest.fixture
def pages(monkeypatch):
    """What `show` displays, as strings."""
    import IPython.display

    seen = []
    monkeypatch.setattr(IPython.display, "display", lambda page: seen.append(page.data))
    return seen


@pytest.mark.parametrize("codec, tag", [("h264", "<video"), ("gif", "<img")])
def test_show_keeps_each_clip_and_its_title(pages, codec, tag):
    clips = [Clip(ramp(3, 15, 17), 8, "same <title>")] * 3 + [ramp(1, 9, 9)]
    show(clips, [c.caption if isinstance(c, Clip) else "still" for c in clips], codec=codec)
    assert pages[0].count(tag) == 4 and pages[0].count("same &lt;title&gt;") == 3


def test_show_takes_one_clip_one_tensor_or_a_batch(pages):
    batch = torch.stack([ramp(2)] * 3)
    for videos, many in ((Clip(ramp(2), 8, "alone"), 1), (ramp(2), 1), (batch, 3), (iter([ramp(2)] * 2), 2)):
        show(videos)
        assert pages[-1].count("<video") == many
    assert "alone" in pages[0]


def test_show_stays_on_its_diet_and_says_so(pages):
    noise = [torch.rand(3, 24, 96, 96) * 2 - 1 for _ in range(6)]
    show(noise)
    assert len(pages[0]) <= 150_000 and "to keep this page light" in pages[0]
    show([ramp(17, 64, 64)])
    assert len(pages[1]) < 20_000 and "light" not in pages[1]


def test_show_refuses(pages):
    with pytest.raises(ValueError, match="h264 or gif"):
        show([ramp(2)], codec="mpeg2")
    for nothing in ([], torch.zeros(0, 3, 2, 8, 8)):
        with pytest.raises(ValueError, match="nothing to show"):
            show(nothing)
    with pytest.raises(ValueError, match="show fewer"):
        show([torch.rand(3, 4, 16, 16)], budget=300)
    for odd in (torch.zeros(3, 8, 8), [torch.zeros(2, 3, 2, 8, 8)], [torch.zeros(1, 2, 8, 8)], [torch.zeros(3, 0, 8, 8)]):
        with pytest.raises(ValueError, match=r"\[3, T, H, W\]"):
            show(odd)
    with pytest.raises(ValueError, match="1 titles for 2 clips"):
        show([ramp(2), ramp(2)], titles=["one"])
    for none in (dict(columns=0), dict(size=0)):
        with pytest.raises(ValueError, match="columns and size must be at least 1"):
            show([ramp(2)], **none)
    assert not pages


# ---- a real file

CLIPS = os.environ.get("SORA_LITE_REAL_CLIPS")


@pytest.mark.skipif(not CLIPS, reason="SORA_LITE_REAL_CLIPS names no folder of real clips")
def test_real_clips():
    paths = [p for p in sorted(Path(CLIPS).iterdir()) if p.suffix == ".mp4"]
    assert paths
    for path in paths:
        about = probe(path)
        clip = read(path, start=about["seconds"] / 2, frames=9, fps=8, size=(64, 96))
        assert clip.video.shape[0] == 3 and clip.video.shape[2:] == (64, 96)
        assert 1 <= clip.video.shape[1] <= 9 and clip.video.std() > 0.02
        native = read(path, frames=2)
        assert native.video.shape[2:] == (about["height"], about["width"])
        assert native.fps == pytest.approx(about["fps"])


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not write .*clip.mp4.*choose another place"):
        write(tmp_path / "file" / "clip.mp4", ramp(3))
    assert (tmp_path / "file").read_text() == "in the way"
