"""Noise schedules against their formulas and against diffusers."""

import math
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch as th
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.stats import norm

from sb3_diffrl.diffusion import DiscreteSchedule, NoiseSchedule, ScheduleName, VPSchedule, make_schedule

DiscreteName = Literal["linear", "squaredcos_cap_v2", "quadratic"]
# Untyped: diffusers' decorators hide what a scheduler has
DDIM: Any = DDIMScheduler
DDPM: Any = DDPMScheduler
DIFFUSERS_NAMES = {"linear": "linear", "squaredcos_cap_v2": "squaredcos_cap_v2", "quadratic": "scaled_linear"}


def all_times(schedule: NoiseSchedule) -> th.Tensor:
    """Every discrete time, or a grid of [t_min, 1]."""
    if schedule.num_train_timesteps is None:
        return schedule.timesteps_at(th.linspace(0, 1, 1000))
    return th.arange(schedule.num_train_timesteps)


@pytest.mark.parametrize("name", get_args(DiscreteName))
def test_discrete_schedules_are_those_of_diffusers(name: DiscreteName) -> None:
    reference = DDPM(num_train_timesteps=1000, beta_schedule=DIFFUSERS_NAMES[name])
    schedule, t = DiscreteSchedule(name, 1000), th.arange(1000)
    # diffusers multiplies a thousand factors in single precision, each off by up to 6e-8 / 1e-3 where beta is capped at 0.999
    th.testing.assert_close(schedule.alpha(t).square(), reference.alphas_cumprod, rtol=2e-4, atol=0)
    th.testing.assert_close(schedule.sigma(t).square(), 1 - reference.alphas_cumprod, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n_times", [1, 2, 10, 77])
def test_cosine_schedule_is_that_of_diffusers_at_any_length(n_times: int) -> None:
    reference = DDPM(num_train_timesteps=n_times, beta_schedule="squaredcos_cap_v2")
    alphas = DiscreteSchedule("squaredcos_cap_v2", n_times).alpha(th.arange(n_times))
    th.testing.assert_close(alphas.square(), reference.alphas_cumprod, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_fewer_training_steps_read_the_same_noise_curve(name: DiscreteName) -> None:
    reference = DiscreteSchedule(name, 1000).log_snr(th.arange(1000))
    for n_times in (10, 100):
        every = 1000 // n_times
        th.testing.assert_close(DiscreteSchedule(name, n_times).log_snr(th.arange(n_times)), reference[every - 1 :: every])
    # Between two of the thousand steps the curve is interpolated, and its end is the same
    finer = DiscreteSchedule(name, 3000).log_snr(th.arange(3000))
    th.testing.assert_close(finer[2::3], reference)
    assert bool((finer.diff() < 0).all())


@pytest.mark.parametrize("name", get_args(ScheduleName))
@pytest.mark.parametrize("n_times", [10, 1000])
def test_snr_falls_to_nearly_pure_noise(name: ScheduleName, n_times: int) -> None:
    schedule = make_schedule(name, n_times)
    t = all_times(schedule)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    assert alpha[-1] < 0.03
    th.testing.assert_close(log_snr, 2 * (alpha.double().log() - sigma.double().log()).float(), rtol=1e-5, atol=1e-5)
    th.testing.assert_close(alpha.square() + sigma.square(), th.ones(len(t)))


def test_vp_schedule_is_that_of_the_specification() -> None:
    t = th.tensor([1e-3, 0.1, 0.5, 1.0], dtype=th.float64)
    log_alpha = -(20 - 0.1) * t**2 / 4 - 0.1 * t / 2
    alpha, sigma = VPSchedule().alpha(t), VPSchedule().sigma(t)
    th.testing.assert_close(alpha, log_alpha.exp())
    th.testing.assert_close(sigma, (1 - alpha.square()).sqrt())
    # By hand at t = 1: exp(-19.9 / 4 - 0.05) = exp(-5.025)
    assert float(alpha[-1]) == pytest.approx(0.006572, rel=1e-3)


@pytest.mark.parametrize("n_times", [10, 1000])
def test_linear_schedule_tends_to_the_vp_schedule(n_times: int) -> None:
    t = th.arange(n_times)
    discrete = DiscreteSchedule("linear", n_times).log_snr(t)
    continuous = VPSchedule().log_snr((t + 1) / n_times)
    # A step takes the rate at its start, so the first beta is 9.5% smaller than the integral of the rate over the first step; later
    # 1 - beta < exp(-beta) lets the product fall faster, by half the sum of beta^2 = 0.067 in all
    th.testing.assert_close(discrete, continuous, rtol=0, atol=0.1)


@pytest.mark.parametrize("n_times", [1000, 97])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 7, 10, 20, 50, 96, 97])
def test_inference_steps_are_diffusers_trailing_spacing(n_times: int, n_steps: int) -> None:
    reference = DDIM(num_train_timesteps=n_times, timestep_spacing="trailing")
    reference.set_timesteps(n_steps)
    timesteps = DiscreteSchedule("linear", n_times).inference_timesteps(n_steps)
    # diffusers adds up a rounded step: it can end with one time too many, below zero, and a half is rounded either way
    halfway = (2 * n_times * np.arange(n_steps)) % (2 * n_steps) == n_steps
    difference = (timesteps - reference.timesteps[:n_steps]).numpy()
    assert not difference[~halfway].any()
    assert np.abs(difference).max() <= 1
    assert timesteps[0] == n_times - 1


