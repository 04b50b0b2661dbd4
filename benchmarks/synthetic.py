"""Datasets of random numbers, for timing."""

import numpy as np
from gymnasium import spaces

from sb3_diffrl import OfflineDataset


def random_dataset(n_episodes: int, length: int, obs_dim: int, action_dim: int) -> OfflineDataset:
    """Episodes of one length, each cut at its end."""
    rng = np.random.default_rng(0)
    n = n_episodes * length
    return OfflineDataset(
        rng.normal(size=(n + n_episodes, obs_dim)).astype(np.float32),
        rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        np.zeros(n, bool),
        np.arange(1, n + 1) % length == 0,
        np.arange(0, n + 1, length),
        spaces.Box(-9, 9, (obs_dim,)),
        spaces.Box(-1, 1, (action_dim,)),
    )
