"""The critics of LQL and NC-LQL: independent Q-networks evaluated together by batched matrix products."""

import itertools
import math
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_diffrl.common import check_count
from sb3_diffrl.lql import native
from sb3_diffrl.lql.activations import Mish
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler
from sb3_diffrl.native import library

#: Size of the level embedding, and of its sinusoidal encoding (the reference implementation's value).
LEVEL_EMBEDDING_DIM = native.LEVEL_ROWS
#: ``native.sample()`` or its like
ChainKernel = Callable[..., th.Tensor]
# Levels from which compiled C embeds them faster than torch
MIN_COMPILED = 64


class StackedLinear(nn.Module):
    """``n_models`` independent linear maps, applied by one batched product.

    Weights start truncated-normal (cut at two sigma, ``sigma = 1 / sqrt(in_features)``) and biases at zero, as in the reference
    implementation.

    :param n_models: number of independent maps
    """

    def __init__(self, n_models: int, in_features: int, out_features: int) -> None:
        super().__init__()
        sigma = 1 / math.sqrt(max(in_features, 1))
        weight = th.empty(n_models, in_features, out_features)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma))
        self.bias = nn.Parameter(th.zeros(n_models, 1, out_features))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """``(n_models, batch, in_features) -> (n_models, batch, out_features)``"""
        return th.baddbmm(self.bias, inputs, self.weight)


def sinusoidal_encoding(n_levels: int, dim: int = LEVEL_EMBEDDING_DIM) -> th.Tensor:
    """Sine and cosine of the integer levels at ``dim / 2`` frequencies, scaled to unit order.

    :return: ``(n_levels, dim)``, sines first
    """
    half = dim // 2
    angles = np.arange(n_levels)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    return th.as_tensor(np.concatenate([np.sin(angles), np.cos(angles)], axis=1) / math.sqrt(dim), dtype=th.float32)


def make_activation(activation_fn: type[nn.Module]) -> nn.Module:
    """An activation layer, with a faster one in the place of ``torch.nn.Mish``."""
    return Mish() if activation_fn is nn.Mish else activation_fn()


@cache
def gpu_kernels(device: th.device) -> ModuleType | None:
    """``triton_chain`` where its kernel runs, which is tried once; ``None`` elsewhere."""
    if device.type != "cuda":
        return None
    try:
        from sb3_diffrl.lql import triton_chain
    except ImportError:
        return None
    return triton_chain if triton_chain.runs_on(device) else None


class LevelEmbedding(nn.Module):
    """Learned embedding of the noise level, one for each critic: sinusoidal encoding, then two linear layers.

    :param n_models: number of critics
    :param n_levels: number of noise levels
    :param activation_fn: activation between the two layers
    """

    encoding: th.Tensor

    def __init__(self, n_models: int, n_levels: int, activation_fn: type[nn.Module]) -> None:
        super().__init__()
        dim = LEVEL_EMBEDDING_DIM
        # Not persistent: it is recomputed from n_levels, and SB3 expects every saved entry to be a weight.
        self.register_buffer("encoding", sinusoidal_encoding(n_levels, dim), persistent=False)
        self.hidden = StackedLinear(n_models, dim, 2 * dim)
        self.activation = make_activation(activation_fn)
        self.output = StackedLinear(n_models, 2 * dim, dim)
        self.n_models = n_models

    def forward(self, levels: th.Tensor) -> th.Tensor:
        """``(batch,)`` integer levels to ``(n_models, batch, LEVEL_EMBEDDING_DIM)``"""
        encoding = self.encoding[levels].expand(self.n_models, -1, -1)
        embedding: th.Tensor = self.output(self.activation(self.hidden(encoding)))
        return embedding


