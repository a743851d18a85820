"""Text, transformer, masks and pipeline."""
import re
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite.dit import MDT, ConvBlock, DiTBlock, JointDiT, DiffiT, DiT, InContextDiT, TimeBlock, UViT, look_up
from sora_lite.patches import coordinates, pack
from sora_lite.pipeline import Denoiser, SoraLite, draw_mask, flow_loss
from sora_lite.shapes import LEVELS, Shapes, caption, vocabulary
from sora_lite.text import TextEncoder, Vocabulary
from sora_lite.vae import VideoVAE

KINDS = [DiT, JointDiT, InContextDiT, UViT, MDT, DiffiT]


def denoiser(kind=DiT, conv_depth=1, **options):
    torch.manual_seed(0)
    text = TextEncoder(vocabulary(), width=32, depth=1, heads=2)
    model = Denoiser(text, kind(channels=16, width=32, depth=4, heads=2, words_width=32, conv_depth=conv_depth,
                                conv_width=16, **options)).eval()
    for name, p in model.named_parameters():       # gates and heads start at zero: make every path count
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def inputs(sizes, generator):
    packed = pack([torch.randn(4, *size, generator=generator) for size in sizes])
    return packed, torch.rand(len(packed.tokens), generator=generator)


CAPTIONS = ["a red circle", "a small blue star moves left on a black background", None]


@pytest.mark.parametrize("conv_depth", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_equals_alone(kind, conv_depth, generator):
    model, sizes = denoiser(kind, conv_depth), [(2, 4, 4), (1, 2, 6), (2, 4, 4)]
    packed, t = inputs(sizes, generator)
    together = model(packed.tokens, t, packed.coords, packed.lengths, CAPTIONS)
    alone = [model(x, s, c, [len(x)], [text]) for x, s, c, text in zip(
        packed.tokens.split(packed.lengths), t.split(packed.lengths), packed.coords.split(packed.lengths), CAPTIONS)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_words_and_noise_levels_are_read(kind, generator):
    model = denoiser(kind)
    packed, t = inputs([(2, 4, 4)], generator)
    say = lambda t, text: model(packed.tokens, t, packed.coords, packed.lengths, [text])
    base = say(t, "a red circle")
    assert (say(t, "a blue circle") - base).abs().max() > 1e-3
    changed = t.clone()
    changed[0] = 1 - changed[0]
    assert (say(changed, "a red circle") - base).abs().max() > 1e-3


@torch.no_grad()
def test_each_token_gets_the_modulation_of_its_own_level(generator):
    dit, lengths = denoiser().dit, [3, 2, 2, 4]
    words = torch.randn(8, 32, generator=generator), [2] * 4
    t = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.5, 1.0, 1.0, 0.9, 0.2, 0.0, 0.9])
    coords = torch.cat([coordinates((n, 1, 1)) for n in lengths])
    rows, which = dit.condition(dit.layout(t, coords, lengths), words)
    assert rows.shape == (4, 3, 32) and which.shape == (11, 3)               # as many as the last clip has
    clips = [i for i, n in enumerate(lengths) for _ in range(n)]
    alone = [dit.condition(dit.layout(t[i, None], coords[:1], [1]), (words[0][2 * c:2 * c + 2], [2]))[0][0]
             for i, c in enumerate(clips)]
    torch.testing.assert_close(look_up(which, rows, lengths), torch.cat(alone))


