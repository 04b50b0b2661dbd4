"""Embeddings of time and position."""

import math

import torch as th
from torch import nn

from sb3_diffrl.diffusion.schedules import first_of_equal_rows

# Brings network times in (0, 1] to the range that the sinusoidal frequencies were made for (1000 steps).
TIME_SCALE = 1000.0


def sinusoidal_frequencies(dim: int) -> th.Tensor:
    """``10000^(-j / (dim / 2))``, ``(dim / 2,)``, radians per unit (Transformer, 1706.03762, section 3.5).

    :param dim: size of the encoding
    :raises ValueError: if ``dim`` is odd
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"An encoding's size must be an even number of at least 2 (sines and cosines), got {dim!r}.")
    half = dim // 2
    return th.exp(th.arange(half) * (-math.log(10_000) / half))


def sines_and_cosines(positions: th.Tensor, frequencies: th.Tensor) -> th.Tensor:
    """``(n,)`` positions and ``(dim / 2,)`` frequencies to ``(n, dim)``, sines first."""
    angles = positions[:, None] * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=1)


class SinusoidalEmbedding(nn.Module):
    """Fixed frequencies in a geometric row, as DDPM's, for a network time in (0, 1] (see ``NoiseSchedule.network_time``).

    :param dim: size of the embedding
    :raises ValueError: if ``dim`` is odd
    """

    frequencies: th.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Not persistent: they follow from the size.
        self.register_buffer("frequencies", sinusoidal_frequencies(dim) * TIME_SCALE, persistent=False)

    def forward(self, time: th.Tensor) -> th.Tensor:
        """``(batch,) -> (batch, dim)``"""
        return sines_and_cosines(time, self.frequencies)


class FourierEmbedding(nn.Module):
    """Random frequencies, drawn once and saved with the model (Fourier features, 2006.10739; Score SDE, 2011.13456).

    :param dim: size of the embedding, even
    :param scale: standard deviation of the frequencies, in cycles per unit of network time
    """

    frequencies: th.Tensor

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", th.randn_like(sinusoidal_frequencies(dim)) * (2 * math.pi * scale))

    def forward(self, time: th.Tensor) -> th.Tensor:
        """``(batch,) -> (batch, dim)``"""
        return sines_and_cosines(time, self.frequencies)


class TimeEmbedding(nn.Sequential):
    """An encoding of the network time, then two linear layers.

    :param encoding: ``SinusoidalEmbedding`` or ``FourierEmbedding``
    :param dim: size of the encoding
    :param hidden_dim: size between the two layers
    :param out_dim: size of the embedding
    :param activation_fn: activation between the two layers
    """

    def __init__(self, encoding: nn.Module, dim: int, hidden_dim: int, out_dim: int, activation_fn: type[nn.Module]) -> None:
        super().__init__(encoding, nn.Linear(dim, hidden_dim), activation_fn(), nn.Linear(hidden_dim, out_dim))

    def forward(self, time: th.Tensor) -> th.Tensor:
        """``(batch,)`` to ``(batch, out_dim)``, or to ``(1, out_dim)`` where all rows share one time (an expanded tensor)."""
        hidden = first_of_equal_rows(time)
        for layer in self:
            hidden = layer(hidden)
        return hidden