class LangevinCritic(BaseModel):
    """Q-networks Qᵢ(s, a, l), optionally conditioned on a noise level.

    Each network takes the features of the observation, the action in the scaled box [-1, 1] and (with more than one noise
    level) its own embedding of the level. The networks share the features extractor and nothing else.

    :param observation_space: observation space
    :param action_space: action space
    :param net_arch: width of each hidden layer
    :param features_extractor: network that turns observations into features
    :param features_dim: size of the features
    :param activation_fn: activation between layers
    :param normalize_images: divide images by 255
    :param n_critics: number of Q-networks
    :param n_levels: number of noise levels; with 1 the critic is not conditioned (LQL)
    :param reward_scale: factor on the rewards that the networks learn from; ``forward()`` divides by it
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.Mish,
        normalize_images: bool = True,
        n_critics: int = 2,
        n_levels: int = 1,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__(observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images)
        self.n_critics = n_critics = check_count("n_critics", n_critics)
        self.n_levels = n_levels
        self.reward_scale = reward_scale
        self.features_dim = features_dim
        self.action_dim = get_action_dim(action_space)
        self.level_embedding = LevelEmbedding(n_critics, n_levels, activation_fn) if n_levels > 1 else None
        input_dim = features_dim + self.action_dim + (LEVEL_EMBEDDING_DIM if n_levels > 1 else 0)
        widths = [input_dim, *net_arch, 1]
        self.layers = nn.ModuleList(StackedLinear(n_critics, n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        self.activation = make_activation(activation_fn)
        #: Evaluate in compiled C where it applies (see ``native``): set by the policy
        self.use_native = False

    @property
    def can_compile(self) -> bool:
        """Whether compiled C computes these networks: not a subclass, which may compute something else, and float32 on a CPU."""
        return (
            self.layers[0].weight.device.type == "cpu"
            and self._is_plain
            and 1 < len(self.layers) <= native.MAX_HIDDEN + 1
            and self.n_critics <= native.MAX_CRITICS
            and library.load() is not None
        )

    @property
    def _is_plain(self) -> bool:
        known = type(self) is LangevinCritic and type(self.activation) in native.ACTIVATIONS
        return known and self.layers[0].weight.dtype == th.float32

    @property
    def chain_kernel(self) -> ChainKernel | None:
        """What runs whole chains of these networks: compiled C on a CPU, a Triton kernel on a GPU, ``None`` where neither can."""
        if self.can_compile:
            return native.sample
        kernels = gpu_kernels(self.layers[0].weight.device)
        if kernels is None or not self._is_plain or not kernels.supports([layer.weight for layer in self.layers], self.action_dim):
            return None
        sample: ChainKernel = kernels.sample
        return sample

    @property
    def compiled(self) -> bool:
        """Whether ``evaluate()`` runs in compiled C."""
        return self.use_native and self.can_compile

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """Features of a batch of observations, ``(batch, features_dim)``."""
        return self.extract_features(obs, self.features_extractor)

    def q_values(self, features: th.Tensor, actions: th.Tensor, levels: th.Tensor | int | None = None) -> th.Tensor:
        """What each network puts out: the value of scaled rewards.

        :param features: ``(batch, features_dim)``
        :param actions: in the scaled box, ``(batch, action_dim)``
        :param levels: noise level of the whole batch or of each row ``(batch,)``; the sharpest if ``None``
        :return: ``(n_critics, batch)``
        """
        inputs = th.cat([features, actions], dim=1)
        if self.level_embedding is not None:
            if levels is None:
                levels = self.n_levels - 1
            if isinstance(levels, int):
                levels = th.full((1,), levels, device=actions.device)
            embedding = self._embed(self.level_embedding, levels)
            inputs = th.cat([inputs.expand(self.n_critics, -1, -1), embedding.expand(-1, len(actions), -1)], dim=2)
        # (n_critics, batch, 1) -> (n_critics, batch)
        return self.evaluate(inputs).squeeze(-1)

    def _embed(self, network: LevelEmbedding, levels: th.Tensor) -> th.Tensor:
        known = type(network) is LevelEmbedding and type(network.activation) in native.ACTIVATIONS
        if len(levels) < MIN_COMPILED or not self.compiled or not known:
            embedding: th.Tensor = network(levels)
            return embedding
        layers = (network.hidden, network.output)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return native.stacked_mlp(type(network.activation), network.encoding[levels], weights, biases)

    def evaluate(self, inputs: th.Tensor) -> th.Tensor:
        """The networks themselves: ``(batch, in)`` or ``(n_critics, batch, in)`` to ``(n_critics, batch, 1)``."""
        if self.compiled:
            weights, biases = zip(*((layer.weight, layer.bias) for layer in self.layers), strict=True)
            return native.stacked_mlp(type(self.activation), inputs, weights, biases)
        inputs = inputs.expand(self.n_critics, -1, -1)
        for layer in self.layers[:-1]:
            inputs = self.activation(layer(inputs))
        q_values: th.Tensor = self.layers[-1](inputs)
        return q_values

    @th.no_grad()
    def sample(
        self,
        sampler: LangevinSampler,
        features: th.Tensor,
        draws: ChainDraws,
        dtype: th.dtype = th.float32,
        kernel: ChainKernel | None = None,
    ) -> th.Tensor:
        """``sampler.sample()`` on the gradient of the critics' sum, by a kernel.

        :param features: ``(batch, features_dim)``
        :param draws: start and noise of ``batch`` chains
        :param dtype: of what multiplies in the hidden layers
        :param kernel: ``chain_kernel``, looked up if ``None``
        :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
        """
        kernel = kernel or self.chain_kernel
        assert kernel is not None, "no kernel for these networks: see `chain_kernel`"
        weights, biases = zip(*((layer.weight, layer.bias) for layer in self.layers), strict=True)
        level_terms = None
        if self.level_embedding is not None:
            embedding = self.level_embedding(th.arange(self.n_levels, device=features.device))
            # (n_critics, n_levels, 16) x (n_critics, 16, width)
            level_terms = th.bmm(embedding, weights[0][:, self.features_dim + self.action_dim :])
        return kernel(sampler, type(self.activation), weights, biases, level_terms, features, draws, dtype)

    def forward(self, obs: PyTorchObs, actions: th.Tensor, levels: th.Tensor | int | None = None) -> tuple[th.Tensor, ...]:
        """Value of each network in units of the env's rewards, as SB3 gives them: ``n_critics`` tensors ``(batch, 1)``.

        :param obs: preprocessed batch of observations
        :param actions: in the scaled box, ``(batch, action_dim)``
        :param levels: as in ``q_values()``
        """
        q_values = self.q_values(self.features(obs), actions, levels) / self.reward_scale
        return tuple(q_values.unsqueeze(-1))
