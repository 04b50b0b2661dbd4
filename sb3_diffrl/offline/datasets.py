"""Minari in: datasets as flat arrays, and windows gathered from them."""

import dataclasses
import warnings
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffrl.offline.environments import check_env_spec
from sb3_diffrl.offline.reading import DatasetSource, check_size, open_datasets, read_episodes
from sb3_diffrl.offline.spaces import ObservationFlattener


@dataclasses.dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Episodes of one or several Minari datasets, one after the other in flat arrays.

    Each episode's observations, its final one included, are consecutive rows, so that the observation after step ``i`` is
    ``observations[observation_rows[i] + 1]`` and memory holds each observation once. Every episode's last step has a flag: a
    termination, after which nothing is worth anything, or a truncation (a time limit, or recording was cut), after which the
    episode would have gone on.

    :param observations: flattened (see ``ObservationFlattener``), float32, ``(n_steps + n_episodes, obs_dim)``
    :param actions: flattened, in the env's units, float32, ``(n_steps, action_dim)``
    :param rewards: float32, ``(n_steps,)``
    :param terminations: bool, ``(n_steps,)``
    :param truncations: bool, ``(n_steps,)``
    :param episode_starts: index of each episode's first step, and the number of steps, int64, ``(n_episodes + 1,)``
    :param observation_space: the env's own
    :param action_space: the env's own
    :param sources: the datasets on disk; none where the arrays come from elsewhere
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    episode_starts: np.ndarray
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    sources: tuple[minari.MinariDataset, ...] = ()

    @classmethod
    def load(cls, dataset: "DatasetSource | OfflineDataset | Sequence[DatasetSource]") -> "OfflineDataset":
        """Read one dataset or a mixture of several, in one pass.

        :param dataset: an id, a ``MinariDataset`` (for instance filtered), or a list of either; a loaded dataset is given back
        :raises FileNotFoundError: if an id is not on disk, with the command that makes or downloads it
        :raises ValueError: if a dataset is empty or damaged, an episode does not hold together or holds a NaN or infinite number,
            or the datasets have different spaces
        """
        if isinstance(dataset, OfflineDataset):
            return dataset
        sources = open_datasets(dataset)
        observation_space, action_space = sources[0].observation_space, sources[0].action_space
        flatten, flatten_action = ObservationFlattener(observation_space), ObservationFlattener(action_space)
        n_steps = sum(source.total_steps for source in sources)
        n_episodes = sum(source.total_episodes for source in sources)
        check_size(sources, 4 * ((n_steps + n_episodes) * flatten.dim + n_steps * flatten_action.dim))

        observations = np.empty((n_steps + n_episodes, flatten.dim), np.float32)
        actions = np.empty((n_steps, flatten_action.dim), np.float32)
        rewards = np.empty(n_steps, np.float32)
        terminations, truncations = np.empty(n_steps, bool), np.empty(n_steps, bool)
        starts = [0]
        for source in sources:
            for episode in read_episodes(source):
                n, start = len(starts) - 1, starts[-1]
                end = start + len(episode)
                try:
                    flatten.into(observations[start + n : end + n + 1], episode.observations)
                    flatten_action.into(actions[start:end], episode.actions)
                except ValueError as error:
                    raise ValueError(f"Dataset {source.id!r}, episode {episode.id}: {error}") from error
                rewards[start:end] = episode.rewards
                terminations[start:end] = episode.terminations
                truncations[start:end] = episode.truncations
                starts.append(end)
        return cls(
            observations,
            actions,
            rewards,
            terminations,
            truncations,
            np.array(starts, np.int64),
            observation_space,
            action_space,
            sources,
        )

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return len(self.rewards)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_starts) - 1

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the datasets on disk."""
        return tuple(source.id for source in self.sources)

    @property
    def env_spec(self) -> EnvSpec | None:
        """Specification of the env which the (first) dataset comes from."""
        return self.sources[0].env_spec if self.sources else None

    @cached_property
    def checksum(self) -> int:
        """Of all arrays (CRC-32), to know the same data again; it is no protection against forgery."""
        checksum = 0
        for array in (self.observations, self.actions, self.rewards, self.terminations, self.truncations, self.episode_starts):
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return checksum

    @cached_property
    def flatten(self) -> ObservationFlattener:
        """Turns the env's observations into rows of ``observations``."""
        return ObservationFlattener(self.observation_space)

    @cached_property
    def episode_lengths(self) -> np.ndarray:
        """Steps of each episode, int64, ``(n_episodes,)``."""
        return np.diff(self.episode_starts)

    @cached_property
    def observation_rows(self) -> np.ndarray:
        """Row of ``observations`` which each step acts on, int64, ``(n_steps,)``; the next row is what follows."""
        return np.arange(self.n_steps) + np.repeat(np.arange(self.n_episodes), self.episode_lengths)

    @cached_property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted sum of rewards of each episode, float64, ``(n_episodes,)``."""
        return np.add.reduceat(self.rewards, self.episode_starts[:-1], dtype=np.float64)

    def returns_to_go(self, discount: float) -> np.ndarray:
        """Discounted sum of an episode's rewards from each step to its last recorded one, float32, ``(n_steps,)``.

        Nothing is added for what would have come after a truncation.
        """
        remaining = np.repeat(self.episode_starts[1:], self.episode_lengths) - np.arange(self.n_steps)
        returns = self.rewards.astype(np.float64)
        span = 1
        # The return over 2k steps is the one over k steps and, k steps on, another one discounted by k.
        while span < remaining.max():
            returns[:-span] += np.where(remaining[:-span] > span, discount**span * returns[span:], 0)
            span *= 2
        return returns.astype(np.float32)

    def windows(self, horizon: int, stride: int = 1, pad: Literal["none", "last"] = "none") -> "Windows":
        """Windows of ``horizon`` observations, ``stride`` steps apart, each within an episode.

        :param pad: ``"none"`` for windows that lie in an episode as a whole, its final observation included; ``"last"`` for one
            from every step, which repeats the final observation where it would reach beyond
        :raises ValueError: if no episode is long enough
        """
        return Windows.make(self, horizon, stride, pad)

    def recover_environment(self, eval_env: bool = True) -> gym.Env[Any, Any]:
        """Rebuild the environment of the (first) dataset: one that is registered here, with wrappers that are known here.

        :param eval_env: the one to evaluate in, where it is another
        :raises ValueError: if it cannot be rebuilt, with the reason
        """
        if not self.sources:
            raise ValueError("This dataset was not read from disk: it does not know its environment. Give one.")
        source = self.sources[0]
        try:
            for spec in (source.env_spec, source._eval_env_spec):
                if spec is not None:
                    check_env_spec(spec)
            env: gym.Env[Any, Any] = source.recover_environment(eval_env=eval_env)
        except Exception as error:
            raise ValueError(
                f"The environment of dataset {self.ids[0]!r} cannot be rebuilt ({type(error).__name__}: {error}). Install the "
                "package it comes from and import what registers it, or give the environment yourself."
            ) from error
        return env


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of observations in a dataset, by their number; what they hold is gathered when asked for.

    :param dataset: which they look into
    :param starts: step index of each window's first observation, int64, ``(n_windows,)``
    :param horizon: observations in a window
    :param stride: steps between two of them
    :param n_dropped: episodes that are too short for any window
    """

    dataset: OfflineDataset
    starts: np.ndarray
    horizon: int
    stride: int
    n_dropped: int = 0

    @classmethod
    def make(cls, dataset: OfflineDataset, horizon: int, stride: int, pad: Literal["none", "last"]) -> "Windows":
        """See ``OfflineDataset.windows()``."""
        if horizon < 1 or stride < 1:
            raise ValueError(f"`horizon` and `stride` must be positive, they are {horizon} and {stride}.")
        if pad not in ("none", "last"):
            raise ValueError(f"`pad` is 'none' or 'last', not {pad!r}.")
        reach = (horizon - 1) * stride
        # An episode of n steps has n + 1 observations, and a window starts at one that a step acts on.
        counts = dataset.episode_lengths.copy()
        if pad == "none":
            counts = np.minimum(counts, np.maximum(counts + 1 - reach, 0))
        n_dropped = int((counts == 0).sum())
        if n_dropped == dataset.n_episodes:
            raise ValueError(
                f"No episode is long enough for a window of {horizon} observations {stride} steps apart, which takes {reach} "
                f"steps: the longest has {dataset.episode_lengths.max()}. Take a shorter horizon or stride, or `pad='last'`."
            )
        if n_dropped:
            warnings.warn(
                f"{n_dropped} of {dataset.n_episodes} episodes are left out: they are shorter than a window ({reach} steps).",
                stacklevel=3,
            )
        before = np.cumsum(counts) - counts
        starts = np.arange(counts.sum()) + np.repeat(dataset.episode_starts[:-1] - before, counts)
        return cls(dataset, starts, horizon, stride, n_dropped)

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def episodes(self) -> np.ndarray:
        """Number of the episode that each window lies in, int64, ``(n_windows,)``."""
        episodes: np.ndarray = np.searchsorted(self.dataset.episode_starts, self.starts, side="right") - 1
        return episodes

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Row of ``dataset.observations`` that each window begins at, int64, ``(n_windows,)``."""
        rows: np.ndarray = self.starts + self.episodes
        return rows

    @cached_property
    def last_rows(self) -> np.ndarray:
        """Row of the final observation of each window's episode, int64, ``(n_windows,)``."""
        rows: np.ndarray = self.dataset.episode_starts[self.episodes + 1] + self.episodes
        return rows

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows of ``dataset.observations`` in windows.

        :param indices: numbers of the windows, ``(batch,)``
        :return: int64, ``(batch, horizon)``
        """
        # (batch, 1) + (horizon,) -> (batch, horizon)
        rows: np.ndarray = self.first_rows[indices][:, None] + np.arange(self.horizon) * self.stride
        clipped: np.ndarray = rows.clip(max=self.last_rows[indices][:, None])
        return clipped

    def observations(self, indices: np.ndarray) -> np.ndarray:
        """Observations in windows, float32, ``(batch, horizon, obs_dim)``."""
        windows: np.ndarray = self.dataset.observations[self.rows(indices)]
        return windows
