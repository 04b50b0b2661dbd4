"""NC-LQL: Langevin Q-learning with a noise-conditioned critic."""

from dataclasses import replace
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule
from torch import nn

from sb3_diffrl.common import OnNonFinite
from sb3_diffrl.lql.langevin import LangevinSampler, UpdateDraws
from sb3_diffrl.lql.lql import LQL, Metrics
from sb3_diffrl.lql.policies import LangevinPolicy

SelfNCLQL = TypeVar("SelfNCLQL", bound="NCLQL")


class NCLQL(LQL):
    """Noise-conditioned Langevin Q-learning (NC-LQL).

    Paper: "Direct Soft-Policy Sampling via Langevin Dynamics", https://arxiv.org/abs/2602.07873.
    Reference implementation (JAX): https://github.com/ku-dmlab/NCLQL.

    The critic Q(s, a, l) also learns itself smoothed by Gaussian noise of scale sigma_l on the action. The chain
    anneals from the smoothest level, where it crosses between modes, to the sharpest, where it refines.

    Arguments and errors are those of ``LQL``, and:

    :param n_levels: number of noise levels L
    :param sigma_max: largest noise scale, in units of the scaled action box [-1, 1]
    :param sigma_min: smallest noise scale, same units
    :param n_langevin_steps: Langevin steps at each level
    :param step_size: step size at the last level; at level l it is (sigma_l / sigma_min)^2 times that
    """

    def __init__(
        self,
        policy: str | type[LangevinPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        n_levels: int = 10,
        sigma_max: float = 0.1,
        sigma_min: float = 0.001,
        n_langevin_steps: int = 2,
        step_size: float = 1e-4,
        inverse_temperature: float = 500.0,
        normalize_grad: bool = True,
        n_particles: int = 1,
        reward_scale: float = 0.2,
        on_nonfinite: OnNonFinite = "raise",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            stats_window_size,
            tensorboard_log,
            policy_kwargs,
            verbose,
            seed,
            device,
            n_langevin_steps,
            step_size,
            inverse_temperature,
            normalize_grad,
            n_particles,
            reward_scale,
            on_nonfinite,
            _init_setup_model=False,
        )
        self.n_levels = n_levels
        self.sigma_max = sigma_max
        self.sigma_min = sigma_min
        if _init_setup_model:
            self._setup_model()

    def _make_sampler(self) -> LangevinSampler:
        return replace(super()._make_sampler(), n_levels=self.n_levels, sigma_max=self.sigma_max, sigma_min=self.sigma_min)

    def draw(self, batch_size: int) -> UpdateDraws:
        """Draw the randomness of one update from torch's global generator."""
        draws = super().draw(batch_size)
        if self.n_levels == 1:  # nothing to smooth: LQL
            return draws
        levels = th.randint(self.n_levels - 1, (batch_size,), device=self.device)
        return draws._replace(levels=levels, noise=th.randn(batch_size, self.critic.action_dim, device=self.device))

    def update(self, replay_data: ReplayBufferSamples, draws: UpdateDraws) -> Metrics:
        """One update.

        :param replay_data: minibatch, actions in the scaled box
        :param draws: the randomness, as ``draw()`` gives it
        :return: metrics, scalar tensors by name
        """
        next_actions = self.policy.sample_actions(replay_data.next_observations, draws.chain)
        q_values = self._q_values(replay_data)
        loss, metrics = self._td_loss(q_values, replay_data, next_actions)
        metrics["grad_norm"] = self._optimise(loss, "td_loss")
        if draws.levels is not None and draws.noise is not None:
            # The target of the smoothing step is the critics' mean before the TD step
            loss, smoothing_metrics = self._smoothing_loss(q_values.detach().mean(dim=0), replay_data, draws.levels, draws.noise)
            self._optimise(loss, "smoothing_loss")
            metrics.update(smoothing_metrics)
        self._update_target()
        return metrics

    def _smoothing_loss(
        self, mean_q: th.Tensor, replay_data: ReplayBufferSamples, levels: th.Tensor, noise: th.Tensor
    ) -> tuple[th.Tensor, Metrics]:
        """Squared distance of the noisy-level critics to the sharpest level's mean, summed over critics.

        :param mean_q: mean over critics at the sharpest level and the batch's actions, ``(batch,)``
        :param levels: noise level of each row, ``(batch,)``
        :param noise: standard normal, ``(batch, action_dim)``
        """
        sigmas = self.policy.sampler.sigmas_on(self.device)[levels].unsqueeze(1)
        q_values = self._q_values(replay_data, replay_data.actions + sigmas * noise, levels)
        loss = nn.functional.mse_loss(q_values, mean_q.expand_as(q_values), reduction="none").mean(dim=1).sum()
        return loss, {"smoothing_loss": loss.detach() / self.critic.n_critics}

    def learn(
        self: SelfNCLQL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "NCLQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfNCLQL:
        """Learn from ``total_timesteps`` env steps, see ``learn()``."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
