"""Diffusion planning."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import polyak_update

from sb3_diffrl.common import OnNonFinite, check_count, check_number
from sb3_diffrl.diffusion.process import PredictionType
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.offline_algorithm import Metrics, OfflineAlgorithm
from sb3_diffrl.offline.policies import of_policy
from sb3_diffrl.offline.reading import DatasetSource
from sb3_diffrl.planner.data import Batch, Data, Pad, WindowSettings, check_velocity_indices, prepare_data
from sb3_diffrl.planner.guidance import GuidanceName, TrainedGuidance
from sb3_diffrl.planner.policies import CriticName, MlpPolicy, PlannerPolicy
from sb3_diffrl.timesteps.samplers import TimestepSampler

SelfDiffusionPlanner = TypeVar("SelfDiffusionPlanner", bound="DiffusionPlanner")

# How fast the target of the TD value follows.
TD_TAU = 0.005
# Windows that the units of a plan's steps are taken from.
SCALE_WINDOWS = 10_000


def check_train_for(names: Sequence[str]) -> Sequence[str]:
    """The names of guidances.

    :raises ValueError: if one cannot be trained for
    """
    unknown = names if isinstance(names, str) else [name for name in names if name not in get_args(TrainedGuidance)]
    if unknown:
        choices = " and ".join(map(repr, get_args(TrainedGuidance)))
        raise ValueError(f"`train_for` is a list of guidances among {choices}, got {names!r}.")
    return names


class Term(NamedTuple):
    """A part of the loss.

    :param loss: scalar
    :param info: metrics
    :param around_step: to surround the optimiser's step with, see ``TimestepSampler.around_step``
    """

    loss: th.Tensor
    info: Metrics
    around_step: AbstractContextManager[None] = nullcontext()


class DiffusionPlanner(OfflineAlgorithm):
    """Plans the states to come by diffusion, replans at every step, and acts by inverse dynamics.

    Papers: What Makes a Good Diffusion Planner for Decision Making? (Diffusion Veteran), https://arxiv.org/abs/2503.00535, code:
    CleanDiffuser, with the guidances of Diffuser, https://arxiv.org/abs/2205.09991, and Decision Diffuser,
    https://arxiv.org/abs/2211.15657. The deviations are listed on the documentation's page.

    A trained model takes another guidance at once, ``model.guidance = "mcss"``, where that needs no further training: ``"none"``
    and ``"mcss"`` always, ``"cg"`` and ``"cfg"`` if named by ``guidance`` or ``train_for`` when the model was made. Likewise
    ``n_candidates``, ``cg_scale``, ``cfg_scale``, ``cfg_target``, ``num_inference_steps``, ``num_action_steps``, ``temperature``.

    :param policy: ``"MlpPolicy"`` or a subclass of ``PlannerPolicy``; sizes of networks are in ``policy_kwargs``
    :param env: environment to evaluate in, the dataset's own by default
    :param dataset: id of a Minari dataset on disk, a ``MinariDataset``, an ``OfflineDataset``, or a list (a mixture)
    :param learning_rate: learning rate, or a function of the remaining progress (1 to 0)
    :param batch_size: minibatch size
    :param policy_kwargs: keyword arguments of the policy
    :param stats_window_size: window of the logged episode statistics, unused offline
    :param tensorboard_log: folder for TensorBoard, ``None`` for none
    :param verbose: 0 no output, 1 information, 2 debugging
    :param seed: seed of weights, minibatches and noise
    :param device: where to compute
    :param horizon: states of a plan, the present one included
    :param stride: steps from one of them to the next
    :param discount: discount of a window's value, below 1
    :param pad: what stands beyond an episode's end: ``"last"``, its final observation and reward go on (mazes: the point stays at
        the goal; kitchen), or ``"none"``: windows lie within episodes (locomotion)
    :param velocity_indices: with ``pad="last"``, entries of the flattened observation that are velocities: what stays is at rest,
        so they are 0 there
    :param terminal_reward: reward in place of the recorded one where an episode terminates (-100 for locomotion that falls)
    :param value_weight: weights the planner's loss by exp(value_weight (value - 1)), with values scaled to [-1, 1]; 0 for none
    :param critic: what values plans: ``"horizon"``, a transformer that sees the plan and predicts its window's return, or ``"td"``,
        the mean of V(s) over the states to come, learnt by temporal differences
    :param guidance: how plans are chosen: ``"none"``, ``"mcss"``, ``"cg"`` or ``"cfg"``
    :param train_for: guidances among ``"cg"`` and ``"cfg"`` to train for besides ``guidance``
    :param n_candidates: candidates of ``"mcss"``
    :param cg_scale: ``"cg"`` samples p(plan) exp(cg_scale value)
    :param cfg_scale: weight of the conditioned model in ``"cfg"``: 1 conditions, more extrapolates
    :param cfg_target: scaled value, in [-1, 1], that ``"cfg"`` asks for
    :param cfg_dropout: share of the minibatch that learns without its value, for ``"cfg"``
    :param num_inference_steps: denoising steps of a plan
    :param num_action_steps: denoising steps of an action
    :param temperature: standard deviation of the noise that actions start from, unless they are deterministic
    :param ema_decay: decay of the moving averages of the weights, which act; smaller at first, min(ema_decay, (1 + n) / (10 + n))
        after n steps
    :param timestep_sampler: which times the planner and the inverse dynamics are trained on, see ``DiffusionBC``; each has its own
    :param clip_sample: bound of what is denoised, in standard deviations from the data's mean, ``None`` for none.
        Without one, guidance that is strong finds noise of which the planner makes states far from all data.
    :param prediction_type: what the denoiser of plans predicts: ``"epsilon"`` as in the papers, where an error at pure noise is an
        error 150 times as large of the plan, the plan itself (``"sample"``), or ``"v_prediction"``
    :param relative: denoise displacements from the present state, each in its own standard deviation, so that a plan's first steps
        are as exact as they are short, rather than states (the papers); the network sees the present state beside each
    :param on_nonfinite: what to do about a NaN or infinite loss or gradient: ``"raise"``, or ``"skip"``: leave out the gradient
        step and count it in ``n_skipped``
    :param _init_setup_model: build the networks at once
    :raises ValueError: if an argument is outside its range, or the dataset does not fit; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: PlannerPolicy
    n_candidates, cg_scale, cfg_scale, cfg_target = map(of_policy, ("n_candidates", "cg_scale", "cfg_scale", "cfg_target"))
    num_inference_steps, num_action_steps = of_policy("num_inference_steps"), of_policy("num_action_steps")
    temperature, guidance = of_policy("temperature"), of_policy("guidance")
    settings_of_policy: ClassVar[tuple[str, ...]] = (
        "n_candidates",
        "cg_scale",
        "cfg_scale",
        "cfg_target",
        "num_inference_steps",
        "num_action_steps",
        "temperature",
        "guidance",
    )

    def __init__(
        self,
        policy: str | type[PlannerPolicy],
        env: GymEnv | str | None = None,
        dataset: DatasetSource | OfflineDataset | Sequence[DatasetSource] | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 128,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        horizon: int = 4,
        stride: int = 1,
        discount: float = 0.997,
        pad: Pad = "none",
        velocity_indices: Sequence[int] = (),
        terminal_reward: float | None = None,
        value_weight: float = 0.0,
        critic: CriticName = "horizon",
        guidance: GuidanceName = "none",
        train_for: Sequence[TrainedGuidance] = (),
        n_candidates: int = 50,
        cg_scale: float = 10.0,
        cfg_scale: float = 2.0,
        cfg_target: float = 1.0,
        cfg_dropout: float = 0.25,
        num_inference_steps: int = 20,
        num_action_steps: int = 10,
        temperature: float = 0.5,
        ema_decay: float = 0.9999,
        timestep_sampler: str | TimestepSampler = "uniform",
        clip_sample: float | None = None,
        prediction_type: PredictionType = "epsilon",
        relative: bool = False,
        on_nonfinite: OnNonFinite = "raise",
        _init_setup_model: bool = True,
    ) -> None:
        self.horizon, self.stride, self.discount, self.pad = horizon, stride, discount, pad
        self.velocity_indices = velocity_indices
        self.terminal_reward, self.value_weight, self.critic = terminal_reward, value_weight, critic
        self.guidance = guidance
        # Kept apart from the guidance in use: the networks stay when that changes.
        named = {guidance, *check_train_for(train_for)}
        self.train_for: tuple[str, ...] = tuple(name for name in get_args(TrainedGuidance) if name in named)
        self.n_candidates, self.cg_scale = n_candidates, cg_scale
        self.cfg_scale, self.cfg_target, self.cfg_dropout = cfg_scale, cfg_target, cfg_dropout
        self.num_inference_steps, self.num_action_steps = num_inference_steps, num_action_steps
        self.temperature, self.ema_decay = temperature, ema_decay
        self.timestep_sampler, self.clip_sample = timestep_sampler, clip_sample
        self.prediction_type, self.relative = prediction_type, relative
        super().__init__(
            policy,
            env,
            dataset,
            learning_rate,
            batch_size,
            policy_kwargs,
            stats_window_size,
            tensorboard_log,
            verbose,
            seed,
            device,
            on_nonfinite,
            _init_setup_model,
        )

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        self._check_arguments()
        super()._setup_model()
        if self._generator_state is None:
            values = self.data.values
            low, high = values.min(), values.max()
            self.policy.value_center.copy_((low + high) / 2)
            self.policy.value_scale.copy_((high - low) / 2 if high > low else th.ones(()))
            if self.relative:
                n = len(values)
                some = th.linspace(0, n - 1, min(n, SCALE_WINDOWS), dtype=th.float64, device=self.device).long()
                windows = self.data.gather(some, self.horizon, self.stride).windows
                self.policy.fit_plan_scale(self.policy.normalizer.normalize(windows))

    def _check_arguments(self) -> None:
        self.horizon, self.stride = check_count("horizon", self.horizon), check_count("stride", self.stride)
        if self.horizon < 2:
            raise ValueError("`horizon` must be at least 2: a plan is the present state and one to go to.")
        if not 0 <= self.discount < 1:
            raise ValueError(f"`discount` must be at least 0 and below 1, got {self.discount!r}.")
        if not 0 <= self.cfg_dropout < 1:
            raise ValueError(f"`cfg_dropout` must be at least 0 and below 1, got {self.cfg_dropout!r}.")
        if "cfg" in self.train_for and self.cfg_dropout == 0:
            raise ValueError(
                'The guidance "cfg" extrapolates from a model without condition, which `cfg_dropout` = 0 never trains.'
            )
        self.velocity_indices = check_velocity_indices(self.velocity_indices)
        self.value_weight = check_number("value_weight", self.value_weight)
        if self.terminal_reward is not None:
            self.terminal_reward = check_number("terminal_reward", self.terminal_reward)

    def _policy_arguments(self) -> dict[str, Any]:
        names = ["horizon", "critic", "train_for", "ema_decay", "timestep_sampler", "clip_sample", "prediction_type", "relative"]
        arguments = {name: getattr(self, name) for name in (*names, *self.settings_of_policy)}
        misplaced = [name for name in self.policy_kwargs if name in arguments]
        if misplaced:
            raise ValueError(f"`policy_kwargs` has {misplaced[0]!r}, which is an argument of {type(self).__name__} itself.")
        return {**self.policy_kwargs, **arguments}

    def _prepare_data(self, dataset: OfflineDataset) -> Data:
        assert isinstance(self.action_space, spaces.Box)
        low, high = (bound.reshape(-1).astype(np.float32) for bound in (self.action_space.low, self.action_space.high))
        # A controller may ask for more than the actuator gives: what the env did is at the bound.
        actions = ((dataset.actions - low) / (high - low) * 2 - 1).clip(-1.0, 1.0)
        return prepare_data(dataset, actions, self.window_settings, self.device)

    @property
    def window_settings(self) -> WindowSettings:
        """How the dataset is cut into windows."""
        return WindowSettings(
            self.horizon, self.stride, self.discount, self.pad, tuple(self.velocity_indices), self.terminal_reward
        )

    # ------------------------------------------------------------------ use

    def plan(self, observation: Any, deterministic: bool = False) -> np.ndarray:
        """The plans that ``predict()`` would act on.

        :param observation: one observation or a batch, as for ``predict()``
        :param deterministic: the plan of the mean latent (of fixed candidates for ``"mcss"``), otherwise a sample
        :return: flattened observations in the env's units, ``stride`` steps apart, the present one first, float32,
            ``(batch, horizon, obs_dim)``; the batch is 1 for one observation
        """
        self.policy.set_training_mode(False)
        obs, _ = self.policy.obs_to_tensor(observation)
        plans: np.ndarray = self.policy.normalizer.denormalize(self.policy.plan(obs, deterministic)).cpu().numpy()
        return plans

    @th.no_grad()
    def value(self, plans: np.ndarray) -> np.ndarray:
        """The critic's value of plans.

        :param plans: as ``plan()`` gives them, ``(batch, horizon, obs_dim)``
        :return: discounted returns in units of the env's reward, float32, ``(batch,)``
        :raises ValueError: if they are of another shape
        """
        self.policy.set_training_mode(False)
        plans = np.asarray(plans, np.float32)
        if plans.shape[1:] != (self.horizon, self.policy.obs_dim):
            raise ValueError(
                f"Plans are (batch, {self.horizon}, {self.policy.obs_dim}), as `plan()` gives them, not {plans.shape}."
            )
        values = self.policy.value(self.policy.normalizer.normalize(th.as_tensor(plans, device=self.device)))
        in_units: np.ndarray = (values * self.policy.value_scale + self.policy.value_center).cpu().numpy()
        return in_units

    # ------------------------------------------------------------------ learning

    def sample_batch(self) -> Batch:
        """A minibatch of windows, drawn evenly, observations standardised and values scaled."""
        data: Data = self.data
        indices = th.randint(len(data.first_rows), (self.batch_size,), device=self.device, generator=self.generator)
        batch = data.gather(indices, self.horizon, self.stride)
        return batch._replace(
            windows=self.policy.normalizer.normalize(batch.windows),
            values=(batch.values - self.policy.value_center) / self.policy.value_scale,
        )

    def update(self) -> Metrics:
        """One gradient step of the planner, the inverse dynamics and the critics, on one minibatch.

        They share no weights, so one optimiser steps down the sum of their losses.
        """
        batch = self.sample_batch()
        terms = [self._planner_loss(batch), self._inverse_dynamics_loss(batch), self._critic_loss(batch)]
        if "cg" in self.train_for:
            terms.append(self._noisy_critic_loss(batch))
        metrics: Metrics = {name: value for term in terms for name, value in term.info.items()}
        with ExitStack() as stack:
            for term in terms:
                stack.enter_context(term.around_step)
            metrics["grad_norm"] = self._optimise(th.stack([term.loss for term in terms]).sum(), self.policy.optimizer, metrics)
        for prefix, sampler in (("planner", self.policy.timestep_sampler), ("action", self.policy.action_timestep_sampler)):
            metrics |= {f"{prefix}_{name}": value for name, value in sampler.info().items()}
        self.policy.planner.update_ema()
        self.policy.inverse_dynamics.update_ema()
        if self.policy.critic_target is not None:
            polyak_update(self.policy.critic.parameters(), self.policy.critic_target.parameters(), TD_TAU)
        return metrics

    def _planner_loss(self, batch: Batch) -> Term:
        """Mean squared error of the planner's noise, weighted by the windows' values if ``value_weight`` says so."""
        policy, windows, generator = self.policy, self.policy.encode(batch.windows), self.generator
        t, weight = policy.timestep_sampler.sample(windows, generator)
        noise = th.randn(windows.shape, device=self.device, generator=generator)
        condition: tuple[th.Tensor, ...] = ()
        if "cfg" in self.train_for:
            is_kept = th.rand(self.batch_size, device=self.device, generator=generator) >= self.cfg_dropout
            condition = (batch.values[:, None], is_kept)
        losses = policy.planner_loss(windows, t, noise, *condition)
        loss = (weight * losses * th.exp(self.value_weight * (batch.values - 1))).mean()

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
            cond = condition[0][rows] if condition else None
            return policy.planner.bound_terms(windows[rows], cond, t, noise, policy.fixed_mask)

        around_step = policy.timestep_sampler.around_step(windows, losses, bound_terms, generator)
        return Term(loss, {"planner_loss": loss.detach()}, around_step)

    def _inverse_dynamics_loss(self, batch: Batch) -> Term:
        """Mean squared error of the action's noise, over the windows whose action does lead to their second state."""
        policy, windows, actions, generator = self.policy, batch.windows, batch.actions, self.generator
        t, weight = policy.action_timestep_sampler.sample(actions, generator)
        noise = th.randn(actions.shape, device=self.device, generator=generator)
        losses = policy.inverse_dynamics_loss(windows, actions, t, noise)
        loss = (weight * losses * batch.is_true).sum() / batch.is_true.sum().clamp(min=1)

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
            return policy.inverse_dynamics_bound_terms(windows[rows], actions[rows], t, noise)

        around_step = policy.action_timestep_sampler.around_step(actions, losses, bound_terms, generator)
        return Term(loss, {"inverse_dynamics_loss": loss.detach()}, around_step)

    def _critic_loss(self, batch: Batch) -> Term:
        """Squared error of the critic: to the window's value, or to one reward and the value of what follows."""
        policy = self.policy
        if policy.critic_target is None:
            loss = (policy.value(batch.windows) - batch.values).square().mean()
        else:
            data: Data = self.data
            indices = th.randint(len(data.step_rows), (self.batch_size,), device=self.device, generator=self.generator)
            steps, normalize = data.transitions(indices), policy.normalizer.normalize
            center, scale = policy.value_center, policy.value_scale
            with th.no_grad():
                following = policy.critic_target.states(normalize(steps.next_observations)) * scale + center
                target = (steps.rewards + self.discount * steps.continues * following - center) / scale
            loss = (policy.critic.states(normalize(steps.observations)) - target).square().mean()  # type: ignore[operator]
        return Term(loss, {"critic_loss": loss.detach()})

    def _noisy_critic_loss(self, batch: Batch) -> Term:
        """Squared error of the value predicted from noisy windows, for ``"cg"``."""
        t = self.policy.planner.process.schedule.sample_timesteps(self.batch_size, self.generator)
        windows = self.policy.encode(batch.windows)
        noise = th.randn(windows.shape, device=self.device, generator=self.generator)
        loss = self.policy.noisy_critic_loss(windows, batch.values, t, noise).mean()
        return Term(loss, {"noisy_critic_loss": loss.detach()})

    def learn(
        self: SelfDiffusionPlanner,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 500,
        tb_log_name: str = "DiffusionPlanner",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDiffusionPlanner:
        """Learn for ``total_timesteps`` gradient steps, see ``OfflineAlgorithm.learn()``."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
