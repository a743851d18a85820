"""Batches made ahead, and a step that asks no device for a number; what a GPU records is tested in test_gpu.py."""
from functools import partial

import pytest
import torch
from torch import Tensor

from sora_lite import replay
from sora_lite.dit import DiT, DiffiT, JointDiT, UViT
from sora_lite.pipeline import Denoiser, flow_loss, made_ahead, noised
from sora_lite.replay import Ahead, Replay, pytree
from sora_lite.shapes import vocabulary
from sora_lite.text import TextEncoder
from sora_lite.train import Engine, fit, generator_of

CAPTIONS = ["a red circle", "a small blue star moves left on a black background", "a ring", ""]


def model_of(kind=DiT, conv_depth=1, fill=16):
    torch.manual_seed(0)
    text = TextEncoder(vocabulary(), width=32, depth=1, heads=2, fill=fill)
    return Denoiser(text, kind(channels=16, width=32, depth=4, heads=2, words_width=32, conv_depth=conv_depth, conv_width=16))


def draw(step, generator, shapes=((4, 3, 4, 4),)):
    return [torch.randn(shapes[i % len(shapes)], generator=generator) for i in range(4)], CAPTIONS


@pytest.mark.parametrize("shapes", [((4, 3, 4, 4),), ((4, 3, 4, 4), (4, 1, 4, 6))], ids=["one size", "two sizes"])
@pytest.mark.parametrize("kind", [DiT, JointDiT, UViT, DiffiT])
def test_a_batch_made_ahead_trains_the_same(kind, shapes):
    model, losses, grads = model_of(kind), [], []
    for make in (None, made_ahead):
        generator = torch.Generator().manual_seed(3)
        batch = draw(0, generator, shapes)
        loss, _ = flow_loss(model, make(model, *batch, generator, masked=0.9) if make else batch, generator,
                            **({} if make else dict(masked=0.9)))
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert torch.equal(*losses) and all(map(torch.equal, *grads))


@pytest.mark.parametrize("conv_depth", [0, 1])
@pytest.mark.parametrize("kind", [DiT, JointDiT, UViT, DiffiT])
def test_a_step_made_ahead_asks_for_no_number(kind, conv_depth, monkeypatch):
    """Tensors on the meta device hold no numbers: whoever asks for one fails. And none is sent to the device, which a
    recording could not repeat."""
    model, generator = model_of(kind, conv_depth), torch.Generator().manual_seed(3)
    asked = made_ahead(model, *draw(0, generator), generator, masked=0.9)
    asked = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), asked)
    model = model.to("meta")

    def sent(*args, **options):
        raise AssertionError("a number is sent to the device in the middle of a step")

    monkeypatch.setattr(torch, "tensor", sent)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        flow_loss(model, asked)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_given_does_not_count():
    """The loss is the mean over tokens that are not given."""
    model, generator = model_of(), torch.Generator().manual_seed(5)
    asked = noised(model.text, *draw(0, generator), generator, masked=1.0)
    said = torch.randn(asked.x0.shape, generator=generator)
    far = flow_loss(lambda *args: torch.where(asked.given[:, None], 1e3, said), asked)[0]
    free = ~asked.given
    assert 0 < free.sum() < len(free)
    torch.testing.assert_close(far, (said[free] - (asked.eps - asked.x0)[free]).square().mean())


def test_captions_of_different_lengths_are_refused():
    model, generator = model_of(fill=4), torch.Generator()
    with pytest.raises(ValueError, match="captions of 4 to 12 words.*fill"):
        made_ahead(model, *draw(0, generator), generator, unconditional=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_by_others_are_those_of_the_loop(workers):
    ahead = Ahead(lambda step, g: (step, torch.randn(3, generator=g)), 7, seed=4, workers=workers)
    for start in (0, 3):                                     # from the start, and as a training goes on that was stopped
        for step in range(start, 7 if start else 5):
            found, numbers = ahead(step)
            assert found == step and torch.equal(numbers, torch.randn(3, generator=generator_of(4, step)))
    assert ahead.coming is None                              # all are made: their makers have gone


def test_training_on_batches_made_ahead_is_the_same_training():
    weights = []
    for workers in (None, 1):
        model, batch = model_of(), draw
        if workers:
            batch = Ahead(lambda step, g: made_ahead(model, *draw(step, g), g), 4, seed=2, workers=workers)
        fit(model, batch, flow_loss, steps=4, warmup=1, seed=2, bf16=False)
        weights.append(model.state_dict())
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))


def test_an_error_in_another_process_is_told():
    def make(step, generator):
        if step == 2:
            raise ValueError("clip 7 is broken")
        return step

    ahead = Ahead(make, 4, workers=1)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(ValueError, match="clip 7 is broken"):
        ahead(2)


def test_only_a_gpu_records():
    with pytest.raises(ValueError, match="kernels are recorded on a GPU, not on cpu"):
        Replay("cpu")
    with pytest.raises(ValueError, match="a recorded step has one part, not 3"):
        Replay("cuda").mine(3)


class Rehearsal(Replay):
    """A recording played by running the action again, on what lies in its tensors by then: all but the GPU's own part."""

    def __init__(self):
        Engine.__init__(self, "cpu")


@pytest.fixture
def rehearsal(monkeypatch):
    calls = []

    def recorded(action, warmup=3):
        for _ in range(warmup):
            action()
        calls.append(warmup)
        return action

    monkeypatch.setattr(replay, "recorded", recorded)
    engine = Rehearsal()
    engine.calls = calls
    return engine


def test_a_recorded_training_is_the_same_training(rehearsal, tmp_path):
    """Two kinds of batches, gradients in one place, rates as tensors: up to the rounding of rates. Stopped and resumed: to
    the bit."""
    trainings = []
    for engine, stop in ((None, None), (rehearsal, None), (rehearsal, 6)):
        model = model_of()

        def batch(step, generator):
            nonlocal stop
            if step == stop:
                stop = None
                raise KeyboardInterrupt
            latents, captions = draw(step, generator, ((4, 3, 4, 4),) if step % 3 else ((4, 1, 4, 4),))
            return made_ahead(model, latents, captions, generator)

        train = partial(fit, model, batch, flow_loss, steps=12, warmup=2, seed=2, bf16=False, engine=engine,
                        folder=tmp_path if stop else None)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train()
        history = train()
        trainings.append((torch.tensor(history.losses), model.state_dict()))
    (plain, _), (losses, weights), (again, resumed) = trainings
    assert (losses - plain).abs().max() < 1e-4 and torch.equal(losses, again)
    assert all(map(torch.equal, weights.values(), resumed.values()))
    assert rehearsal.calls == [3, 3, 0] * 3                  # what was recorded: two kinds of batches and the update, each time


def test_a_recorded_training_stops_at_a_loss_that_is_not_finite(rehearsal):
    model = model_of()
    broken = lambda step, generator: made_ahead(model, *draw(step, generator), generator)._replace(
        x0=torch.full((48, 16), float("nan")) if step == 5 else torch.zeros(48, 16))
    with pytest.raises(FloatingPointError, match="step 5"):
        fit(model, broken, flow_loss, steps=8, bf16=False, engine=rehearsal)
    assert all(p.isfinite().all() for p in model.parameters())


def test_batches_without_given_tokens_are_of_the_same_kind():
    model = model_of()
    for masked in (0.0, 1.0):
        generator = torch.Generator().manual_seed(1)
        assert made_ahead(model, *draw(0, generator), generator, masked=masked).layout.levels.shape == (4, 2)
