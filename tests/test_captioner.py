"""The captioner: shapes, causality, losses, learning; what captions state and how they are graded."""
import math

import pytest
import torch

from sora_lite.captioner import KINDS, Captioner, WordBlock, coca_loss, degrade, grade, statements
from sora_lite.shapes import LEVELS, MOTIONS, Shapes, caption, vocabulary
from sora_lite.text import Vocabulary
from sora_lite.train import fit

CAPTIONS = ["a red circle", "a small blue star moves left on a black background", "an orange ring on a sand background"]


def captioner(**options) -> Captioner:
    torch.manual_seed(0)
    return Captioner(vocabulary(), **dict(width=32, heads=2, queries=4, depth=1) | options).eval()


@pytest.mark.parametrize("size", [(1, 16, 24), (5, 64, 64), (17, 32, 40)])
def test_videos_of_any_size_are_seen_and_captioned(size):
    model, video = captioner(), torch.randn(3, 3, *size)
    pooled, vector = model.see(video)
    assert pooled.shape == (3, 4 * min(5, size[0]), 32) and torch.allclose(vector.norm(dim=1), torch.ones(3))
    said = model.caption(video, batch=2)
    assert len(said) == 3 and all(len(text.split()) < model.config["longest"] for text in said)


def test_frames_are_encoded_one_by_one_and_their_order_is_told(generator):
    model, video = captioner(), torch.randn(1, 3, 5, 16, 16, generator=generator)
    frames = video.transpose(1, 2).flatten(0, 1)
    together = model.see.encode(frames)
    assert (together - torch.cat([model.see.encode(f[None]) for f in frames])).abs().max() < 1e-5
    assert (model.see(video)[0] - model.see(video.flip(2))[0]).abs().max() > 1e-3


def test_long_clips_are_looked_at_evenly(generator):
    model, video = captioner(frames=3), torch.randn(1, 3, 9, 16, 16, generator=generator)
    other = video.clone()
    other[:, :, [1, 2, 3, 5, 6, 7]] = 0                     # frames 0, 4 and 8 are looked at
    assert torch.equal(model.see(video)[0], model.see(other)[0])
    other[:, :, 4] = 0
    assert not torch.equal(model.see(video)[0], model.see(other)[0])


def test_no_word_sees_a_later_one(generator):
    block = WordBlock(32, 2, memory=True)
    x, memory = torch.randn(2, 6, 32, generator=generator), torch.randn(2, 3, 32, generator=generator)
    other = x.clone()
    other[:, 4:] = 0
    assert torch.allclose(block(x, memory)[:, :4], block(other, memory)[:, :4], atol=1e-6)
    assert not torch.allclose(block(x, memory), block(x, memory + 1))


def test_what_fills_a_batch_up_does_not_count(generator):
    model, video = captioner(), torch.randn(3, 3, 1, 16, 16, generator=generator)
    numbers, counts = model.pad(CAPTIONS)
    together = model.words.whole(model.words.read(numbers), counts)
    for i, text in enumerate(CAPTIONS):
        assert (model.vectors(video[i:i + 1], [text])[1] - together[i]).abs().max() < 1e-5
    said = lambda video, texts: coca_loss(model, (video, texts), generator)[1]["captioning"]
    each = [said(video[i:i + 1], [text]) for i, text in enumerate(CAPTIONS)]
    words = torch.tensor([len(Vocabulary(vocabulary()).encode(t)) + 1.0 for t in CAPTIONS])     # and the end
    assert float(said(video, CAPTIONS)) == pytest.approx(float((torch.stack(each) * words).sum() / words.sum()), rel=1e-4)


def test_gradients_reach_every_weight(generator):
    model = captioner().train()
    loss, parts = coca_loss(model, (torch.randn(3, 3, 2, 16, 16), CAPTIONS), generator)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert float(loss.detach()) == pytest.approx(float(2 * parts["captioning"] + parts["contrastive"]), rel=1e-5)
    assert 0.2 < float(parts["contrastive"]) / math.log(3) < 6