def test_gradients_reach_every_weight(generator):
    for kind in KINDS:
        model = denoiser(kind).train()
        loss, _ = flow_loss(model, ([torch.randn(4, 2, 4, 4)] * 3, CAPTIONS[:2] * 2), generator)
        loss.backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_a_clip_without_words_trains_the_empty_caption():
    model, latents = denoiser(), [torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    loss = lambda last: flow_loss(model, (latents, [*CAPTIONS[:2], last]), torch.Generator().manual_seed(0), unconditional=0)[0].item()
    assert loss("") == loss(" ") == loss(None) != loss(CAPTIONS[0])


def test_every_kind_of_mask_is_drawn():
    grid, patterns, boxes = (5, 3, 3), set(), 0
    for seed in range(500):
        mask = draw_mask(coordinates(grid), grid, torch.Generator().manual_seed(seed)).view(5, 9)
        if (mask == mask[:, :1]).all():                                 # whole frames
            patterns.add("".join("01"[int(frame)] for frame in mask[:, 0]))
        else:                                                           # a box, or all but one, in every frame
            assert (mask == mask[:1]).all()
            boxes += 1
    assert {"10000", "11110", "00001", "01111", "10001"} <= patterns and any("101" in p for p in patterns)
    assert boxes > 50


class Listener:
    """Remembers what it is shown; says nonsense of given tokens, and nothing of the rest."""
    text = types.SimpleNamespace(vocabulary=Vocabulary(vocabulary()))

    def __call__(self, tokens, t, coords, lengths, captions, layout=None):
        self.tokens, self.given, self.captions = tokens, t == 0, captions
        return torch.where(self.given[:, None], 1e6, 0.0).expand(tokens.shape)


def test_given_tokens_are_shown_clean_and_do_not_count(generator):
    model, batch = Listener(), ([torch.ones(4, 5, 6, 6)] * 32, ["a red circle"] * 32)
    loss, _ = flow_loss(model, batch, generator, masked=1.0, unconditional=0.0)
    assert 0.1 < model.given.float().mean() < 0.9 and (model.tokens[model.given] == 1).all()
    assert not (model.tokens[~model.given] == 1).all(1).any()
    assert float(loss) == pytest.approx(2, rel=0.1)                     # the mean of (eps - 1)^2 over what was not given
    flow_loss(model, batch, generator, masked=0.0, unconditional=0.0)
    assert not model.given.any() and None not in model.captions
    flow_loss(model, batch, generator, masked=0.25, unconditional=1.0)
    assert 0.03 < model.given.view(32, -1).any(1).float().mean() < 0.6 and model.captions == [None] * 32


@torch.no_grad()
def test_mdt_hides_tokens_from_its_early_blocks_in_training_only(generator):
    dit, seen = denoiser(MDT, conv_depth=0).dit, []
    for block in dit.blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(list(given[2])))
    packed, t = inputs([(2, 4, 4), (1, 2, 6)], generator)               # 8 and 3 tokens
    words = torch.randn(2, 32, generator=generator), [1, 1]
    for training, early in ((True, [6, 2]), (False, [8, 3])):
        seen.clear()
        dit.train(training)(packed.tokens, t, packed.coords, packed.lengths, words)
        assert seen == [early, early, [8, 3], [8, 3]]


@torch.no_grad()
def test_each_prompt_gets_its_own_prediction_and_guidance_leads_towards_it(pipe, generator):
    prompts = ["a small blue star moves left on a black background", None, "a red circle"]      # not in order of length
    x, t = torch.randn(3, 8, 16, generator=generator), torch.full((3, 8), 0.5)
    say = lambda texts, scale, rows: pipe.predictor(texts, (2, 2, 2), guidance_scale=scale, bf16=False)(x[rows], t[rows])
    together = say(prompts, 3.0, slice(None))
    for i, text in enumerate(prompts):
        alone, free = (say([said], 1.0, slice(i, i + 1)) for said in (text, None))
        torch.testing.assert_close(together[i:i + 1], free + 3 * (alone - free), rtol=1e-3, atol=1e-3)
    assert (together[0] - say([None], 1.0, slice(0, 1))[0]).abs().max() > 1e-2


