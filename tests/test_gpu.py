"""What a GPU does otherwise than a CPU: its own kernels, and the same numbers up to rounding. Skipped where there is none."""
import pytest
import torch
from torch import nn

from sora_lite.dit import DiT
from sora_lite.patches import attention
from sora_lite.pipeline import Denoiser, SoraLite, encode_world, flow_loss, made_ahead
from sora_lite.replay import Ahead, Replay, recorded
from sora_lite.shapes import Shapes, vocabulary
from sora_lite.text import TextEncoder
from sora_lite.train import compiled, fit
from sora_lite.vae import VideoVAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of a from b, in shares of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def parts(device="cpu"):
    torch.manual_seed(0)
    text = TextEncoder(vocabulary(), width=64, depth=2, heads=2, fill=48)
    dit = DiT(channels=96, width=64, depth=2, heads=4, words_width=64, conv_depth=1, conv_width=32)
    return VideoVAE().to(device).eval(), text, dit


@pytest.mark.parametrize("memory, channels", [(False, 32), (True, 32), (True, 12)])
def test_the_kernel_for_packs_equals_clip_by_clip(memory, channels, generator):
    """And heads that the kernel does not take (it wants multiples of 8 channels) go another way."""
    lengths, words = [80, 16, 33, 80, 1], [7, 3, 16, 1, 9]
    draw = lambda n: torch.randn(n, 4, channels, generator=generator, dtype=torch.double)
    q, k, v = (draw(sum(lengths)) for _ in range(3))
    mk, mv = draw(sum(words)), draw(sum(words))
    outs, grads = [], []
    for device, dtype in (("cpu", torch.double), ("cuda", torch.bfloat16)):
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (q, k, v, mk, mv)]
        more = (leaves[3], leaves[4], words) if memory else None
        out = attention(*leaves[:3], lengths, memory=more)
        out.square().sum().backward()
        outs.append(out)
        grads.append([x.grad for x in leaves[:5 if memory else 3]])
    assert outs[1].dtype == torch.bfloat16 and far(outs[1], outs[0]) < 0.01
    assert all(far(ours, exact) < 0.02 for ours, exact in zip(grads[1], grads[0]))


def test_figures_are_drawn_on_the_device():
    world = Shapes(objects=(1, 3), pillar=0.5)
    made = [world.batch(24, torch.Generator().manual_seed(3), device) for device in ("cpu", "cuda")]
    assert made[1][0].device.type == "cuda" and made[0][1] == made[1][1]
    assert (made[1][0].cpu() - made[0][0]).abs().max() < 1e-3


def test_a_training_takes_the_same_steps():
    """The same seed is the same batches, noise and masks: losses differ by rounding only, compiled or not."""
    world, curves = Shapes(32, 32, 9, objects=(1, 2), level="ordinary+descriptive"), []
    for device, fast in (("cpu", False), ("cuda", False), ("cuda", True)):
        vae, text, dit = parts(device)
        latents, captions = encode_world(vae, world, 64, 0, batch=32)
        model = Denoiser(text, dit).to(device)

        def draw(step, generator):
            index = torch.randint(64, (16,), generator=generator)
            return list(latents[index].float().to(device)), [captions[i] for i in index.tolist()]

        with compiled([*dit.blocks, *dit.stem, *dit.head] if fast else [], device):
            curves.append(torch.tensor(fit(model, draw, flow_loss, steps=12, warmup=4, device=device).losses))
    assert (curves[1] - curves[0]).abs().max() < 0.03 and (curves[2] - curves[0]).abs().max() < 0.03, curves


@pytest.mark.parametrize("fast", [False, True])
def test_a_recorded_training_takes_the_same_steps(fast):
    """Clips, beginnings of clips and images in turn: three recordings, and the losses of a training that records nothing.
    Compiled, which takes a while for each kind: clips only."""
    world, curves = Shapes(32, 32, 9, objects=(1, 2), level="ordinary+descriptive"), []
    for replayed in (False, True):
        vae, text, dit = parts("cuda")
        latents, captions = encode_world(vae, world, 64, 0, batch=32)
        model = Denoiser(text, dit)

        def draw(step, generator, where="cpu"):
            index = torch.randint(64, (16,), generator=generator)
            return list(latents[index, :, :3 - (0 if fast else step % 3)].float().to(where)), [captions[i] for i in index.tolist()]

        batch, engine = (lambda step, generator: draw(step, generator, "cuda")), None
        if replayed:
            batch = Ahead(lambda step, generator: made_ahead(model, *draw(step, generator), generator), 12, workers=2)
            engine = Replay()
        model = model.to("cuda")
        with compiled([*text.blocks, *dit.blocks, *dit.stem, *dit.head] if fast and replayed else [], "cuda"):
            curves.append(torch.tensor(fit(model, batch, flow_loss, steps=12, warmup=4, device="cuda", engine=engine).losses))
    assert len(engine.kinds) == (1 if fast else 3)
    assert (curves[1] - curves[0]).abs().max() < 0.03, curves


def test_a_recording_reads_what_lies_there_now():
    x, y = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
    replay = recorded(lambda: (x + y).exp())
    x.fill_(2)
    assert torch.allclose(replay(), torch.full_like(x, 3).exp())


def test_a_prompt_becomes_the_same_video():
    pipe = SoraLite(*parts())
    for p in pipe.model.parameters():                    # gates start at zero: make every path count
        nn.init.normal_(p, std=0.05) if p.ndim > 1 else None
    made = [pipe.to(device)("a large red circle moves left", height=32, width=32, frames=9, num_inference_steps=4,
                            generator=torch.Generator().manual_seed(0), bf16=False) for device in ("cpu", "cuda")]
    assert far(made[1], made[0]) < 0.02


def test_checkpoints_resume_on_the_gpu(tmp_path):
    data = torch.randn(8, 8, device="cuda")
    loss = lambda m, x, g: (m(x) - x.flip(1)).square().mean()
    run = lambda model, steps, folder: fit(model, lambda s, g: data, loss, steps=12, warmup=2, device="cuda", folder=folder,
                                           save_every=steps)
    made = []
    for name in ("whole", "cut"):
        torch.manual_seed(0)
        made.append(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)))
    run(made[0], 100, tmp_path / "whole")

    class Stop(Exception):
        pass

    def until(step, generator):
        if step == 7:
            raise Stop
        return data

    with pytest.raises(Stop):
        fit(made[1], until, loss, steps=12, warmup=2, device="cuda", folder=tmp_path / "cut", save_every=5)
    run(made[1], 100, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values()))
