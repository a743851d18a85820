"""Native sizes: tiles, positions, framing, batches of mixed clips."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from sora_lite import oracle, sizes
from sora_lite.dit import DiT
from sora_lite.patches import coordinates, pack, rope
from sora_lite.pipeline import Denoiser, SoraLite, encode_world, flow_loss
from sora_lite.shapes import SHAPES, SIZES, Shapes, caption, coverage, vocabulary
from sora_lite.sizes import (WAYS, PaddedDiT, ScaledDiT, box_share, bucketed_batches, decoder_halo, framing,
                             held_out_losses, mean_and_error, middle_square, packed_batches, padded_batches, peak_memory,
                             read_all, scaled_rope, score_at, share_inside, tiled_decode)
from sora_lite.text import TextEncoder
from sora_lite.vae import VideoVAE, psnr


def lively(module):
    """Weights that start at zero would hide a wrong path: draw them all."""
    for p in module.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return module.eval()


def vae(decoder=(1, 1)):
    torch.manual_seed(0)
    return lively(VideoVAE(channels=4, widths=(16, 24), encoder=(1, 1), decoder=decoder))


def denoiser(kind=DiT, **options):
    torch.manual_seed(0)
    text = TextEncoder(vocabulary(), width=32, depth=1, heads=2)
    return lively(Denoiser(text, kind(**dict(channels=16, width=32, depth=2, heads=2, words_width=32, conv_depth=0) | options)))


# tiles

@pytest.mark.parametrize("decoder", [(1, 1), (2, 2), (0, 3), (3, 0)])
@pytest.mark.parametrize("tile", [3, 8])
def test_tiles_equal_the_whole_to_rounding_and_only_with_the_whole_halo(decoder, tile, generator):
    model = vae(decoder)
    latents = torch.randn(1, 4, 2, 11, 20, generator=generator)
    whole, halo = model.decode(latents), decoder_halo(model)
    assert (tiled_decode(model, latents, tile) - whole).abs().max() < 1e-5
    assert (tiled_decode(model, latents, tile, chunk=1) - whole).abs().max() < 1e-5
    assert (tiled_decode(model, latents, tile, halo - 1) - whole).abs().max() > 1e-4


def test_bad_tiles_are_refused(generator):
    latents = torch.randn(1, 4, 1, 4, 4, generator=generator)
    with pytest.raises(ValueError, match="tile must be at least 1"):
        tiled_decode(vae(), latents, 0)
    with pytest.raises(ValueError, match="halo at least 0"):
        tiled_decode(vae(), latents, 2, -1)
    with pytest.raises(ValueError, match="latents have 5 channels"):
        tiled_decode(vae(), torch.randn(1, 5, 1, 4, 4), 2)


def test_peak_memory_sees_what_came_and_went():
    with peak_memory("cpu") as peak:
        torch.ones(30_000_000).sum()
    assert math.isnan(peak["mb"]) or 90 < peak["mb"] < 200


# positions

def test_ways_of_scaling_do_what_they_say():
    coords, dim = coordinates((3, 6, 8)), 48                 # pairs of t, h, w: 6, 9, 9
    plain = rope(coords, dim)
    for way in WAYS:
        for a, b in zip(scaled_rope(coords, dim, way), plain):
            assert torch.allclose(a, b, atol=1e-6)           # a scale of 1 changes nothing
    near = rope(coords / torch.tensor([1.0, 2.0, 2.0]), dim)
    assert torch.equal(scaled_rope(coords, dim, "interpolate", (1, 2, 2))[0], near[0])
    sin, plain_sin, near_sin = scaled_rope(coords, dim, "ntk", (1, 2, 2))[1], plain[1], near[1]
    assert torch.allclose(sin[:, :6], plain_sin[:, :6], atol=1e-6)           # time is as it was
    for first, slowest in ((6, 14), (15, 23)):
        assert torch.allclose(sin[:, first], plain_sin[:, first], atol=1e-6)          # the fastest pair too
        assert torch.allclose(sin[:, slowest], near_sin[:, slowest], atol=1e-6)       # the slowest is interpolated
    assert (sin[:, 10] - plain_sin[:, 10]).abs().max() > 1e-3 < (sin[:, 10] - near_sin[:, 10]).abs().max()


def test_bad_scaling_is_refused():
    with pytest.raises(ValueError, match="'yarn' is unknown.*interpolate"):
        scaled_rope(torch.zeros(1, 3), 16, "yarn")
    with pytest.raises(ValueError, match="at least 1"):
        ScaledDiT.of(denoiser().dit, "ntk", (1, 0.5, 1))


@torch.no_grad()
@pytest.mark.parametrize("conv_depth", [0, 1])
def test_a_scaled_model_is_the_same_model(conv_depth, generator):
    model = denoiser(conv_depth=conv_depth, conv_width=16)
    packed = pack([torch.randn(4, 1, 8, 8, generator=generator)])
    t, captions = torch.rand(len(packed.tokens), generator=generator), ["a red circle"]
    say = lambda dit: Denoiser(model.text, dit)(packed.tokens, t, packed.coords, packed.lengths, captions)
    assert torch.equal(say(ScaledDiT.of(model.dit, "none", (1, 2, 2))), say(model.dit))
    for way in WAYS[1:]:
        assert (say(ScaledDiT.of(model.dit, way, (1, 2, 2))) - say(model.dit)).abs().max() > 1e-4
        assert torch.allclose(say(ScaledDiT.of(model.dit, way, (1, 1, 1))), say(model.dit), atol=1e-5)


# framing

def test_the_middle_square():
    video = torch.arange(7 * 4).view(1, 1, 4, 7)
    assert torch.equal(middle_square(video), video[..., 1:5])
    assert middle_square(torch.zeros(3, 2, 9, 4)).shape == (3, 2, 4, 4)
    assert torch.equal(middle_square(video[..., :4]), video[..., :4])


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_ruler_finds_what_lies_beyond_the_edge(shape):
    radius, x = 13.0, torch.tensor([32.0, 10.0, 4.0, -3.0, 61.0])
    y = torch.tensor([32.0, 30.0, 40.0, 30.0, 60.0])
    wide = coverage(shape, x + 64, y + 64, torch.full_like(x, radius), 192, 192)
    inside = wide[:, 64:128, 64:128]
    truth = inside.sum((1, 2)) / wide.sum((1, 2))
    measured = share_inside(inside > 0.5, shape, radius)
    assert truth[0] > 0.999 and truth[3] < 0.6
    assert (measured - truth).abs().max() < 0.08


def test_a_figure_that_is_not_there_has_no_share(generator):
    assert torch.equal(share_inside(torch.zeros(2, 64, 64, dtype=torch.bool), "star", 10.0), torch.zeros(2))
    world = Shapes(frames=5)
    cast = world.cast(1, generator)
    thing, video = world.scenes(cast)[0]["objects"][0], world.render(cast)[0]
    other = "red" if thing["color"] != "red" else "blue"
    assert torch.equal(framing(video, thing | {"color": other}), torch.zeros(5))
    assert framing(video, thing).min() > 0.9


def test_crops_of_data_are_measured_right(generator):
    world = Shapes(64, 112, 5)
    cast = world.cast(12, generator)
    for i, (scene, video) in enumerate(zip(world.scenes(cast), world.render(cast))):
        whole = coverage(scene["objects"][0]["shape"], *cast["center"][i, 0].T, cast["radius"][i].expand(5), 64, 112)
        truth = middle_square(whole).sum((1, 2)) / whole.sum((1, 2))
        assert (framing(middle_square(video), scene["objects"][0]) - truth).abs().mean() < 0.12


def test_a_box_in_a_window():
    window = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 0.5, 1.0], [2.0, 2.0, 0.5, 0.5]])
    assert torch.allclose(box_share((-0.5, -0.5, 0.5, 0.5), window), torch.tensor([1.0, 0.5, 0.0]))


# batches

@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=60),
       st.integers(64, 200))
def test_every_clip_is_trained_on_once(grids, capacity):
    lengths = [math.prod(g) for g in grids]
    generator = torch.Generator().manual_seed(0)
    for batches in (padded_batches(lengths, 7), bucketed_batches(grids, capacity),
                    packed_batches(lengths, capacity, generator)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(grids))) and all(batches)
    assert all(len({grids[i] for i in batch}) == 1 for batch in bucketed_batches(grids, capacity))
    for batches in (bucketed_batches(grids, capacity), packed_batches(lengths, capacity, generator)):
        assert all(sum(lengths[i] for i in batch) <= capacity for batch in batches)


def test_a_clip_that_is_too_long_is_named():
    with pytest.raises(ValueError, match="clip 1 has 100 tokens"):
        packed_batches([10, 100], 64, torch.Generator())


SIZES_MIXED = [(2, 4, 4), (1, 2, 6), (3, 4, 2), (1, 2, 2)]
CAPTIONS = ["a red circle", None, "a small blue star moves left on a black background", "a green ring"]


def test_padded_equals_packed_in_results_and_gradients(generator):
    packed = pack([torch.randn(4, *size, generator=generator) for size in SIZES_MIXED])
    t, out, weights = torch.rand(len(packed.tokens), generator=generator), [], denoiser().state_dict()
    for kind in (DiT, PaddedDiT):
        model = denoiser(kind).train()
        model.load_state_dict(weights)
        said = model(packed.tokens, t, packed.coords, packed.lengths, CAPTIONS)
        said.square().mean().backward()
        with torch.no_grad():
            calm = model(packed.tokens, t, packed.coords, packed.lengths, CAPTIONS)
        out.append((said.detach(), calm, [p.grad for p in model.parameters() if p.grad is not None]))
    (a, b, grads), (c, d, padded_grads) = out
    assert max((x - a).abs().max() for x in (b, c, d)) < 1e-4
    assert len(grads) == len(padded_grads)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(grads, padded_grads))


def test_held_out_losses_depend_on_the_seed_alone(generator):
    model, clips = denoiser(), [torch.randn(4, *size, generator=generator) for size in SIZES_MIXED * 2]
    first = held_out_losses(model, clips, CAPTIONS * 2, batch=4, rounds=2)
    assert len(first) == 4 and torch.equal(first, held_out_losses(model, clips, CAPTIONS * 2, batch=4, rounds=2))
    assert not torch.equal(first, held_out_losses(model, clips, CAPTIONS * 2, seed=1, batch=4, rounds=2))
    assert first[0] != first[2]                               # a round has noise of its own


def test_no_two_batches_of_an_exam_have_the_same_noise(monkeypatch):
    seeds, model = [], denoiser()
    monkeypatch.setattr(sizes, "flow_loss", lambda model, batch, generator, **options: (
        torch.tensor(float(seeds.append(generator.initial_seed()) or 0)), {}))
    held_out_losses(model, [torch.zeros(4, 1, 2, 2)] * 1100, ["a red circle"] * 1100, batch=100, rounds=3)
    assert len(seeds) == len(set(seeds)) == 33


# reading and sampling

def test_real_clips_of_any_size_are_read_right(generator):
    for size in ((64, 64, 9), (64, 112, 9), (128, 128, 1)):
        world = Shapes(*size, split="test")
        cast = world.cast(12, generator)
        rows = read_all(world.scenes(cast), world.render(cast))
        assert rows.shape == (12, len(oracle.ATTRIBUTES) + 1) and rows[:, -1].mean() > 0.9
        scenes = [scene | {"background": "none of them"} for scene in world.scenes(cast)]
        assert rows[:, -1].sum() > 0 == read_all(scenes, world.render(cast))[:, -1].sum()


def test_scores_come_with_their_samples_and_repeat():
    model = denoiser()
    pipe = SoraLite(vae(), model.text, model.dit, defaults=dict(num_inference_steps=1))
    rows, videos = score_at(pipe, 1, 32, 48, 3, batch=2)
    assert set(rows) == {"sampled", "real", "reconstructed"} and videos.shape == (3, 3, 1, 32, 48)
    again, same = score_at(pipe, 1, 32, 48, 3, batch=2, real=False)
    assert set(again) == {"sampled"} and torch.equal(videos, same)
    with pytest.raises(ValueError, match="nearest"):
        score_at(pipe, 2, 32, 48, 3)


def test_encode_world_is_the_autoencoders_code(generator):
    model, world = vae(), Shapes(32, 64, 5)
    latents, captions = encode_world(model, world, 3, 5, batch=2)
    assert latents.shape == (3, 4, 2, 4, 8) and len(captions) == 3
    squares, same = encode_world(model, world, 3, 5, batch=2, change=middle_square)
    assert squares.shape == (3, 4, 2, 4, 4) and same == captions


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([[0.0, 2.0], [3.0, 3.0]]))
    assert mean == 2.0 and abs(error - 1.0) < 1e-6
    assert math.isnan(mean_and_error(torch.ones(1))[1])


def test_the_weights_that_come_with_the_book_load_and_obey():
    folder = ROOT / "data" / "sora-lite"
    assert sum(p.stat().st_size for p in (ROOT / "data").rglob("*") if p.is_file()) <= 16_000_000
    provenance = json.loads((folder / "provenance.json").read_text())
    assert {"seed", "train_steps", "commit", "seconds", "fidelity", "fidelity_two"} <= set(provenance)
    pipe = SoraLite.from_pretrained(folder)
    rows, _ = score_at(pipe, 17, 64, 64, 16, real=False)
    assert rows["sampled"][:, -1].mean() >= 0.75                        # of 16 prompts: broken weights, not weak ones
    world, seed = Shapes(split="test", objects=(2, 2)), torch.Generator().manual_seed(5)
    cast = world.cast(16, seed)
    scenes, real = world.scenes(cast), world.render(cast)
    back = pipe.vae.decode(pipe.vae.encode(real))
    assert oracle.fidelity(scenes, back)["all"] >= 0.9 and psnr(back, real).mean() > 31
    made = pipe([caption(scene) for scene in scenes], generator=seed)
    assert oracle.fidelity(scenes, made)["all"] >= 0.5