def test_it_learns_a_handful_of_clips_by_heart(generator):
    video, texts = Shapes(32, 32, 2).batch(4, generator)
    model = captioner(width=64)
    fit(model, lambda k, g: (video, texts), coca_loss, steps=60, warmup=5, ema=0.9, bf16=False)
    assert model.caption(video) == texts and model.caption(video[:0]) == []
    seen, told = model.vectors(video, texts)
    assert (seen @ told.T).argmax(1).tolist() == [0, 1, 2, 3]


def test_the_captioner_travels(tmp_path, generator):
    model = captioner()
    with torch.no_grad():                              # as saved: in half precision
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.save_pretrained(tmp_path)
    video = torch.randn(2, 3, 5, 16, 16, generator=generator)
    assert torch.equal(Captioner.from_pretrained(tmp_path).see(video)[0], model.see(video)[0])


def test_bad_input_is_refused():
    model = captioner(longest=8)
    with pytest.raises(ValueError, match="multiples of 8.*20 x 16"):
        model.see(torch.zeros(1, 3, 1, 20, 16))
    with pytest.raises(ValueError, match="11 words.*longest"):
        model.pad(["a small blue star moves left on a black background and"])
    with pytest.raises(ValueError, match="crimson"):
        model.pad(["a crimson disc"])
    with pytest.raises(ValueError, match="as many"):
        grade([], [])


@pytest.mark.parametrize("options", [{}, dict(objects=(2, 3)), dict(frames=1), dict(pillar=1.0)])
def test_statements_are_the_scene(options, generator):
    world = Shapes(**options)
    for scene in world.scenes(world.cast(60, generator)):
        things, several = scene["objects"], len(scene["objects"]) > 1
        stated = statements(caption(scene, "descriptive"))
        tie = lambda thing, value: f"{thing['color']}: {value}" if several else value
        assert stated["count"] == {str(len(things))} and stated["background"] == {scene["background"]}
        assert stated["color"] == {t["color"] for t in things}
        for kind in ("shape", "size", "place"):
            assert stated[kind] == {tie(t, t[kind]) for t in things}
        assert stated["motion"] == {tie(t, MOTIONS[t["motion"]]) for t in things if t["motion"]}
        for level in LEVELS:                            # a shorter caption states less, and nothing else
            assert all(statements(caption(scene, level))[kind] <= stated[kind] for kind in KINDS)


def test_grades_by_hand():
    true = [statements("a large red circle on a navy background"), statements("a small blue star on a sand background")]
    said = [statements("a large red square"), statements("a small blue star on a sand background")]
    table = grade(said, true)
    assert table["shape"] == dict(precision=0.5, recall=0.5) and table["background"] == dict(precision=1, recall=0.5)
    assert table["any"] == dict(hallucination=0.5, exact=0.5)
    assert math.isnan(table["motion"]["precision"])


def test_poor_captions_are_short_vague_true_or_wrong(generator):
    world, words = Shapes(), Vocabulary([*vocabulary(), "figure"])
    scenes = world.scenes(world.cast(2000, generator))
    poor = [degrade(scene, generator) for scene in scenes]
    false = [sum(len(v - statements(caption(s, "descriptive"))[k]) for k, v in statements(p).items())
             for s, p in zip(scenes, poor)]
    long, share = [len(statements(p)["motion"]) for p in poor], lambda found: sum(found) / len(scenes)
    true = [p == caption(s, "descriptive") for s, p in zip(scenes, poor)]
    assert false == [n - t for n, t in zip(long, true)], "a long caption is true or has one false statement, others none"
    assert 0.16 < share(false) < 0.24 and 0.07 < share(true) < 0.13
    assert 0.36 < share(p == caption(s, "terse") for s, p in zip(scenes, poor)) < 0.44
    assert all(words.encode(p) for p in poor)
