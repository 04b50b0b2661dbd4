"""What the learned timestep sampler draws from: the swept density, the Beta over its mass, the uniform share."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_diffrl.timesteps import AdaptiveTimestepSampler
from sb3_diffrl.timesteps.adaptive import log_norm_of_beta

from .timestep_tools import process, rng


def with_errors(sampler: AdaptiveTimestepSampler, error: th.Tensor, n_updates: int) -> None:
    """Updates of the policy with a model that stays as it is, whose squared error at the swept times is the given one."""
    generator = rng()
    x0 = th.randn(16, 3, generator=generator)
    weight, offset = sampler.process.schedule.bound_coefficients(sampler.sweep_timesteps)
    planted = (weight * error + offset) / th.tensor(2.0).log()

    def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        terms: th.Tensor = planted[th.searchsorted(sampler.sweep_timesteps, t).clamp(max=len(planted) - 1)]
        return terms

    for _ in range(n_updates):
        sampler.sample(x0, generator)
        with sampler.around_step(x0, th.ones(16), bound_terms, generator):
            pass


@pytest.mark.parametrize("powers", [(0.5, 0.5), (0.0, 1.0), (0.25, 0.75), (1.0, 1.0)])
@pytest.mark.parametrize("schedule", ["linear", "vp", "squaredcos_cap_v2"])
def test_without_a_reward_times_are_drawn_from_the_swept_density(schedule: Any, powers: tuple[float, float]) -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=50, sweep_powers=powers, uniform_floor=0.2)
    th.manual_seed(0)
    sampler.setup(process(schedule), (3,))
    error = (1 + th.arange(50.0)) ** -0.5
    with_errors(sampler, error, 100)
    every_time = sampler.process.schedule.timesteps_at((th.arange(5000) + 0.5) / 5000)
    weight = sampler.process.schedule.bound_coefficients(every_time).weight.view(50, 100).mean(1)
    density = weight ** powers[0] * error ** powers[1]
    expected = 0.8 * density / density.sum() + 0.2 / 50
    t = sampler.sample(th.zeros(50_000, 3), rng(1)).t
    edges = sampler.process.schedule.timesteps_at(th.arange(1, 50) / 50)
    drawn = th.bincount(th.searchsorted(edges, t, right=True), minlength=50) / 50_000
    assert (drawn - expected).abs().max() < 0.005


@pytest.mark.parametrize("schedule", ["linear", "vp"])
def test_an_untrained_model_is_trained_at_uniform_times(schedule: Any) -> None:
    """All its errors are 1, at the start and in every sweep."""
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=50)
    th.manual_seed(0)
    sampler.setup(process(schedule), (3,))
    for _ in range(3):
        th.testing.assert_close(sampler.cumulative, th.linspace(0, 1, 51), rtol=0, atol=1e-4)
        with_errors(sampler, th.ones(50), 1)


def test_the_swept_density_follows_the_errors_at_the_pace_of_the_sweeps() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=4, statistics_decay=0.5)
    sampler.setup(process(), (3,))
    with_errors(sampler, th.tensor([1.0, 0.0, 0.0, 0.0]), 1)
    # Half of the running mean is still the errors of 1 that were there before.
    th.testing.assert_close(sampler.cumulative.diff(), th.tensor([1.5, 0.5, 0.5, 0.5]) / 3, rtol=1e-3, atol=1e-4)
    with_errors(sampler, th.tensor([1.0, 0.0, 0.0, 0.0]), 60)
    th.testing.assert_close(sampler.cumulative.diff(), th.tensor([1.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-4)
    t = sampler.sample(th.zeros(1000, 3), rng()).t
    assert ((t >= 0) & (t < 100)).all()


def test_a_perfect_model_leaves_the_density_uniform() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=10, statistics_decay=0.0)
    sampler.setup(process(), (3,))
    with_errors(sampler, th.zeros(10), 3)
    th.testing.assert_close(sampler.cumulative, th.linspace(0, 1, 11), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["sweep", "uniform"])
def test_full_importance_weights_leave_the_expected_loss_as_under_uniform_times(base: Any) -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=20, base=base, importance=1.0, concentration_range=(0.5, 2.0))
    th.manual_seed(0)
    sampler.setup(process(n_times=20), (3,))
    with_errors(sampler, th.linspace(1, 0.1, 20), 10)
    with th.no_grad():
        *_, last = sampler.policy.parameters()
        last.copy_(th.tensor([0.5, -0.7]))  # a Beta that is not the uniform one
    loss = th.linspace(3, 1, 20).square()
    t, weight = sampler.sample(th.zeros(200_000, 3), rng(1))
    assert float(loss[t].mean()) > 1.03 * float(loss.mean()) or float(loss[t].mean()) < 0.97 * float(loss.mean())
    assert float((weight * loss[t]).mean()) == pytest.approx(float(loss.mean()), rel=0.01)


def test_importance_is_a_power_of_the_density() -> None:
    draws = []
    for importance in (0.0, 0.5, 1.0):
        sampler = AdaptiveTimestepSampler(importance=importance)
        th.manual_seed(0)
        sampler.setup(process(), (3,))
        sampler.cumulative.copy_(th.linspace(0, 1, 101).sqrt())
        draws.append(sampler.sample(th.zeros(100, 3), rng()))
    none, half, full = draws
    assert th.equal(none.t, full.t)
    assert th.equal(none.weight, th.ones(100))
    th.testing.assert_close(half.weight.square(), full.weight)
    assert full.weight.std() > 0.1


def test_no_time_is_ever_left_out() -> None:
    sampler = AdaptiveTimestepSampler(concentration_range=(0.5, 4.0), uniform_floor=0.2)
    sampler.setup(process(n_times=10), (2,))
    with th.no_grad():
        *_, last = sampler.policy.parameters()
        last.copy_(th.tensor([50.0, -50.0]))  # as far as it goes
        beta = sampler.policy(th.zeros(1, 2))
    assert float(beta.concentration1) == pytest.approx(4.0)
    assert float(beta.concentration0) == pytest.approx(0.5)
    t = sampler.sample(th.zeros(20_000, 2), rng()).t
    # A fifth of the draws is uniform.
    assert (th.bincount(t, minlength=10) / 20_000).min() >= 0.2 / 10 - 5 * (0.02 / 20_000) ** 0.5


@pytest.mark.parametrize("base", ["sweep", "uniform"])
def test_log_density_is_that_of_the_mixture(base: Any) -> None:
    sampler = AdaptiveTimestepSampler(uniform_floor=0.3, base=base)
    sampler.setup(process(), (2,))
    grid = (th.arange(1000) + 0.5) / 1000
    mass, slope = grid, th.ones(1000)
    if base == "sweep":
        # Mass x^2 below x, in 100 straight pieces
        sampler.cumulative.copy_(th.linspace(0, 1, 101).square())
        cell = (grid * 100).floor() / 100
        slope = 2 * cell + 0.01
        mass = cell**2 + (grid - cell) * slope
    concentrations = th.tensor([[2.0, 3.0]]).expand(1000, 2)
    log_norm = th.full((1000,), 12.0).log()
    density = sampler._log_density(th, concentrations, log_norm, 100 * grid, sampler.cumulative).exp()
    th.testing.assert_close(density, 0.3 + 0.7 * 12 * mass * (1 - mass) ** 2 * slope, rtol=1e-3, atol=1e-3)
    assert float(density.mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("uniform_floor", [0.0, 0.3])
@pytest.mark.parametrize("importance", [0.0, 0.5])
def test_numpy_and_torch_place_and_weigh_draws_alike(uniform_floor: float, importance: float) -> None:
    sampler = AdaptiveTimestepSampler(uniform_floor=uniform_floor, importance=importance).setup(process(), (2,))
    sampler.cumulative.copy_(th.linspace(0, 1, 101).square())
    generator = rng()
    concentrations = 0.2 + 5 * th.rand(10_000, 2, generator=generator)
    mass, u = th.rand(2, 10_000, generator=generator)
    mass[:2] = th.tensor([0.0, 1.0])
    tensors = [concentrations, log_norm_of_beta(concentrations), mass, u if uniform_floor else None, sampler.cumulative]
    by_torch = sampler._place_and_weigh(th, *tensors)
    by_numpy = sampler._place_and_weigh(np, *(None if x is None else x.numpy() for x in tensors))
    for a, b in zip(by_torch, by_numpy, strict=True):
        th.testing.assert_close(a, th.from_numpy(b), rtol=1e-4, atol=1e-4)
