"""Gradient of the critics with respect to the action: the drift of the Langevin chain.

Two implementations that give the same numbers up to rounding; ``native.py`` has a third that runs the whole chain.
"""

import torch as th
from torch import nn

from sb3_diffrl.lql.activations import KERNELS, constants
from sb3_diffrl.lql.critic import LangevinCritic, StackedLinear


class AutogradQGradient:
    """Gradient by automatic differentiation: right for any critic, and the yardstick for the others.

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
    """Hand-written gradient of the stacked critics, in torch.

    The part of the first layer that comes from the observation is computed once for the chain, the one that comes from the noise
    level once for each level. A step is one product by each weight matrix forwards and one backwards, in reused memory.

    :param critic: a critic that ``supports()`` accepts
    :param features: features of the observations, ``(batch, features_dim)``
    :param dtype: precision of the chain, that of the features if ``None``
    """

    @staticmethod
    def supports(critic: nn.Module) -> bool:
        """Whether the critic is the package's own network with an activation whose derivative is written here.

        A subclass may compute something else, so it takes the automatic gradient.
        """
        return type(critic) is LangevinCritic and type(critic.activation) in KERNELS

    @th.no_grad()
    def __init__(self, critic: LangevinCritic, features: th.Tensor, dtype: th.dtype | None = None) -> None:
        dtype = features.dtype if dtype is None else dtype
        layers = [layer for layer in critic.layers if isinstance(layer, StackedLinear)]
        self.weights = [layer.weight.detach().to(dtype) for layer in layers]
        biases = [layer.bias.detach().to(dtype) for layer in layers]
        split = [critic.features_dim, critic.action_dim, self.weights[0].shape[1] - critic.features_dim - critic.action_dim]
        from_features, from_action, from_level = th.split(self.weights[0], split, dim=1)
        # First layer without its action part: (n_critics, batch, width), and by level (n_levels, n_critics, 1, width)
        self.first = th.baddbmm(biases[0], features.to(dtype).expand(critic.n_critics, -1, -1), from_features)
        self.level_terms = [th.zeros((), dtype=dtype, device=features.device)]
        if critic.level_embedding is not None:
            embedding = critic.level_embedding(th.arange(critic.n_levels, device=features.device)).to(dtype)
            self.level_terms = list(th.bmm(embedding, from_level).unsqueeze(2).unbind(1))
        self.biases = biases[1:]
        self.weights[0] = from_action
        self.transposed = [weight.transpose(1, 2) for weight in self.weights]
        self.kernel = KERNELS[type(critic.activation)]
        self.constants = constants(dtype, features.device)

        widths, shape = [weight.shape[2] for weight in self.weights[:-1]], (critic.n_critics, len(features))

        def buffer(width: int) -> th.Tensor:
            return th.empty(*shape, width, dtype=dtype, device=features.device)

        self.slopes = [buffer(width) for width in widths]
        self.z, self.values, self.scratch = [{width: buffer(width) for width in set(widths)} for _ in range(3)]
        # The output layer is linear: its gradient is its weight
        self.output_gradient = self.transposed[-1].expand(*shape, -1)
        self.level, self.first_at_level = -1, self.first

    def __call__(self, actions: th.Tensor, level: int) -> th.Tensor:
        """Gradient at ``actions`` ``(batch, action_dim)``, same shape."""
        depth = len(self.slopes)
        if level != self.level:
            self.level, self.first_at_level = level, self.first + self.level_terms[level]
        inputs = actions[None]
        for i, slope in enumerate(self.slopes):
            width = slope.shape[-1]
            z, bias = self.z[width], self.first_at_level if i == 0 else self.biases[i - 1]
            th.baddbmm(bias, inputs.expand(len(z), -1, -1), self.weights[i], out=z)
            value = self.values[width]
            self.kernel(self.constants, z, value if i < depth - 1 else None, slope, self.scratch[width])
            inputs = value
        gradient = self.output_gradient
        for i in reversed(range(depth)):
            slope = self.slopes[i]
            gradient = th.multiply(gradient, slope, out=self.values[slope.shape[-1]])
            out = self.z[self.slopes[i - 1].shape[-1]] if i > 0 else None
            gradient = th.bmm(gradient, self.transposed[i], out=out)
        # (n_critics, batch, action_dim) -> (batch, action_dim)
        return gradient.sum(0)
