"""A denoiser with its moving average and its process: what is trained, and what samples."""

from collections.abc import Callable, Sequence

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sb3_diffrl.diffusion import native
from sb3_diffrl.diffusion.denoisers import DiT1d, MlpDenoiser
from sb3_diffrl.diffusion.process import Denoise, DenoiseSteps, DiffusionProcess, Fixed, Guidance, Solver


class MovingAverage:
    """How averages of weights follow them: a share of ``1 - min(decay, (1 + n) / (10 + n))`` after n updates; the first one copies.

    Without the second part an average of decay 0.9999 is after 5000 updates still for 61% what it began with.

    :param decay: once it has warmed up, in [0, 1)
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @th.no_grad()
    def __call__(self, averages: Sequence[th.Tensor], weights: Sequence[th.Tensor], n_averaged: th.Tensor | int) -> None:
        """Let the averages follow.

        :param n_averaged: updates before this one
        """
        n = int(n_averaged)
        th._foreach_lerp_(list(averages), list(weights), 1 - min(self.decay, (1 + n) / (10 + n)))


class DiffusionModel(nn.Module):
    """A conditional diffusion model: the network that learns, and its exponential moving average, which samples.

    :param denoiser: called as ``denoiser(x_t, time, cond)``, see ``MlpDenoiser`` and ``DiT1d``
    :param process: noise schedule, prediction type and solvers
    :param ema_decay: largest decay of the moving average at an ``update_ema()``, in [0, 1), see ``MovingAverage``
    :raises ValueError: if ``ema_decay`` is outside its range
    """

    def __init__(self, denoiser: nn.Module, process: DiffusionProcess, ema_decay: float = 0.995) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {ema_decay!r}.")
        self.denoiser = denoiser
        self.process = process
        self.denoiser_ema = AveragedModel(denoiser, multi_avg_fn=MovingAverage(ema_decay))
        self.denoiser_ema.requires_grad_(False)
        #: Run DDIM chains in compiled C where that can be done; ``False`` for the modules of torch, step by step
        self.use_native = True

    def _denoise(self, network: Callable[..., th.Tensor], *cond: th.Tensor | None) -> Denoise:
        return lambda x_t, t: network(x_t, self.process.schedule.network_time(t), *cond)

    def loss(
        self,
        x0: th.Tensor,
        cond: th.Tensor | None,
        t: th.Tensor,
        noise: th.Tensor,
        fixed_mask: th.Tensor | None = None,
        cond_mask: th.Tensor | None = None,
    ) -> th.Tensor:
        """Denoising loss of the learning network, see ``DiffusionProcess.denoising_loss``, ``(batch,)``.

        :param cond: condition, ``(batch, cond_dim)`` or ``None``
        :param cond_mask: ``(batch,)``, false in the rows that learn without their condition (see ``DiT1d``)
        """
        conditions = (cond,) if cond_mask is None else (cond, cond_mask)
        return self.process.denoising_loss(self._denoise(self.denoiser, *conditions), x0, t, noise, fixed_mask)

    def averaged_steps(self, num_inference_steps: int, cond: th.Tensor | None = None) -> DenoiseSteps:
        """The averaged network at the times of a chain, for samplers that combine several.

        :param num_inference_steps: number of denoising steps
        :param cond: condition, ``(batch, cond_dim)`` or ``None``
        """
        schedule = self.process.schedule
        times = schedule.network_time(schedule.inference_timesteps(num_inference_steps))
        network = self.denoiser_ema.module
        if isinstance(network, (MlpDenoiser, DiT1d)):
            return network.at_times(times, cond)

        def at(time: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
            return lambda x_t: network(x_t, time.expand(len(x_t)), cond)

        return [at(time) for time in times.unbind()]

    @th.no_grad()
    def bound_terms(
        self, x0: th.Tensor, cond: th.Tensor | None, t: th.Tensor, noise: th.Tensor, fixed_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """Terms of the variational bound of the learning network, see ``DiffusionProcess.bound_terms``, ``(batch,)``.

        :param cond: condition, ``(batch, cond_dim)`` or ``None``
        """
        return self.process.bound_terms(self._denoise(self.denoiser, cond), x0, t, noise, fixed_mask)

    def sample(
        self,
        start: th.Tensor,
        cond: th.Tensor | None,
        num_inference_steps: int,
        solver: Solver = "ddim",
        noise: th.Tensor | None = None,
        fixed: Fixed | None = None,
        guidance: Guidance | None = None,
    ) -> th.Tensor:
        """Denoise ``start`` with the averaged network, see ``DiffusionProcess.sample``.

        :param cond: condition, ``(batch, cond_dim)`` or ``None``
        """
        if self._can_compile(start, cond, solver, fixed, guidance):
            return self._sample_compiled(start, cond, num_inference_steps, fixed)
        denoise = self.averaged_steps(num_inference_steps, cond)
        return self.process.sample(denoise, start, num_inference_steps, solver, noise, fixed, guidance)

    def _can_compile(
        self, start: th.Tensor, cond: th.Tensor | None, solver: Solver, fixed: Fixed | None, guidance: Guidance | None
    ) -> bool:
        if not self.use_native or solver != "ddim" or guidance is not None or (th.is_grad_enabled() and start.requires_grad):
            return False
        network = self.denoiser_ema.module
        if isinstance(network, MlpDenoiser):
            return fixed is None and start.ndim == 2 and native.supports(network)
        return (
            type(network) is DiT1d
            and (cond is None or len(cond) == 1)
            and (fixed is None or fixed.mask.ndim <= start.ndim - 1)
            and native.supports(network.transformer)
        )

    def _sample_compiled(
        self, start: th.Tensor, cond: th.Tensor | None, num_inference_steps: int, fixed: Fixed | None
    ) -> th.Tensor:
        network, clip = self.denoiser_ema.module, self.process.clip_sample
        steps = self.process.step_coefficients(num_inference_steps, "ddim")
        coefficients = [(step.x0_x, step.x0_output, step.next_x, step.next_x0) for step in steps]
        if isinstance(network, MlpDenoiser):
            terms = self._of_times(network, num_inference_steps, network.time_terms)
            return native.ddim_perceptron(network, terms, cond, coefficients, start, clip)
        assert isinstance(network, DiT1d)
        start = start if fixed is None else th.where(fixed.mask, fixed.values, start)
        mask = None if fixed is None else fixed.mask
        vectors = self._of_times(network, num_inference_steps, network.vectors_at, cond)
        return native.ddim_transformer(network.transformer, vectors, coefficients, start, mask, clip, network.n_given)

    def _of_times(
        self, network: nn.Module, num_inference_steps: int, make: Callable[..., th.Tensor], *cond: th.Tensor | None
    ) -> th.Tensor:
        """What depends on the times of a chain, and on a condition if there is one; without one it is kept for the next chain."""
        schedule = self.process.schedule

        def at_times() -> th.Tensor:
            return make(schedule.network_time(schedule.inference_timesteps(num_inference_steps)), *cond)

        if any(c is not None for c in cond):
            return at_times()
        return native.remember(network, num_inference_steps, network.parameters(), at_times)

    def update_ema(self) -> None:
        """Let the moving average follow, after an optimiser step. The first call copies the weights."""
        self.denoiser_ema.update_parameters(self.denoiser)
