"""A transformer over the steps of a trajectory, with adaptive layer norms that start at zero (DiT, 2212.09748, section 3.2)."""

import torch as th
from torch import nn

from sb3_diffrl.diffusion.attention import attention
from sb3_diffrl.diffusion.embeddings import sines_and_cosines, sinusoidal_frequencies
from sb3_diffrl.diffusion.layers import Linear, TanhGELU

# Vectors that set a block: shift, scale and gate of the attention and of the perceptron.
BLOCK_VECTORS = 6
# Shift and scale of the last norm.
FINAL_VECTORS = 2
ALL = slice(None)


class Modulation(nn.Module):
    """The vectors that set the layer norms, from a condition, or learned alone where there is none. All start at zero.

    :param condition_dim: size of the condition, 0 for none
    :param n_vectors: number of vectors
    :param d_model: size of each
    """

    def __init__(self, condition_dim: int, n_vectors: int, d_model: int) -> None:
        super().__init__()
        self.shape = (n_vectors, 1, d_model)
        self.weight = nn.Parameter(th.zeros(n_vectors * d_model, condition_dim)) if condition_dim else None
        self.bias = nn.Parameter(th.zeros(n_vectors * d_model))

    def forward(self, condition: th.Tensor | None) -> tuple[th.Tensor, ...]:
        """``(batch, condition_dim)`` to ``n_vectors`` tensors ``(batch, 1, d_model)``; ``batch`` is 1 without a condition."""
        if self.weight is None or condition is None:
            vectors = self.bias[None]
        else:
            vectors = nn.functional.linear(nn.functional.silu(condition), self.weight, self.bias)
        # (batch, n_vectors * d_model) -> n_vectors x (batch, 1, d_model)
        return vectors.view(-1, *self.shape).unbind(1)


class Block(nn.Module):
    """Self-attention, then a perceptron, each on a modulated layer norm and added to its own input through a gate.

    The residual is added to the input before the norm. With the gates at zero, as at the start, the block is the identity.

    :param d_model: width
    :param head_dim: size of an attention head
    """

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.query = Linear(d_model, d_model)
        self.key_value = Linear(d_model, 2 * d_model)
        self.attention_out = Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(Linear(d_model, 4 * d_model), TanhGELU(), Linear(4 * d_model, d_model))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: th.Tensor, vectors: tuple[th.Tensor, ...], steps: slice = ALL) -> th.Tensor:
        """Apply the block.

        :param x: tokens, ``(batch, length, d_model)``
        :param vectors: six tensors ``(batch or 1, 1, d_model)``: shift, scale and gate of the attention, then of the perceptron
        :param steps: tokens to compute, from what all of them are
        :return: ``(batch, n_steps, d_model)``
        """
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = vectors
        normed = modulate(self.attention_norm(x), shift_attention, scale_attention)
        query, key_value = self.query(normed[:, steps].contiguous()), self.key_value(normed)
        x = th.addcmul(x[:, steps], gate_attention, self.attention_out(attention(query, key_value, self.head_dim)))
        return th.addcmul(x, gate_mlp, self.mlp(modulate(self.mlp_norm(x), shift_mlp, scale_mlp)))


class Transformer1d(nn.Module):
    """Transformer over the steps of a trajectory, all of which see one another.

    With a condition it is the trunk of ``DiT1d``; without, read at its first token, a critic of trajectories::

        critic = Transformer1d(obs_dim, 1, max_length=horizon)
        value = critic(plan, steps=slice(1))[:, 0, 0]

    Its output starts at zero.

    :param in_dim: size of one step
    :param out_dim: size of the output at each step
    :param max_length: largest number of steps
    :param condition_dim: size of the condition that sets the layer norms, 0 for none
    :param d_model: width
    :param depth: number of blocks
    :param head_dim: size of an attention head
    :raises ValueError: if ``head_dim`` does not divide ``d_model``, or ``d_model`` is odd
    """

    positions: th.Tensor

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        max_length: int,
        condition_dim: int = 0,
        d_model: int = 256,
        depth: int = 2,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if head_dim < 1 or d_model % head_dim or d_model % 2:
            raise ValueError(f"`d_model` must be even and a multiple of `head_dim`, got d_model={d_model} and head_dim={head_dim}.")
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        self.condition_dim, self.head_dim = condition_dim, head_dim
        self.embedding = nn.Linear(in_dim, d_model)
        # Not persistent: it follows from the sizes.
        positions = sines_and_cosines(th.arange(max_length), sinusoidal_frequencies(d_model))
        self.register_buffer("positions", positions, persistent=False)
        self.modulation = Modulation(condition_dim, BLOCK_VECTORS * depth + FINAL_VECTORS, d_model)
        self.blocks = nn.ModuleList(Block(d_model, head_dim) for _ in range(depth))
        self.final_norm = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.output = nn.Linear(d_model, out_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: th.Tensor, condition: th.Tensor | None = None, steps: slice = ALL) -> th.Tensor:
        """Apply the transformer.

        :param x: steps, ``(batch, length, in_dim)``
        :param condition: ``(batch, condition_dim)``, or ``(1, condition_dim)`` for all rows; ``None`` if ``condition_dim`` is 0
        :param steps: which steps of the output to compute; they see all of ``x``
        :return: ``(batch, n_steps, out_dim)``
        :raises ValueError: if ``x`` is longer than ``max_length``, or a condition is missing or not expected
        """
        if x.shape[1] > len(self.positions):
            raise ValueError(f"A trajectory of {x.shape[1]} steps is longer than `max_length` = {len(self.positions)}.")
        if (condition is None) == (self.condition_dim > 0):
            raise ValueError(f"`condition` must be given exactly when `condition_dim` > 0, which is {self.condition_dim}.")
        return self.modulated(x, self.modulation(condition), steps)

    def modulated(self, x: th.Tensor, vectors: tuple[th.Tensor, ...], steps: slice = ALL) -> th.Tensor:
        """Apply the transformer with given vectors in place of a condition.

        :param x: steps, ``(batch, length, in_dim)``
        :param vectors: as ``modulation`` makes them, each ``(batch or 1, 1, d_model)``
        :param steps: see ``forward()``
        :return: ``(batch, n_steps, out_dim)``
        """
        hidden = self.embedding(x) + self.positions[: x.shape[1]]
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            hidden = block(hidden, vectors[BLOCK_VECTORS * i : BLOCK_VECTORS * (i + 1)], steps if is_last else ALL)
        shift, scale = vectors[-FINAL_VECTORS:]
        output: th.Tensor = self.output(modulate(self.final_norm(hidden), shift, scale))
        return output


def modulate(normed: th.Tensor, shift: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """``normed * (1 + scale) + shift``"""
    return th.addcmul(shift, normed, 1 + scale)