@torch.no_grad()
def test_guidance_is_stronger_early_token_by_token_and_comes_from_the_defaults(pipe, generator):
    x, t = torch.randn(1, 8, 16, generator=generator), torch.tensor([[0.0, 0.3, 0.5, 0.79, 0.81, 0.9, 0.95, 1.0]])
    say = lambda **guidance: pipe.predictor(["a red circle"], (2, 2, 2), bf16=False, **guidance)(x, t)
    even = lambda scale: say(guidance_scale=scale, early_guidance=1.0)
    early = say(guidance_scale=2.0, early_guidance=3.0)
    torch.testing.assert_close(early[:, :4], even(2.0)[:, :4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(early[:, 4:], even(4.0)[:, 4:], rtol=1e-3, atol=1e-3)
    assert (early[:, 4:] - even(2.0)[:, 4:]).abs().max() > 1e-2
    assert torch.equal(say(guidance_scale=1.0), even(1.0)) and torch.equal(say(), say(guidance_scale=2.5, early_guidance=4.0))
    pipe = SoraLite(pipe.vae, pipe.model.text, pipe.model.dit, defaults=dict(early_guidance=1.0))
    assert torch.equal(say(), even(2.5))


@torch.no_grad()
def test_convolutions_cut_and_join_whole_clips_only(generator):
    dit = denoiser().dit
    tokens = torch.randn(3 * 2 * 3 * 5, 16, generator=generator)
    assert torch.equal(dit.to_tokens(dit.to_cells(tokens, (2, 3, 5))), tokens)
    packed, t = inputs([(2, 4, 4)], generator)
    words = torch.zeros(1, 32), [1]
    with pytest.raises(ValueError, match="conv_depth=0"):
        dit(packed.tokens[:7], t[:7], packed.coords[:7], [7], words)
    plain = denoiser(conv_depth=0).dit
    assert plain(packed.tokens[:7], t[:7], packed.coords[:7], [7], words).shape == (7, 16)


@torch.no_grad()
def test_fresh_convolutions_treat_frames_alike():
    block, which = ConvBlock(8, 32), torch.ones(5 * 4, 1)
    x, condition = torch.randn(1, 5, 4, 4, 8), torch.randn(1, 1, 32)
    frames = torch.cat([block(f, condition, which[:4], (1, 2, 2)) for f in x.split(1, 1)], 1)
    assert (block(x, condition, which, (1, 2, 2)) - frames).abs().max() < 1e-5


@torch.no_grad()
def test_diffit_lets_the_noise_level_into_queries_keys_and_values_only(generator):
    """Each is x W_s + c W_t, of the token as modulated and of the row of its level; the residual stream and what the
    words are asked see no level."""
    torch.manual_seed(0)
    block, plain = TimeBlock(32, 2, 32), DiTBlock(32, 2, 32)
    block.adaLN_bias[:] = 1
    plain.load_state_dict(block.state_dict(), strict=False)
    x, rows = torch.randn(6, 32, generator=generator), torch.randn(1, 2, 6 * 32, generator=generator)
    which = torch.eye(2)[torch.tensor([0, 0, 1, 0, 1, 1])]
    sight, turn = {}, (torch.ones(6, 8), torch.zeros(6, 8))
    see = lambda name: lambda module, given, made: sight.update({name: (given[0], made)})
    for name in "qkv":
        getattr(block.attention, name).register_forward_hook(see(name))
    block.words.q.register_forward_hook(see("words"))
    say = lambda b: b(x, (rows, which), [6], turn, (torch.ones(3, 32), [3]))
    say(block)
    assert torch.allclose(sight["words"][0], torch.nn.functional.layer_norm(x, (32,)))
    for name in "qkv":
        linear, ((tokens, *_), made) = getattr(block.attention, name), sight[name]
        assert torch.allclose(made, tokens @ linear.weight.T + linear.bias + (which @ rows[0]) @ linear.time.weight.T, atol=1e-5)
    assert (say(block) - say(plain)).abs().max() > 1e-2       # the level is heard
    for b in (block, plain):
        b.attention.out.weight.zero_()
    assert torch.allclose(say(block), say(plain))             # through attention, and no other way


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_masks_never_give_everything(t, h, w, seed):
    grid = (t, h, w)
    mask = draw_mask(coordinates(grid), grid, torch.Generator().manual_seed(seed))
    assert mask.shape == (t * h * w,) and not mask.all()


def test_the_vocabulary_holds_every_caption(generator):
    words = Vocabulary(vocabulary())
    for options in (dict(objects=(1, 3), pillar=0.5), dict(frames=1)):
        world = Shapes(**options)
        for scene in world.scenes(world.cast(200, generator)):
            for level in LEVELS:
                assert words.encode(caption(scene, level))


def test_captions_that_fit_are_of_one_length(tmp_path):
    """So that a compiled block meets the same lengths in every batch."""
    text = TextEncoder(vocabulary(), width=32, depth=1, heads=2, fill=48)
    scene = dict(background="navy", pillar=False, passes=[(1, 0, "late")], objects=[
        dict(shape="ring", color="orange", size="medium", motion="bounce-x", place="middle right"),
        dict(shape="star", color="red", size="large", motion="bounce-y", place="upper center")])
    assert text([None, caption(scene), caption(scene, "descriptive")])[1] == [48, 48, 48]
    again = TextEncoder.from_pretrained(text.save_pretrained(tmp_path / "text"))
    assert again([None])[1] == [48], "the weights know how far captions were filled"


def test_bad_prompts_are_refused_with_a_hint():
    words = Vocabulary(vocabulary())
    with pytest.raises(ValueError, match="'circel'.*circle"):
        words.encode("a red circel")
    with pytest.raises(ValueError, match="empty"):
        words.encode("   ")
    assert words.encode(None) == [0]


@pytest.fixture(scope="module")
def pipe():
    model = denoiser()
    return SoraLite(VideoVAE(channels=4, widths=(16, 24), encoder=(1, 1), decoder=(1, 1)), model.text, model.dit,
                    defaults=dict(num_inference_steps=2))


@pytest.mark.parametrize("size", [(17, 64, 64), (1, 32, 64), (9, 48, 16)])
def test_the_pipeline_makes_any_size(pipe, size):
    frames, height, width = size
    video = pipe("a red circle", frames=frames, height=height, width=width)
    assert video.shape == (1, 3, *size) and video.abs().max() <= 1


def test_one_seed_one_video(pipe):
    make = lambda seed: pipe(["a red circle", "a small blue star"], frames=5, height=32, width=32,
                             generator=torch.Generator().manual_seed(seed))
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))


