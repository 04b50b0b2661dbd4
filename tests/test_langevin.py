"""The sampler against densities that are known in closed form."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_diffrl import LQL, NCLQL
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler, QGradient, noise_levels

from .envs import box_env


def gradient_of(q_function: "QFunction") -> QGradient:
    """Q-gradient of ``q_function(actions, level)``, by autograd."""

    def gradient(actions: th.Tensor, level: int) -> th.Tensor:
        actions = actions.detach().requires_grad_()
        return th.autograd.grad(q_function(actions, level).sum(), actions)[0]

    return gradient


class QFunction:
    """Q whose Boltzmann density at inverse temperature ``w`` is a Gaussian mixture, smoothed by each level's noise.

    :param means: ``(n_modes, action_dim)``
    :param weights: of the modes
    :param std: of each mode, before smoothing
    :param sigmas: noise added at each level
    """

    def __init__(self, means: list[list[float]], weights: list[float], std: float, w: float, sigmas: list[float]) -> None:
        self.means, self.log_weights = th.tensor(means), th.tensor(weights).log()
        self.std, self.w, self.sigmas = std, w, sigmas

    def __call__(self, actions: th.Tensor, level: int) -> th.Tensor:
        variance = self.std**2 + self.sigmas[level] ** 2
        distances = (actions[:, None] - self.means).square().sum(-1)
        return th.logsumexp(self.log_weights - distances / (2 * variance), dim=1) / self.w


def test_noise_levels_are_geometric() -> None:
    sigmas = noise_levels(4, 1.0, 0.001)
    np.testing.assert_allclose(sigmas, [1.0, 0.1, 0.01, 0.001], rtol=1e-5)


def test_default_steps_are_those_of_the_specification() -> None:
    sampler = LangevinSampler()
    drift = [0.5 * size * sampler.inverse_temperature for size in sampler.step_sizes]
    noise = [math.sqrt(size) for size in sampler.step_sizes]
    np.testing.assert_allclose([drift[0], drift[5], drift[9]], [250, 1.5, 0.025], rtol=0.01)
    np.testing.assert_allclose([noise[0], noise[5], noise[9]], [1.0, 0.077, 0.010], rtol=0.01)


def test_chain_on_a_quadratic_q_samples_its_gaussian() -> None:
    mean = th.tensor([0.2, -0.1])
    precision = th.tensor([[1.0, 0.4], [0.4, 0.8]])
    w, step_size = 100.0, 1e-3
    sampler = LangevinSampler(1, n_steps=600, step_size=step_size, inverse_temperature=w, normalize_grad=False)
    actions = sampler.sample(lambda a, level: (mean - a) @ precision, sampler.draw(20_000, 2))
    np.testing.assert_allclose(actions.mean(0), mean, atol=0.005)
    # Unadjusted Langevin dynamics on a Gaussian is itself Gaussian, its covariance inflated by the step size:
    # the fixed point of S = (I - e w P / 2)^2 S + e I
    inflation = th.linalg.inv(th.eye(2) - step_size * w / 4 * precision)
    np.testing.assert_allclose(th.cov(actions.T), th.linalg.inv(w * precision) @ inflation, atol=5e-4)


def test_histogram_of_a_two_mode_q_is_its_boltzmann_density() -> None:
    w, bins = 20.0, 20
    # Modes of unequal weight near enough to be crossed: chains that never cross would show half and half.
    q_function = QFunction([[-0.3, -0.3], [0.3, 0.3]], [0.75, 0.25], std=0.25, w=w, sigmas=[0.0])
    sampler = LangevinSampler(1, n_steps=1500, step_size=1e-3, inverse_temperature=w, normalize_grad=False)
    actions = sampler.sample(gradient_of(q_function), sampler.draw(20_000, 2))
    x, y = actions.numpy().T
    histogram, edges, _ = np.histogram2d(x, y, bins=bins, range=((-1, 1), (-1, 1)))
    centres = th.as_tensor((edges[1:] + edges[:-1]) / 2, dtype=th.float32)
    density = th.exp(w * q_function(th.cartesian_prod(centres, centres), 0)).view(bins, bins)
    distance = 0.5 * np.abs(histogram / histogram.sum() - (density / density.sum()).numpy()).sum()
    # Sampling noise of this many draws over this many cells is about 0.05; half and half would be 0.25.
    assert distance < 0.08


def test_noise_levels_cross_between_modes_where_plain_langevin_stays() -> None:
    w, std = 20.0, 0.05
    means = [[-0.6, 0.0], [0.6, 0.0]]
    levels = LangevinSampler(10, 1.0, 0.05, n_steps=10, step_size=5e-4, inverse_temperature=w, normalize_grad=False)
    plain = replace(levels, n_levels=1, n_steps=100)
    start = th.tensor(means[0]).repeat(500, 1)

    def share_in_other_mode(sampler: LangevinSampler, sigmas: list[float]) -> float:
        q_function = QFunction(means, [0.5, 0.5], std, w, sigmas)
        draws = ChainDraws(start, sampler.draw(500, 2).noise)
        actions = sampler.sample(gradient_of(q_function), draws)
        distance = (actions[:, None] - q_function.means).norm(dim=-1).amin(dim=1)
        assert distance.mean() < 4 * std  # the chains end in a mode, not between
        return float((actions[:, 0] > 0).float().mean())

    assert share_in_other_mode(plain, [0.0]) == 0.0
    # The last level is the sharp Q itself, as in the critic
    assert 0.3 < share_in_other_mode(levels, [*levels.sigmas.tolist()[:-1], 0.0]) < 0.7


def test_normalised_drift_does_not_depend_on_the_scale_of_q() -> None:
    sampler = LangevinSampler()
    draws = sampler.draw(50, 3)
    mean = th.tensor([0.5, -0.2, 0.1])
    small = sampler.sample(lambda a, level: 1e-3 * (mean - a), draws)
    large = sampler.sample(lambda a, level: 1e3 * (mean - a), draws)
    np.testing.assert_allclose(small, large, atol=1e-3)


def test_actions_stay_in_the_box_under_any_gradient() -> None:
    sampler = LangevinSampler(normalize_grad=False)
    actions = sampler.sample(lambda a, level: 1e20 * th.randn_like(a), sampler.draw(100, 4))
    assert actions.abs().max() <= 1.0


def test_particles_keep_the_best_by_the_smallest_critic() -> None:
    model = NCLQL("MlpPolicy", box_env(), n_particles=7, policy_kwargs={"net_arch": [16, 16]}, n_langevin_steps=1, n_levels=2)
    obs = th.randn(5, 5)
    policy, draws = model.policy, model.policy.sampler.draw(7 * 5, 3)
    chosen = policy.sample_actions(obs, draws)
    # Every particle by itself, from its own share of the draws
    policy.sampler = replace(policy.sampler, n_particles=1)
    rows = [slice(5 * i, 5 * (i + 1)) for i in range(7)]
    particles = th.stack([policy.sample_actions(obs, ChainDraws(draws.start[i], draws.noise[:, :, i])) for i in rows])
    values = th.stack([th.cat(model.critic(obs, actions), dim=1).amin(dim=1) for actions in particles])
    best = values.argmax(dim=0)
    assert len(set(best.tolist())) > 1
    th.testing.assert_close(chosen, particles[best, th.arange(5)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_levels": 0}, "n_levels"),
        ({"n_levels": 2.5}, "n_levels"),
        ({"sigma_min": 0.1, "sigma_max": 0.1}, "sigma_min"),
        ({"sigma_min": 0.2}, "sigma_min"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": -1e-4}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"inverse_temperature": 0.0}, "inverse_temperature"),
        ({"n_langevin_steps": 0}, "n_langevin_steps"),
        ({"n_particles": 0}, "n_particles"),
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"n_levels": None}, "n_levels"),
        ({"n_levels": "3"}, "n_levels"),
        ({"n_particles": 2.0}, "n_particles"),
        ({"step_size": "small"}, "step_size"),
        ({"sigma_max": None}, "sigma_max"),
        ({"policy_kwargs": {"n_critics": "2"}}, "n_critics"),
    ],
)
def test_an_argument_outside_its_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NCLQL("MlpPolicy", box_env(), **arguments)


def test_lql_is_one_level_of_constant_step() -> None:
    sampler = LQL("MlpPolicy", box_env(), n_langevin_steps=7, step_size=2e-3).policy.sampler
    assert (sampler.n_levels, sampler.n_steps) == (1, 7)
    assert sampler.step_sizes == pytest.approx([2e-3])
