"""Weights of the denoising loss over time."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch as th

from sb3_diffrl.diffusion.process import DiffusionProcess

WeightingName = Literal["min_snr", "p2"]


class LossWeighting(ABC):
    """A weight of the denoising loss that depends on the signal-to-noise ratio alone.

    A rule says what it gives the loss of the noise (``prediction_type="epsilon"``). A denoiser of the data or the velocity has
    another loss for the same error, and gets the weight that makes the two equal: the squared error of the noise is ``SNR`` times
    that of the data, and ``SNR / (SNR + 1)`` times that of the velocity.
    """

    @abstractmethod
    def noise_weight(self, snr: th.Tensor) -> th.Tensor:
        """Weight of the squared error of the noise, of the shape of ``snr``."""

    def __call__(self, process: DiffusionProcess, t: th.Tensor) -> th.Tensor:
        """Weight of ``process.denoising_loss`` at the times ``t``, ``(batch,)``."""
        snr = process.schedule.log_snr(t).exp()
        weight = self.noise_weight(snr)
        if process.prediction_type == "epsilon":
            return weight
        return weight * snr if process.prediction_type == "sample" else weight * snr / (snr + 1)


@dataclass(frozen=True)
class MinSNR(LossWeighting):
    """``min(SNR, gamma) / SNR`` (Min-SNR, 2303.09556, section 3.4): the loss of the data, weighted by the SNR up to a bound.

    :param gamma: the bound
    """

    gamma: float = 5.0

    def noise_weight(self, snr: th.Tensor) -> th.Tensor:
        """See ``LossWeighting``."""
        return snr.clamp(max=self.gamma) / snr


@dataclass(frozen=True)
class P2(LossWeighting):
    """``1 / (k + SNR)^gamma`` (P2, 2204.00227, eq. 8): less weight where little noise is left to remove.

    :param k: keeps the weight finite where the SNR is near 0
    :param gamma: strength, 0 for none
    """

    k: float = 1.0
    gamma: float = 1.0

    def noise_weight(self, snr: th.Tensor) -> th.Tensor:
        """See ``LossWeighting``."""
        return (self.k + snr).pow(-self.gamma)


def make_weighting(weighting: WeightingName | LossWeighting) -> LossWeighting:
    """A weighting by its name.

    :raises ValueError: for an unknown name, which lists the known ones
    """
    if isinstance(weighting, LossWeighting):
        return weighting
    if weighting not in get_args(WeightingName):
        raise ValueError(f"Unknown loss weighting {weighting!r}, choose 'min_snr' or 'p2'.")
    return MinSNR() if weighting == "min_snr" else P2()
