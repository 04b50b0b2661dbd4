"""The diffusion policy p(a | s)."""

from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffrl.common import check_count
from sb3_diffrl.diffusion.denoisers import MlpDenoiser
from sb3_diffrl.diffusion.model import DiffusionModel
from sb3_diffrl.diffusion.process import DiffusionProcess, PredictionType, Solver
from sb3_diffrl.diffusion.schedules import ScheduleName, make_schedule
from sb3_diffrl.offline.policies import OfflinePolicy
from sb3_diffrl.timesteps.mixin import TimestepSamplerMixin
from sb3_diffrl.timesteps.samplers import TimestepSampler

# Seeds the noise of deterministic actions: part of the policy's definition, so it never changes.
DETERMINISTIC_SEED = 0


class DiffusionPolicy(TimestepSamplerMixin, OfflinePolicy):
    """Actions are denoised from Gaussian noise by a network that sees the observation.

    The sampler's settings may be changed on a trained policy: ``model.num_inference_steps = 5``, likewise ``solver``.

    :param observation_space: observation space, as in the dataset
    :param action_space: bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress (1 to 0)
    :param net_arch: width of each hidden layer of the denoiser
    :param activation_fn: activation of the denoiser
    :param time_embedding_dim: size of the time's embedding
    :param optimizer_class: optimiser
    :param optimizer_kwargs: its keyword arguments, without the learning rate
    :param num_train_timesteps: noise levels of training, unused by the schedule ``"vp"``
    :param num_inference_steps: denoising steps of an action
    :param beta_schedule: noise schedule: ``"linear"``, ``"squaredcos_cap_v2"``, ``"quadratic"`` or ``"vp"``
    :param prediction_type: what the denoiser predicts: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``
    :param solver: ``"ddim"`` or ``"ddpm"``
    :param ema_decay: decay of the moving average of the weights, which acts
    :param timestep_sampler: which times to train on: a name or an object, see ``timestep_sampler_by_name``
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (256, 256, 256),
        activation_fn: type[nn.Module] = nn.Mish,
        time_embedding_dim: int = 64,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        num_train_timesteps: int = 50,
        num_inference_steps: int = 10,
        beta_schedule: ScheduleName = "squaredcos_cap_v2",
        prediction_type: PredictionType = "epsilon",
        solver: Solver = "ddim",
        ema_decay: float = 0.995,
        timestep_sampler: str | TimestepSampler = "uniform",
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, optimizer_class, optimizer_kwargs)
        self.net_arch, self.activation_fn, self.time_embedding_dim = net_arch, activation_fn, time_embedding_dim
        self.num_train_timesteps, self.beta_schedule = num_train_timesteps, beta_schedule
        self.prediction_type, self.ema_decay = prediction_type, ema_decay
        self.num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        self.solver: Solver = solver
        # The scaled box is [-1, 1]
        process = DiffusionProcess(make_schedule(beta_schedule, num_train_timesteps), prediction_type, clip_sample=1.0)
        process.check_sampling(self.num_inference_steps, solver)
        denoiser = MlpDenoiser(self.action_dim, self.obs_dim, net_arch, activation_fn, time_embedding_dim)
        self.model = DiffusionModel(denoiser, process, ema_decay)
        self.optimizer = self.make_optimizer(self.model.denoiser.parameters())
        self._setup_timestep_sampler(timestep_sampler, process, (self.action_dim,))

    def loss(self, obs: th.Tensor, actions: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Denoising loss, ``(batch,)``.

        :param obs: flattened, in the env's units, ``(batch, obs_dim)``
        :param actions: in the scaled box, ``(batch, action_dim)``
        :param t: diffusion times, ``(batch,)``
        :param noise: standard normal, ``(batch, action_dim)``
        """
        return self.model.loss(actions, self.normalizer.normalize(obs), t, noise)

    def bound_terms(self, obs: th.Tensor, actions: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Terms of the variational bound, see ``DiffusionProcess.bound_terms``; arguments as of ``loss()``, ``(batch,)``."""
        return self.model.bound_terms(actions, self.normalizer.normalize(obs), t, noise)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Actions in the scaled box [-1, 1], ``(batch, action_dim)``."""
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        assert isinstance(observation, th.Tensor)
        return self.sample_actions(observation, self.fixed_noise(len(observation)) if deterministic else None)

    def draw_noise(self, batch_size: int, generator: th.Generator | None = None) -> th.Tensor:
        """All the randomness of ``batch_size`` actions: the start, then the steps' noise, ``(1 + steps, batch, action_dim)``.

        :param generator: where to draw it from, torch's global generator if ``None``
        """
        n_steps = self.num_inference_steps if self.solver == "ddpm" else 0
        return th.randn(1 + n_steps, batch_size, self.action_dim, device=self.device, generator=generator)

    def fixed_noise(self, batch_size: int) -> th.Tensor:
        """The noise of deterministic actions, the same for every observation: same observation, same action."""
        n_steps = self.num_inference_steps if self.solver == "ddpm" else 0
        noise = th.randn(1 + n_steps, 1, self.action_dim, generator=th.Generator().manual_seed(DETERMINISTIC_SEED))
        return noise.expand(-1, batch_size, -1).to(self.device)

    @th.no_grad()
    def sample_actions(self, obs: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """Draw actions.

        :param obs: flattened, in the env's units, ``(batch, obs_dim)``
        :param noise: as ``draw_noise()`` gives it, drawn here if ``None``
        :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
        """
        noise = self.draw_noise(len(obs)) if noise is None else noise
        steps = noise[1:] if self.solver == "ddpm" else None
        cond = self.normalizer.normalize(obs)
        return self.model.sample(noise[0], cond, self.num_inference_steps, self.solver, steps).clamp(-1.0, 1.0)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ["net_arch", "activation_fn", "time_embedding_dim", "num_train_timesteps", "num_inference_steps", "beta_schedule"]
        names += ["prediction_type", "solver", "ema_decay", "timestep_sampler"]
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in names}}


MlpPolicy = DiffusionPolicy
