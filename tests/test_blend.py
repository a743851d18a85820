"""Videos as prompts: inversion undoes sampling, blends mix, connected clips keep their ends, errors are sentences."""
import math

import pytest
import torch

from sora_lite import blend
from sora_lite.blend import (MORE_WAYS, blended, connect, frames_to_dissolve, invert, largest_step, sdedit, slerp,
                             to_and_fro)
from sora_lite.diffusion import Flow, mix
from sora_lite.edit import crossfade, frame_steps, recoded
from sora_lite.patches import patchify
from test_edit import PIPE, PROMPT, clip, seeded

OTHER = "a blue star stays still"


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inversion_finds_the_noise_that_was(strength, monkeypatch):
    """A flow with a known solution: every point runs straight towards a fixed picture."""
    target = torch.randn(1, 12, 16, generator=seeded(1))
    monkeypatch.setattr(PIPE, "predictor", lambda *_, **__: lambda x, t: (x - target) * 0.5)
    latents = torch.randn(1, 4, 3, 4, 4, generator=seeded(2))
    noise = invert(PIPE, latents, [PROMPT], strength, num_inference_steps=200)
    tokens, _ = patchify(latents, PIPE.patch)
    arrived = target + (tokens - target) * math.exp(0.5 * strength)          # dx/dt = (x - target) / 2
    assert torch.allclose(mix(Flow(), tokens, noise, torch.full((1, 12), strength)), arrived, atol=1e-2)


def test_up_and_down_again_gives_the_clip_back():
    video = clip(5)
    coded = recoded(PIPE, video)
    how = dict(strength=1.0, source_prompt=PROMPT, guidance_scale=1.0)
    error = [float((sdedit(PIPE, video, PROMPT, num_inference_steps=n, **how) - coded).abs().mean()) for n in (8, 64)]
    fresh = sdedit(PIPE, video, PROMPT, strength=1.0, guidance_scale=1.0, num_inference_steps=64, generator=seeded())
    assert error[1] < 0.5 * error[0] and error[1] < 0.2 * float((fresh - coded).abs().mean())


def test_a_weaker_edit_stays_nearer():
    video = clip(5)
    coded = recoded(PIPE, video)
    gaps = [float((sdedit(PIPE, video, OTHER, strength=s, generator=seeded()) - coded).abs().mean()) for s in (0.05, 0.4, 1.0)]
    assert gaps[0] < gaps[1] < gaps[2]


def test_inversion_replaces_the_noise_of_the_generator():
    video = clip(5)
    make = lambda seed, source: sdedit(PIPE, video, OTHER, strength=0.8, source_prompt=source, generator=seeded(seed))
    assert torch.equal(make(0, PROMPT), make(1, PROMPT)) and not torch.equal(make(0, None), make(1, None))


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_strengths_that_cannot_be_are_named(strength):
    for call in (lambda: sdedit(PIPE, clip(5), PROMPT, strength=strength),
                 lambda: invert(PIPE, torch.zeros(1, 4, 2, 4, 4), [PROMPT], strength)):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            call()


def test_predictions_are_mixed_by_token():
    weights = torch.tensor([[[1.0, 0.25, 0.0]], [[0.0, 0.75, 1.0]]])
    said = blended([lambda x, t: x, lambda x, t: x + 4], weights)(torch.zeros(2, 3, 5), torch.zeros(2, 3))
    assert torch.equal(said[..., 0], torch.tensor([[0.0, 3.0, 4.0]] * 2))
    with pytest.raises(ValueError):
        blended([lambda x, t: x], weights)(torch.zeros(2, 3, 5), torch.zeros(2, 3))