def test_given_tokens_are_kept_to_the_bit(pipe, generator):
    grid = (3, 2, 2)
    kept = torch.randn(1, 12, 16, generator=generator)
    mask = (coordinates(grid)[:, 0] == 0)[None]
    out = pipe.latents(["a red circle"], grid, num_inference_steps=3, given=kept, mask=mask, generator=generator)
    from sora_lite.patches import patchify
    assert torch.equal(patchify(out)[0][mask], kept[mask])


def test_bad_sizes_and_prompts_fail_before_any_work(pipe):
    with pytest.raises(ValueError, match="nearest"):
        pipe("a red circle", height=60)
    for asked, near in (dict(height=72), "17 frames of 64 x 64"), (dict(height=0), "of 16 x 64"), (dict(frames=3), "5 frames"):
        with pytest.raises(ValueError, match=f"do not fit. The nearest size that does: .*{near}") as said:
            pipe("a red circle", **dict(frames=17, height=64, width=64) | asked)
        frames, height, width = map(int, re.search(r"does: (\d+) frames of (\d+) x (\d+)", str(said.value)).groups())
        assert pipe.latent_grid(frames, height, width)
    with pytest.raises(ValueError, match="a whole number of them"):
        pipe("a red circle", num_inference_steps=2.5)
    with pytest.raises(ValueError, match="must be a prompt"):
        pipe([])
    with pytest.raises(ValueError, match="chunk of at least 1"):
        pipe("a red circle", chunk=0)
    with pytest.raises(ValueError, match="empty"):
        pipe("")


def test_the_pipeline_travels(pipe, tmp_path):
    with torch.no_grad():                              # as saved: in half precision
        for p in [*pipe.vae.parameters(), *pipe.model.parameters()]:
            p.copy_(p.bfloat16())
    pipe.save_pretrained(tmp_path / "p", seed=0)
    back = SoraLite.from_pretrained(tmp_path / "p")
    assert back.defaults == pipe.defaults and back.patch == pipe.patch
    make = lambda p: p(["a red circle", "a small blue star"], frames=5, height=32, width=32,
                       generator=torch.Generator().manual_seed(1))
    assert make(back).shape == (2, 3, 5, 32, 32) and torch.allclose(make(back), make(pipe), atol=1e-5)
    (tmp_path / "p" / "pipeline.json").rename(tmp_path / "kept")
    (tmp_path / "p" / "pipeline.json").write_text('{"patch": [1, 2')
    with pytest.raises(ValueError, match="pipeline.json cannot be read"):
        SoraLite.from_pretrained(tmp_path / "p")
    (tmp_path / "kept").rename(tmp_path / "p" / "pipeline.json")
    (tmp_path / "p" / "dit" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        SoraLite.from_pretrained(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="pipeline.json"):
        SoraLite.from_pretrained(tmp_path / "q")


@pytest.mark.parametrize("kind", KINDS[1:])
@torch.no_grad()
def test_a_pipeline_with_another_transformer_travels(kind, tmp_path):
    model = denoiser(kind)
    pipe = SoraLite(VideoVAE(4, widths=(8, 8)), model.text, model.dit)
    back = SoraLite.from_pretrained(pipe.save_pretrained(tmp_path / "p"))
    assert type(back.model.dit) is kind and back.model.dit.config == model.dit.config
    notes = tmp_path / "p" / "pipeline.json"
    notes.write_text(notes.read_text().replace(f'"{kind.__name__}"', '"Sora"'))
    with pytest.raises(ValueError, match="of the kind Sora, which is not known here .known: DiT, .*import the module"):
        SoraLite.from_pretrained(tmp_path / "p")


def test_a_pipeline_with_a_part_that_cannot_be_saved_says_so_before_it_writes(tmp_path):
    model, text = denoiser(), torch.nn.Identity()
    text.rim = ()
    pipe = SoraLite(VideoVAE(4, widths=(8, 8)), text, model.dit)
    with pytest.raises(ValueError, match="the part text of this pipeline, a Identity, cannot be saved"):
        pipe.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_gradients_in_bfloat16_are_those_in_float32(t, generator):
    """On two latent frames they once were not: a 3-D convolution's gradient held whatever lay in memory."""
    block = ConvBlock(32, 16)
    x, level = torch.randn(2, t, 4, 4, 32, generator=generator), torch.randn(2, 1, 16, generator=generator)

    def gradient(bf16: bool) -> torch.Tensor:
        block.zero_grad()
        rubbish = [torch.full((n,), float("nan")) for n in (32 * 32 * k for k in (3, 6, 12, 48))]   # noqa: F841
        del rubbish
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = block(x, level, torch.ones(2 * t * 4, 1), (1, 2, 2))
        out.float().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in (block.time.weight, block.space.weight)])

    exact = gradient(False)
    assert (gradient(True) - exact).norm() < 0.02 * exact.norm()
