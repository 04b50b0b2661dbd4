"""Policies of LQL and NC-LQL: a critic, its target, and the sampler that draws actions from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffrl.common import check_observation, unscale_action
from sb3_diffrl.lql.critic import ChainKernel, LangevinCritic
from sb3_diffrl.lql.cuda_graphs import CudaGraphs
from sb3_diffrl.lql.gradients import AutogradQGradient, StackedMlpQGradient
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler
from sb3_diffrl.native import library
from sb3_diffrl.saving import SafePolicySaving

# Seeds the start and the noise of deterministic actions: part of the policy's definition, so it never changes.
DETERMINISTIC_SEED = 0
Backend = Literal["auto", "native", "torch", "autograd", "cuda_graphs"]
ChainDtype = Literal["float32", "bfloat16"]
#: What computes the chains, in words
BACKENDS: dict[Backend, str] = {
    "native": "compiled",
    "torch": "hand-written, in torch",
    "autograd": "by automatic differentiation",
    "cuda_graphs": "launched as CUDA graphs",
}


class LangevinPolicy(SafePolicySaving):
    """Policy without an actor: actions are drawn from exp(w Σ Qᵢ(s, ·)) by Langevin dynamics on the critic.

    :param observation_space: observation space
    :param action_space: bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress (1 to 0)
    :param net_arch: width of each hidden layer of a critic, ``[256, 256, 256]`` if ``None``; of a dictionary, the ``qf`` entry
    :param activation_fn: activation of the critics
    :param features_extractor_class: features extractor to use, the policy's own if ``None`` (``FlattenExtractor``, ``NatureCNN`` in
        ``CnnPolicy``, ``CombinedExtractor`` in ``MultiInputPolicy``)
    :param features_extractor_kwargs: its keyword arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: optimiser of the critics
    :param optimizer_kwargs: its keyword arguments, without the learning rate
    :param n_critics: number of critics
    :param sampler: sampler of the actions; its ``n_levels`` is the critic's, too
    :param reward_scale: factor on the rewards that the critics learn from
    :param backend: what computes the chains, see ``LangevinPolicy.chain_backend``; the fastest that the critics allow if ``"auto"``
    :param chain_dtype: ``"bfloat16"``: compiled chains multiply rounded numbers in the hidden layers, in about half the time for
        large batches, where the processor can (AVX512-BF16; so can a GPU's kernel), else as ``"float32"``. Deterministic actions,
        and the critics' values and gradients in updates, are in float32 all the same.
    """

    default_features_extractor_class: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor
    #: Override with a subclass to use a critic of your own.
    critic_class: ClassVar[type[LangevinCritic]] = LangevinCritic
    critic: LangevinCritic
    critic_target: LangevinCritic

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Mish,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        sampler: LangevinSampler | None = None,
        reward_scale: float = 1.0,
        backend: Backend = "auto",
        chain_dtype: ChainDtype = "float32",
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = [256, 256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.n_critics = n_critics
        self.sampler = LangevinSampler() if sampler is None else sampler
        self.reward_scale = reward_scale
        if backend not in get_args(Backend):
            raise ValueError(f"`backend` must be one of {', '.join(get_args(Backend))}; got {backend!r}.")
        self.backend: Backend = backend
        if chain_dtype not in get_args(ChainDtype):
            raise ValueError(f"`chain_dtype` must be one of {', '.join(get_args(ChainDtype))}; got {chain_dtype!r}.")
        self.chain_dtype: ChainDtype = chain_dtype
        self._graphs: CudaGraphs | None = CudaGraphs()
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.critic = self.make_critic()
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)
        # Where SB3 looks for it. A plain reference: registering the module a second time would save its weights twice.
        self.__dict__["features_extractor"] = self.critic.features_extractor
        optimizer_kwargs = self.optimizer_kwargs
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not {"foreach", "differentiable"} & {*optimizer_kwargs}:
            # One kernel instead of ten calls for each parameter: a millisecond an update on a CPU
            optimizer_kwargs = {"fused": True, **optimizer_kwargs}
        self.critic.optimizer = self.optimizer_class(
            self.critic.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **optimizer_kwargs,
        )

    def make_critic(self) -> LangevinCritic:
        """Build the critics, a ``critic_class`` with its own features extractor."""
        extractor = self.make_features_extractor()
        critic = self.critic_class(
            self.observation_space,
            self.action_space,  # type: ignore[arg-type]
            net_arch=get_actor_critic_arch(self.net_arch)[1],
            features_extractor=extractor,
            features_dim=extractor.features_dim,
            activation_fn=self.activation_fn,
            normalize_images=self.normalize_images,
            n_critics=self.n_critics,
            n_levels=self.sampler.n_levels,
            reward_scale=self.reward_scale,
        )
        critic.use_native = self.backend in ("auto", "native", "cuda_graphs")
        return critic

    @property
    def actor(self) -> "LangevinPolicy":
        """The policy itself: it takes the place of the actor in code written for SB3's actor-critic agents."""
        return self

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            lr_schedule=self._dummy_schedule,  # not needed to predict
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            n_critics=self.n_critics,
            sampler=self.sampler,
            reward_scale=self.reward_scale,
            backend=self.backend,
            chain_dtype=self.chain_dtype,
        )
        return data

    def set_training_mode(self, mode: bool) -> None:
        """Put the critic (never its target) in training or evaluation mode: it matters to batch norm and dropout."""
        if mode != self.critic.training:  # costs a tenth of a millisecond, at every prediction
            self.critic.set_training_mode(mode)
        self.training = mode

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """Actions in the scaled box [-1, 1], ``(batch, action_dim)``."""
        return self._predict(obs, deterministic)

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """As every SB3 policy's.

        :raises NonFiniteError: if an observation is not finite
        """
        obs, is_batch = super().obs_to_tensor(observation)
        check_observation(obs)
        return obs, is_batch

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.deterministic_actions(observation) if deterministic else self.sample_actions(observation)

    @th.no_grad()
    def sample_actions(self, obs: PyTorchObs, draws: ChainDraws | None = None, generator: th.Generator | None = None) -> th.Tensor:
        """Draw actions from the soft policy.

        :param obs: preprocessed batch of observations, as ``obs_to_tensor()`` gives them
        :param draws: start and noise of ``n_particles * batch`` chains, particle by particle; drawn here if ``None``
        :param generator: where to draw them from, torch's global generator if ``None``
        :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
        """
        features = self.critic.features(obs)
        if draws is None:
            n_chains = self.sampler.n_particles * len(features)
            draws = self.sampler.draw(n_chains, self.critic.action_dim, features.device, generator)
        return self._run_chains(features, draws)

    @th.no_grad()
    def deterministic_actions(self, obs: PyTorchObs) -> th.Tensor:
        """One fixed action for each observation: the chain with the same start and noise for every observation.

        The result for an observation does not depend on the others in the batch, nor on the call. Early Langevin steps are long
        and can turn a rounding difference into another action: compiled chains are exact by themselves; in torch, the chain runs
        in double precision where it may be batched, and row by row where features or gradients come from somebody else's network.

        :param obs: preprocessed batch of observations
        :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
        """
        backend, kernel = self._find_backend()
        is_exact = kernel is not None
        is_batched = backend != "autograd" and not any(True for _ in self.critic.features_extractor.parameters())
        if is_batched and (is_exact or self.device.type != "mps"):  # which has no double precision
            return self._run_fixed_chains(self.critic.features(obs), th.float32 if is_exact else th.float64)
        dtype = th.float32 if is_exact else None
        rows = _split_rows(obs)
        return th.cat([self._run_fixed_chains(self.critic.features(row), dtype) for row in rows])

    def _run_fixed_chains(self, features: th.Tensor, dtype: th.dtype | None = None) -> th.Tensor:
        generator = th.Generator().manual_seed(DETERMINISTIC_SEED)
        n_particles, batch = self.sampler.n_particles, len(features)
        start, noise = self.sampler.draw(n_particles, self.critic.action_dim, generator=generator)
        # (..., n_particles, action_dim) -> (..., n_particles * batch, action_dim): every observation gets the same
        draws = ChainDraws(start.repeat_interleave(batch, dim=-2), noise.repeat_interleave(batch, dim=-2))
        draws = ChainDraws(*(draw.to(features.device, dtype) for draw in draws))
        return self._run_chains(features, draws, dtype, row_by_row=True)

    def _run_chains(
        self, features: th.Tensor, draws: ChainDraws, dtype: th.dtype | None = None, row_by_row: bool = False
    ) -> th.Tensor:
        if self.sampler.n_levels != self.critic.n_levels:
            raise ValueError(
                f"The sampler has {self.sampler.n_levels} noise levels, the critic {self.critic.n_levels}: they must agree."
            )
        n_particles = self.sampler.n_particles
        # (batch, features_dim) -> (n_particles * batch, features_dim)
        features = features.repeat(n_particles, 1) if n_particles > 1 else features
        actions = self._chains(features, draws, dtype)
        # (n_particles * batch, ...) -> (n_particles, batch, ...)
        actions, features = (x.view(n_particles, -1, x.shape[1]) for x in (actions, features))
        if n_particles == 1:
            return actions[0]
        # Keep the particle with the largest min-over-critics value at the sharpest level
        if row_by_row:
            columns = zip(features.unbind(1), actions.unbind(1), strict=True)
            q_values = th.stack([self.critic.q_values(*column).amin(dim=0) for column in columns], dim=1)
        else:
            q_values = self.critic.q_values(features.flatten(0, 1), actions.flatten(0, 1)).amin(dim=0).view(n_particles, -1)
        best = q_values.argmax(dim=0)
        return actions[best, th.arange(len(best), device=best.device)]

    @property
    def chain_backend(self) -> Backend:
        """What computes the chains, the fastest that the critics allow unless ``backend`` says otherwise.

        ``"native"``: one kernel for whole chains of the package's own critics, compiled C on a CPU (where the critics then train in
        it, too), Triton's on a GPU; ``"torch"``: hand-written gradient, for the same critics on any device; ``"autograd"``:
        automatic gradient, for any critic; ``"cuda_graphs"``: chains, by the kernel or in torch, and whole updates launched as CUDA
        graphs. On a GPU neither kernel nor graphs are taken unless asked for; on a CPU ``"cuda_graphs"`` is as ``"auto"``.

        :raises RuntimeError: if ``backend`` asks for one that cannot be had
        """
        return self._find_backend()[0]

    def _find_backend(self) -> tuple[Backend, ChainKernel | None]:
        # What computes the chains, and the kernel if it is one. Looked up once a call: it costs ten microseconds.
        kernel, can_torch = self.critic.chain_kernel, StackedMlpQGradient.supports(self.critic)
        has_kernel, on_gpu = kernel is not None, self.device.type == "cuda"
        if self.backend == "auto" or (self.backend == "cuda_graphs" and self.device.type == "cpu"):
            choices: dict[Backend, bool] = {"native": has_kernel and not on_gpu, "torch": can_torch, "autograd": True}
            chosen = next(name for name, is_usable in choices.items() if is_usable)
            return chosen, kernel if chosen == "native" else None
        usable = {"native": has_kernel, "torch": can_torch, "autograd": True, "cuda_graphs": can_torch and on_gpu}
        if not usable[self.backend]:
            raise RuntimeError(f'`backend={self.backend!r}` cannot compute this critic here; use `backend="auto"`.')
        return self.backend, kernel if self.backend in ("native", "cuda_graphs") else None

    @property
    def product_dtype(self) -> th.dtype:
        """Of what multiplies in the hidden layers of chains, see ``chain_dtype``."""
        return self._product_dtype(self._find_backend()[1])

    def _product_dtype(self, kernel: ChainKernel | None) -> th.dtype:
        if self.chain_dtype == "float32" or kernel is None:
            return th.float32
        return th.bfloat16 if self.device.type == "cuda" or library.multiplies_bfloat16() else th.float32

    def _chains(self, features: th.Tensor, draws: ChainDraws, dtype: th.dtype | None) -> th.Tensor:
        backend, kernel = self._find_backend()
        if backend == "autograd":
            return self.sampler.sample(AutogradQGradient(self.critic, features), draws)
        rounded_to = self._product_dtype(kernel) if dtype is None else dtype

        def chains(features: th.Tensor, draws: ChainDraws) -> th.Tensor:
            if kernel is not None:
                return self.critic.sample(self.sampler, features, draws, rounded_to, kernel)
            return self.sampler.sample(StackedMlpQGradient(self.critic, features, dtype), draws).to(features.dtype)

        if backend == "cuda_graphs" and self._graphs is not None:
            setting = (self.sampler, rounded_to, next(self.critic.layers.parameters()).data_ptr())
            actions: th.Tensor = self._graphs(chains, (features, draws), setting)
            return actions
        return chains(features, draws)

    @contextmanager
    def plain_chains(self) -> Iterator[None]:
        """Chains without graphs of their own, as a part of a larger one."""
        graphs, self._graphs = self._graphs, None
        try:
            yield
        finally:
            self._graphs = graphs

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Rescale the action from [-1, 1] to [low, high], never outside by a rounding error."""
        assert isinstance(self.action_space, spaces.Box)
        return unscale_action(self.action_space, scaled_action)


def _split_rows(obs: PyTorchObs) -> list[PyTorchObs]:
    if isinstance(obs, dict):
        batch = len(next(iter(obs.values())))
        return [{key: value[i : i + 1] for key, value in obs.items()} for i in range(batch)]
    return [obs[i : i + 1] for i in range(len(obs))]


MlpPolicy = LangevinPolicy


class CnnPolicy(LangevinPolicy):
    """``LangevinPolicy`` for images."""

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(LangevinPolicy):
    """``LangevinPolicy`` for Dict observations."""

    default_features_extractor_class = CombinedExtractor
