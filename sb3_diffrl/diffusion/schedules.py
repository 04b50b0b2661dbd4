"""Noise schedules: how much of the data is left in ``x_t = alpha(t) x_0 + sigma(t) eps`` at each time.

All are variance preserving, ``alpha^2 + sigma^2 = 1``, so that a schedule is its log signal-to-noise ratio.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch as th
from torch import nn

ScheduleName = Literal["linear", "squaredcos_cap_v2", "quadratic", "vp"]

# The number of steps that beta_start and beta_end are given for, as in DDPM and diffusers.
REFERENCE_STEPS = 1000


def first_of_equal_rows(t: th.Tensor) -> th.Tensor:
    """The first row alone of a tensor that repeats one row without copying it (``expand``), the tensor itself otherwise.

    When sampling, all rows share one time: what depends on the time alone is then computed once, not once per row.
    """
    return t[:1] if t.stride(0) == 0 else t


class BoundCoefficients(NamedTuple):
    """What turns a squared noise error per dimension into a term of the variational bound: ``weight * error + offset``, in nats.

    :param weight: ``(batch,)``
    :param offset: ``(batch,)``
    """

    weight: th.Tensor
    offset: th.Tensor


class NoiseSchedule(nn.Module, ABC):
    """How noisy the data is at each time.

    :param num_train_timesteps: number T of discrete times 0 .. T - 1, or ``None`` in continuous time
    """

    _place: th.Tensor

    def __init__(self, num_train_timesteps: int | None) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        # Follows the module to its device, for schedules that hold no other tensor
        self.register_buffer("_place", th.empty(0), persistent=False)

    @property
    def device(self) -> th.device:
        """Where the schedule computes."""
        return self._place.device

    @abstractmethod
    def alpha(self, t: th.Tensor) -> th.Tensor:
        """Share of the data at times ``t``, same shape as ``t``."""

    @abstractmethod
    def sigma(self, t: th.Tensor) -> th.Tensor:
        """Standard deviation of the noise at times ``t``, same shape as ``t``."""

    @abstractmethod
    def log_snr(self, t: th.Tensor) -> th.Tensor:
        """``log(alpha(t)^2 / sigma(t)^2)``, same shape as ``t``; falls as ``t`` grows."""

    @abstractmethod
    def timesteps_at(self, fraction: th.Tensor) -> th.Tensor:
        """The times at a fraction in [0, 1] of the way from the least to the largest noise, same shape as ``fraction``.

        A uniform fraction gives the uniform training distribution, any other density on [0, 1] another one.

        :return: int64 in 0 .. T - 1, or float in [``t_min``, 1] in continuous time
        """

    @abstractmethod
    def timesteps_at_log_snr(self, log_snr: th.Tensor) -> th.Tensor:
        """The times that are nearest to the given log signal-to-noise ratios, same shape; the inverse of ``log_snr``."""

    @abstractmethod
    def inference_timesteps(self, num_inference_steps: int) -> th.Tensor:
        """The times at which a sampler of that many steps asks the denoiser.

        :return: ``(num_inference_steps,)``, descending from the noisiest time; the step after the last one goes to clean data
        :raises ValueError: if there are fewer than one or, in discrete time, more than T steps
        """

    @abstractmethod
    def network_time(self, t: th.Tensor) -> th.Tensor:
        """What a denoiser's time embedding is given: float in (0, 1], 1 at the noisiest, same shape as ``t``."""

    @abstractmethod
    def bound_coefficients(self, t: th.Tensor) -> BoundCoefficients:
        """Weights of the variational bound, see ``DiffusionProcess.bound_terms``."""

    def sample_timesteps(self, n: int, generator: th.Generator | None = None) -> th.Tensor:
        """``n`` training times, uniform.

        :param generator: source of randomness on the schedule's device, torch's global one if ``None``
        :return: ``(n,)``, int64 in 0 .. T - 1, or float in [``t_min``, 1] in continuous time
        """
        return self.timesteps_at(th.rand(n, device=self.device, generator=generator))


