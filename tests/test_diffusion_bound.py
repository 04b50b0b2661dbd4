"""The variational bound against closed forms: the KL of Gaussians, and the exact likelihood of Gaussian data."""

import math
from typing import Any, Literal, get_args

import pytest
import torch as th
from diffusers import DDPMScheduler

from sb3_diffrl.diffusion import Denoise, DiffusionProcess, DiscreteSchedule, PredictionType, VPSchedule

DiscreteName = Literal["linear", "squaredcos_cap_v2", "quadratic"]

# Untyped: diffusers' decorators hide what a scheduler has
DDPM: Any = DDPMScheduler

MEAN, VARIANCE = th.tensor([0.7, -0.4]), th.tensor([1.0, 0.25])
# Of N(MEAN, VARIANCE), in bits per dimension
ENTROPY = float((2 * math.pi * math.e * VARIANCE).log2().mean() / 2)


def gaussian_denoiser(process: DiffusionProcess) -> Denoise:
    """The exact denoiser of the Gaussian data."""

    def denoise(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        alpha, sigma = process.schedule.alpha(t)[:, None], process.schedule.sigma(t)[:, None]
        x0 = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x_t - alpha * MEAN)
        return process.target(x0, (x_t - alpha * x0) / sigma, t)

    return denoise


def draws() -> tuple[th.Tensor, th.Tensor]:
    """Eight data and noises ``(8, 2)`` with exactly the joint mean and covariance of the data and of standard normal noise.

    Terms are quadratic in them under the exact denoiser: their mean over the eight is the expectation, without sampling error.
    """
    points = th.cat([th.eye(4), -th.eye(4)]) * 2
    return MEAN + VARIANCE.sqrt() * points[:, :2], points[:, 2:]


def terms_at(process: DiffusionProcess, times: th.Tensor) -> th.Tensor:
    """Expected term at each time under the exact denoiser, ``(n_times,)``."""
    x0, noise = draws()
    # (8 * n_times, 2), the times running fastest
    rows, noises = (x.repeat_interleave(len(times), dim=0) for x in (x0, noise))
    return process.bound_terms(gaussian_denoiser(process), rows, times.repeat(8), noises).view(8, -1).mean(0)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("name", get_args(DiscreteName))
