"""Langevin dynamics on a critic: noise levels, step sizes and the sampling chain.

Everything here is a pure function of a Q-gradient, a start and a noise tensor. The critic, and how its gradient is
computed, are the caller's business (see ``sb3_diffrl.lql.gradients``).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch as th

from sb3_diffrl.common import check_count, check_positive

#: ``q_gradient(actions, level)``: the gradient of the critics' sum at ``actions`` ``(batch, action_dim)`` for one noise level, same
#: shape as ``actions``.
QGradient = Callable[[th.Tensor, int], th.Tensor]

# Keeps the normalised drift finite where the gradient vanishes; the reference implementation's value.
GRADIENT_EPS = 1e-8


class ChainDraws(NamedTuple):
    """All the randomness of one run of the chain, so that a run can be replayed.

    :param start: first actions, uniform in the scaled box, ``(batch, action_dim)``
    :param noise: standard normal, ``(n_levels, n_steps, batch, action_dim)``
    """

    start: th.Tensor
    noise: th.Tensor


class UpdateDraws(NamedTuple):
    """All the randomness of one update, so that an update can be replayed.

    :param chain: draws of the chain that samples the next actions
    :param levels: noise level of each row in the smoothing loss, ``(batch,)``; ``None`` without smoothing
    :param noise: standard normal noise on the actions there, ``(batch, action_dim)``; ``None`` without smoothing
    """

    chain: ChainDraws
    levels: th.Tensor | None = None
    noise: th.Tensor | None = None


def noise_levels(n_levels: int, sigma_max: float, sigma_min: float) -> th.Tensor:
    """Geometric noise levels, from the smoothest to the sharpest.

    :return: ``(n_levels,)``, from ``sigma_max`` (level 0) to ``sigma_min`` (level ``n_levels - 1``), in units of the
        scaled action box [-1, 1]; a single level is ``sigma_max``
    """
    return th.exp(th.linspace(math.log(sigma_max), math.log(sigma_min), n_levels))


@dataclass(frozen=True)
class LangevinSampler:
    """Unadjusted Langevin dynamics, annealed over noise levels.

    One step at level l is (https://arxiv.org/abs/2602.07873)::

        a <- clip(a + step_l / 2 * w * g_l(a) + sqrt(step_l) * z, -1, 1)
        step_l = step_size * (sigma_l / sigma_min)^2

    where z is standard normal and g_l the Q-gradient at the level, divided by its own L2 norm when ``normalize_grad`` is on.
    With one level this is plain Langevin dynamics of constant step size (LQL).

    :param n_levels: number of noise levels L
    :param sigma_max: largest noise scale, in units of the scaled action box [-1, 1]
    :param sigma_min: smallest noise scale, same units
    :param n_steps: Langevin steps at each level
    :param step_size: ε at the last level
    :param inverse_temperature: w of the target density exp(w Σ Qᵢ). With ``normalize_grad`` it is a step
        length, not a temperature.
    :param normalize_grad: divide each sample's gradient by its L2 norm
    :param n_particles: chains run for each observation, of which the best by the smallest critic is kept
    :raises ValueError: if an argument is outside its range; the message names it
    """

    n_levels: int = 10
    sigma_max: float = 0.1
    sigma_min: float = 0.001
    n_steps: int = 2
    step_size: float = 1e-4
    inverse_temperature: float = 500.0
    normalize_grad: bool = True
    n_particles: int = 1

    def __post_init__(self) -> None:
        for name, label in (("n_levels", "n_levels"), ("n_steps", "n_langevin_steps"), ("n_particles", "n_particles")):
            object.__setattr__(self, name, check_count(label, getattr(self, name)))
        for name in ("step_size", "inverse_temperature", "sigma_min", "sigma_max"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"`sigma_min` must be smaller than `sigma_max`, got sigma_min={self.sigma_min!r} and "
                f"sigma_max={self.sigma_max!r}: the chain anneals from sigma_max down to sigma_min."
            )

    @property
    def sigmas(self) -> th.Tensor:
        """Noise scale of each level, ``(n_levels,)``, from the smoothest to the sharpest."""
        return noise_levels(self.n_levels, self.sigma_max, self.sigma_min)

    @functools.cache  # noqa: B019 - samplers are few and small
    def sigmas_on(self, device: th.device) -> th.Tensor:
        """``sigmas`` on a device, copied there once."""
        return self.sigmas.to(device)

    @property
    def step_sizes(self) -> list[float]:
        """Step size of each level; the last is ``step_size``."""
        sigmas = self.sigmas
        return [float(size) for size in self.step_size * (sigmas / sigmas[-1]) ** 2]

    def draw(
        self,
        batch_size: int,
        action_dim: int,
        device: th.device | str = "cpu",
        generator: th.Generator | None = None,
    ) -> ChainDraws:
        """Draw the start and the noise of ``batch_size`` independent chains.

        :param generator: source of randomness, torch's global one if ``None``
        """
        start = th.rand(batch_size, action_dim, device=device, generator=generator).mul_(2).sub_(1)
        shape = (self.n_levels, self.n_steps, batch_size, action_dim)
        return ChainDraws(start, th.randn(shape, device=device, generator=generator))

    def sample(self, q_gradient: QGradient, draws: ChainDraws) -> th.Tensor:
        """Run the chain.

        :param q_gradient: gradient of the critics' sum with respect to the actions
        :param draws: start and noise, see ``ChainDraws``
        :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
        """
        actions, noise = draws
        for level, step_size in enumerate(self.step_sizes):
            drift_scale = 0.5 * step_size * self.inverse_temperature
            for step_noise in noise[level] * math.sqrt(step_size):
                drift = q_gradient(actions, level)
                if self.normalize_grad:
                    drift = drift / (th.linalg.vector_norm(drift, dim=-1, keepdim=True) + GRADIENT_EPS)
                actions = (actions + drift * drift_scale + step_noise).clip(-1.0, 1.0)
        return actions
