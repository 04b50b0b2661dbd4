"""The solvers against closed forms on Gaussian data and against diffusers."""

from typing import Any, Literal, get_args

import pytest
import torch as th
from diffusers import DDIMScheduler, DDPMScheduler

from sb3_diffrl.diffusion import (
    Denoise,
    DiffusionProcess,
    DiscreteSchedule,
    Fixed,
    NoiseSchedule,
    PredictionType,
    ScheduleName,
    Solver,
    VPSchedule,
    make_schedule,
)

DiscreteName = Literal["linear", "squaredcos_cap_v2"]

# Untyped: diffusers' decorators hide what a scheduler has
DDIM: Any = DDIMScheduler
DDPM: Any = DDPMScheduler

MEAN = th.tensor([0.7, -0.4])
COVARIANCE = th.tensor([[1.0, 0.3], [0.3, 0.25]])


def gaussian_denoiser(process: DiffusionProcess, mean: th.Tensor = MEAN, covariance: th.Tensor = COVARIANCE) -> Denoise:
    """The exact denoiser of Gaussian data, ``E[x_0 | x_t]`` in the process's prediction type. All rows share one time."""

    def denoise(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        alpha, sigma = process.schedule.alpha(t[:1]), process.schedule.sigma(t[:1])
        gain = alpha * th.linalg.solve(alpha**2 * covariance + sigma**2 * th.eye(len(mean)), covariance)
        x0 = mean + (x_t - alpha * mean) @ gain
        return process.target(x0, (x_t - alpha * x0) / sigma, t)

    return denoise


def standardised_draws(n_steps: int) -> tuple[th.Tensor, th.Tensor]:
    """Starts ``(n, 2)`` and noise ``(n_steps, n, 2)`` that have, over the n rows, mean 0 and covariance I exactly, all together.

    With an affine denoiser the samples are an affine map of them, so that theirs are the solver's exact moments.
    """
    dim = 2 * (1 + n_steps)
    # (2 dim, dim) -> (2 dim, 1 + n_steps, 2)
    points = (th.cat([th.eye(dim), -th.eye(dim)]) * dim**0.5).view(2 * dim, 1 + n_steps, 2)
    return points[:, 0], points[:, 1:].transpose(0, 1)


def moments(samples: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Mean and covariance over the rows."""
    return samples.mean(0), th.cov(samples.T, correction=0)


def some_denoiser(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
    """Any smooth function of both arguments, exact for no data."""
    return th.tanh(1.5 * x_t.roll(1, dims=-1) - 0.3 * x_t + t[:, None] / 1000)


@pytest.mark.parametrize("solver", get_args(Solver))
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_solvers_reproduce_a_gaussian(name: ScheduleName, prediction_type: PredictionType, solver: Solver) -> None:
    schedule = make_schedule(name, 1000)
    process = DiffusionProcess(schedule, prediction_type)

    def sample_moments(n_steps: int) -> tuple[th.Tensor, th.Tensor]:
        start, noise = standardised_draws(n_steps)
        return moments(process.sample(gaussian_denoiser(process), start, n_steps, solver, noise))

    (_, coarse), (mean, fine) = sample_moments(100), sample_moments(200)
    # The start ignores what is left of the data: alpha times the mean, and alpha^2 times (covariance - I).
    left = float(schedule.alpha(schedule.inference_timesteps(1)))
    th.testing.assert_close(mean, MEAN, rtol=0, atol=left + 1e-3)
    # Both solvers are of first order: twice the steps, half the error, and two runs extrapolate to what is left at second order,
    # about the square of the error (0.05 for DDPM, whose posterior lacks what the denoiser does not know of x_0).
    assert (fine - COVARIANCE).norm() < 0.6 * (coarse - COVARIANCE).norm() < 0.06
    th.testing.assert_close(2 * fine - coarse, COVARIANCE, rtol=0, atol=left**2 + 0.005)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_one_step_goes_to_the_predicted_data(name: ScheduleName) -> None:
    # The fault of a solver that ends at its last training time: its last step would leave noise, or do nothing
    process = DiffusionProcess(make_schedule(name, 10), "sample")
    data = th.randn(4, 3)
    for solver in get_args(Solver):
        th.testing.assert_close(process.sample(lambda x, t: data, th.randn(4, 3), 1, solver), data)
        th.testing.assert_close(process.sample(lambda x, t: data, th.randn(4, 3), 7, solver), data)


@pytest.mark.parametrize("clip_sample", [None, 0.8])
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n_steps", [4, 20, 100])
class TestAgainstDiffusers:
    """Same start and same noise in both. The noise levels are made the same to the last bit (they are compared in
    test_diffusion_schedules.py), so that in double precision only the solvers are compared.
    """

    @staticmethod
    def processes(
        reference: type, name: DiscreteName, prediction_type: PredictionType, clip_sample: float | None
    ) -> tuple[Any, Any]:
        scheduler = reference(
            num_train_timesteps=100,
            clip_sample=clip_sample is not None,
            clip_sample_range=clip_sample or 1.0,
            prediction_type=prediction_type,
            timestep_spacing="trailing",
        )
        schedule = DiscreteSchedule(name, 100)
        scheduler.alphas_cumprod = schedule.log_snr(th.arange(100)).double().sigmoid()
        return scheduler, DiffusionProcess(schedule, prediction_type, clip_sample)

    @staticmethod
    def assert_same(ours: th.Tensor, theirs: th.Tensor) -> None:
        # Single precision would be off by 1e-7 at best. The first steps divide by alpha >= 5e-4.
        th.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_ddim(
        self, n_steps: int, name: DiscreteName, prediction_type: PredictionType, clip_sample: float | None, eta: float
    ) -> None:
        scheduler, process = self.processes(DDIM, name, prediction_type, clip_sample)
        start, noise = th.randn(6, 3, dtype=th.float64), th.randn(n_steps, 6, 3, dtype=th.float64)
        x = start
        scheduler.set_timesteps(n_steps)
        for t, step_noise in zip(scheduler.timesteps, noise, strict=True):
            output = some_denoiser(x, t.expand(6))
            x = scheduler.step(
                output, int(t), x, eta=eta, use_clipped_model_output=True, variance_noise=step_noise if eta else None
            ).prev_sample
        solver: Solver = "ddpm" if eta else "ddim"
        self.assert_same(process.sample(some_denoiser, start, n_steps, solver, noise), x)

    def test_ddpm(self, n_steps: int, name: DiscreteName, prediction_type: PredictionType, clip_sample: float | None) -> None:
        scheduler, process = self.processes(DDPM, name, prediction_type, clip_sample)
        start = th.randn(6, 3, dtype=th.float64)
        x, generator = start, th.Generator().manual_seed(1)
        scheduler.set_timesteps(n_steps)
        for t in scheduler.timesteps:
            x = scheduler.step(some_denoiser(x, t.expand(6)), int(t), x, generator=generator).prev_sample
        replayed = th.Generator().manual_seed(1)
        ours = process.sample(some_denoiser, start, n_steps, "ddpm", generator=replayed)
        self.assert_same(ours, x)


def test_ddpm_is_diffusers_where_the_steps_do_not_divide_the_training_steps() -> None:
    scheduler = DDPM(num_train_timesteps=1000, clip_sample=False)
    process = DiffusionProcess(DiscreteSchedule("linear", 1000))
    # diffusers takes the neighbour in the list, not a rounded distance, only for times that are given to it
    scheduler.set_timesteps(timesteps=process.schedule.inference_timesteps(7).tolist())
    x = start = th.randn(6, 3)
    generator = th.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(some_denoiser(x, t.expand(6)), int(t), x, generator=generator).prev_sample
    ours = process.sample(some_denoiser, start, 7, "ddpm", generator=th.Generator().manual_seed(1))
    th.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_noising_and_targets_are_diffusers(prediction_type: PredictionType) -> None:
    scheduler = DDPM(num_train_timesteps=1000, prediction_type=prediction_type)
    process = DiffusionProcess(DiscreteSchedule("linear", 1000), prediction_type)
    x0, noise, t = th.randn(50, 4, 3), th.randn(50, 4, 3), th.randint(1000, (50,))
    th.testing.assert_close(process.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    targets = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}
    th.testing.assert_close(process.target(x0, noise, t), targets[prediction_type], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_the_target_splits_into_data_and_noise(name: ScheduleName, prediction_type: PredictionType) -> None:
    schedule: NoiseSchedule = make_schedule(name, 100).double()
    process = DiffusionProcess(schedule, prediction_type)
    x0, noise = th.randn(2, 100, 4, 3, dtype=th.float64)
    t = schedule.timesteps_at(th.linspace(0, 1, 100, dtype=th.float64))
    x_t = process.add_noise(x0, noise, t)
    x0_hat, noise_hat = process.split(x_t, process.target(x0, noise, t), t)
    # alpha^2 + sigma^2 = 1 holds to single precision, and alpha >= 0.0005
    th.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-5)
    th.testing.assert_close(noise_hat, noise, rtol=0, atol=1e-5)
    # Clipped, the two still make up x_t
    clipped = DiffusionProcess(schedule, prediction_type, clip_sample=0.5)
    x0_hat, noise_hat = clipped.split(x_t, process.target(x0, noise, t), t)
    th.testing.assert_close(x0_hat, x0.clamp(-0.5, 0.5), rtol=0, atol=1e-5)
    th.testing.assert_close(process.add_noise(x0_hat, noise_hat, t), x_t)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_clipping_bounds_the_samples(name: ScheduleName) -> None:
    process = DiffusionProcess(make_schedule(name, 50), clip_sample=0.3)
    for solver in get_args(Solver):
        samples = process.sample(some_denoiser, th.randn(100, 3), 10, solver)
        assert samples.abs().max() == pytest.approx(0.3)


@pytest.mark.parametrize("solver", get_args(Solver))
def test_fixed_entries_are_held_at_every_step_and_in_the_result(solver: Solver) -> None:
    process = DiffusionProcess(VPSchedule())
    mask = th.zeros(5, 1, dtype=th.bool)
    mask[0] = True  # the first step of a trajectory of five
    values = th.randn(8, 1, 2)  # a state for each row
    seen: list[th.Tensor] = []

    def denoise(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        seen.append(x_t)
        return 0.5 * x_t + x_t[:, :1]

    samples = process.sample(denoise, th.randn(8, 5, 2), 6, solver, fixed=Fixed(mask, values))
    assert len(seen) == 6
    for x in [*seen, samples]:
        assert th.equal(x[:, :1], values)
    assert not th.isclose(samples[:, 1:], values).any()


def test_inpainting_with_the_conditional_denoiser_samples_the_conditional() -> None:
    process = DiffusionProcess(DiscreteSchedule("squaredcos_cap_v2", 400), "v_prediction")
    known = 1.5
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]

    def denoise(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        # The exact denoiser of x[1] given the clean x[0]
        alpha, sigma = process.schedule.alpha(t)[:, None], process.schedule.sigma(t)[:, None]
        mean, variance = MEAN[1] + slope * (x_t[:, :1] - MEAN[0]), COVARIANCE[1, 1] - slope * COVARIANCE[0, 1]
        x1 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t[:, 1:] - alpha * mean)
        x0 = th.cat([x_t[:, :1], x1], dim=1)
        return process.target(x0, (x_t - alpha * x0) / sigma, t)

    fixed = Fixed(th.tensor([True, False]), th.tensor([known, 0.0]))
    samples = process.sample(denoise, standardised_draws(0)[0], 400, fixed=fixed)[:, 1]
    # The points' second coordinate has mean 0 and variance 1
    assert float(samples.mean()) == pytest.approx(float(MEAN[1] + slope * (known - MEAN[0])), abs=2e-3)
    assert float(samples.var(correction=0)) == pytest.approx(float(COVARIANCE[1, 1] - slope * COVARIANCE[0, 1]), abs=2e-3)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("solver", get_args(Solver))
def test_guidance_by_an_exact_likelihood_samples_the_posterior(solver: Solver, prediction_type: PredictionType) -> None:
    n_steps = 200
    process = DiffusionProcess(DiscreteSchedule("squaredcos_cap_v2", 400), prediction_type)
    observed, variance = 0.5, 0.2  # y = x[0] + N(0, variance)

    def guidance(x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        # log p(y | x_t): y is Gaussian around E[x_0 | x_t][0] with the denoiser's uncertainty added
        alpha, sigma = process.schedule.alpha(t[:1]), process.schedule.sigma(t[:1])
        gain = alpha * th.linalg.solve(alpha**2 * COVARIANCE + sigma**2 * th.eye(2), COVARIANCE)
        spread = (COVARIANCE - alpha * gain.T @ COVARIANCE)[0, 0] + variance
        x0 = MEAN[0] + (x_t - alpha * MEAN) @ gain[:, 0]
        gradient: th.Tensor = ((observed - x0) / spread)[:, None] * gain[:, 0]
        return gradient

    start, noise = standardised_draws(n_steps)
    samples = process.sample(gaussian_denoiser(process), start, n_steps, solver, noise, guidance=guidance)
    mean, covariance = moments(samples)
    kalman = COVARIANCE[:, 0] / (COVARIANCE[0, 0] + variance)
    th.testing.assert_close(mean, MEAN + kalman * (observed - MEAN[0]), rtol=0, atol=3e-3)
    th.testing.assert_close(covariance, COVARIANCE - th.outer(kalman, COVARIANCE[0]), rtol=0, atol=8e-3)


@pytest.mark.parametrize("solver", get_args(Solver))
def test_the_same_start_and_noise_give_the_same_sample_to_the_bit(solver: Solver) -> None:
    process = DiffusionProcess(VPSchedule(), "v_prediction")
    start, noise = th.randn(5, 3), th.randn(9, 5, 3)
    first = process.sample(some_denoiser, start, 9, solver, noise)
    th.randn(17)
    assert th.equal(first, process.sample(some_denoiser, start, 9, solver, noise))
    drawn = [process.sample(some_denoiser, start, 9, solver, generator=th.Generator().manual_seed(3)) for _ in range(2)]
    assert th.equal(*drawn)
    # The noise matters to one solver alone
    assert th.equal(first, process.sample(some_denoiser, start, 9, solver, noise + 1)) == (solver == "ddim")


def test_gradients_flow_through_the_sampler_to_its_start() -> None:
    process = DiffusionProcess(VPSchedule())
    start = th.randn(1, 2).requires_grad_()
    sample = process.sample(gaussian_denoiser(process), start, 20)
    (gradient,) = th.autograd.grad(sample[0, 0], start)
    # The map is affine: a finite step of any size has its slope
    moved = process.sample(gaussian_denoiser(process), start.detach() + th.tensor([1.0, 0.0]), 20)
    assert float((moved - sample.detach())[0, 0]) == pytest.approx(float(gradient[0, 0]), rel=1e-3)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_denoising_loss_is_the_mean_square_over_free_entries(prediction_type: PredictionType) -> None:
    process = DiffusionProcess(DiscreteSchedule("linear", 100), prediction_type)
    x0, noise, t = th.randn(6, 4, 2), th.randn(6, 4, 2), th.randint(100, (6,))
    mask = th.tensor([True, False, False, False])[:, None]

    def denoise(x_t: th.Tensor, times: th.Tensor) -> th.Tensor:
        # Free entries off by 2, fixed ones by anything
        th.testing.assert_close(x_t[:, 0], x0[:, 0])
        return process.target(x0, noise, times) + th.where(mask, 100.0, 2.0)

    th.testing.assert_close(process.denoising_loss(denoise, x0, t, noise, mask), th.full((6,), 4.0), rtol=1e-4, atol=0)
    whole = process.denoising_loss(lambda x, t: process.target(x0, noise, t) + th.arange(2.0), x0, t, noise)
    th.testing.assert_close(whole, th.full((6,), 0.5), rtol=1e-4, atol=0)


def test_an_argument_outside_its_range_is_named() -> None:
    schedule = VPSchedule()
    process = DiffusionProcess(schedule)
    with pytest.raises(ValueError, match="prediction_type"):
        DiffusionProcess(schedule, "eps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_sample"):
        DiffusionProcess(schedule, clip_sample=0.0)
    with pytest.raises(ValueError, match="solver"):
        process.sample(some_denoiser, th.randn(2, 3), 5, "heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise"):
        process.sample(some_denoiser, th.randn(2, 3), 5, "ddpm", th.randn(4, 2, 3))
    with pytest.raises(ValueError, match="num_inference_steps"):
        process.sample(some_denoiser, th.randn(2, 3), 0)