class DiscreteSchedule(NoiseSchedule):
    """T discrete noise levels, from ``beta_t``, the share of the variance that is replaced by noise in step t (DDPM, 2006.11239).

    ======================  ===========================================================================  ====================
    name                    rule                                                                         diffusers' name
    ======================  ===========================================================================  ====================
    ``linear``              beta linear from ``beta_start`` to ``beta_end`` (DDPM)                       ``linear``
    ``quadratic``           sqrt(beta) linear between their roots (DDIM, 2010.02502)                     ``scaled_linear``
    ``squaredcos_cap_v2``   alpha^2 a squared cosine, beta at most 0.999 (Improved DDPM, 2102.09672)     ``squaredcos_cap_v2``
    ======================  ===========================================================================  ====================

    ``beta_start`` and ``beta_end`` are those of 1000 steps. With another ``num_train_timesteps`` the same curve is read at as many
    even steps, so that the last time is always (nearly) pure noise; diffusers keeps the betas, and 100 steps of its default
    ``linear`` still hold 36% of the data's variance at the end.

    :param name: the rule
    :param num_train_timesteps: number T of noise levels
    :param beta_start: first beta of 1000 steps, unused by ``squaredcos_cap_v2``
    :param beta_end: last beta of 1000 steps, likewise
    :raises ValueError: if an argument is outside its range; the message names it
    """

    alphas: th.Tensor
    sigmas: th.Tensor
    log_snrs: th.Tensor
    bound_weights: th.Tensor
    bound_offsets: th.Tensor

    def __init__(
        self,
        name: Literal["linear", "squaredcos_cap_v2", "quadratic"],
        num_train_timesteps: int,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be at least 1, got {num_train_timesteps!r}.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"`beta_start` and `beta_end` must satisfy 0 < start <= end < 1, got {beta_start!r} and {beta_end!r}.")
        super().__init__(num_train_timesteps)
        self.name = name
        # In double precision: 1 - alpha^2 cancels at the first times.
        log_alphas_squared = _log_alphas_squared(name, num_train_timesteps, beta_start, beta_end)
        log_snrs = log_alphas_squared - th.log(-th.expm1(log_alphas_squared))
        # The first time is the decoder's, a Gaussian of precision SNR; the others lead to the time before them
        # (VDM, 2107.00630, eq. 14).
        weights = th.cat([th.ones(1, dtype=th.float64), th.expm1(log_snrs[:-1] - log_snrs[1:])]) / 2
        offsets = th.zeros_like(weights)
        offsets[0] = (math.log(2 * math.pi) - log_snrs[0]) / 2
        tables = {
            "alphas": th.exp(log_alphas_squared / 2),
            "sigmas": th.sqrt(-th.expm1(log_alphas_squared)),
            "log_snrs": log_snrs,
            "bound_weights": weights,
            "bound_offsets": offsets,
        }
        for key, table in tables.items():
            self.register_buffer(key, table.float(), persistent=False)

    @property
    def _n_times(self) -> int:
        return len(self.alphas)

    def alpha(self, t: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return self.alphas[t]

    def sigma(self, t: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return self.sigmas[t]

    def log_snr(self, t: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return self.log_snrs[t]

    def timesteps_at(self, fraction: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return (fraction * self._n_times).long().clamp_(0, self._n_times - 1)

    def timesteps_at_log_snr(self, log_snr: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        middles = (self.log_snrs[1:] + self.log_snrs[:-1]) / -2
        return th.searchsorted(middles, -log_snr.to(middles))

    def inference_timesteps(self, num_inference_steps: int) -> th.Tensor:
        """Evenly spaced from T - 1 down: diffusers' ``timestep_spacing="trailing"``."""
        if not 1 <= num_inference_steps <= self._n_times:
            raise ValueError(
                f"`num_inference_steps` must be between 1 and `num_train_timesteps` = {self._n_times}, got {num_inference_steps!r}."
            )
        steps = th.arange(num_inference_steps, 0, -1, device=self.device, dtype=th.float64)
        return (steps * self._n_times / num_inference_steps).round().long() - 1

    def network_time(self, t: th.Tensor) -> th.Tensor:
        """``(t + 1) / T``"""
        return ((first_of_equal_rows(t) + 1) / self._n_times).expand(t.shape)

    def bound_coefficients(self, t: th.Tensor) -> BoundCoefficients:
        """See ``NoiseSchedule``."""
        return BoundCoefficients(self.bound_weights[t], self.bound_offsets[t])


def _log_alphas_squared(name: str, n_times: int, beta_start: float, beta_end: float) -> th.Tensor:
    """``log(alpha_t^2)`` of the discrete schedules, ``(n_times,)``, double precision."""
    if name == "squaredcos_cap_v2":
        angles = (th.linspace(0, 1, n_times + 1, dtype=th.float64) + 0.008) / 1.008 * math.pi / 2
        alphas_squared = angles.cos().square()
        # (n_times,) beta_t = 1 - alpha_t^2 / alpha_{t-1}^2 <= 0.999
        return (alphas_squared[1:] / alphas_squared[:-1]).clamp(min=1 - 0.999).log().cumsum(0)
    if name == "linear":
        betas = th.linspace(beta_start, beta_end, REFERENCE_STEPS, dtype=th.float64)
    elif name == "quadratic":
        betas = th.linspace(math.sqrt(beta_start), math.sqrt(beta_end), REFERENCE_STEPS, dtype=th.float64).square()
    else:
        raise ValueError(f"Unknown noise schedule {name!r}, choose 'linear', 'squaredcos_cap_v2', 'quadratic' or 'vp'.")
    # (REFERENCE_STEPS + 1,), from clean data on
    curve = nn.functional.pad(th.log1p(-betas).cumsum(0), (1, 0))
    position = th.arange(1, n_times + 1, dtype=th.float64) * REFERENCE_STEPS / n_times
    below = position.long().clamp(max=REFERENCE_STEPS - 1)
    return th.lerp(curve[below], curve[below + 1], position - below)


class VPSchedule(NoiseSchedule):
    """The variance-preserving diffusion in continuous time (Score SDE, 2011.13456, eq. 33): ``t`` in [``t_min``, 1] and::

        log alpha(t) = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2

    :param beta_min: noise rate at t = 0
    :param beta_max: noise rate at t = 1
    :param t_min: smallest training time; ``sigma(t_min)`` is the noise that a model cannot see below
    :raises ValueError: if an argument is outside its range; the message names it
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"`beta_min` and `beta_max` must satisfy 0 < min <= max, got {beta_min!r} and {beta_max!r}.")
        if not 0 < t_min < 1:
            raise ValueError(f"`t_min` must be between 0 and 1, got {t_min!r}.")
        super().__init__(None)
        self.name = "vp"
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def _log_alpha_squared(self, t: th.Tensor) -> th.Tensor:
        return t * (t * (-(self.beta_max - self.beta_min) / 2) - self.beta_min)

    def alpha(self, t: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return th.exp(self._log_alpha_squared(t) / 2)

    def sigma(self, t: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return th.sqrt(-th.expm1(self._log_alpha_squared(t)))

    def log_snr(self, t: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        log_alpha_squared = self._log_alpha_squared(t)
        return log_alpha_squared - th.log(-th.expm1(log_alpha_squared))

    def timesteps_at(self, fraction: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        return fraction * (1 - self.t_min) + self.t_min

    def timesteps_at_log_snr(self, log_snr: th.Tensor) -> th.Tensor:
        """See ``NoiseSchedule``."""
        # The positive root of (beta_max - beta_min) t^2 / 2 + beta_min t = -log(alpha^2), in the form that does not cancel
        target = nn.functional.softplus(-log_snr)
        root = th.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * target)
        return (2 * target / (self.beta_min + root)).clamp(self.t_min, 1.0)

    def inference_timesteps(self, num_inference_steps: int) -> th.Tensor:
        """Uniform from 1 down to one step above ``t_min``."""
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps!r}.")
        return th.linspace(1.0, self.t_min, num_inference_steps + 1, device=self.device)[:-1]

    def network_time(self, t: th.Tensor) -> th.Tensor:
        """``t`` itself"""
        return t

    def bound_coefficients(self, t: th.Tensor) -> BoundCoefficients:
        """``-d log_snr / dt / 2 = beta(t) / (2 sigma(t)^2)`` (VDM, 2107.00630, eq. 18)."""
        rate = self.beta_min + t * (self.beta_max - self.beta_min)
        return BoundCoefficients(rate / (-2 * th.expm1(self._log_alpha_squared(t))), th.zeros_like(t))


def make_schedule(name: ScheduleName, num_train_timesteps: int) -> NoiseSchedule:
    """A schedule by its name.

    :param name: ``"linear"``, ``"squaredcos_cap_v2"``, ``"quadratic"`` (discrete time) or ``"vp"`` (continuous time)
    :param num_train_timesteps: number of discrete times, unused by ``"vp"``
    :raises ValueError: for an unknown name, which lists the known ones
    """
    return VPSchedule() if name == "vp" else DiscreteSchedule(name, num_train_timesteps)
