"""How the loss and its gradient differ over the times."""

from collections.abc import Iterable
from typing import NamedTuple

import torch as th

from sb3_diffrl.diffusion.process import Denoise, DiffusionProcess


class TimestepStatistics(NamedTuple):
    """Of the denoising loss of single rows, at each time.

    :param loss: mean, ``(n_times,)``
    :param gradient_norm: norm of the mean gradient, ``(n_times,)``
    :param gradient_std: root of the gradient's variance over rows and noises, summed over its entries, ``(n_times,)``
    """

    loss: th.Tensor
    gradient_norm: th.Tensor
    gradient_std: th.Tensor


def timestep_statistics(
    denoise: Denoise,
    parameters: Iterable[th.Tensor],
    process: DiffusionProcess,
    x0: th.Tensor,
    timesteps: th.Tensor,
    generator: th.Generator | None = None,
) -> TimestepStatistics:
    """Measure loss and gradient at each of the given times. It takes one backward pass a row and time, and changes no gradient.

    :param denoise: the denoiser
    :param parameters: its parameters
    :param process: its process
    :param x0: data, two rows at least, ``(batch, ...)``
    :param timesteps: times of the schedule, ``(n_times,)``
    :param generator: source of the noise on the data's device, torch's global one if ``None``
    :raises ValueError: if there are fewer than two rows
    """
    if len(x0) < 2:
        raise ValueError(f"A variance needs two rows of `x0` at least, got {len(x0)}.")
    parameters = list(parameters)
    rows = []
    for t in timesteps:
        noise = th.randn(x0.shape, device=x0.device, generator=generator)
        losses = process.denoising_loss(denoise, x0, t.expand(len(x0)), noise)
        gradients = []
        for loss in losses:
            parts = th.autograd.grad(loss, parameters, retain_graph=True)
            gradients.append(th.cat([part.flatten() for part in parts]))
        stacked = th.stack(gradients)  # (batch, n_parameters)
        rows.append(th.stack([losses.detach().mean(), stacked.mean(0).norm(), stacked.var(0).sum().sqrt()]))
    return TimestepStatistics(*th.stack(rows, 1))
