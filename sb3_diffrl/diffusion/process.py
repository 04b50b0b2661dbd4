"""The diffusion process: noising, training targets, solvers and the variational bound, for any denoiser."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch as th
from torch import nn

from sb3_diffrl.diffusion.schedules import NoiseSchedule

#: ``denoise(x_t, t) -> output``: ``x_t`` ``(batch, ...)``, ``t`` ``(batch,)`` times of the schedule, output of the shape of ``x_t``
#: and of the meaning that ``prediction_type`` says. A network is usually given ``schedule.network_time(t)``.
Denoise = Callable[[th.Tensor, th.Tensor], th.Tensor]

#: A denoiser at the times of a chain, one function of ``x_t`` for each: what depends on the times alone is computed once.
DenoiseSteps = Sequence[Callable[[th.Tensor], th.Tensor]]

#: ``guidance(x_t, t) -> gradient``: what is added to the score: the gradient of a log-density with respect to ``x_t``, same shape.
Guidance = Callable[[th.Tensor, th.Tensor], th.Tensor]

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Solver = Literal["ddim", "ddpm"]


class Fixed(NamedTuple):
    """Entries that are known, for inpainting.

    :param mask: boolean, true where an entry is known, broadcastable to the sample
    :param values: their clean values, broadcastable to the sample; anything where ``mask`` is false
    """

    mask: th.Tensor
    values: th.Tensor


class StepCoefficients(NamedTuple):
    """One step of a solver from time t to s: ``x0 = x0_x x_t + x0_output output + x0_score guidance``, then
    ``x_s = next_x x_t + next_x0 x0 + noise_std z``.
    """

    x0_x: float
    x0_output: float
    x0_score: float
    next_x: float
    next_x0: float
    noise_std: float


class DiffusionProcess(nn.Module):
    """Forward process, training targets, solvers and bound of a denoiser. It holds no weights.

    ``x_t = alpha(t) x_0 + sigma(t) eps``; the denoiser's output is the noise ``eps``, the data ``x_0``, or the velocity
    ``v = alpha eps - sigma x_0`` (Progressive Distillation, 2202.00512), by ``prediction_type``.

    :param schedule: noise schedule
    :param prediction_type: what the denoiser predicts: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``
    :param clip_sample: bound c of the data: predictions of ``x_0`` are clipped to [-c, c], ``None`` not to clip. Few steps with
        ``"epsilon"`` need it where the schedule ends in nearly pure noise (``squaredcos_cap_v2``), because an error of the noise
        there is an error ``sigma / alpha`` times as large of the data.
    :raises ValueError: if an argument is outside its range; the message names it
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction_type: PredictionType = "epsilon", clip_sample: float | None = None
    ) -> None:
        super().__init__()
        if prediction_type not in get_args(PredictionType):
            raise ValueError(f"Unknown `prediction_type` {prediction_type!r}, choose 'epsilon', 'sample' or 'v_prediction'.")
        if clip_sample is not None and not clip_sample > 0:
            raise ValueError(f"`clip_sample` must be a positive bound or None, got {clip_sample!r}.")
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type
        self.clip_sample = clip_sample
        self._coefficients: dict[tuple[int, Solver], list[StepCoefficients]] = {}

    def add_noise(self, x0: th.Tensor, noise: th.Tensor, t: th.Tensor) -> th.Tensor:
        """``x_t``.

        :param x0: data, ``(batch, ...)``
        :param noise: standard normal, same shape
        :param t: times, ``(batch,)``
        """
        return _rows(self.schedule.alpha(t), x0) * x0 + _rows(self.schedule.sigma(t), x0) * noise

    def target(self, x0: th.Tensor, noise: th.Tensor, t: th.Tensor) -> th.Tensor:
        """What the denoiser should return for ``add_noise(x0, noise, t)``, of the shape of ``x0``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        return _rows(self.schedule.alpha(t), x0) * noise - _rows(self.schedule.sigma(t), x0) * x0

    def split(self, x_t: th.Tensor, output: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """The data and the noise that the denoiser takes ``x_t`` to be made of; ``add_noise`` of the two is ``x_t``.

        :param x_t: noisy data, ``(batch, ...)``
        :param output: the denoiser's output, same shape
        :param t: times, ``(batch,)``
        :return: ``x0_hat``, clipped to ``clip_sample``, and ``noise_hat``, both of the shape of ``x_t``
        """
        alpha, sigma = _rows(self.schedule.alpha(t), x_t), _rows(self.schedule.sigma(t), x_t)
        if self.prediction_type == "epsilon":
            x0_hat, noise_hat = (x_t - sigma * output) / alpha, output
        elif self.prediction_type == "sample":
            x0_hat, noise_hat = output, (x_t - alpha * output) / sigma
        else:
            x0_hat, noise_hat = alpha * x_t - sigma * output, alpha * output + sigma * x_t
        if self.clip_sample is None:
            return x0_hat, noise_hat
        x0_hat = x0_hat.clamp(-self.clip_sample, self.clip_sample)
        return x0_hat, (x_t - alpha * x0_hat) / sigma

    def sample(
        self,
        denoise: Denoise | DenoiseSteps,
        start: th.Tensor,
        num_inference_steps: int,
        solver: Solver = "ddim",
        noise: th.Tensor | None = None,
        fixed: Fixed | None = None,
        guidance: Guidance | None = None,
        generator: th.Generator | None = None,
    ) -> th.Tensor:
        """Denoise ``start``. Gradients flow through it unless the caller turns them off.

        Both solvers step over ``schedule.inference_timesteps`` and end at clean data: ``"ddim"`` (2010.02502, eq. 12) is a
        deterministic map of ``start``, ``"ddpm"`` draws from the posterior ``q(x_s | x_t, x_0 = x0_hat)`` (2006.11239, eq. 7: the
        small variance), which is DDIM with ``eta = 1``. Where ``x0_hat`` is clipped, the noise follows it (diffusers'
        ``use_clipped_model_output``).

        :param denoise: the denoiser, or one function for each of ``schedule.inference_timesteps(num_inference_steps)``
        :param start: ``x`` at the noisiest time, standard normal, ``(batch, ...)``
        :param num_inference_steps: number of calls to the denoiser
        :param solver: ``"ddim"`` or ``"ddpm"``
        :param noise: the steps' standard normal noise, ``(num_inference_steps, batch, ...)``, so that a run can be replayed;
            ``None`` draws it. The last entry has no effect, since the last step adds no noise, and ``"ddim"`` uses none.
        :param fixed: entries held at their clean values in everything that the denoiser sees, and in the result
        :param guidance: gradient added to the score at each step (classifier guidance, 2105.05233, algorithm 2)
        :param generator: source of the drawn noise, torch's global one if ``None``
        :return: samples, of the shape of ``start``
        :raises ValueError: if ``num_inference_steps``, ``solver`` or the shape of ``noise`` is not valid
        """
        steps = self.step_coefficients(num_inference_steps, solver)
        if noise is not None and noise.shape != (num_inference_steps, *start.shape):
            raise ValueError(
                f"`noise` must be of shape (num_inference_steps, *start.shape) = {(num_inference_steps, *start.shape)}, "
                f"got {tuple(noise.shape)}."
            )
        timesteps = self.schedule.inference_timesteps(num_inference_steps).unbind()
        x = start if fixed is None else th.where(fixed.mask, fixed.values, start)
        for i, (step, timestep) in enumerate(zip(steps, timesteps, strict=True)):
            t = timestep.expand(len(x))
            output = denoise(x, t) if callable(denoise) else denoise[i](x)
            x0_hat = th.add(x * step.x0_x, output, alpha=step.x0_output)
            if guidance is not None:
                x0_hat = x0_hat.add(guidance(x, t), alpha=step.x0_score)
            if self.clip_sample is not None:
                x0_hat = x0_hat.clamp(-self.clip_sample, self.clip_sample)
            x = th.add(x * step.next_x, x0_hat, alpha=step.next_x0)
            if step.noise_std > 0:
                z = th.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator) if noise is None else noise[i]
                x = x.add(z, alpha=step.noise_std)
            if fixed is not None:
                x = th.where(fixed.mask, fixed.values, x)
        return x

    def check_sampling(self, num_inference_steps: int, solver: Solver) -> None:
        """Raise now what ``sample()`` would raise later.

        :raises ValueError: if ``num_inference_steps`` or ``solver`` is not valid
        """
        self.step_coefficients(num_inference_steps, solver)

    def denoising_loss(
        self, denoise: Denoise, x0: th.Tensor, t: th.Tensor, noise: th.Tensor, fixed_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """Mean squared error of the denoiser's output against ``target``, the usual unweighted loss.

        :param denoise: the denoiser
        :param x0: data, ``(batch, ...)``
        :param t: times, ``(batch,)``
        :param noise: standard normal, same shape as ``x0``
        :param fixed_mask: boolean, broadcastable to ``x0``: entries that stay clean in the input and out of the loss
        :return: ``(batch,)``, the mean over the entries that are not fixed
        """
        x_t = self._noisy_input(x0, noise, t, fixed_mask)
        return _mean_square(denoise(x_t, t) - self.target(x0, noise, t), fixed_mask)

    def bound_terms(
        self, denoise: Denoise, x0: th.Tensor, t: th.Tensor, noise: th.Tensor, fixed_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """Terms of the variational bound on ``-log p(x0)`` at the times ``t``, in bits per dimension (DDPM, 2006.11239, eq. 5).

        In discrete time the term at t > 0 is the KL divergence between the posterior ``q(x_{t-1} | x_t, x_0)`` and the model's step
        ``p(x_{t-1} | x_t)``, both of the posterior's variance. The one at t = 0 is ``-log p(x_0 | x_t)`` of a Gaussian decoder of
        variance ``sigma^2 / alpha^2``: a density's, it may be negative. The sum over t, plus ``prior_term``, is the bound.

        In continuous time it is the density of the bound over ``t``, ``-d log_snr / dt / 2 * |noise - noise_hat|^2``
        (VDM, 2107.00630, eq. 18). Its integral over [t_min, 1], plus ``prior_term`` and ``reconstruction_term``, is the bound.

        :param denoise: the denoiser
        :param x0: data, ``(batch, ...)``
        :param t: times, ``(batch,)``
        :param noise: standard normal, same shape as ``x0``; give the same before and after an update to see its effect alone
        :param fixed_mask: boolean, broadcastable to ``x0``: entries that stay clean in the input and out of the bound
        :return: ``(batch,)``, the mean over the entries that are not fixed
        """
        weight, offset = self.schedule.bound_coefficients(t)
        return (weight * self._noise_error(denoise, x0, t, noise, fixed_mask) + offset) / math.log(2)

    def reconstruction_term(
        self, denoise: Denoise, x0: th.Tensor, noise: th.Tensor, fixed_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """``-log p(x_0 | x_t)`` at the least noisy time, for a Gaussian decoder of variance ``sigma^2 / alpha^2``.

        In discrete time this is ``bound_terms`` at t = 0. Arguments as there.

        :return: ``(batch,)``, bits per dimension
        """
        t = self.schedule.timesteps_at(th.zeros(1, device=x0.device)).expand(len(x0))
        error = self._noise_error(denoise, x0, t, noise, fixed_mask)
        return (error + math.log(2 * math.pi) - self.schedule.log_snr(t)) / (2 * math.log(2))

    def prior_term(self, x0: th.Tensor, fixed_mask: th.Tensor | None = None) -> th.Tensor:
        """KL divergence of N(0, I) from ``q(x_t | x_0)`` at the noisiest time, in bits per dimension, ``(batch,)``."""
        t = self.schedule.timesteps_at(th.ones(1, device=x0.device)).expand(len(x0))
        variance = self.schedule.sigma(t).square()
        mean_square = _mean_square(_rows(self.schedule.alpha(t), x0) * x0, fixed_mask)
        return (mean_square + variance - 1 - variance.log()) / (2 * math.log(2))

    def _noisy_input(self, x0: th.Tensor, noise: th.Tensor, t: th.Tensor, fixed_mask: th.Tensor | None) -> th.Tensor:
        x_t = self.add_noise(x0, noise, t)
        return x_t if fixed_mask is None else th.where(fixed_mask, x0, x_t)

    def _noise_error(
        self, denoise: Denoise, x0: th.Tensor, t: th.Tensor, noise: th.Tensor, fixed_mask: th.Tensor | None
    ) -> th.Tensor:
        x_t = self._noisy_input(x0, noise, t, fixed_mask)
        return _mean_square(self.split(x_t, denoise(x_t, t), t)[1] - noise, fixed_mask)

    def step_coefficients(self, num_inference_steps: int, solver: Solver) -> list[StepCoefficients]:
        """The solver's steps as Python numbers, computed once: reading them from a device at each step would make it wait."""
        key = (num_inference_steps, solver)
        if key not in self._coefficients:
            if solver not in get_args(Solver):
                raise ValueError(f"Unknown `solver` {solver!r}, choose 'ddim' or 'ddpm'.")
            log_snr = self.schedule.log_snr(self.schedule.inference_timesteps(num_inference_steps)).cpu().double()
            # Clean data comes after the last time
            next_log_snr = nn.functional.pad(log_snr[1:], (0, 1), value=math.inf)
            alpha, sigma = th.sigmoid(log_snr).sqrt(), th.sigmoid(-log_snr).sqrt()
            next_alpha, next_sigma = th.sigmoid(next_log_snr).sqrt(), th.sigmoid(-next_log_snr).sqrt()
            # The posterior's variance is sigma_s^2 (1 - SNR_t / SNR_s); what it leaves of sigma_s^2 is kept from the noise in x_t.
            kept = next_sigma * th.exp((log_snr - next_log_snr) / 2) if solver == "ddpm" else next_sigma
            fresh = next_sigma * th.sqrt(-th.expm1(log_snr - next_log_snr)) if solver == "ddpm" else th.zeros_like(sigma)
            one, zero = th.ones_like(alpha), th.zeros_like(alpha)
            x0_x, x0_output = {"epsilon": (1 / alpha, -sigma / alpha), "sample": (zero, one), "v_prediction": (alpha, -sigma)}[
                self.prediction_type
            ]
            columns = (x0_x, x0_output, sigma**2 / alpha, kept / sigma, next_alpha - kept * alpha / sigma, fresh)
            self._coefficients[key] = [StepCoefficients(*row) for row in th.stack(columns, dim=1).tolist()]
        return self._coefficients[key]


def _rows(values: th.Tensor, like: th.Tensor) -> th.Tensor:
    """One value per row, ``(batch,)``, in a shape that multiplies ``like`` ``(batch, ...)``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _mean_square(error: th.Tensor, fixed_mask: th.Tensor | None) -> th.Tensor:
    """``(batch, ...) -> (batch,)``, the mean over the entries that are not fixed."""
    square = error.square().flatten(1)
    if fixed_mask is None:
        return square.mean(1)
    free = (~fixed_mask).expand_as(error).flatten(1)
    return (square * free).sum(1) / free.sum(1)
