"""Verbs upon a mask: what is given stays to the bit, shapes are right, frames stand where they should, errors are sentences."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite import edit
from sora_lite.dit import DiT
from sora_lite.edit import (animate, behind_still, between, box, crossfade, extend, feather, fill, frame_steps, inpaint,
                            interpolate, loop, outpaint, pixels_of, recoded, ring, seam, settle, steered, take,
                            tokens_of, window)
from sora_lite.pipeline import Denoiser, SoraLite
from sora_lite.shapes import Shapes, vocabulary
from sora_lite.text import TextEncoder
from sora_lite.vae import VideoVAE
from sora_lite.video import Clip, write

PROMPT = "a red circle moves right"


def lively(module):
    """Weights that start at zero would hide a wrong path: draw them all."""
    for p in module.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return module.eval()


def make_pipe():
    torch.manual_seed(0)
    vae = lively(VideoVAE(channels=4, widths=(16, 24), encoder=(1, 1), decoder=(1, 1)))
    text = TextEncoder(vocabulary(), width=32, depth=1, heads=2)
    model = lively(Denoiser(text, DiT(channels=16, width=32, depth=1, heads=2, words_width=32, conv_depth=0)))
    return SoraLite(vae, model.text, model.dit, defaults=dict(height=32, width=32, num_inference_steps=2))


PIPE = make_pipe()


def clip(frames=17, height=32, width=32, n=1, seed=0):
    return torch.rand(n, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# masks

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 2), st.integers(1, 3), st.integers(0, 10_000), st.floats(0.1, 1.0),
       st.sampled_from([1.0, 2.0]), st.sampled_from(["euler", "heun", "multistep"]))
def test_given_tokens_come_back_to_the_bit_and_the_rest_is_made(t, h, w, seed, strong, scale, solver):
    g = seeded(seed)
    latents = torch.randn(2, 4, t, 2 * h, 2 * w, generator=g)
    levels = torch.where(torch.rand(2, t, h, w, generator=g) < 0.6, 0.0, strong)
    levels[:, -1, -1, -1] = strong                                # never all given
    out = fill(PIPE, latents, levels, PROMPT, generator=g, given_scale=scale, solver=solver)
    held = (levels == 0).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None].expand_as(latents)
    assert out.shape == latents.shape and out.isfinite().all()
    assert torch.equal(out[held], latents[held])
    assert (out[~held] != latents[~held]).float().mean() > 0.99


def test_strengths_broadcast_and_bad_ones_are_named(generator):
    latents = torch.randn(2, 4, 3, 4, 4, generator=generator)
    for levels in (0.5, torch.tensor([0.0, 1.0, 1.0])[:, None, None], torch.ones(2, 3, 2, 2)):
        assert fill(PIPE, latents, levels, PROMPT, generator=generator).shape == latents.shape
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 0 to 2"):
        fill(PIPE, latents, torch.tensor([0.0, 1.0, 2.0])[:, None, None], PROMPT)
    with pytest.raises(ValueError, match="do not fit 2 clips of"):
        fill(PIPE, latents, torch.ones(4, 2, 2), PROMPT)
    with pytest.raises(ValueError, match="nothing to make"):
        fill(PIPE, latents, 0.0, PROMPT)
    one_given = torch.ones(2, 3, 2, 2)
    one_given[1] = 0
    with pytest.raises(ValueError, match="nothing to make"):
        fill(PIPE, latents, one_given, PROMPT)


def test_a_low_strength_changes_little_and_a_high_one_much(generator):
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    noise = torch.randn(1, 12, 16, generator=generator)
    near, far = ((fill(PIPE, latents, s, PROMPT, noise=noise) - latents).norm() for s in (0.05, 1.0))
    assert near < 0.3 * far


def test_levels_the_model_sees_are_strengths_times_the_schedule(generator):
    latents, seen = torch.randn(1, 4, 3, 4, 4, generator=generator), []
    levels = torch.tensor([0.0, 0.5, 1.0])[:, None, None]

    def predict(x, t):
        seen.append(t.view(3, 4))
        return torch.zeros_like(x)

    fill(PIPE, latents, levels, PROMPT, predict=predict, num_inference_steps=4)
    assert len(seen) == 4 and torch.allclose(seen[0][:, 0], torch.tensor([0.0, 0.5, 1.0]))
    for t in seen:
        assert (t[0] == 0).all() and torch.allclose(t[1], t[2] / 2)


def test_guidance_for_the_given_asks_with_it_and_without(generator):
    x0, noise = torch.randn(1, 6, 2, generator=generator), torch.randn(1, 6, 2, generator=generator)
    held = torch.tensor([[True, True, False, False, False, False]])
    asked = []

    def predict(x, t):
        asked.append((x, t))
        return x

    x, t = torch.where(held[..., None], x0, noise), torch.where(held, 0.0, 0.7)
    said = steered(predict, x0, noise, held, 3.0)(x, t)
    (with_x, with_t), (without_x, without_t) = asked
    assert torch.equal(with_x, x) and torch.equal(with_t, t) and (without_t == 0.7).all()
    loose = 0.3 * x0 + 0.7 * noise
    assert torch.allclose(without_x[held], loose[held], atol=1e-6) and torch.equal(without_x[~held], x[~held])
    assert torch.allclose(said, without_x + 3 * (x - without_x), atol=1e-5)
    assert torch.allclose(steered(predict, x0, noise, held, 1.0)(x, t), x, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10_000))
def test_regions_are_rounded_up_to_tokens(t, h, w, seed):
    tokens = torch.rand(2, t, h, w, generator=seeded(seed)) < 0.5
    pixels = pixels_of(PIPE, tokens)
    assert pixels.shape == (2, 1 + 4 * (t - 1), 16 * h, 16 * w)
    assert torch.equal(tokens_of(PIPE, pixels), tokens)
    region = torch.rand(pixels.shape, generator=seeded(seed)) < 0.001
    assert (pixels_of(PIPE, tokens_of(PIPE, region)) >= region).all()


def test_a_token_holds_one_picture_at_first_and_then_four():
    for frame, token in ((0, 0), (1, 1), (4, 1), (5, 2), (16, 4)):
        region = torch.zeros(17, 32, 32, dtype=torch.bool)
        region[frame, 20, 3] = True
        assert tokens_of(PIPE, region).nonzero().tolist() == [[token, 1, 0]]


def test_feathers_rise_inside_and_are_nothing_outside():
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[:, 4:, 4:] = True
    weight = feather(region, 2)
    assert (weight[~region] == 0).all() and (weight[:, 6:, 6:] > 0.999).all()       # frame's own rim is no rim
    assert ((0 < weight[:, 4, 8:]) & (weight[:, 4, 8:] < 1)).all()
    assert torch.equal(feather(region, 0), region.float())


# what can be given

def test_anything_that_fits_is_taken_as_it_is():
    video = clip(9)
    for source in (video, video[0], Clip(video[0], 8)):
        assert torch.equal(take(PIPE, source), video)
    assert torch.equal(take(PIPE, video[0, :, 0]), video[:, :, :1])
    assert take(PIPE, clip(6), any_length=True).shape[2] == 6
    assert take(PIPE, clip(5, 48, 16, n=3)).shape == (3, 3, 5, 48, 16)


@pytest.mark.parametrize("source,said", [
    (torch.zeros(3, 16, 32, 32), "17 frames of 32 x 32"), (torch.zeros(3, 17, 30, 32), "17 frames of 32 x 32"),
    (torch.zeros(3, 17, 24, 32), "16a x 16b .* 17 frames of 32 x 32"), (torch.zeros(4, 17, 32, 32), r"got \[4, 17, 32, 32\]"),
    (torch.zeros(32, 32), r"\[3, H, W\]"), (torch.zeros(3, 0, 32, 32), "got"), ([1, 2], "not a list"),
    (torch.full((3, 32, 32), 255.0), "divide bytes by 127.5"), (torch.full((3, 32, 32), torch.nan), r"\[-1, 1\]")])
def test_what_does_not_fit_is_refused_with_a_sentence(source, said):
    with pytest.raises(ValueError, match=said):
        take(PIPE, source)


def test_files_are_made_to_fit(tmp_path):
    path = write(tmp_path / "mine.mp4", clip(40, 50, 90)[0], fps=16)
    with pytest.warns(UserWarning, match="mine.mp4 is longer than the 17 frames"):
        assert take(PIPE, path).shape == (1, 3, 17, 32, 32)              # 40 frames at 16 are 20 at 8, of which 17
    assert take(PIPE, str(path), frames=7).shape[2] == 5
    assert take(PIPE, path, frames=7, any_length=True).shape[2] == 7
    assert take(PIPE, path, size=(16, 48), frames=17).shape[3:] == (16, 48)
    short = write(tmp_path / "one.mp4", clip(1, 50, 90)[0], fps=8)
    assert take(PIPE, short).shape[2] == 1
    with pytest.raises(ValueError, match="1 frames of 40 x 40 do not fit. The nearest size that does: 1 frames of 32 x 32"):
        take(PIPE, path, size=(40, 40))
    with pytest.raises(FileNotFoundError, match="no video file"):
        take(PIPE, tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_file_can_be_animated(tmp_path, suffix):
    pil = pytest.importorskip("PIL.Image", reason="Pillow writes the picture")
    pil.new("RGB", (80, 60), (255, 0, 0)).save(tmp_path / f"red.{suffix}")
    out = animate(PIPE, tmp_path / f"red.{suffix}", PROMPT, frames=5, generator=seeded())
    assert out.shape == (1, 3, 5, 32, 32)


# verbs in time

def test_a_clip_behind_a_still_fits_where_a_longer_one_has_its_end():
    still = clip(1).expand(-1, -1, 13, -1, -1)
    whole = PIPE.vae.encode(still)
    assert torch.allclose(behind_still(PIPE.vae, still[:, :, :5]), whole[:, :, 3:], atol=1e-4)   # for a still it is exact
    assert behind_still(PIPE.vae, clip(9)).shape == (1, 4, 2, 4, 4)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 5, 9, 17]), st.sampled_from([0, 5, 9, 17]), st.integers(1, 5), st.integers(0, 3))
def test_windows_are_whole_and_the_made_is_where_it_should_be(first, last, k, context):
    both = last > 0
    a, b = clip(first), clip(last, seed=1) if both else None
    frames = 4 * k - both
    latents, strength, start = window(PIPE, a, b, frames, context or None)
    assert latents.shape[2] == len(strength) and strength[0] == 0
    made = strength.flatten().nonzero()[:, 0]
    assert len(made) == k and made.diff().eq(1).all()
    assert start == 1 + 4 * (int(made[0]) - 1)                            # the first frame of the first made four
    assert not both or strength[-1] == 0
    if not context and len(strength) > 5:                                 # longer than the weights know: only if it must be
        assert len(strength) == k + 1 + both


def test_a_window_before_a_clip_ends_in_its_frames_without_the_first():
    latents, strength, start = window(PIPE, None, clip(9), 8)
    assert start == 0 and strength.flatten().tolist() == [1, 1, 1, 0, 0]
    assert torch.equal(latents[:, :, 3:], behind_still(PIPE.vae, clip(9)))


def test_numbers_of_frames_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="4k, the nearest is 8"):
        window(PIPE, clip(5), None, 7)
    with pytest.raises(ValueError, match="4k - 1, the nearest is 7"):
        window(PIPE, clip(5), clip(5), 8)
    with pytest.raises(ValueError, match="nearest is 4"):
        extend(PIPE, clip(5), PROMPT, after=-3)
    with pytest.raises(ValueError, match="at least 5 frames, got 1"):
        extend(PIPE, clip(1), PROMPT, before=4)
    with pytest.raises(ValueError, match="before or after"):
        extend(PIPE, clip(5), PROMPT)
    with pytest.raises(ValueError, match="of one size"):
        window(PIPE, clip(5), clip(5, 32, 48), 7)
    with pytest.raises(ValueError, match="give a clip"):
        window(PIPE, None, None, 4)
    with pytest.raises(ValueError, match="2 videos and 3 prompts"):
        extend(PIPE, clip(5, n=2), [PROMPT] * 3, after=4)
    with pytest.raises(ValueError, match="one picture, got 5 frames"):
        animate(PIPE, clip(5), PROMPT)
    with pytest.raises(ValueError, match="16 frames of .* do not fit. The nearest size that does: 17 frames"):
        animate(PIPE, clip(1), PROMPT, frames=16)
    with pytest.raises(ValueError, match="more than one frame"):
        animate(PIPE, clip(1), PROMPT, frames=1)
    with pytest.raises(ValueError, match="at most 1, or a larger context"):
        loop(PIPE, clip(17), PROMPT, blend=3, context=1)
    with pytest.raises(ValueError, match="never saw the word"):
        animate(PIPE, clip(1), "a crimson disc", generator=seeded())


@pytest.mark.parametrize("frames,before,after", [(1, 0, 4), (9, 0, 8), (9, 8, 0), (5, 4, 12), (17, 8, 8)])
def test_extended_clips_hold_the_given_as_the_autoencoder_gives_it(frames, before, after):
    video = clip(frames, n=2)
    out = extend(PIPE, video, PROMPT, before=before, after=after, generator=seeded())
    assert out.shape == (2, 3, before + frames + after, 32, 32) and out.isfinite().all()
    assert torch.equal(out[:, :, before:before + frames], recoded(PIPE, video))


def test_what_follows_a_given_clip_depends_on_it_and_on_the_noise():
    a, b = clip(9), clip(9, seed=1)
    make = lambda video, seed: extend(PIPE, video, PROMPT, after=4, generator=seeded(seed))[:, :, 9:]
    assert torch.equal(make(a, 0), make(a, 0))
    assert (make(a, 0) - make(b, 0)).abs().mean() > 1e-3 < (make(a, 0) - make(a, 1)).abs().mean()


def test_one_clip_and_several_prompts_make_several_videos():
    prompts = [PROMPT, "a blue star", None]
    out = extend(PIPE, clip(5), prompts, before=4, generator=seeded())
    assert out.shape[0] == 3 and torch.allclose(out[0, :, 4:], out[2, :, 4:], atol=1e-5)
    assert (out[0, :, :4] - out[1, :, :4]).abs().max() > 1e-3


def test_blends_touch_the_frames_they_name_and_no_others():
    video = clip(17)
    hard, soft = (extend(PIPE, video, PROMPT, after=8, blend=n, generator=seeded()) for n in (0, 2))
    changed = (hard - soft).abs().amax((0, 1, 3, 4)) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [15, 16] and hard.shape == soft.shape


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4))
def test_crossfades_go_over_evenly(a, b, n):
    n = min(a, b, n)
    out = crossfade(torch.zeros(1, 3, a, 2, 2), torch.ones(1, 3, b, 2, 2), n)
    level = out[0, 0, :, 0, 0]
    assert len(level) == a + b - n and (level.diff() >= 0).all()
    assert torch.allclose(level[a - n:a], torch.linspace(0, 1, n + 2)[1:-1])


@pytest.mark.parametrize("frames", [3, 7, 11])
@pytest.mark.parametrize("blend", [0, 1])
def test_loops_hold_the_clip_and_close(frames, blend):
    video = clip(9)
    out = loop(PIPE, video, PROMPT, frames=frames, blend=blend, generator=seeded())
    assert out.shape[2] == 9 + frames
    assert torch.equal(out[:, :, blend:9 - blend], recoded(PIPE, video)[:, :, blend:9 - blend])


def test_settling_is_a_mean_of_answers_whose_latent_frames_begin_elsewhere(monkeypatch):
    asked, video = [], clip(17)

    def answer(pipe, latents, strength, prompt, **how):
        assert how["num_inference_steps"] == 1 and how["noise"] is None
        asked.append((strength / 0.4).flatten().round().int().tolist())
        return latents + len(asked)

    monkeypatch.setattr(edit, "fill", answer)
    out = settle(PIPE, video, range(5, 12), PROMPT, noise=torch.zeros(1))
    # one, two, three frames ahead: which latent frames hold one of the frames 5 to 11
    assert asked == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]
    own = []
    for shift in (1, 2, 3):
        longer = torch.cat([video[:, :, :1]] * shift + [video] + [video[:, :, -1:]] * (4 - shift), 2)
        own.append(PIPE.vae.decode(PIPE.vae.encode(longer) + shift)[:, :, shift:shift + 17])
    assert torch.allclose(out, torch.stack(own).mean(0), atol=1e-5)


def test_settling_asks_for_predictions_that_fit_each_window():
    grids = []
    prepare = lambda strength: grids.append(len(strength)) or {}
    out = between(PIPE, clip(9), clip(9), 7, PROMPT, smooth=True, prepare=prepare, generator=seeded())
    assert grids == [5, 6, 6, 6] and out.shape[2] == 7            # the window, then with one, two, three frames ahead


def test_steps_and_seams_are_those_that_are_there():
    level = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.6, 0.5, 0.4, 0.2, 0.1])           # steps 1 1 1 3 1 1 2 1, and 1 back
    video = level.view(1, 1, -1, 1, 1).expand(2, 3, -1, 4, 4)
    assert torch.allclose(frame_steps(video)[0], torch.tensor([0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.2, 0.1]), atol=1e-6)
    assert torch.allclose(frame_steps(video, closed=True)[1, -1], torch.tensor(0.1), atol=1e-6)
    assert torch.allclose(seam(video, 4, 0), torch.tensor([3.0, 3.0]), atol=1e-4)       # from frame 3 to 4
    assert torch.allclose(seam(video, 7, 0), torch.tensor([2.0, 2.0]), atol=1e-4)
    assert torch.allclose(seam(video, 6, 0), torch.tensor([1.0, 1.0]), atol=1e-4)
    assert torch.allclose(seam(video, 6, 2), torch.tensor([3.0, 3.0]), atol=1e-4)       # two frames further in, too


def test_of_several_candidates_the_one_with_the_smallest_seam_is_kept():
    video = clip(9, n=2)
    all_six = loop(PIPE, video.repeat_interleave(3, 0), PROMPT, frames=7, blend=1, candidates=1, generator=seeded(1))
    best = loop(PIPE, video, PROMPT, frames=7, blend=1, candidates=3, generator=seeded(1))
    seams = seam(all_six, 9, 1).view(2, 3)
    assert seams.std(1).min() > 0 and seams.argmin(1).any()       # they differ, and the first is not always the best
    assert torch.allclose(best, all_six.unflatten(0, (2, 3))[torch.arange(2), seams.argmin(1)], atol=1e-5)
    with pytest.raises(ValueError, match="at least 1 candidate, got 0"):
        loop(PIPE, video, PROMPT, candidates=0)


def test_a_ring_blends_both_joins():
    given_clip, way = torch.zeros(1, 3, 5, 2, 2), torch.ones(1, 3, 7, 2, 2)       # 2 frames of margin at each end
    level = ring(given_clip, way, 2)[0, 0, :, 0, 0]
    assert len(level) == 8
    assert torch.allclose(level, torch.tensor([2 / 3, 1 / 3, 0, 1 / 3, 2 / 3, 1, 1, 1]))


def test_between_two_clips_both_matter():
    a, b, c = clip(5), clip(5, seed=1), clip(5, seed=2)
    make = lambda first, last: between(PIPE, first, last, 7, PROMPT, generator=seeded())
    assert make(a, b).shape == (1, 3, 7, 32, 32)
    assert (make(a, b) - make(c, b)).abs().max() > 1e-3 < (make(a, b) - make(a, c)).abs().max()


# regions

def test_outside_of_a_region_nothing_changes():
    video = clip(9, n=2)
    out = inpaint(PIPE, video, PROMPT, corners=(2, 2, 14, 30), frames=(5, 9), generator=seeded())
    tokens = tokens_of(PIPE, box(video, (2, 2, 14, 30), (5, 9)))
    assert tokens.nonzero().tolist() == [[2, 0, 0], [2, 0, 1]]
    inside = pixels_of(PIPE, tokens)
    assert torch.equal(out[:, :, ~inside], recoded(PIPE, video)[:, :, ~inside])
    assert (out - recoded(PIPE, video))[:, :, inside].abs().mean() > 1e-2


def test_each_clip_may_have_its_own_region():
    video = clip(5, n=2)
    region = torch.zeros(2, 5, 32, 32, dtype=torch.bool)
    region[0, :, :16, :16] = region[1, :, 16:, 16:] = True
    out, before = inpaint(PIPE, video, PROMPT, region=region, blend=0, generator=seeded()), recoded(PIPE, video)
    for i in range(2):
        assert torch.equal(out[i][:, ~region[i]], before[i][:, ~region[i]])
        assert (out[i] - before[i])[:, region[i]].abs().mean() > 1e-2


@pytest.mark.parametrize("corners,frames", [((0, 0, 0, 5), None), ((0, 0, 33, 5), None), ((8, 8, 4, 9), None), (None, (5, 5))])
def test_boxes_that_are_none_are_refused(corners, frames):
    with pytest.raises(ValueError, match="empty or leaves the clip of 5 frames of 32 x 32"):
        inpaint(PIPE, clip(5), PROMPT, corners=corners, frames=frames)
    with pytest.raises(ValueError, match="does not fit"):
        inpaint(PIPE, clip(5), PROMPT, region=torch.zeros(5, 32, 32))
    with pytest.raises(ValueError, match="does not fit"):
        inpaint(PIPE, clip(5), PROMPT, region=torch.ones(4, 32, 32))


def test_a_canvas_holds_the_clip_where_it_was_laid():
    video = clip(5)
    for place, corner in ((dict(width=64), (0, 16)), (dict(height=48, width=48, top=16, left=0), (16, 0))):
        out = outpaint(PIPE, video, PROMPT, generator=seeded(), **place)
        top, left = corner
        canvas = torch.nn.functional.pad(video, (left, out.shape[4] - 32 - left, top, out.shape[3] - 32 - top, 0, 0),
                                         mode="replicate")
        part = (..., slice(top, top + 32), slice(left, left + 32))
        assert torch.equal(out[part], recoded(PIPE, canvas)[part])
    for place in (dict(width=32), dict(width=16), dict(width=64, left=8), dict(width=64, left=48)):
        with pytest.raises(ValueError, match="multiples of 16"):
            outpaint(PIPE, video, PROMPT, **place)


# between frames

@pytest.mark.parametrize("frames,factor", [(2, 4), (5, 2), (3, 8), (5, 4)])
def test_frames_between_frames(frames, factor):
    video = clip(frames)
    out = interpolate(PIPE, video, PROMPT, factor=factor, generator=seeded())
    total = 1 + factor * (frames - 1)
    assert out.shape[2] == total
    draft = torch.nn.functional.interpolate(video, (total, 32, 32), mode="trilinear", align_corners=True)
    assert torch.allclose(draft[:, :, ::factor], video, atol=1e-5)
    assert torch.equal(out[:, :, ::factor], recoded(PIPE, draft)[:, :, ::factor])
    assert (out - recoded(PIPE, draft)).abs().max() > 1e-2


def test_a_file_is_extended_at_its_end_and_looped_as_a_whole(tmp_path):
    path = write(tmp_path / "long.mp4", clip(33, 32, 32)[0], fps=8)
    whole = take(PIPE, path, frames=math.inf)
    assert whole.shape[2] == 33
    options = dict(num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    out = extend(PIPE, path, PROMPT, after=4, **options)
    options["generator"].manual_seed(0)
    assert torch.equal(out, extend(PIPE, whole, PROMPT, after=4, **options)) and out.shape[2] == 37
    assert loop(PIPE, path, PROMPT, frames=7, candidates=1, num_inference_steps=1).shape[2] == 40


def test_frames_that_cannot_be_put_between_are_refused():
    with pytest.raises(ValueError, match="there must be two"):
        interpolate(PIPE, clip(1), PROMPT)
    with pytest.raises(ValueError, match="factor of at least 2"):
        interpolate(PIPE, clip(5), PROMPT, factor=1)
    with pytest.raises(ValueError, match="nearest size that does: 5 frames"):
        interpolate(PIPE, clip(2), PROMPT, factor=3)


def test_every_name_that_chapter_9_exports_is_covered():
    public = {name for name in edit.__all__} - {"Source", "paired"}
    assert public <= set(globals())


# the studio

def test_a_button_makes_what_the_menu_says(monkeypatch, tmp_path, capsys):
    pytest.importorskip("ipywidgets", reason="ipywidgets is optional and not installed")
    import IPython.display
    from sora_lite import studio
    shown, said, made = [], [], []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.setattr(studio, "show", lambda videos, titles, **_: (made.append(videos), said.append(titles)))
    pipe = make_pipe()
    pipe.defaults |= dict(height=64, width=64, num_inference_steps=1)
    studio.studio(pipe)
    verb, file, prompt, noise, button, out = shown[0].children
    for name, frames in zip(studio.WAYS, (17, 25, 25, 33, 28, 17, 17, 17), strict=True):
        verb.value = name
        button.click()
        assert said[-1][1].startswith(f"{name}: a ") and made[-1][1].shape[1] == frames
    count = len(made)
    file.value = str(tmp_path / "none.mp4")
    button.click()
    assert len(made) == count                                             # a sentence, and no clip
    file.value = str(write(tmp_path / "mine.mp4", clip(9, 40, 40)[0]))
    button.click()
    assert len(made) == count                                             # a file has no caption: a prompt is needed
    prompt.value, verb.value = PROMPT, "loop"
    button.click()
    assert len(made) == count + 1 and made[-1][1].shape == (3, 20, 64, 64)


def test_given_frames_are_marked():
    from sora_lite.studio import marked
    video = torch.zeros(3, 5, 32, 32)
    out = marked(video, [0, 3])
    assert out.shape[2] > 32 and torch.equal(out[:, :, :32], video)
    bar = out[:, :, 32:]
    assert (bar[:, [1, 2, 4]] == 1).all() and (bar[2, [0, 3]] < 0).all() and (bar[0, [0, 3]] > 0.5).all()
    assert (marked(video, [])[:, :, 32:] == 1).all()
