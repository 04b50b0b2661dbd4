"""The base class of the agents that learn from a dataset."""

import io
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_diffrl.common import (
    MAX_SKIPPED,
    NonFiniteError,
    OnNonFinite,
    check_count,
    check_gradient,
    check_learning_rate,
    check_on_nonfinite,
    check_scalable,
)
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.policies import OfflinePolicy
from sb3_diffrl.offline.reading import DatasetSource
from sb3_diffrl.offline.spaces import FlattenObservation, check_same_spaces, flattened, is_nested
from sb3_diffrl.saving import SafeSaving

SelfOfflineAlgorithm = TypeVar("SelfOfflineAlgorithm", bound="OfflineAlgorithm")

#: Scalar tensors by name.
Metrics = dict[str, th.Tensor]


class _NoEnvironment(gym.Env[Any, Any]):
    """Stands where Stable-Baselines3 wants a training env and none can be had: it says why when it is stepped."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], reason: str) -> None:
        self.observation_space, self.action_space, self.reason = observation_space, action_space, reason

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:  # noqa: ARG002
        raise RuntimeError(f"There is no environment to step: {self.reason}")


class OfflineAlgorithm(SafeSaving, ABC):
    """An agent of Stable-Baselines3 that learns from a dataset instead of an environment.

    ``learn(total_timesteps)`` counts gradient steps, and callbacks are called after each. All randomness of training comes from a
    generator of the model's own, which is saved with it: evaluating does not change a run, and a run that is saved, loaded and
    continued gives the same weights as one that never stopped.

    A subclass builds its networks in a policy and writes ``update()``.

    :param policy: name or class of the policy
    :param env: environment to evaluate in (``get_env()``); by default the dataset's own, rebuilt when it is asked for
    :param dataset: id of a Minari dataset on disk, a ``MinariDataset``, an ``OfflineDataset``, or a list of ids and Minari datasets
        (a mixture). The saved model holds the ids, never the data.
    :param learning_rate: learning rate, or a function of the remaining progress (1 to 0)
    :param batch_size: minibatch size
    :param policy_kwargs: keyword arguments of the policy
    :param stats_window_size: window of the logged episode statistics, unused offline
    :param tensorboard_log: folder for TensorBoard, ``None`` for none
    :param verbose: 0 no output, 1 information, 2 debugging
    :param seed: seed of weights, minibatches and noise
    :param device: where to compute
    :param on_nonfinite: what to do about a NaN or infinite loss or gradient: ``"raise"``, or ``"skip"``: leave out the gradient
        step and count it in ``n_skipped``
    :param _init_setup_model: build the networks at once
    :raises FileNotFoundError: if the dataset is not on disk, with the command that makes or downloads it
    :raises ValueError: if the dataset is damaged, or its spaces are not those of ``env`` or not supported
    """

    policy: OfflinePolicy
    generator: th.Generator
    #: How the policy samples, see ``of_policy()``
    settings_of_policy: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        policy: str | type[OfflinePolicy],
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
        on_nonfinite: OnNonFinite = "raise",
        _init_setup_model: bool = True,
    ) -> None:
        # The env comes later: SB3 would refuse "MlpPolicy" for goal environments, which are flattened here.
        super().__init__(
            policy,
            None,
            learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            supported_action_spaces=(spaces.Box,),
        )
        self.batch_size = batch_size
        self.on_nonfinite: OnNonFinite = on_nonfinite
        #: Gradient steps that were left out
        self.n_skipped = 0
        self._skipped_in_a_row = 0
        self.n_envs = 1
        self._env_seed: int | None = None
        self.dataset_ids: tuple[str, ...] = ()
        self.dataset_steps = 0
        #: Of the data, see ``OfflineDataset.checksum``; 0 where a file of an older version does not say
        self.dataset_checksum = 0
        self._dataset: OfflineDataset | None = None
        self._data: Any = None
        self._generator_state: tuple[str, np.ndarray] | None = None
        if dataset is not None:
            self._take_dataset(OfflineDataset.load(dataset))
        elif _init_setup_model:
            raise ValueError("Give a `dataset`: the id of a Minari dataset on disk, a `MinariDataset`, or a list of them.")
        if env is not None:
            self._take_env(env)
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ data and environment

    @property
    def dataset(self) -> OfflineDataset:
        """The data; a loaded model reads them when they are first asked for.

        :raises ValueError: if the model was trained on data that have no id, or on other data than now bear it
        """
        if self._dataset is None:
            if not self.dataset_ids:
                raise ValueError("This model was trained on data without an id: give them by `set_dataset()`.")
            dataset = OfflineDataset.load(list(self.dataset_ids))
            ids = ", ".join(self.dataset_ids)
            if dataset.n_steps != self.dataset_steps:
                raise ValueError(
                    f"The model was trained on {self.dataset_steps} steps of {ids}, of which "
                    f"{dataset.n_steps} are on disk now. Give the data by `set_dataset()`, filtered as they were if they were."
                )
            if self.dataset_checksum not in (0, dataset.checksum):
                raise ValueError(
                    f"The data of {ids} on disk are not those that the model was trained on: there are as many steps, but other "
                    "numbers (their checksum differs). To learn from them nevertheless, give them by `set_dataset()`."
                )
            self._take_dataset(dataset)
        assert self._dataset is not None
        return self._dataset

    def set_dataset(self, dataset: DatasetSource | OfflineDataset | Sequence[DatasetSource]) -> None:
        """Learn from other data from now on; observations are still standardised by the first ones.

        :raises ValueError: if the spaces are not the model's
        """
        self._take_dataset(OfflineDataset.load(dataset))

    def _take_dataset(self, dataset: OfflineDataset) -> None:
        dataset_spaces = [dataset.observation_space, dataset.action_space]
        if hasattr(self, "observation_space"):
            check_same_spaces("the model", [self.observation_space, self.action_space], "the dataset", dataset_spaces)
        else:
            check_scalable(dataset.action_space)
            self.observation_space, self.action_space = dataset_spaces
        self._dataset, self.dataset_ids, self.dataset_steps = dataset, dataset.ids, dataset.n_steps
        self.dataset_checksum = dataset.checksum
        self._data = None

    @abstractmethod
    def _prepare_data(self, dataset: OfflineDataset) -> Any:
        """What minibatches are gathered from, on the model's device."""

    @property
    def data(self) -> Any:
        """The dataset as ``update()`` uses it, prepared when it is first asked for."""
        if self._data is None:
            self._data = self._prepare_data(self.dataset)
        return self._data

    def get_env(self) -> VecEnv | None:
        """The environment to evaluate in: the one given, or the dataset's, rebuilt on the first call.

        Where it cannot be rebuilt there is a warning, and an environment that raises when it is stepped: training goes on.
        """
        if self.env is None and hasattr(self, "observation_space"):
            try:
                self._take_env(self.dataset.recover_environment(eval_env=True))
            except (ValueError, NotImplementedError) as error:  # the latter: spaces that SB3's vectorised envs do not take
                warnings.warn(f"Training goes on without an environment to evaluate in. {error}", stacklevel=2)
                self._take_env(_NoEnvironment(self.observation_space, self.action_space, str(error)))
            if self._env_seed is not None and self.env is not None:
                self.env.seed(self._env_seed)
        return self.env

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Evaluate in another environment.

        :raises ValueError: if its spaces are not the model's
        """
        del force_reset  # nothing is collected from it
        self._take_env(env)

    def _take_env(self, env: GymEnv | str) -> None:
        env = gym.make(env) if isinstance(env, str) else env
        env_spaces = [env.observation_space, env.action_space]
        if hasattr(self, "observation_space") and is_nested(self.observation_space) and isinstance(env, VecEnv):
            # One that was flattened here before
            env_spaces[0] = self.observation_space if env_spaces[0] == flattened(self.observation_space) else env_spaces[0]
        if isinstance(env, gym.Env) and is_nested(env.observation_space):
            env = FlattenObservation(env)
        wrapped = self._wrap_env(env, self.verbose)
        if unwrap_vec_normalize(wrapped) is not None:
            raise ValueError("The model standardises observations by the dataset's statistics: give the env without VecNormalize.")
        if wrapped.num_envs > 1:
            raise ValueError(
                f"An offline agent learns from a dataset and takes one environment, not {wrapped.num_envs}. `evaluate_policy()` "
                "and `EvalCallback` evaluate it in as many as you give them."
            )
        if hasattr(self, "observation_space"):
            check_same_spaces("the dataset", [self.observation_space, self.action_space], "the environment", env_spaces)
        self.env = wrapped

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        self.batch_size = check_count("batch_size", self.batch_size)
        check_on_nonfinite(self.on_nonfinite)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        assert isinstance(self.action_space, spaces.Box)
        policy = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **self._policy_arguments())
        assert isinstance(policy, OfflinePolicy), f"{self.policy_class} is not an OfflinePolicy"
        if self._generator_state is None:
            policy.fit_normalizer(self.dataset)
        elif self._generator_state[0] == self.device.type:
            self.generator.set_state(th.as_tensor(self._generator_state[1]))
        self.policy = policy.to(self.device)

    def _policy_arguments(self) -> dict[str, Any]:
        # A subclass adds what its own arguments say.
        return self.policy_kwargs

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything: weights to come, minibatches, noise, and the environment if there is one.

        :param seed: seed; with ``None``, the generator of training is seeded from torch's global one
        """
        super().set_random_seed(seed)
        self._env_seed = seed  # for an environment that is made later
        self.generator = th.Generator(self.device)
        self.generator.manual_seed(int(th.randint(2**62, ())) if seed is None else seed)

    # ------------------------------------------------------------------ learning

    @abstractmethod
    def update(self) -> Metrics:
        """One gradient step on a minibatch.

        :return: metrics, scalar tensors by name
        """

    def learn(
        self: SelfOfflineAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 500,
        tb_log_name: str = "OfflineAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineAlgorithm:
        """Learn for ``total_timesteps`` gradient steps.

        :param total_timesteps: gradient steps; callbacks count them as timesteps
        :param callback: called after every gradient step
        :param log_interval: gradient steps between two logs, ``None`` for none
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: start counting anew, or go on
        :param progress_bar: show one
        :raises NonFiniteError: if a loss or gradient is not finite, naming the step and the last file that the model was saved
            as; the weights are as before that step. See ``on_nonfinite``; a hundred skipped in a row are raised nevertheless.
        """
        check_on_nonfinite(self.on_nonfinite)
        total_timesteps, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        callback.on_training_start(locals(), globals())
        metrics: list[Metrics] = []
        while self.num_timesteps < total_timesteps:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self._update_learning_rate(self._optimizers())
            check_learning_rate(self._optimizers())
            self.policy.set_training_mode(True)
            try:
                with th.enable_grad():  # Ctrl-C can leave torch without
                    metrics.append(self.update())
                self._skipped_in_a_row = 0
            except NonFiniteError as error:
                self._skip(error)
            self.num_timesteps += 1
            self._n_updates += 1
            if log_interval is not None and self.num_timesteps % log_interval == 0:
                self._record(metrics)
                metrics.clear()
                self.dump_logs()
            callback.update_locals(locals())
            if not callback.on_step():
                break
        callback.on_training_end()
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        _ = self.data  # read before anything starts
        self.get_env()
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.optimizer]

    def _optimise(self, loss: th.Tensor, optimizer: th.optim.Optimizer, parts: Metrics | None = None) -> th.Tensor:
        """One step down the loss.

        :param parts: what it is made of, by name, for the message
        :return: norm of the gradient
        :raises NonFiniteError: if the loss or the gradient is not finite; the weights are as they were
        """
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        norm = check_gradient(loss, parameters, self.policy, f"gradient step {self.num_timesteps + 1}", parts or {})
        optimizer.step()
        return norm

    def _skip(self, error: NonFiniteError) -> None:
        if self.on_nonfinite == "raise" or self._skipped_in_a_row >= MAX_SKIPPED:
            raise NonFiniteError(f"{error} {self.last_save}") from error
        self.n_skipped += 1
        self._skipped_in_a_row += 1

    def _record(self, metrics: list[Metrics]) -> None:
        for name in {name: None for metric in metrics for name in metric}:
            values = th.stack([metric[name] for metric in metrics if name in metric])
            self.logger.record(f"train/{name}", values.float().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.n_skipped:
            self.logger.record("train/n_skipped", self.n_skipped)

    def dump_logs(self) -> None:
        """Write the logs."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    # ------------------------------------------------------------------ saving

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save the model: weights, optimiser, normaliser, counters and the state of its generator, with the dataset's ids.

        :param path: file to write
        :param exclude: names of attributes to leave out besides the usual
        :param include: names of attributes to save although they usually are not
        """
        self._generator_state = (self.device.type, self.generator.get_state().cpu().numpy())
        # The policy is made anew from the model's attributes when the file is loaded.
        self.__dict__.update({name: getattr(self, name) for name in self.settings_of_policy})
        super().save(path, exclude, include)

    @classmethod
    def load(
        cls: type[SelfOfflineAlgorithm],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = False,
        **kwargs: Any,
    ) -> SelfOfflineAlgorithm:
        """Load a model, see ``SafeSaving.load()``.

        :param path: file to read
        :param env: environment to evaluate in; by default the dataset's own, rebuilt when it is asked for
        :param device: where to compute
        :param custom_objects: attributes to take from here instead of the file, by name
        :param print_system_info: print what the model was saved on
        :param force_reset: not used: nothing is collected from the environment
        :param trusted: un-pickle what the file holds
        :param kwargs: attributes to change; ``dataset`` is what to learn from in place of the file's, see ``set_dataset()``
        """
        dataset = kwargs.pop("dataset", None)
        # What is a property is set on the finished model: among its attributes it would do nothing.
        properties = {name: kwargs.pop(name) for name in list(kwargs) if isinstance(getattr(cls, name, None), property)}
        model = super().load(path, None, device, custom_objects, print_system_info, force_reset, trusted, **kwargs)
        for name, value in properties.items():
            setattr(model, name, value)
        if dataset is not None:
            model.set_dataset(dataset)
        if env is not None:
            model.set_env(env)
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_dataset", "_data", "generator"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
