"""LQL: Q-learning whose policy is Langevin dynamics on the critic."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, RolloutReturn, Schedule, TrainFreq
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.utils import _pytree as pytree

from sb3_diffrl.common import (
    MAX_SKIPPED,
    NonFiniteError,
    OnNonFinite,
    check_gradient,
    check_learning_rate,
    check_on_nonfinite,
    check_positive,
    check_scalable,
)
from sb3_diffrl.lql.critic import LangevinCritic
from sb3_diffrl.lql.cuda_graphs import GraphedUpdate
from sb3_diffrl.lql.env_guard import NonFiniteStepError, check_observable, end_trajectory, finite
from sb3_diffrl.lql.langevin import LangevinSampler, UpdateDraws
from sb3_diffrl.lql.policies import BACKENDS, CnnPolicy, LangevinPolicy, MlpPolicy, MultiInputPolicy
from sb3_diffrl.lql.random_state import random_state, set_random_state
from sb3_diffrl.saving import SafeReplayBuffers, SafeSaving

SelfLQL = TypeVar("SelfLQL", bound="LQL")

Metrics = dict[str, th.Tensor]

# A coordinate counts as saturated from this magnitude on, in the scaled box.
SATURATION = 0.95
# Size of the log's spread metric: states looked at, and samples drawn at each.
SPREAD_STATES, SPREAD_SAMPLES = 16, 16


class LQL(SafeSaving, SafeReplayBuffers, OffPolicyAlgorithm):
    """Langevin Q-learning (LQL): the policy is exp(w Σ Qᵢ(s, ·)), sampled by Langevin dynamics on the critic.

    Paper: "Direct Soft-Policy Sampling via Langevin Dynamics", https://arxiv.org/abs/2602.07873.
    Reference implementation (JAX): https://github.com/ku-dmlab/NCLQL.

    There is no actor. ``NCLQL`` is the same with a noise-conditioned critic, which lets the chain cross between the modes of
    Q; it is the better choice unless you study the difference.

    :param policy: policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: environment to learn from (if registered in Gymnasium, can be a string); its action space is a bounded Box
    :param learning_rate: learning rate of the critics' optimiser, constant or a function of the remaining progress (1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: env steps of uniformly random actions before the first update
    :param batch_size: minibatch size of an update
    :param tau: coefficient of the soft update of the target critics (between 0 and 1)
    :param gamma: discount factor
    :param train_freq: update every ``train_freq`` steps, or a tuple such as ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: updates after each rollout (see ``train_freq``); ``-1`` for as many as env steps
    :param action_noise: noise added to the sampled action; ``None`` by default, as the policy is already stochastic
    :param replay_buffer_class: replay buffer class (for instance ``HerReplayBuffer``), automatic if ``None``
    :param replay_buffer_kwargs: keyword arguments of the replay buffer
    :param optimize_memory_usage: memory-efficient variant of the replay buffer
    :param n_steps: length of the n-step return
    :param stats_window_size: number of episodes that the rollout statistics are averaged over
    :param tensorboard_log: log location for TensorBoard (no logging if ``None``)
    :param policy_kwargs: keyword arguments of the policy (``net_arch``, ``n_critics``, ...), see
        ``LangevinPolicy``
    :param verbose: 0 for no output, 1 for information, 2 for debug messages
    :param seed: seed of the pseudo-random generators
    :param device: device (cpu, cuda, ...); ``auto`` uses the GPU if possible
    :param n_langevin_steps: Langevin steps in a chain
    :param step_size: step size ε of the chain, in squared units of the scaled action box [-1, 1]. With the default
        ``inverse_temperature`` and ``normalize_grad``, a step drifts by 0.1, so that twenty can cross the box.
    :param inverse_temperature: w; with ``normalize_grad`` a step length rather than an inverse temperature
    :param normalize_grad: divide the Q-gradient by its L2 norm at each step (the paper's practice). Off, the chain samples
        exp(w Σ Qᵢ), once it mixes; the Qᵢ are in units of scaled rewards.
    :param n_particles: chains run for each action, of which the best by the smallest critic is kept
    :param reward_scale: factor on the rewards that the critics learn from
    :param on_nonfinite: what to do about a NaN or infinite observation, reward, action, loss or gradient: ``"raise"``, or
        ``"skip"``: leave out the update, or the env's step, after which all envs are reset, and count it in ``n_skipped``
    :param _init_setup_model: whether to build the networks at once
    :raises ValueError: if an argument is outside its range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: LangevinPolicy
    critic: LangevinCritic
    critic_target: LangevinCritic

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
        n_langevin_steps: int = 20,
        step_size: float = 4e-4,
        inverse_temperature: float = 500.0,
        normalize_grad: bool = True,
        n_particles: int = 1,
        reward_scale: float = 0.2,
        on_nonfinite: OnNonFinite = "raise",
        _init_setup_model: bool = True,
    ) -> None:
        check_observable(env, policy, policy_kwargs)
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
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.n_langevin_steps = n_langevin_steps
        self.step_size = step_size
        self.inverse_temperature = inverse_temperature
        self.normalize_grad = normalize_grad
        self.n_particles = n_particles
        self.reward_scale = reward_scale
        self.on_nonfinite: OnNonFinite = on_nonfinite
        #: Updates and env steps that were left out
        self.n_skipped = 0
        self._skipped_in_a_row = 0
        self._random_state: dict[str, Any] | None = None
        self._logged_obs: th.Tensor | dict[str, th.Tensor] | None = None
        self._graphed_update: GraphedUpdate | None = None
        self._collected: dict[nn.Module, list[nn.Parameter]] = {}
        if _init_setup_model:
            self._setup_model()

    def _make_sampler(self) -> LangevinSampler:
        return LangevinSampler(
            n_levels=1,
            n_steps=self.n_langevin_steps,
            step_size=self.step_size,
            inverse_temperature=self.inverse_temperature,
            normalize_grad=self.normalize_grad,
            n_particles=self.n_particles,
        )

    def _setup_model(self) -> None:
        check_observable(self.observation_space, self.policy_class, self.policy_kwargs)
        check_scalable(self.action_space)
        check_on_nonfinite(self.on_nonfinite)
        self.reward_scale = check_positive("reward_scale", self.reward_scale)
        for name in ("sampler", "reward_scale"):
            if name in self.policy_kwargs:
                raise ValueError(f"`{name}` is not for `policy_kwargs`: the algorithm's own arguments set it.")
        own_choice = {"n_steps": self.n_steps, "gamma": self.gamma}.items() <= self.replay_buffer_kwargs.items()
        if self.n_steps > 1 and self.replay_buffer_class is NStepReplayBuffer and own_choice:
            # SB3's own choice, from a saved model: it would warn that `n_steps` is ignored
            self.replay_buffer_class = None
        # Arguments of the policy, but not the user's own, which are the ones saved.
        users_policy_kwargs = self.policy_kwargs
        self.policy_kwargs = {**users_policy_kwargs, "sampler": self._make_sampler(), "reward_scale": self.reward_scale}
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = users_policy_kwargs
        self.actor = self.policy
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        if self.verbose >= 1:
            rounded = ", products in bfloat16" if self.policy.product_dtype == th.bfloat16 else ""
            print(f"Langevin chains: gradient of the critics {BACKENDS[self.policy.chain_backend]}{rounded}")

    @th.enable_grad()  # Ctrl-C can leave torch without
    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Do ``gradient_steps`` updates on minibatches from the replay buffer, and log their mean metrics."""
        assert self.replay_buffer is not None
        if gradient_steps < 1:
            return
        self._apply_settings()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.critic.optimizer)
        check_learning_rate([self.critic.optimizer])

        update = self._choose_update()
        metrics: list[Metrics] = []
        for _ in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            try:
                metrics.append(update(replay_data, self.draw(batch_size)))
                self._skipped_in_a_row = 0
            except NonFiniteError as error:
                self._skip(error)
        if isinstance(update, GraphedUpdate):
            for fault in update.take_faults():
                self._skip(fault)
        self._logged_obs = replay_data.observations
        self._n_updates += gradient_steps

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.n_skipped:
            self.logger.record("train/n_skipped", self.n_skipped)
        if metrics:
            # One transfer from the device for all of them
            means = th.stack([th.stack(list(metric.values())) for metric in metrics]).mean(dim=0).tolist()
            for name, mean in zip(metrics[0], means, strict=True):
                self.logger.record(f"train/{name}", mean)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for an observation or a batch of them, as in every SB3 algorithm.

        :param deterministic: one fixed action for each observation, see
            ``deterministic_actions()``; otherwise a draw from the soft policy
        """
        self._apply_settings()
        return super().predict(observation, state, episode_start, deterministic)

    def _apply_settings(self) -> None:
        # The model's attributes rule, so that a callback may change them (`model.inverse_temperature = ...`).
        self.policy.sampler = self._make_sampler()
        self.policy.reward_scale = self.critic.reward_scale = self.critic_target.reward_scale = self.reward_scale

    def draw(self, batch_size: int) -> UpdateDraws:
        """Draw the randomness of one update from torch's global generator."""
        sampler = self.policy.sampler
        return UpdateDraws(sampler.draw(sampler.n_particles * batch_size, self.critic.action_dim, self.device))

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
        self._update_target()
        return metrics

    def _q_values(
        self, replay_data: ReplayBufferSamples, actions: th.Tensor | None = None, levels: th.Tensor | None = None
    ) -> th.Tensor:
        # (n_critics, batch), at the batch's actions and the sharpest level unless told otherwise
        features = self.critic.features(replay_data.observations)
        return self.critic.q_values(features, replay_data.actions if actions is None else actions, levels)

    def _td_loss(self, q_values: th.Tensor, replay_data: ReplayBufferSamples, next_actions: th.Tensor) -> tuple[th.Tensor, Metrics]:
        """Squared TD error, summed over critics.

        :param q_values: at the batch's actions, ``(n_critics, batch)``
        :param next_actions: drawn at the next observations, ``(batch, action_dim)``
        """
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts.flatten()
        with th.no_grad():
            next_features = self.critic_target.features(replay_data.next_observations)
            next_q = self.critic_target.q_values(next_features, next_actions).amin(dim=0)
            rewards, dones = replay_data.rewards.flatten(), replay_data.dones.flatten()
            target = self.reward_scale * rewards + discounts * (1 - dones) * next_q
        loss = nn.functional.mse_loss(q_values, target.expand_as(q_values), reduction="none").mean(dim=1).sum()
        return loss, {
            "td_loss": loss.detach() / self.critic.n_critics,
            "q_mean": q_values.detach().mean() / self.reward_scale,
            "action_saturation": (next_actions.abs() >= SATURATION).float().mean(),
        }

    def _optimise(self, loss: th.Tensor, name: str) -> th.Tensor:
        # Returns the norm of the gradient
        self.critic.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self._check_gradient(loss, name)
        self.critic.optimizer.step()
        return norm

    def _weights(self, network: nn.Module) -> list[nn.Parameter]:
        # Kept: walking through the modules costs a tenth of a millisecond.
        if network not in self._collected:
            self._collected[network] = [*network.parameters()]
        return self._collected[network]

    def _check_gradient(self, loss: th.Tensor, name: str) -> th.Tensor:
        return check_gradient(loss, self._weights(self.critic), self.critic, f"env step {self.num_timesteps}", {name: loss})

    def _choose_update(self) -> Callable[[ReplayBufferSamples, UpdateDraws], Metrics]:
        if self.policy.chain_backend != "cuda_graphs":
            return self.update
        if self._graphed_update is None or self._graphed_update.optimizer is not self.critic.optimizer:
            self._graphed_update = GraphedUpdate(self)
        return self._graphed_update

    def _skip(self, error: NonFiniteError) -> None:
        if self.on_nonfinite == "raise" or self._skipped_in_a_row >= MAX_SKIPPED:
            raise type(error)(f"{error} {self.last_save}") from error
        self.n_skipped += 1
        self._skipped_in_a_row += 1

    def _update_target(self) -> None:
        polyak_update(self._weights(self.critic), self._weights(self.critic_target), self.tau)
        # Running statistics are copied as they are, see https://github.com/DLR-RM/stable-baselines3/issues/996
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def action_spread(self, obs: th.Tensor | dict[str, th.Tensor], n_samples: int = SPREAD_SAMPLES) -> float:
        """How much repeated samples at one observation differ: whether the policy still explores.

        Draws from a generator of its own, so that looking at it does not change the run.

        :param obs: preprocessed batch of observations
        :param n_samples: samples drawn at each
        :return: standard deviation over the samples, mean over observations and coordinates, in units of the scaled box [-1, 1]
        """
        generator = th.Generator(self.device).manual_seed(self._n_updates)
        repeated = pytree.tree_map(lambda x: x.repeat_interleave(n_samples, 0), obs)
        # (batch * n_samples, action_dim) -> (batch, n_samples, action_dim)
        actions = self.policy.sample_actions(repeated, generator=generator).view(-1, n_samples, self.critic.action_dim)
        return float(actions.std(dim=1).mean())

    def dump_logs(self) -> None:
        """Write the logs, with the spread of the policy's samples at a few states of the last minibatch."""
        if self._logged_obs is not None:
            obs = self._logged_obs
            few = {k: v[:SPREAD_STATES] for k, v in obs.items()} if isinstance(obs, dict) else obs[:SPREAD_STATES]
            self.logger.record("train/action_spread", self.action_spread(few))
        super().dump_logs()

    def learn(
        self: SelfLQL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "LQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfLQL:
        """Learn from ``total_timesteps`` env steps; arguments as in every SB3 algorithm.

        :raises NonFiniteError: if the env gives a NaN or infinite observation or reward, or a loss or gradient is not finite; the
            model and its replay buffer are as they were before that step. See ``on_nonfinite``; a hundred skipped in a row are
            raised nevertheless.
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    @contextmanager
    def _fault_handling(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteStepError as error:
            # The env is past the fault: the next learn() starts a new episode.
            self._last_obs = None
            end_trajectory(self.replay_buffer)
            raise NonFiniteStepError(
                f"At env step {self.num_timesteps}, {error}. The step was not stored and nothing was learned from it: the model "
                "and its replay buffer can be saved, and `learn(..., reset_num_timesteps=False)` continues from a new episode."
            ) from None

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        assert self.env is not None, "Set an environment with `set_env()` before calling `learn()`."
        is_reset = reset_num_timesteps or self._last_obs is None
        with self._fault_handling(), finite(self.env):
            prepared = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        state, self._random_state = self._random_state, None
        if not reset_num_timesteps and state is not None and state["seed"] == self.seed:
            set_random_state(state, self.device, self.action_space)
            if self._vec_normalize_env is not None and not is_reset and "returns" in state:
                self._vec_normalize_env.returns = state["returns"]
        return prepared

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """SB3's, with the env guarded against NaN and infinite numbers."""
        before = self.num_timesteps
        while True:
            try:
                with self._fault_handling(), finite(env):
                    if self._last_obs is None:  # after a fault
                        self._restart(env)
                    options = (train_freq, replay_buffer, action_noise, learning_starts, log_interval)
                    return super().collect_rollouts(env, callback, *options)
            except NonFiniteStepError as error:
                if self.num_timesteps > before:
                    before, self._skipped_in_a_row = self.num_timesteps, 0
                self._skip(error)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        except NonFiniteError as error:
            raise NonFiniteStepError(str(error)) from error

    def _restart(self, env: VecEnv) -> None:
        self._last_obs = env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()
        if self.action_noise is not None:
            self.action_noise.reset()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything; another seed than the model's takes precedence over the random state that a file holds."""
        super().set_random_seed(seed)
        if seed != self.seed:
            self._random_state = None

    def save(
        self, path: str | Path | io.BufferedIOBase, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Save the model, with the state of the random generators: ``learn(..., reset_num_timesteps=False)`` goes on from it.

        The replay buffer is saved by ``save_replay_buffer()``, statistics of ``VecNormalize`` by its ``save()``.

        :param path: file to write
        :param exclude: names of attributes to leave out besides the usual
        :param include: names of attributes to save although they usually are not
        :raises OSError: if it cannot be written, with the reason; a former file is as it was
        """
        self._random_state = {"seed": self.seed, **random_state(self.device, self.action_space)}
        if self._vec_normalize_env is not None:
            # Its own save() leaves them out
            self._random_state["returns"] = self._vec_normalize_env.returns.copy()
        try:
            super().save(path, exclude, include)
        finally:
            self._random_state = None

    def _excluded_save_params(self) -> list[str]:
        rebuilt = ["actor", "critic", "critic_target", "batch_norm_stats", "batch_norm_stats_target"]
        return [*super()._excluded_save_params(), *rebuilt, "_logged_obs", "_graphed_update", "_collected"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "critic.optimizer"], []
