"""Gradient of the critics with respect to the action: the drift of the Langevin chain.

``make_q_gradient`` picks the fastest implementation that the critic allows; all give the same numbers up to rounding.
"""

from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_diffrl.lql.activations import KERNELS, Array, constants
from sb3_diffrl.lql.critic import LangevinCritic, StackedLinear
from sb3_diffrl.lql.langevin import QGradient

# Activations per layer up to which numpy is faster than torch on a CPU
SMALL = 32_768


def has_fast_gradient(critic: nn.Module) -> bool:
    """Whether the critic is the package's own network with an activation whose derivative is written here.

    A subclass may compute something else, so it takes the automatic gradient.
    """
    return type(critic) is LangevinCritic and type(critic.activation) in KERNELS


class AutogradQGradient:
    """Gradient by automatic differentiation: right for any critic, and the yardstick for the other.

    :param critic: the critic
    :param features: features of the observations, ``(batch, features_dim)``
    """

    def __init__(self, critic: LangevinCritic, features: th.Tensor) -> None:
        self.critic = critic
        self.features = features.detach()

    def __call__(self, actions: th.Tensor, level: int) -> th.Tensor:
        """Gradient at ``actions`` ``(batch, action_dim)``, same shape."""
        # SB3 predicts under no_grad: open the gradient for this computation alone.
        with th.inference_mode(False), th.enable_grad():
            actions = actions.detach().clone().requires_grad_()
            q_values = self.critic.q_values(self.features.clone(), actions, level)
            return th.autograd.grad(q_values.sum(), actions)[0]


class StackedMlpQGradient:
    """Hand-written gradient of the stacked critics.

    The part of the first layer that comes from the observation is computed once for the chain, the one that comes from the noise
    level once for each level. A step is one product by each weight matrix forwards and one backwards, in reused memory.

    :param critic: a critic for which ``has_fast_gradient`` holds
    :param features: features of the observations, ``(batch, features_dim)``
    :param dtype: precision of the chain, that of the features if ``None``
    """

    @th.no_grad()
    def __init__(self, critic: LangevinCritic, features: th.Tensor, dtype: th.dtype | None = None) -> None:
        dtype = features.dtype if dtype is None else dtype
        layers = [layer for layer in critic.layers if isinstance(layer, StackedLinear)]
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        biases = [layer.bias.detach().to(dtype) for layer in layers]
        split = [critic.features_dim, critic.action_dim, weights[0].shape[1] - critic.features_dim - critic.action_dim]
        from_features, from_action, from_level = th.split(weights[0], split, dim=1)
        # First layer without its action part: (n_critics, batch, width), and by level (n_levels, n_critics, batch, width)
        first = th.baddbmm(biases[0], features.to(dtype).expand(critic.n_critics, -1, -1), from_features)
        level_terms = [th.zeros((), dtype=dtype, device=features.device)]
        if critic.level_embedding is not None:
            embedding = critic.level_embedding(th.arange(critic.n_levels, device=features.device)).to(dtype)
            level_terms = list(th.bmm(embedding, from_level).unsqueeze(2).unbind(1))

        widths = [weight.shape[2] for weight in weights[:-1]]
        shape = (critic.n_critics, len(features))
        numpy = features.device.type == "cpu" and shape[0] * shape[1] * max(widths, default=1) <= SMALL
        self.xp: Any = np if numpy else th
        self.first, *self.biases = map(self.array, [first, *biases[1:]])
        self.level_terms = [self.array(term) for term in level_terms]
        weights[0] = from_action
        transposed = [weight.transpose(1, 2) for weight in weights]
        self.weights, self.transposed = [self.array(w) for w in weights], [self.array(w) for w in transposed]
        self.kernel = KERNELS[type(critic.activation)]
        self.constants = constants(self.xp, dtype, features.device)

        def buffer(width: int) -> Array:
            return self.array(th.empty(*shape, width, dtype=dtype, device=features.device))

        self.slopes = [buffer(width) for width in widths]
        self.z, self.values, self.scratch = [{width: buffer(width) for width in set(widths)} for _ in range(3)]
        # The output layer is linear: its gradient is its weight
        self.output_gradient = self.array(transposed[-1].expand(*shape, -1))
        self.level, self.first_at_level = -1, self.first

    def array(self, tensor: th.Tensor) -> Array:
        """The tensor as an array of ``self.xp``, in the same memory."""
        return tensor.numpy() if self.xp is np else tensor

    def __call__(self, actions: Array, level: int) -> Array:
        """Gradient at ``actions`` ``(batch, action_dim)``, same shape; both are arrays of ``self.xp``."""
        xp, depth = self.xp, len(self.slopes)
        if level != self.level:
            self.level, self.first_at_level = level, self.first + self.level_terms[level]
        inputs = actions[None]
        for i, slope in enumerate(self.slopes):
            width = slope.shape[-1]
            z, bias = self.z[width], self.first_at_level if i == 0 else self.biases[i - 1]
            if xp is th:
                th.baddbmm(bias, inputs.expand(len(z), -1, -1), self.weights[i], out=z)
            else:
                np.add(np.matmul(inputs, self.weights[i], out=z), bias, out=z)
            value = self.values[width] if i < depth - 1 else None
            self.kernel(xp, self.constants, z, value, slope, self.scratch[width])
            inputs = value
        gradient = self.output_gradient
        for i in reversed(range(depth)):
            slope = self.slopes[i]
            gradient = xp.multiply(gradient, slope, out=self.values[slope.shape[-1]])
            out = self.z[self.slopes[i - 1].shape[-1]] if i > 0 else None
            gradient = xp.matmul(gradient, self.transposed[i], out=out)
        # (n_critics, batch, action_dim) -> (batch, action_dim)
        return gradient.sum(0)


def make_q_gradient(critic: LangevinCritic, features: th.Tensor, dtype: th.dtype | None = None) -> QGradient:
    """The gradient of ``sum_i Q_i`` with respect to the actions, for one batch of observations.

    :param critic: the critic that drives the chain
    :param features: features of the observations, ``(batch, features_dim)``
    :param dtype: precision of the chain where the hand-written gradient applies
    """
    if has_fast_gradient(critic):
        return StackedMlpQGradient(critic, features, dtype)
    return AutogradQGradient(critic, features)
