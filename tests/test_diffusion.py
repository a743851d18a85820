"""Conversions invert, solvers reach the exact solution at their order, masks hold to the bit."""
import math
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite import diffusion, lab
from sora_lite.diffusion import (PREDICTIONS, VP, Flow, guidance_at, guide, mix, sample, sample_times, schedule,
                                 shift_for_tokens, shift_times, split, target)
from sora_lite.vae import VideoVAE

PROCESSES = [Flow(), VP()]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PROCESSES), st.sampled_from(PREDICTIONS), st.floats(0.02, 0.98), st.integers(0, 10_000))
def test_what_is_asked_for_can_be_converted_back(process, prediction, t, seed):
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(7, 3, generator=g).double(), torch.randn(7, 3, generator=g).double()
    times = torch.full((7,), t, dtype=torch.double)
    said = target(process, prediction, x0, eps, times)
    a, b = split(process, prediction, mix(process, x0, eps, times), said, times)
    assert (a - x0).abs().max() < 1e-6 and (b - eps).abs().max() < 1e-6


@pytest.mark.parametrize("process", PROCESSES)
def test_velocity_is_the_derivative_of_the_path(process):
    x0, eps, t, h = torch.randn(5, 2).double(), torch.randn(5, 2).double(), torch.full((5,), 0.3).double(), 1e-6
    slope = (mix(process, x0, eps, t + h) - mix(process, x0, eps, t - h)) / (2 * h)
    assert (process.velocity(x0, eps, t[:, None]) - slope).abs().max() < 1e-6


def gaussian(process, mean=1.5, std=0.4):
    def model(x, t):
        a, s = process.alpha(t)[..., None], process.sigma(t)[..., None]
        variance = a * a * std * std + s * s
        return target(process, "v", mean + a * std * std / variance * (x - a * mean),
                      s / variance * (x - a * mean), t)
    return model, lambda noise: mean + std * noise


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order_of_convergence_on_a_gaussian(process, solver, order, generator):
    model, end = gaussian(process)
    noise = torch.randn(500, 1, generator=generator).double()
    error = [float((sample(model, noise, steps=n, solver=solver, process=process, prediction="v") - end(noise)).abs().mean())
             for n in (32, 64, 128)]
    assert math.log2(error[1] / error[2]) == pytest.approx(order, abs=0.25) and error[2] < 0.01


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_answers_of_x0_that_are_a_little_wrong_arrive_where_exact_ones_do(process, solver, generator):
    """A network's error of some thousandths must not be divided by the noise that is left at t = 0."""
    exact, end = gaussian(process)

    def wrong(x, t):
        x0 = split(process, "v", x, exact(x, t), t)[0]
        return x0 + 0.005 * torch.randn(x.shape, generator=generator)

    noise = torch.randn(500, 1, generator=generator).double()
    made = sample(wrong, noise, steps=128, solver=solver, process=process, prediction="x0")
    assert (made - end(noise)).abs().max() < 0.05


def test_heun_is_of_second_order_from_x0(generator):
    model, end = gaussian(Flow())
    noise = torch.randn(500, 1, generator=generator).double()
    answer = lambda x, t: split(Flow(), "v", x, model(x, t), t)[0]
    error = [float((sample(answer, noise, steps=n, solver="heun", prediction="x0") - end(noise)).abs().mean()) for n in (64, 128)]
    assert math.log2(error[0] / error[1]) == pytest.approx(2, abs=0.25) and error[1] < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["euler", "heun", "multistep"]))
def test_given_tokens_stay_to_the_bit_and_are_seen_at_level_zero(seed, solver):
    g = torch.Generator().manual_seed(seed)
    noise, kept = torch.randn(2, 9, 3, generator=g), torch.randn(2, 9, 3, generator=g)
    mask = torch.rand(2, 9, generator=g) < 0.5

    def model(x, t):
        assert torch.equal(x[mask], kept[mask]) and bool((t[mask] == 0).all())
        return x.mean(1, keepdim=True).expand_as(x) - x

    out = sample(model, noise, steps=4, solver=solver, given=kept, mask=mask)
    assert torch.equal(out[mask], kept[mask]) and not torch.equal(out[~mask], noise[~mask])


