"""Loss and gradient over the times."""

import pytest
import torch as th

from sb3_diffrl.diffusion import DiffusionProcess, make_schedule
from sb3_diffrl.timesteps import timestep_statistics


def test_a_denoiser_with_one_weight_has_the_moments_of_its_gaussian_noise() -> None:
    """Data 0, noise predicted as ``w x_t``: the loss is ``e^2 (w sigma - 1)^2``, its gradient ``2 sigma (w sigma - 1) e^2``."""
    process = DiffusionProcess(make_schedule("linear", 100))
    w, times = th.tensor(0.5, requires_grad=True), th.tensor([3, 50, 99])
    measured = timestep_statistics(lambda x_t, t: w * x_t, [w], process, th.zeros(600, 1), times, th.Generator().manual_seed(0))
    sigma = process.schedule.sigma(times)
    # e^2 is chi-squared: mean 1, variance 2
    th.testing.assert_close(measured.loss, (0.5 * sigma - 1).square(), rtol=0.15, atol=0)
    gradient = (2 * sigma * (0.5 * sigma - 1)).abs()
    th.testing.assert_close(measured.gradient_norm, gradient, rtol=0.15, atol=0)
    th.testing.assert_close(measured.gradient_std, gradient * 2**0.5, rtol=0.25, atol=0)
    assert w.grad is None


def test_one_row_has_no_variance() -> None:
    process = DiffusionProcess(make_schedule("linear", 10))
    with pytest.raises(ValueError, match="two rows"):
        timestep_statistics(lambda x_t, t: x_t, [th.ones(1, requires_grad=True)], process, th.zeros(1, 1), th.tensor([0]))