def test_the_arc_keeps_the_length_of_noise(generator):
    a, b = torch.randn(2, 500, 96, generator=generator)
    for share in (0.0, 0.3, 0.5, 1.0):
        on_arc = slerp(a, b, torch.full((500,), share))
        assert abs(float(on_arc.std()) - 1) < 0.02
    assert torch.allclose(slerp(a, b, torch.zeros(500)), a, atol=1e-4)
    assert torch.allclose(slerp(a, b, torch.ones(500)), b, atol=1e-4)
    assert abs(float(torch.lerp(a, b, 0.5).std()) - 0.5 ** 0.5) < 0.02        # the straight line does not
    assert slerp(a, a, torch.full((500,), 0.5)).sub(a).abs().max() < 1e-2


@pytest.mark.parametrize("blend", [0, 2])
@pytest.mark.parametrize("way", [dict(), dict(dissolve=False), dict(dissolve=False, conditioning=False),
                                 dict(dissolve=False, noise=True), dict(dissolve=False, noise=True, conditioning=False)])
def test_connected_clips_keep_both_ends(way, blend):
    a, b = clip(9, n=2), clip(5, n=2, seed=1)
    out = connect(PIPE, a, b, (PROMPT, OTHER), frames=7, blend=blend, **way, generator=seeded())
    assert out.shape == (2, 3, 21, 32, 32) and out.isfinite().all()
    assert torch.equal(out[:, :, :9 - blend], recoded(PIPE, a)[:, :, :9 - blend])
    assert torch.equal(out[:, :, -5 + blend:], recoded(PIPE, b)[:, :, blend:])


def test_a_dissolve_shows_the_first_clip_less_and_less(monkeypatch):
    """With clips that go on as black and as white, the way between them rises evenly."""
    flat = {PROMPT: -1.0, OTHER: 1.0}
    monkeypatch.setattr(blend, "extend", lambda pipe, clip, said, after=0, before=0, **how: torch.full(
        (1, 3, clip.shape[2] + after + before, 32, 32), flat[said[0]]))
    level = connect(PIPE, clip(5), clip(5), (PROMPT, OTHER), frames=7)[0, 0, :, 0, 0]
    assert level[:5].eq(-1).all() and level[-5:].eq(1).all()
    assert torch.allclose(level[4:13].diff(), torch.full((8,), 0.25))


def grey(levels):
    return torch.tensor(levels).view(1, 1, -1, 1, 1).expand(1, 3, -1, 4, 4)


def test_the_largest_step_counts_the_frames_that_blend():
    video = grey([0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.9, 0.6])               # steps 5 1 1 1 1 1 1 3
    assert float(largest_step(video, 3, 3, 0)) == pytest.approx(0.1, abs=1e-6)
    assert float(largest_step(video, 2, 3, 0)) == pytest.approx(0.1, abs=1e-6)
    assert float(largest_step(video, 2, 3, 1)) == pytest.approx(0.5, abs=1e-6)     # from frame 0, untouched, to frame 1
    assert float(largest_step(video, 3, 2, 0)) == pytest.approx(0.1, abs=1e-6)
    assert float(largest_step(video, 3, 2, 1)) == pytest.approx(0.3, abs=1e-6)     # from frame 7 to 8, untouched


def test_to_and_fro():
    video = torch.arange(4.0).view(1, 1, 4, 1, 1)
    assert to_and_fro(video, 11).flatten().tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert to_and_fro(video, 3).flatten().tolist() == [0, 1, 2] and to_and_fro(video[:, :, :1], 3).shape[2] == 3


def test_a_dissolve_is_as_long_as_its_pace_asks_and_no_longer():
    a, b = grey([-0.92, -0.96, -1.0, -0.98]), grey([0.6, 0.62, 0.64, 0.66])
    n = int(frames_to_dissolve(a, b))                          # 1.58 apart, in steps of 0.04: 79 to keep to 0.02
    assert n == 79
    way = crossfade(to_and_fro(a, 4 + n), to_and_fro(b.flip(2), 4 + n).flip(2), n)
    assert way.shape[2] == 8 + n and float(largest_step(way, 4, 4, 0)) <= 1.5 * 0.04 + 1e-6
    assert int(frames_to_dissolve(a, b, pace=1.0)) == 39 and int(frames_to_dissolve(a, a)) == 11
    still, batch = b.mean(2, keepdim=True).expand_as(b), torch.cat
    assert frames_to_dissolve(batch([a, still]), batch([b, -still])).tolist() == [79, 127]      # as long as may be
    assert frames_to_dissolve(a, b, most=31).tolist() == [31]


