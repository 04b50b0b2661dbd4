"""What the policies of the offline agents share."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

from sb3_diffrl.common import check_observation, unscale_action
from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.spaces import Normalizer, ObservationFlattener
from sb3_diffrl.saving import SafePolicySaving


def of_policy(name: str) -> Any:
    """An attribute of an algorithm that is its policy's once it has one: changed on either, it is on both, and saved."""

    def get(model: Any) -> Any:
        policy = model.__dict__.get("policy")
        return model.__dict__[name] if policy is None else getattr(policy, name)

    def put(model: Any, value: Any) -> None:
        if model.__dict__.get("policy") is not None:
            setattr(model.policy, name, value)
        model.__dict__[name] = value

    return property(get, put)


class OfflinePolicy(SafePolicySaving):
    """Policy on flattened, standardised observations (see ``ObservationFlattener``), with actions in the scaled box [-1, 1].

    :param observation_space: observation space, as in the dataset
    :param action_space: bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress (1 to 0)
    :param optimizer_class: optimiser
    :param optimizer_kwargs: its keyword arguments, without the learning rate
    """

    optimizer: th.optim.Optimizer

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs, squash_output=True
        )
        self.lr_schedule = lr_schedule
        self.flatten = ObservationFlattener(observation_space)
        self.obs_dim = self.flatten.dim
        self.action_dim = int(np.prod(action_space.shape))
        self.normalizer = Normalizer(self.obs_dim)

    def set_training_mode(self, mode: bool) -> None:
        """See ``BasePolicy``. Nothing is done if the mode is the present one: a walk over all modules takes as long as a plan."""
        if self.training != mode:
            self.train(mode)

    def make_optimizer(self, parameters: Any) -> th.optim.Optimizer:
        """The optimiser of ``optimizer_class`` for some parameters."""
        fused = {"fused": True} if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) else {}
        return self.optimizer_class(parameters, lr=self.lr_schedule(1), **{**fused, **self.optimizer_kwargs})  # type: ignore[call-arg]

    def fit_normalizer(self, dataset: OfflineDataset) -> None:
        """Take the observations' mean and standard deviation from a dataset."""
        self.normalizer.fit(dataset.observations)

    def obs_to_tensor(self, observation: Any) -> tuple[th.Tensor, bool]:
        """Flatten an observation or a batch.

        :param observation: in the observation space, or stacked as vectorised environments do
        :return: ``(batch, obs_dim)`` in the env's units, and whether it was a batch
        :raises NonFiniteError: if an observation is not finite
        """
        batched = self.flatten.is_batched(observation)
        obs = th.as_tensor(self.flatten(observation, batched), device=self.device)
        check_observation(obs)
        return obs, batched

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Rescale the action from [-1, 1] to [low, high], never outside by a rounding error."""
        assert isinstance(self.action_space, spaces.Box)
        return unscale_action(self.action_space, scaled_action)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,  # not needed to predict
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }
