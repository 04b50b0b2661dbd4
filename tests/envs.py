"""Environments for the tests: real Gymnasium environments with spaces and dynamics chosen for what a test shows."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class RandomEnv(gym.Env[Any, np.ndarray]):
    """Random observations of any space, constant reward, episodes of fixed length."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], reward: float = 1.0, length: int = 20
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.reward, self.length, self.steps = reward, length, 0
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.steps += 1
        return self.observation_space.sample(), self.reward, False, self.steps >= self.length, {}


def box_env(obs_dim: int = 5, action_dim: int = 3) -> RandomEnv:
    """A :class:`RandomEnv` of vector observations and actions in [-1, 1]."""
    return RandomEnv(spaces.Box(-1, 1, (obs_dim,)), spaces.Box(-1, 1, (action_dim,)))


class FaultyEnv(RandomEnv):
    """A :class:`RandomEnv` that gives ``value`` as an observation or reward at one step of its life."""

    def __init__(self, fault: str, value: float, at: int, length: int = 20) -> None:
        super().__init__(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), length=length)
        self.fault, self.value, self.at, self.life = fault, value, at, 0

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.life += 1
        if self.life == self.at:
            if self.fault == "reward":
                reward = self.value
            else:
                obs[1] = self.value
        return obs, reward, terminated, truncated, info
