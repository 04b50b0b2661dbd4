"""Timestep samplers with fixed rules: the times they draw and the weights they give."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch as th

from sb3_diffrl.diffusion import DiffusionProcess, make_schedule
from sb3_diffrl.timesteps import (
    P2,
    LogitNormalTimestepSampler,
    LogNormalTimestepSampler,
    LossSecondMomentSampler,
    MinSNR,
    SpeedTimestepSampler,
    TimestepSampler,
    UniformTimestepSampler,
    make_timestep_sampler,
)

from .timestep_tools import rng

NAMES = ("uniform", "logit_normal", "lognormal", "loss_second_moment", "min_snr", "p2", "speed", "adaptive", "adaptive+min_snr")
N = 20_000


def process(schedule: Any = "linear", n_times: int = 1000, prediction_type: Any = "epsilon") -> DiffusionProcess:
    return DiffusionProcess(make_schedule(schedule, n_times), prediction_type)


def no_bound(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
    raise AssertionError("this sampler does not look at the bound")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "vp"])
def test_times_are_the_schedules_and_repeat_with_the_generator(name: str, schedule: Any) -> None:
    model = process(schedule, 10)
    sampler = make_timestep_sampler(name, model, (2, 3))
    x0 = th.randn(500, 2, 3)
    before = th.get_rng_state()
    t, weight = sampler.sample(x0, rng())
    assert th.equal(before, th.get_rng_state())  # only the generator was used
    assert t.shape == weight.shape == (500,)
    assert (weight > 0).all()
    assert not weight.requires_grad
    if schedule == "vp":
        assert t.is_floating_point()
        assert 1e-3 <= float(t.min()) < float(t.max()) <= 1
    else:
        assert t.dtype == th.int64
        assert 0 <= int(t.min()) < int(t.max()) <= 9
    again = sampler.sample(x0, rng())
    assert th.equal(t, again.t)
    assert th.equal(weight, again.weight)


def test_uniform_times_are_uniform() -> None:
    t, weight = make_timestep_sampler("uniform", process(n_times=10), (1,)).sample(th.zeros(N, 1), rng())
    # Standard deviation of a count: sqrt(20000 * 0.1 * 0.9) = 42
    assert (th.bincount(t, minlength=10) - N / 10).abs().max() < 5 * 42
    assert (weight == 1).all()


def test_logit_normal_times_have_a_normal_logit() -> None:
    sampler = LogitNormalTimestepSampler(mean=-0.5, std=0.7).setup(process("vp"), (1,))
    t = sampler.sample(th.zeros(N, 1), rng()).t
    logit = th.logit((t - 1e-3) / (1 - 1e-3), eps=1e-6)
    assert float(logit.mean()) == pytest.approx(-0.5, abs=5 * 0.7 / N**0.5)
    assert float(logit.std()) == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("schedule", ["linear", "vp"])
def test_lognormal_times_have_a_normal_log_noise_level(schedule: Any) -> None:
    model = process(schedule)
    t = LogNormalTimestepSampler(mean=-1.0, std=0.5).setup(model, (1,)).sample(th.zeros(N, 1), rng()).t
    log_level = -model.schedule.log_snr(t) / 2  # log(sigma / alpha)
    assert float(log_level.mean()) == pytest.approx(-1.0, abs=0.02)
    assert float(log_level.std()) == pytest.approx(0.5, rel=0.03)


FORMULAS: dict[str, Callable[[float], tuple[float, float]]] = {
    "epsilon": lambda snr: (min(snr, 5.0) / snr, 1 / (1 + snr)),
    "sample": lambda snr: (min(snr, 5.0), snr / (1 + snr)),
    "v_prediction": lambda snr: (min(snr, 5.0) / (snr + 1), snr / (1 + snr) ** 2),
}


@pytest.mark.parametrize("prediction_type", FORMULAS)
def test_min_snr_and_p2_equal_their_formulas(prediction_type: str) -> None:
    model = process("squaredcos_cap_v2", 50, prediction_type)
    for i, name in enumerate(("min_snr", "p2")):
        t, weight = make_timestep_sampler(name, model, (1,)).sample(th.zeros(300, 1), rng())
        snr = (model.schedule.alpha(t).double() / model.schedule.sigma(t).double()) ** 2
        expected = th.tensor([FORMULAS[prediction_type](float(ratio))[i] for ratio in snr])
        th.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("weighting", [MinSNR(gamma=3.0), P2(k=0.5, gamma=2.0)])
def test_weighted_losses_of_one_denoiser_are_the_same_for_each_prediction_type(weighting: Any) -> None:
    x0, noise, error = (th.randn(50, 4, generator=rng(i), dtype=th.float64) for i in range(3))
    t = th.arange(50)
    losses = []
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        model = process("linear", 50, prediction_type).double()
        x_t = model.add_noise(x0, noise, t)
        noise_hat = noise + 0.1 * error
        x0_hat = (x_t - model.schedule.sigma(t)[:, None] * noise_hat) / model.schedule.alpha(t)[:, None]
        output = model.target(x0_hat, noise_hat, t)

        def denoise(x_t: th.Tensor, t: th.Tensor, output: th.Tensor = output) -> th.Tensor:
            return output

        losses.append(weighting(model, t) * model.denoising_loss(denoise, x0, t, noise))
    th.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-9)
    th.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=1e-9)


def test_speed_draws_the_noisiest_times_less_often_and_weighs_by_the_rate_of_change() -> None:
    model = process()
    sampler = SpeedTimestepSampler(tau=0.7, k=5.0, lam=0.6).setup(model, (1,))
    t, weight = sampler.sample(th.zeros(N, 1), rng())
    # 700 times of weight 5 against 300 of weight 1
    share = 700 * 5 / (700 * 5 + 300)
    assert float((t < 700).float().mean()) == pytest.approx(share, abs=0.01)
    assert (weight[t >= 700] == 1).all()
    assert 0.4 <= float(weight[t < 700].min()) < float(weight[t < 700].max()) <= 0.6 + 1e-6
    variance = model.schedule.sigma(th.arange(1000)).square()
    fastest = int((variance[1:] - variance[:-1]).argmax())
    assert float(sampler.weights[fastest]) == pytest.approx(0.6, abs=1e-3)


def test_a_rule_is_combined_with_a_weighting() -> None:
    model = process()
    x0 = th.zeros(100, 1)
    rule = make_timestep_sampler("speed", model, (1,)).sample(x0, rng())
    both = make_timestep_sampler("speed+p2", model, (1,)).sample(x0, rng())
    assert th.equal(rule.t, both.t)
    th.testing.assert_close(both.weight, rule.weight * P2()(model, rule.t))
    also = make_timestep_sampler(SpeedTimestepSampler(weighting=P2()), model, (1,)).sample(x0, rng())
    assert th.equal(also.weight, both.weight)


# ------------------------------------------------------------------ importance sampling


def time_loss(t: th.Tensor) -> th.Tensor:
    """A loss known at each time: 1 to 10."""
    return 1.0 + t.float()


def warmed_up(n_times: int = 10) -> TimestepSampler:
    sampler = make_timestep_sampler(LossSecondMomentSampler(uniform_floor=0.1), process(n_times=n_times), (1,))
    x0 = th.zeros(500, 1)
    for i in range(20):
        t, _ = sampler.sample(x0, rng(i))
        with sampler.around_step(x0, time_loss(t), no_bound):
            pass
    return sampler


def test_second_moment_sampling_is_in_proportion_to_the_loss() -> None:
    sampler = warmed_up()
    assert isinstance(sampler, LossSecondMomentSampler)
    expected = 0.9 * th.arange(1.0, 11.0) / 55 + 0.1 / 10
    th.testing.assert_close(sampler.probabilities(), expected, rtol=1e-4, atol=1e-6)
    t, _ = sampler.sample(th.zeros(N, 1), rng())
    observed = th.bincount(t, minlength=10) / N
    assert (observed - expected).abs().max() < 5 * (0.25 / N) ** 0.5


def test_importance_weights_leave_the_expected_loss_as_it_is() -> None:
    t, weight = warmed_up().sample(th.zeros(N, 1), rng())
    mean = float(time_loss(th.arange(10)).mean())
    weighted = weight * time_loss(t)
    error = 5 * float(weighted.std()) / N**0.5
    assert float(weighted.mean()) == pytest.approx(mean, abs=error)
    # The same without weights would be far off, and the variance is below that of uniform times.
    assert float(time_loss(t).mean()) > mean + 10 * error
    assert float(weighted.std()) < 0.5 * float(time_loss(th.arange(10)).std())


def test_importance_weights_are_unbiased_in_continuous_time() -> None:
    sampler = make_timestep_sampler(LossSecondMomentSampler(n_bins=20), process("vp"), (1,))
    x0 = th.zeros(2000, 1)
    for i in range(20):
        t, _ = sampler.sample(x0, rng(i))
        with sampler.around_step(x0, (3 * t).exp(), no_bound):
            pass
    t, weight = sampler.sample(th.zeros(N, 1), rng())
    weighted = weight * (3 * t).exp()
    mean = float(
        (
            3
            * make_timestep_sampler("uniform", process("vp"), (1,)).process.schedule.timesteps_at(
                (th.arange(10_000) + 0.5) / 10_000
            )
        )
        .exp()
        .mean()
    )
    assert float(weighted.mean()) == pytest.approx(mean, abs=5 * float(weighted.std()) / N**0.5)
    assert weight.std() > 0.3


def test_second_moment_sampling_is_uniform_until_each_time_was_seen_often_enough() -> None:
    sampler = make_timestep_sampler(LossSecondMomentSampler(history=3), process(n_times=4), (1,))
    assert isinstance(sampler, LossSecondMomentSampler)
    for i in range(3):
        th.testing.assert_close(sampler.probabilities(), th.full((4,), 0.25))
        sampler._observe(th.arange(4), time_loss(th.arange(4)) + i)
    assert sampler.probabilities()[3] > sampler.probabilities()[0]


def test_second_moments_forget() -> None:
    sampler = make_timestep_sampler(LossSecondMomentSampler(history=10), process(n_times=2), (1,))
    assert isinstance(sampler, LossSecondMomentSampler)
    for level in (100.0, 1.0):
        for _ in range(100):
            sampler._observe(th.tensor([0, 1]), th.tensor([level, 1.0]))
    # (1 - 1/10)^100 of 10^4 is left
    assert float(sampler.second_moment[0]) == pytest.approx(1 + 0.9**100 * 1e4, rel=0.01)


# ------------------------------------------------------------------ interface


@pytest.mark.parametrize("name", ["uniform", "lognormal", "loss_second_moment", "adaptive"])
def test_density_shows_what_is_drawn_and_changes_nothing(name: str) -> None:
    sampler = make_timestep_sampler(name, process(), (3,))
    x0 = th.randn(50, 3, generator=rng())
    before, place = copy.deepcopy(sampler.state_dict()), sampler.sample(x0, rng()) and sampler._place
    density = sampler.density(x0, n_bins=10, n_draws=200)
    assert float(density.mean()) == pytest.approx(1.0, abs=1e-5)
    assert sampler._place is place
    assert str(before) == str(sampler.state_dict())
    drawn = sampler.sample(x0.repeat(200, 1), rng(5)).t
    expected = th.bincount(drawn // 100, minlength=10) / len(drawn) * 10
    th.testing.assert_close(density, expected, atol=0.3, rtol=0)


def test_an_object_serves_in_any_loop_after_setup() -> None:
    sampler = UniformTimestepSampler()
    with pytest.raises(RuntimeError, match="setup"):
        sampler.sample(th.zeros(2, 1))
    assert sampler.setup(process(), (1,)).sample(th.zeros(2, 1)).t.shape == (2,)


@pytest.mark.parametrize("name", ["adaptiv", "uniform+p3", "p2+min_snr", "min_snr+uniform", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="'adaptive', 'min_snr'"):
        make_timestep_sampler(name, process(), (1,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormalTimestepSampler(std=0.0), "std"),
        (lambda: SpeedTimestepSampler(tau=1.0), "tau"),
        (lambda: SpeedTimestepSampler(lam=0.3), "lam"),
        (lambda: LossSecondMomentSampler(history=0), "history"),
        (lambda: LossSecondMomentSampler(uniform_floor=1.5), "uniform_floor"),
        (lambda: UniformTimestepSampler(weighting="snr"), "Unknown loss weighting 'snr'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