def test_vp_inference_steps_are_uniform_from_one() -> None:
    schedule = VPSchedule(t_min=0.2)
    np.testing.assert_allclose(schedule.inference_timesteps(4), [1.0, 0.8, 0.6, 0.4], rtol=1e-6)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_training_times_are_uniform(name: ScheduleName) -> None:
    schedule = make_schedule(name, 10)
    times = schedule.sample_timesteps(100_000, generator=th.Generator().manual_seed(0))
    assert times.shape == (100_000,)
    shares = th.histc(schedule.network_time(times), bins=10, min=0.0 if name == "vp" else 0.05, max=1.0 if name == "vp" else 1.05)
    # Standard error of a share: 1e-3
    th.testing.assert_close(shares / 100_000, th.full((10,), 0.1), rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_fractions_span_the_training_times(name: ScheduleName) -> None:
    schedule = make_schedule(name, 10)
    ends = schedule.timesteps_at(th.tensor([0.0, 1.0]))
    assert ends.tolist() == (pytest.approx([1e-3, 1.0]) if name == "vp" else [0, 9])
    assert schedule.network_time(ends).tolist() == pytest.approx([1e-3 if name == "vp" else 0.1, 1.0])


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_times_are_found_by_their_snr(name: ScheduleName) -> None:
    schedule = make_schedule(name, 1000)
    t = all_times(schedule)
    # A shift of less than half the way to the neighbour finds the same discrete time
    found = schedule.timesteps_at_log_snr(schedule.log_snr(t) + (0 if name == "vp" else 1e-5))
    th.testing.assert_close(found, t, rtol=1e-3, atol=0)
    ends = schedule.timesteps_at_log_snr(th.tensor([100.0, -100.0]))
    th.testing.assert_close(ends, t[[0, -1]])


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_shared_times_stay_shared_for_the_network(name: ScheduleName) -> None:
    schedule = make_schedule(name, 10)
    t = schedule.timesteps_at(th.tensor([0.5]))
    shared = schedule.network_time(t.expand(6))
    assert shared.stride() == (0,)
    th.testing.assert_close(shared, schedule.network_time(t.repeat(6)))


def test_a_schedule_adds_nothing_to_the_saved_state() -> None:
    assert not DiscreteSchedule("linear", 10).state_dict()
    assert not VPSchedule().state_dict()


def test_bound_coefficients_are_differences_of_the_snr() -> None:
    schedule = DiscreteSchedule("quadratic", 100)
    t = th.arange(100)
    snr = schedule.log_snr(t).double().exp()
    weight, offset = schedule.bound_coefficients(t)
    th.testing.assert_close(weight[1:] * snr[1:], (snr[:-1] - snr[1:]) / 2, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert not offset[1:].any()
    # -log of the Gaussian decoder's density at its mean
    assert float(offset[0]) == pytest.approx(-norm.logpdf(0.0, scale=float(snr[0].rsqrt())), rel=1e-5)
    assert float(weight[0]) == 0.5


def test_vp_bound_density_is_the_derivative_of_the_log_snr() -> None:
    schedule = VPSchedule()
    t = th.linspace(1e-3, 1, 50, dtype=th.float64).requires_grad_()
    (slope,) = th.autograd.grad(schedule.log_snr(t).sum(), t)
    weight, offset = schedule.bound_coefficients(t)
    th.testing.assert_close(weight, -slope / 2)
    assert not offset.any()


def test_an_argument_outside_its_range_is_named() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps"):
        DiscreteSchedule("linear", 0)
    with pytest.raises(ValueError, match="beta_end"):
        DiscreteSchedule("linear", 10, beta_start=0.5, beta_end=0.1)
    with pytest.raises(ValueError, match="t_min"):
        VPSchedule(t_min=0.0)
    with pytest.raises(ValueError, match="beta_min"):
        VPSchedule(beta_min=-1.0)
    with pytest.raises(ValueError, match="squaredcos_cap_v2"):
        make_schedule("cosine", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_inference_steps"):
        DiscreteSchedule("linear", 10).inference_timesteps(11)
    with pytest.raises(ValueError, match="num_inference_steps"):
        VPSchedule().inference_timesteps(0)


def test_the_docstring_s_figure_for_diffusers() -> None:
    # DiscreteSchedule's docstring: 100 steps of the betas of a thousand leave this share of the variance
    assert math.exp(float(th.log1p(-th.linspace(1e-4, 0.02, 100)).sum())) == pytest.approx(0.36, abs=0.005)
