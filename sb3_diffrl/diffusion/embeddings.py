"""Embeddings of time and position."""

import math

import torch as th
from torch import nn

from sb3_diffrl.diffusion.schedules import first_of_equal_rows

# Brings network times in (0, 1] to the range that the sinusoidal frequencies were made for (1000 steps).
TIME_SCALE = 1000.0


def sinusoidal_encoding(positions: th.Tensor, dim: int) -> th.Tensor:
    """Sine and cosine at ``dim / 2`` frequencies ``10000^(-j / (dim / 2))`` (Transformer, 1706.03762, section 3.5).

    :param positions: ``(n,)``
    :param dim: size of the encoding, even
    :return: ``(n, dim)``, sines first
    """
    half = dim // 2
    frequencies = th.exp(th.arange(half, device=positions.device, dtype=th.float32) * (-math.log(10_000) / half))
    angles = positions[:, None] * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=1)


class SinusoidalEmbedding(nn.Module):
    """Fixed frequencies in a geometric row, as DDPM's, for a network time in (0, 1] (see ``NoiseSchedule.network_time``).

    :param dim: size of the embedding
    :raises ValueError: if ``dim`` is odd
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        _check_even(dim)
        self.dim = dim

    def forward(self, time: th.Tensor) -> th.Tensor:
        """``(batch,) -> (batch, dim)``"""
        return sinusoidal_encoding(time * TIME_SCALE, self.dim)


class FourierEmbedding(nn.Module):
    """Random frequencies from N(0, ``scale^2``), drawn once and saved with the model (Score SDE, 2011.13456, appendix; 2006.10739).

    :param dim: size of the embedding
    :param scale: standard deviation of the frequencies, in cycles per unit of network time
    :raises ValueError: if ``dim`` is odd
    """

    frequencies: th.Tensor

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        _check_even(dim)
        self.register_buffer("frequencies", th.randn(dim // 2) * scale)

    def forward(self, time: th.Tensor) -> th.Tensor:
        """``(batch,) -> (batch, dim)``, cosines first"""
        angles = time[:, None] * (self.frequencies * (2 * math.pi))
        return th.cat([angles.cos(), angles.sin()], dim=1)


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


def _check_even(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"The embedding's size must be an even number of at least 2 (sines and cosines), got {dim!r}.")