def test_terms_are_the_kl_divergences_of_the_steps(name: DiscreteName, prediction_type: PredictionType) -> None:
    process = DiffusionProcess(DiscreteSchedule(name, 1000), prediction_type)
    t = th.tensor([1, 2, 10, 200, 500, 990])
    x0, noise = th.randn(2, len(t), 3, 2)
    x_t = process.add_noise(x0, noise, t)
    output = process.target(x0, noise, t) + 0.1 * th.randn(len(t), 3, 2)

    # The step's mean, and the posterior's, as diffusers computes them; its last step before clean data is not used
    scheduler = DDPM(1000, beta_schedule={"quadratic": "scaled_linear"}.get(name, name), clip_sample=False)
    scheduler.alphas_cumprod = process.schedule.log_snr(th.arange(1000)).double().sigmoid()
    scheduler.register_to_config(prediction_type=prediction_type)

    def mean(model_output: th.Tensor, i: int) -> tuple[th.Tensor, th.Tensor]:
        time, generator = int(t[i]), th.Generator().manual_seed(0)
        variance = scheduler._get_variance(time)
        x = x_t[i : i + 1].double()
        drawn = scheduler.step(model_output[i : i + 1].double(), time, x, generator=generator).prev_sample
        z = th.randn(x.shape, generator=generator.manual_seed(0), dtype=th.float64)
        return (drawn - variance.sqrt() * z).flatten(), variance

    expected = []
    for i in range(len(t)):
        posterior, variance = mean(process.target(x0, noise, t), i)
        expected.append((mean(output, i)[0] - posterior).square().mean() / (2 * variance) / math.log(2))
    terms = process.bound_terms(lambda x, times: output, x0, t, noise)
    th.testing.assert_close(terms, th.stack(expected).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("name", get_args(DiscreteName))
def test_the_sum_of_the_terms_is_the_likelihood_of_gaussian_data(name: DiscreteName, prediction_type: PredictionType) -> None:
    schedule = DiscreteSchedule(name, 100)
    process = DiffusionProcess(schedule, prediction_type)
    bound = terms_at(process, th.arange(100)).sum() + process.prior_term(draws()[0]).mean()

    # By the chain rule of the KL divergence, the mean of the bound lies above the mean of -log p(x_0), which is the entropy, by the
    # divergences of the chain's steps from the true reverse steps, and of N(0, I) from the noisiest data. The reverse steps are
    # Gaussians of the chain's means, whose variances hold, beside the chain's, what the denoiser does not know of x_0.
    alphas_squared = schedule.alphas.double().square()[:, None]
    previous = th.cat([th.ones(1, 1, dtype=th.float64), alphas_squared[:-1]])
    betas = 1 - alphas_squared / previous
    unknown = VARIANCE * (1 - alphas_squared) / (alphas_squared * VARIANCE + 1 - alphas_squared)
    of_chain = betas * (1 - previous) / (1 - alphas_squared)
    of_chain[0] = (1 - alphas_squared[0]) / alphas_squared[0]  # the decoder's
    excess = previous * betas.square() / (1 - alphas_squared).square() * unknown / of_chain
    excess[0] = unknown[0] / of_chain[0] - 1
    last = alphas_squared[-1] * VARIANCE + 1 - alphas_squared[-1]
    gap = (excess - excess.log1p()).sum(0) + alphas_squared[-1] * MEAN.square() + last - 1 - last.log()
    assert float(bound) == pytest.approx(ENTROPY + float(gap.mean()) / (2 * math.log(2)), abs=1e-3)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_the_integral_of_the_density_is_the_likelihood_in_continuous_time(prediction_type: PredictionType) -> None:
    schedule = VPSchedule()
    process = DiffusionProcess(schedule, prediction_type)
    # Even in the log SNR, where the density is smooth: most of it lies at small times
    ends = schedule.log_snr(schedule.timesteps_at(th.tensor([0.0, 1.0])))
    times = schedule.timesteps_at_log_snr(th.linspace(float(ends[0]), float(ends[1]), 1000))
    x0, noise = draws()
    reconstruction = process.reconstruction_term(gaussian_denoiser(process), x0, noise)
    bound = th.trapezoid(terms_at(process, times), times) + (process.prior_term(x0) + reconstruction).mean()
    # Only the ends leave a gap: alpha^2 / 2 = 2e-5 and the decoder's 1 / (2 SNR) = 5e-5 over the data's variance
    assert float(bound) == pytest.approx(ENTROPY, abs=1e-3)


@pytest.mark.parametrize("name", get_args(DiscreteName))
def test_a_point_mass_and_its_perfect_denoiser_have_no_kl(name: DiscreteName) -> None:
    process = DiffusionProcess(DiscreteSchedule(name, 100), "sample")
    x0, t = th.tensor([0.3, -1.0]).expand(100, 2), th.arange(100)
    terms = process.bound_terms(lambda x, times: x0, x0, t, th.randn(100, 2))
    assert terms[1:].abs().max() < 1e-6
    # The decoder is a Gaussian around the point
    th.testing.assert_close(
        terms[0], process.schedule.sigma(t[0]).div(process.schedule.alpha(t[0])).mul(math.sqrt(2 * math.pi)).log2()
    )


def test_the_prior_term_is_the_kl_divergence_to_the_standard_normal() -> None:
    for schedule in (DiscreteSchedule("quadratic", 10), VPSchedule(beta_max=1.0)):
        x0 = th.randn(5, 4, 2)
        t = schedule.timesteps_at(th.ones(1))
        q = th.distributions.Normal(schedule.alpha(t) * x0, schedule.sigma(t))
        expected = th.distributions.kl_divergence(q, th.distributions.Normal(0.0, 1.0)).mean((1, 2)) / math.log(2)
        th.testing.assert_close(DiffusionProcess(schedule).prior_term(x0), expected)


@pytest.mark.parametrize("name", [*get_args(DiscreteName), "vp"])
def test_the_reconstruction_term_is_the_decoders_density(name: Any) -> None:
    schedule = VPSchedule() if name == "vp" else DiscreteSchedule(name, 50)
    process = DiffusionProcess(schedule, "sample")
    x0, noise, x0_hat = th.randn(3, 6, 2)
    x0_hat = x0 + 0.01 * x0_hat
    t = schedule.timesteps_at(th.zeros(1)).expand(6)
    decoder = th.distributions.Normal(x0_hat, (-schedule.log_snr(t[:1]) / 2).exp())
    expected = -decoder.log_prob(x0).mean(1) / math.log(2)  # type: ignore[no-untyped-call]
    terms = process.reconstruction_term(lambda x, times: x0_hat, x0, noise)
    th.testing.assert_close(terms, expected, rtol=1e-3, atol=1e-3)
    if name != "vp":
        th.testing.assert_close(terms, process.bound_terms(lambda x, times: x0_hat, x0, t, noise))


@pytest.mark.parametrize("schedule", [DiscreteSchedule("linear", 100), VPSchedule()])
def test_fixed_entries_are_seen_clean_and_left_out_of_the_bound(schedule: DiscreteSchedule | VPSchedule) -> None:
    process = DiffusionProcess(schedule)
    x0, noise = th.randn(2, 8, 5, 2)
    t = schedule.timesteps_at(th.linspace(0, 1, 8))
    mask = th.tensor([True, False, False, False, False])[:, None]

    def denoise(x_t: th.Tensor, times: th.Tensor) -> th.Tensor:
        if x_t.shape[1] == 5:
            th.testing.assert_close(x_t[:, 0], x0[:, 0])
        return 0.3 * x_t

    for term in (process.bound_terms, lambda d, x, times, n, m=None: process.reconstruction_term(d, x, n, m)):
        th.testing.assert_close(term(denoise, x0, t, noise, mask), term(denoise, x0[:, 1:], t, noise[:, 1:]))
    th.testing.assert_close(process.prior_term(x0, mask), process.prior_term(x0[:, 1:]))


def test_an_update_that_changes_nothing_changes_no_term_under_the_same_noise() -> None:
    process = DiffusionProcess(DiscreteSchedule("linear", 100), "v_prediction")
    x0, noise, t = th.randn(50, 2), th.randn(50, 2), th.randint(100, (50,))
    before, after = (process.bound_terms(gaussian_denoiser(process), x0, t, noise) for _ in range(2))
    assert th.equal(before, after)
    fresh = process.bound_terms(gaussian_denoiser(process), x0, t, th.randn(50, 2))
    assert float((fresh - before).abs().mean()) > 0.01