def test_a_connection_takes_the_frames_that_its_clips_need(monkeypatch):
    monkeypatch.setattr(blend, "frames_to_dissolve", lambda a, b: torch.tensor([11, 31]))
    a, b = clip(9, n=2), clip(5, n=2, seed=1)
    out = connect(PIPE, a, b, (PROMPT, OTHER), blend=0, generator=seeded())
    assert out.shape[2] == 9 + 31 + 5
    assert torch.equal(out[:, :, :9], recoded(PIPE, a)) and torch.equal(out[:, :, -5:], recoded(PIPE, b))
    assert connect(PIPE, a, b, (PROMPT, OTHER), dissolve=False, generator=seeded(), blend=1).shape[2] == 9 + 11 + 5
    assert frame_steps(out).amax() < 2 and out.isfinite().all()


def test_noise_is_inverted_for_what_is_made_and_not_again_for_what_is_settled(monkeypatch):
    calls, real = [], blend.invert
    monkeypatch.setattr(blend, "invert", lambda *args, **how: calls.append(1) or real(*args, **how))
    connect(PIPE, clip(5), clip(5), (PROMPT, OTHER), frames=7, dissolve=False, noise=True, blend=1, generator=seeded())
    assert len(calls) == 2


def test_one_clip_leads_to_several_and_both_prompts_count():
    a, b = clip(5), clip(5, n=3, seed=1)
    make = lambda *prompts: connect(PIPE, a, b, prompts, frames=7, generator=seeded())
    out = make(PROMPT, OTHER)
    assert out.shape[0] == 3
    for other in (make("a green ring", OTHER), make(PROMPT, "a green ring")):
        assert (out - other)[:, :, 5:12].abs().max() > 1e-4


def test_the_share_rises_from_one_prompt_to_the_other(monkeypatch):
    seen = []
    monkeypatch.setattr(blend, "blended", lambda predicts, weights: seen.append(weights) or predicts[0])
    for conditioning in (True, False):
        connect(PIPE, clip(5), clip(5), (PROMPT, OTHER), frames=11, dissolve=False, conditioning=conditioning, context=1,
                smooth=False, blend=0, generator=seeded())
    soft, hard = (w[1, 0].view(5, 4)[:, 0] for w in seen)                    # one given, three made, one given
    assert torch.allclose(soft[:4], torch.tensor([0, 0.25, 0.5, 0.75])) and hard[:4].tolist() == [0, 0, 1, 1]
    assert all(torch.allclose(w.sum(0), torch.ones(1)) for w in seen)


def test_clips_that_cannot_be_connected_are_refused():
    with pytest.raises(ValueError, match="one size"):
        connect(PIPE, clip(5), clip(5, 32, 48), (PROMPT, OTHER))
    with pytest.raises(ValueError, match="two prompts.*got 'a"):
        connect(PIPE, clip(5), clip(5), PROMPT)
    with pytest.raises(ValueError, match="nearest is 11"):
        connect(PIPE, clip(5), clip(5), (PROMPT, OTHER), frames=12)
    with pytest.raises(ValueError, match="0 new frames"):
        connect(PIPE, clip(5), clip(5), (PROMPT, OTHER), frames=0)
    with pytest.raises(ValueError, match="at least 5 frames"):
        connect(PIPE, clip(5), clip(1), (PROMPT, OTHER))


def test_more_ways_for_the_studio():
    for name, way in MORE_WAYS.items():
        out = way(PIPE, clip(17), PROMPT, generator=seeded(), num_inference_steps=1)
        assert out.shape[:2] == (1, 3) and (out.shape[2] >= 45 if "connect" in name else out.shape[2] == 17)
