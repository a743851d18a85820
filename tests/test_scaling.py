"""Scaling: counted FLOPs, an exam that is the same for all, laws that are found again, plans that add up."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sora_lite import scaling
from sora_lite.scaling import (bootstrap, build, fit_laws, held_out_loss, learning_curve, parabola_minimum, plan,
                               power_law, step_flops)


def coded(n, seed=0):
    return torch.randn(n, 24, 2, 4, 4, generator=torch.Generator().manual_seed(seed)), ["a red circle"] * n


def as_batch(clips):
    return list(clips[0]), clips[1]


def test_the_count_grows_with_the_batch_and_agrees_with_six_n_d():
    model = build(128, 2, patch=(1, 2, 2))
    few, many = (step_flops(model, as_batch(coded(n))) for n in (8, 16))     # in both some clip has given tokens
    assert many == 2 * few
    weights = sum(p.numel() for p in model.dit.parameters())
    assert few == pytest.approx(6 * weights * 8 * 8, rel=0.35)


def test_the_exam_asks_models_of_any_patch_the_same():
    # a fresh model says 0: its loss is the mean square of the target, whatever its patch
    losses = [held_out_loss(build(32, 1, patch=patch), coded(64, 5)) for patch in ((1, 1, 1), (1, 2, 2), (2, 4, 4))]
    assert losses == pytest.approx([2.0] * 3, rel=0.05)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_a_training_shows_each_budget_on_its_way():
    model = build(32, 1)
    flops = step_flops(model, as_batch(coded(4)))
    rows = learning_curve(model, coded(16), coded(8, 1), [2 * flops, 5 * flops], flops, batch_size=4,
                          last=lambda: dict(more=1))
    assert [row["steps"] for row in rows] == [2, 5] and [row.get("more") for row in rows] == [None, 1]
    assert [row["budget"] for row in rows] == [2 * flops, 5 * flops]
    assert rows[1]["tokens"] == 5 * 4 * 32 and rows[1]["flops"] == 5 * flops
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_budget_that_buys_no_step_is_refused():
    with pytest.raises(ValueError, match="buys no step"):
        learning_curve(build(32, 1), coded(4), coded(4), [10.0], 10**9)


def test_a_parabola_has_its_minimum_inside_or_none():
    x = np.array([0.0, 1.0, 2.0, 4.0])
    assert parabola_minimum(x, (x - 1.5) ** 2 + 3) == pytest.approx((1.5, 3.0))
    assert all(map(math.isnan, parabola_minimum(x, -(x - 1.5) ** 2)))
    assert all(map(math.isnan, parabola_minimum(x, (x - 5) ** 2)))


def test_a_power_law_is_found_again_and_gaps_are_left_out():
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    y = 3 * x**0.6
    assert power_law(x, y) == pytest.approx((3, 0.6))
    y[1] = math.nan
    assert power_law(x, y) == pytest.approx((3, 0.6))
    assert all(map(math.isnan, power_law(x[:1], y[:1])))


def made_up(noise=0.0, alpha=0.4, beta=0.3, seeds=3, each=lambda n: 6):
    """Rows of a world whose loss is N^-alpha + D^-beta, in which the best N grows as C^(beta / (alpha + beta)).
    each: FLOPs of a weight and token for N weights."""
    rng, rows = np.random.default_rng(0), []
    for n in np.geomspace(2e3, 2e6, 9):
        for seed in range(seeds):
            for budget in (1e10, 4e10, 1.6e11, 6.4e11):
                tokens = budget / (each(n) * n)
                rows.append(dict(parameters=int(n), tokens=tokens, flops=budget, budget=budget, seed=seed,
                                 loss=n**-alpha + tokens**-beta + noise * rng.normal()))
    return rows


def test_the_laws_of_a_made_up_world_are_found_again():
    laws = fit_laws(made_up())
    assert laws["parameters law"][1] == pytest.approx(0.3 / 0.7, abs=0.03)
    assert laws["tokens law"][1] == pytest.approx(0.4 / 0.7, abs=0.03)
    assert laws["loss law"][1] == pytest.approx(-0.4 * 0.3 / 0.7, abs=0.02)
    assert laws["parameters"] * laws["tokens"] * 6 == pytest.approx(laws["budgets"], rel=1e-3)


def test_what_a_weight_and_token_cost_is_read_between_the_sizes():
    each = lambda n: 12 - 0.4 * np.log(n)
    laws = fit_laws(made_up(each=each)[::-1])                    # in any order
    assert laws["parameters"] * laws["tokens"] * each(laws["parameters"]) == pytest.approx(laws["budgets"], rel=1e-3)


def test_the_bootstrap_is_as_wide_as_the_noise():
    spread = lambda noise: np.std([d["parameters law"][1] for d in bootstrap(made_up(noise), rounds=40)])
    assert spread(0.0) == pytest.approx(0, abs=1e-9)
    assert 0 < spread(1e-4) < spread(1e-3)


def test_a_plan_adds_up_and_grows_with_the_compute():
    laws = fit_laws(made_up())
    small, large = plan(1e12, 1e11, laws), plan(1e14, 1e11, laws)
    assert small["seconds"] == pytest.approx(6 * small["parameters"] * small["tokens"] / 1e11, rel=1e-3) and small["seconds"] < 10
    assert small["beyond"] == pytest.approx(1e12 / 6.4e11)
    assert small["tokens"] == small["steps"] * small["batch_size"] * 320
    assert large["parameters"] > small["parameters"] and large["batch_size"] > small["batch_size"]
    k, exponent = laws["parameters law"]
    assert large["parameters"] == pytest.approx(k * 1e14**exponent, rel=0.25)


@pytest.mark.parametrize("each", [6, 9])
def test_no_plan_costs_more_than_its_budget(each):
    laws = fit_laws(made_up(each=lambda n: each))
    greedy = laws | {"parameters law": (0.25, 0.48), "tokens law": (0.03, 0.63)}       # together more than C^1
    for flops in np.geomspace(1e9, 1e17, 9):
        for some in (laws, greedy):
            p = plan(flops, 1e11, some)
            assert each * p["parameters"] * p["tokens"] <= flops * (1 + 1e-6)
            assert each * p["parameters"] * p["tokens"] > 0.5 * flops or flops < 1e12     # nor does it waste much


def test_what_asks_for_more_than_the_largest_model_is_no_plan(monkeypatch):
    weights = lambda width, depth: [torch.empty(depth, 12, width, width)]          # a model's, without the time to make it
    of = lambda *shape: SimpleNamespace(dit=SimpleNamespace(parameters=lambda: weights(*shape)))
    monkeypatch.setattr(scaling, "build", of)
    laws = fit_laws(made_up())
    flops = lambda n: (n / laws["parameters law"][0]) ** (1 / laws["parameters law"][1])
    assert plan(flops(2.5e10), 1e15, laws)["width"] > 4000
    with pytest.raises(ValueError, match="ask for 2.7e.10 weights, and the largest model planned here has 2.58e.10: lower flops"):
        plan(flops(2.7e10), 1e15, laws)


def test_a_budget_that_buys_no_step_is_no_plan():
    with pytest.raises(ValueError, match="buy no step.*raise flops"):
        plan(1e7, 1e11, fit_laws(made_up()))


@pytest.mark.parametrize("flops, rate", [(0, 1e9), (1e12, -1)])
def test_a_plan_needs_amounts(flops, rate):
    with pytest.raises(ValueError, match="must be positive"):
        plan(flops, rate, fit_laws(made_up()))


def test_no_valley_no_plan():
    hill = [row | dict(loss=300 - math.log(row["parameters"]) ** 2) for row in made_up()]
    with pytest.raises(ValueError, match="try more sizes"):
        plan(1e12, 1e9, fit_laws(hill))
