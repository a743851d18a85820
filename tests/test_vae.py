"""The autoencoder: causal, any size, pieces equal the whole, clear errors."""
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from sora_lite import lab
from sora_lite import vae as vae_module
from sora_lite.shapes import Shapes
from sora_lite.vae import BOTTLENECKS, FSQ, VideoVAE, psnr


def model(bottleneck="kl"):
    torch.manual_seed(0)
    vae = VideoVAE(channels=4, widths=(16, 24), encoder=(1, 1), decoder=(1, 1), bottleneck=bottleneck).eval()
    for p in vae.parameters():          # blocks start as the identity: make every layer count
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return vae


VAES = {name: model(name) for name in BOTTLENECKS}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(BOTTLENECKS)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_pieces_equal_the_whole_for_any_size(name, t, h, w, chunk):
    vae = VAES[name]
    video = torch.rand(1, 3, 1 + 4 * (t - 1), 8 * h, 8 * w, generator=torch.Generator().manual_seed(t)) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (1, 4, t, h, w) and vae.decode(latents).shape == video.shape
    assert (vae.encode(video, chunk) - latents).abs().max() < 1e-4
    assert (vae.decode(latents, chunk) - vae.decode(latents)).abs().max() < 1e-4


def test_memory_in_pieces_does_not_grow_with_length():
    """By the chapter's own probe, in fresh processes."""
    cells = [c.source for c in nbformat.read(ROOT / "notebooks" / "02_compression.ipynb", 4).cells if c.cell_type == "code"]
    space = {}
    exec(next(c for c in cells if 'probe = """' in c).split("lengths =")[0], space)
    (short, long), whole = (space["peak"](n, 4) for n in (65, 513)), space["peak"](257, 0)
    assert long - short < 5 and whole > 3 * long, (short, long, whole)


def test_the_past_does_not_see_the_future(generator):
    vae, video = VAES["kl"], torch.rand(1, 3, 17, 16, 16, generator=generator)
    other = video.clone()
    other[:, :, 9:] = 0
    same = (vae.encode(video) - vae.encode(other)).abs().amax((0, 1, 3, 4)) < 1e-6
    assert same.tolist() == [True, True, True, False, False]


def test_an_image_is_the_first_frame_of_a_video(generator):
    vae, video = VAES["kl"], torch.rand(1, 3, 9, 16, 16, generator=generator)
    assert torch.allclose(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1], atol=1e-5)


@pytest.mark.parametrize("video", [torch.zeros(3, 5, 16, 16), torch.zeros(1, 1, 5, 16, 16),
                                   torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8)])
def test_what_is_no_batch_of_videos_is_refused(video):
    with pytest.raises(ValueError, match=r"encode takes videos \[B, 3, T, H, W\] of floats"):
        VAES["kl"].encode(video)
    with pytest.raises(ValueError, match=r"decode takes latents \[B, Z, t, h, w\]"):
        VAES["kl"].decode(torch.zeros(VAES["kl"].config["channels"], 1, 2, 2))


def test_sizes_that_cannot_be_are_named_with_the_nearest_that_can():
    with pytest.raises(ValueError, match="17 frames of 64 x 64"):
        VAES["kl"].encode(torch.zeros(1, 3, 16, 60, 64))
    with pytest.raises(ValueError, match="5 channels"):
        VAES["kl"].decode(torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(ValueError, match="chunk"):
        VAES["kl"].encode(torch.zeros(1, 3, 5, 16, 16), chunk=0)
    with pytest.raises(ValueError, match="kl.*vq.*fsq"):
        VideoVAE(bottleneck="gan")


@pytest.mark.parametrize("levels", [2, 4, 1, 0, -3, 3.5])
def test_levels_that_do_not_lie_evenly_about_zero_are_refused(levels):
    with pytest.raises(ValueError, match="odd and at least 3"):
        VideoVAE(bottleneck="fsq", options=dict(levels=levels))


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_a_channel_takes_each_of_its_levels_and_no_other(levels):
    z, *_ = FSQ(1, levels)(torch.linspace(-9, 9, 1000).view(1, 1, 10, 10, 10))
    assert torch.allclose(z.unique(), torch.linspace(-1, 1, levels))


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_latents_without_channels_or_codes_are_refused(bottleneck):
    with pytest.raises(ValueError, match="channels must be at least 1"):
        VideoVAE(channels=0, bottleneck=bottleneck)
    with pytest.raises(ValueError, match="at least 2 codes"):
        VideoVAE(bottleneck="vq", options=dict(codes=1))


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_every_bottleneck_learns(name):
    from sora_lite.train import fit

    vae = model(name)
    world = Shapes(height=32, width=32, frames=5)

    def loss(m, x, g):
        y, penalty, _ = m(x, g)
        return (y.float() - x).square().mean() + 1e-5 * penalty

    history = fit(vae, lambda k, g: world.batch(4, g)[0], loss, steps=30, warmup=5)
    assert sum(history.losses[-5:]) < 0.6 * sum(history.losses[:5])


def test_the_chapter_counts_its_cost_on_the_device_that_trains():
    """The "meta" device stands in for a GPU: like there, tensors of two devices do not mix."""
    notebook = nbformat.read(Path(__file__).parent.parent / "notebooks" / "02_compression.ipynb", 4)
    cell = next(c.source for c in notebook.cells if "get_total_flops" in c.source)
    scope = dict(vars(vae_module), lab=lab, vae=VideoVAE(), batch_size=1, train_steps=1, train_on="shapes", seed=0,
                 run_device=torch.device("meta"))
    exec(cell, scope)
    assert scope["flops"] > 1e9


def test_latents_are_normalised(generator):
    vae = model()
    videos = [Shapes(height=32, width=32).batch(8, generator)[0] for _ in range(2)]
    vae.measure_latents(videos)
    z = torch.cat([vae.encode(v) for v in videos]).transpose(0, 1).flatten(1)
    assert z.mean(1).abs().max() < 1e-3 and abs(z.square().mean().sqrt() - 1) < 1e-2


def test_psnr_of_a_known_error():
    assert psnr(torch.zeros(1, 3, 1, 4, 4), torch.full((1, 3, 1, 4, 4), 0.2)).item() == pytest.approx(20.0, abs=1e-4)


def test_the_start_is_the_best_linear_code(generator):
    video, vae = Shapes(height=32, width=32).batch(24, generator)[0], VideoVAE(channels=12)
    vae.start_from_pca(video)
    gained = lambda v: psnr(vae.decode(vae.encode(v)), v).mean().item()
    best = gained(video)
    assert best > 20 and torch.linalg.matrix_rank(vae.shortcut_in.linear.weight[:12]) == 12
    for layer in (vae.shortcut_in.linear, vae.shortcut_out.linear):
        layer.weight.data += 0.05 * layer.weight.std() * torch.randn(layer.weight.shape, generator=generator)
    assert gained(video) < best
