"""Small Minari datasets with known contents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
from gymnasium import spaces

from sb3_diffrl.offline.writing import DataFormat, DatasetWriter

OBS_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
ACTION_SPACE = spaces.Box(-2, 2, (1,))


class Tape(gym.Wrapper[Any, Any, Any, Any]):
    """Remembers every episode as the env gave it."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observations: list[list[Any]] = []
        self.actions: list[list[Any]] = []
        self.results: list[list[tuple[float, bool, bool]]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(**kwargs)
        for tape, first in ((self.observations, [obs]), (self.actions, []), (self.results, [])):
            tape.append(first)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.observations[-1].append(obs)
        self.actions[-1].append(action)
        self.results[-1].append((float(reward), terminated, truncated))
        return obs, reward, terminated, truncated, info

    def write(self, dataset_id: str) -> minari.MinariDataset:
        """The episodes that have steps, as a dataset."""
        with DatasetWriter(dataset_id, self.observation_space, self.action_space) as writer:
            for observations, actions, results in zip(self.observations, self.actions, self.results, strict=True):
                if results:
                    rewards, terminations, truncations = zip(*results, strict=True)
                    writer.add_episode(observations, actions, rewards, terminations, truncations)
            return writer.publish()


def write_episodes(
    dataset_id: str,
    lengths: Sequence[int],
    ends: Sequence[str] | None = None,
    data_format: DataFormat = "hdf5",
    first: int = 0,
) -> minari.MinariDataset:
    """Episode ``e`` observes ``(first + e, t)``, acts ``t / 10`` and is rewarded ``10 ** e`` at step ``t``.

    :param lengths: steps of each episode
    :param ends: "terminated", "truncated" or "open" for each; terminated by default
    """
    with DatasetWriter(dataset_id, OBS_SPACE, ACTION_SPACE, data_format=data_format) as writer:
        for e, length in enumerate(lengths):
            last = np.arange(length) == length - 1
            end = "terminated" if ends is None else ends[e]
            steps = np.arange(length + 1)
            writer.add_episode(
                np.stack([np.full(length + 1, first + e), steps], axis=1),
                steps[:-1, None] / 10,
                np.full(length, 10.0**e),
                last & (end == "terminated"),
                last & (end == "truncated"),
            )
        return writer.publish()


@contextmanager
def opened(dataset: minari.MinariDataset) -> Iterator[h5py.File]:
    """The file behind a dataset, to be tampered with."""
    with h5py.File(hdf5_file(dataset), "a") as file:
        yield file


def hdf5_file(dataset: minari.MinariDataset) -> Path:
    return Path(dataset.storage.data_path) / "main_data.hdf5"


def same(one: minari.MinariDataset, other: minari.MinariDataset) -> bool:
    """Whether two datasets hold the same steps."""
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for a, b in pairs for k in ("observations", "actions", "rewards"))