def test_each_token_may_have_its_own_schedule(generator):
    model, end = gaussian(Flow())
    noise = torch.randn(4, 6, 1, generator=generator)
    ramp = (1 - (torch.arange(60)[:, None] - 4 * torch.arange(6)) / 30).clamp(0, 1)          # [steps + 1, 6]
    seen = []
    out = sample(lambda x, t: (seen.append(t), model(x, t))[1], noise, times=ramp[:, None], prediction="v")
    assert (out - end(noise)).abs().max() < 0.1
    assert torch.equal(seen[10][0], ramp[10])


def test_guidance():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(guide(a, b, 1.0), a, atol=1e-6) and torch.equal(guide(a, b, 0.0), b)
    assert torch.allclose(guide(a, b, 2.0), 2 * a - b, atol=1e-5)
    levels = torch.tensor([0.0, 0.8, 0.81, 1.0])
    assert guidance_at(levels, 2.5, 4.0).tolist() == [2.5, 2.5, 7.0, 7.0]
    assert guidance_at(levels, 2.5).tolist() == [2.5] * 4 and guidance_at(levels, 1.0, 4.0).tolist() == [1.0] * 4
    mixed = guide(a, b, guidance_at(torch.tensor([0.1, 0.5, 0.9]), 2.0, 3.0)[:, None])          # each token by its own level
    assert torch.allclose(mixed[2], guide(a, b, 4.0)[2]) and torch.allclose(mixed[:2], guide(a, b, 2.0)[:2])


def test_times_are_logit_normal_and_shift_towards_noise(generator):
    t = sample_times(20_000, generator)
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    assert (shift_times(t, 3.0) > t).all() and torch.allclose(shift_times(t, 1.0), t)
    assert shift_for_tokens(64) == 2 and shift_for_tokens(1) == 1


def test_schedules_and_bad_arguments():
    times = schedule(10, shift=3, start=0.6)
    assert times[0] == pytest.approx(0.6) and times[-1] == 0 and (times.diff() < 0).all()
    with pytest.raises(ValueError, match="at least one step"):
        schedule(0)
    with pytest.raises(ValueError, match="euler, heun or multistep"):
        sample(lambda x, t: x, torch.zeros(1, 1), solver="rk4")
    with pytest.raises(ValueError, match="belong together"):
        sample(lambda x, t: x, torch.zeros(1, 1), mask=torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="flow, v, eps, x0"):
        target(Flow(), "score", torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))


def chapter(*with_these: str, **scope) -> dict:
    """What is defined by the cells of chapter 4 that contain one of some texts, run in `scope`; `fit` trains nothing."""
    cells = nbformat.read(Path(__file__).parent.parent / "notebooks" / "04_diffusion.ipynb", 4).cells
    scope = dict(vars(diffusion), nn=torch.nn, lab=lab, seed=0, points_steps=1, fit=lambda *a, **k: None) | scope
    for text in with_these:
        exec(next(c.source for c in cells if c.cell_type == "code" and text in c.source), scope)
    return scope


def test_the_guided_moons_are_labelled_by_their_moon():
    drawn = []

    def fit(net, batch, loss, **_):
        drawn.append(batch(0, torch.Generator().manual_seed(0)))

    chapter("def moons", "def labelled", fit=fit)
    points, label = drawn[-1]
    x, y = points.T / 1.2 + torch.tensor([[0.5], [0.25]])
    from_upper, from_lower = ((x**2 + y**2).sqrt() - 1).abs(), (((x - 1) ** 2 + (y - 0.5) ** 2).sqrt() - 1).abs()
    apart = (from_upper - from_lower).abs() > 0.4                   # the circles cross; the half circles do not
    assert apart.sum() > 300 and torch.equal(label[apart], (from_lower < from_upper)[apart].long())


def test_predictions_are_compared_on_latents_that_were_not_trained_on(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae, judged = VideoVAE().eval(), []
    monkeypatch.setattr(VideoVAE, "from_pretrained", lambda *_: vae)
    monkeypatch.setattr(lab, "weights", lambda name: tmp_path)

    def seen(process, x0, eps, t):
        judged.append(x0)
        return mix(process, x0, eps, t)

    scope = chapter("def compare", mix=seen, profile="smoke", run_device="cpu", compare_steps=1, compare_seeds=1)
    assert judged and not any((scope["pool"] == clip).all((1, 2)).any() for clip in torch.cat(judged))
