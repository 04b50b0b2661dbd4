"""Behaviour cloning with a diffusion policy."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_diffrl.bc.policies import DiffusionPolicy, MlpPolicy
from sb3_diffrl.common import OnNonFinite
from sb3_diffrl.diffusion.process import PredictionType, Solver
from sb3_diffrl.diffusion.schedules import ScheduleName
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.offline_algorithm import Metrics, OfflineAlgorithm
from sb3_diffrl.offline.policies import of_policy
from sb3_diffrl.offline.reading import DatasetSource
from sb3_diffrl.timesteps.samplers import TimestepSampler

SelfDiffusionBC = TypeVar("SelfDiffusionBC", bound="DiffusionBC")


class Data(NamedTuple):
    """What minibatches are gathered from.

    :param observations: flattened, in the env's units, ``(rows, obs_dim)``
    :param rows: the row of each step's observation, ``(n_steps,)``
    :param actions: in the scaled box [-1, 1], ``(n_steps, action_dim)``
    """

    observations: th.Tensor
    rows: th.Tensor
    actions: th.Tensor


class Batch(NamedTuple):
    """A minibatch.

    :param observations: flattened, in the env's units, ``(batch, obs_dim)``
    :param actions: in the scaled box [-1, 1], ``(batch, action_dim)``
    """

    observations: th.Tensor
    actions: th.Tensor


class DiffusionBC(OfflineAlgorithm):
    """Diffusion behaviour cloning: actions are drawn from a diffusion model p(a | s) of the dataset's.

    Papers: Imitating Human Behaviour with Diffusion Models, https://arxiv.org/abs/2301.10677, and Diffusion Policy,
    https://arxiv.org/abs/2303.04137; the model is DDPM's, https://arxiv.org/abs/2006.11239. The deviations are listed on the
    documentation's page.

    :param policy: ``"MlpPolicy"`` or a subclass of ``DiffusionPolicy``
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
    :param num_train_timesteps: noise levels of training
    :param num_inference_steps: denoising steps of an action
    :param beta_schedule: noise schedule: ``"linear"``, ``"squaredcos_cap_v2"``, ``"quadratic"`` or ``"vp"`` (continuous time)
    :param prediction_type: what the denoiser predicts: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``
    :param solver: ``"ddim"`` or ``"ddpm"``
    :param ema_decay: decay of the moving average of the weights, which acts
    :param timestep_sampler: which times to train on: ``"uniform"``, ``"logit_normal"``, ``"lognormal"``, ``"loss_second_moment"``,
        ``"min_snr"``, ``"p2"``, ``"speed"``, ``"adaptive"``, a rule and a weighting (``"adaptive+min_snr"``), or a
        ``TimestepSampler``
    :param on_nonfinite: what to do about a NaN or infinite loss or gradient: ``"raise"``, or ``"skip"``: leave out the gradient
        step and count it in ``n_skipped``
    :param _init_setup_model: build the networks at once
    :raises ValueError: if an argument is outside its range, or the dataset does not fit; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: DiffusionPolicy
    settings_of_policy: ClassVar[tuple[str, ...]] = ("num_inference_steps", "solver")
    num_inference_steps, solver = map(of_policy, settings_of_policy)

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str | None = None,
        dataset: DatasetSource | OfflineDataset | Sequence[DatasetSource] | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        num_train_timesteps: int = 50,
        num_inference_steps: int = 10,
        beta_schedule: ScheduleName = "squaredcos_cap_v2",
        prediction_type: PredictionType = "epsilon",
        solver: Solver = "ddim",
        ema_decay: float = 0.995,
        timestep_sampler: str | TimestepSampler = "uniform",
        on_nonfinite: OnNonFinite = "raise",
        _init_setup_model: bool = True,
    ) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_steps = num_inference_steps
        self.beta_schedule: ScheduleName = beta_schedule
        self.prediction_type: PredictionType = prediction_type
        self.solver = solver
        self.ema_decay = ema_decay
        self.timestep_sampler = timestep_sampler
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

    def _policy_arguments(self) -> dict[str, Any]:
        names = (
            "num_train_timesteps",
            "num_inference_steps",
            "beta_schedule",
            "prediction_type",
            "solver",
            "ema_decay",
            "timestep_sampler",
        )
        return {**self.policy_kwargs, **{name: getattr(self, name) for name in names}}

    def _prepare_data(self, dataset: OfflineDataset) -> Data:
        assert isinstance(self.action_space, spaces.Box)
        low, high = (th.as_tensor(bound.reshape(-1)).float() for bound in (self.action_space.low, self.action_space.high))
        # A controller may ask for more than the actuator gives: what the env did is at the bound.
        actions = ((th.as_tensor(dataset.actions) - low) / (high - low) * 2 - 1).clamp(-1.0, 1.0)
        return Data(*(th.as_tensor(x, device=self.device) for x in (dataset.observations, dataset.observation_rows, actions)))

    def sample_batch(self) -> Batch:
        """A minibatch of steps, drawn evenly."""
        data: Data = self.data
        steps = th.randint(len(data.actions), (self.batch_size,), device=self.device, generator=self.generator)
        return Batch(data.observations[data.rows[steps]], data.actions[steps])

    def update(self) -> Metrics:
        """One gradient step of the denoiser on a minibatch."""
        batch = self.sample_batch()
        sampler = self.policy.timestep_sampler
        t, weight = sampler.sample(batch.actions, self.generator)
        noise = th.randn(batch.actions.shape, device=self.device, generator=self.generator)
        losses = self.policy.loss(batch.observations, batch.actions, t, noise)
        loss = (weight * losses).mean()

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
            return self.policy.bound_terms(batch.observations[rows], batch.actions[rows], t, noise)

        with sampler.around_step(batch.actions, losses, bound_terms, self.generator):
            grad_norm = self._optimise(loss, self.policy.optimizer)
        self.policy.model.update_ema()
        return {"loss": loss.detach(), "grad_norm": grad_norm, **sampler.info()}

    def learn(
        self: SelfDiffusionBC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 500,
        tb_log_name: str = "DiffusionBC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDiffusionBC:
        """Learn for ``total_timesteps`` gradient steps, see ``OfflineAlgorithm.learn()``."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
