"""What a planner learns from: windows of observations with values, and what stands beyond an episode's end."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch as th

from sb3_diffrl.offline.datasets import OfflineDataset, Windows

Pad = Literal["none", "last"]

# A final observation counts as at rest when all its velocities are within this many standard deviations of zero.
REST = 0.2


class WindowSettings(NamedTuple):
    """How windows are cut and valued, see ``DiffusionPlanner``."""

    horizon: int
    stride: int
    discount: float
    pad: Pad
    velocity_indices: tuple[int, ...]
    terminal_reward: float | None


class Batch(NamedTuple):
    """A minibatch of windows.

    :param windows: flattened observations in the env's units, ``(batch, horizon, obs_dim)``
    :param actions: the action at the first of them, in the scaled box [-1, 1], ``(batch, action_dim)``
    :param values: the windows' values, scaled to [-1, 1] over the dataset, ``(batch,)``
    :param is_true: whether the action leads to the second observation; false where the episode ended on the way, in motion,
        ``(batch,)``
    """

    windows: th.Tensor
    actions: th.Tensor
    values: th.Tensor
    is_true: th.Tensor


class Transitions(NamedTuple):
    """A minibatch of single steps.

    :param observations: flattened, in the env's units, ``(batch, obs_dim)``
    :param rewards: ``(batch,)``
    :param next_observations: ``(batch, obs_dim)``
    :param continues: 0 where the step ended in a termination, else 1, ``(batch,)``
    """

    observations: th.Tensor
    rewards: th.Tensor
    next_observations: th.Tensor
    continues: th.Tensor


class Data(NamedTuple):
    """A dataset as minibatches are gathered from it, on the model's device.

    The first four are per window, ``(n_windows, ...)``; windows begin at ``first_rows``, and their episodes end at ``last_rows``.
    The next three are per step, ``(n_steps,)``: near an episode's end there are steps that no window begins with.

    :param first_rows: rows of ``observations``
    :param last_rows: rows of ``observations``
    :param actions: in the scaled box [-1, 1]
    :param values: discounted returns, in the env's units
    :param step_rows: rows of ``observations``
    :param rewards: of the step
    :param continues: 0 where the step ended in a termination, else 1
    :param observations: flattened, in the env's units, ``(rows, obs_dim)``
    :param is_at_rest: per row: all velocities are nearly zero (true if there are none), ``(rows,)``
    :param stays: false for the velocities, which are 0 beyond an episode's end, ``(obs_dim,)``
    """

    first_rows: th.Tensor
    last_rows: th.Tensor
    actions: th.Tensor
    values: th.Tensor
    step_rows: th.Tensor
    rewards: th.Tensor
    continues: th.Tensor
    observations: th.Tensor
    is_at_rest: th.Tensor
    stays: th.Tensor

    def gather(self, indices: th.Tensor, horizon: int, stride: int) -> Batch:
        """Windows by their number.

        Beyond the end of an episode its final observation goes on, at rest: what comes to a halt at the goal stays there.

        :param indices: numbers of the windows, ``(batch,)``
        :return: a minibatch, with values still in the env's units
        """
        first, last = self.first_rows[indices], self.last_rows[indices]
        # (batch, 1) + (horizon,) -> (batch, horizon)
        rows = first[:, None] + th.arange(horizon, device=first.device) * stride
        is_beyond = rows > last[:, None]
        windows = self.observations[rows.minimum(last[:, None])]
        # (batch, horizon, 1) | (obs_dim,) -> (batch, horizon, obs_dim)
        windows = windows * (~is_beyond[..., None] | self.stays)
        is_true = self.is_at_rest[last] | (first + stride <= last)
        return Batch(windows, self.actions[indices], self.values[indices], is_true)

    def transitions(self, indices: th.Tensor) -> Transitions:
        """Steps by their number, ``(batch,)``."""
        rows = self.step_rows[indices]
        return Transitions(self.observations[rows], self.rewards[indices], self.observations[rows + 1], self.continues[indices])


def prepare_data(dataset: OfflineDataset, actions: np.ndarray, settings: WindowSettings, device: th.device) -> Data:
    """Cut a dataset into windows.

    :param actions: in the scaled box [-1, 1], ``(n_steps, action_dim)``
    :raises ValueError: if no episode is long enough for a plan, or a velocity's index is no index
    """
    windows = make_windows(dataset, settings)
    steps = windows.starts
    velocities = list(settings.velocity_indices)
    speeds = np.abs(dataset.observations[:, velocities])
    is_at_rest = (speeds <= REST * dataset.observations[:, velocities].std(axis=0)).all(axis=1)
    stays = np.ones(dataset.observations.shape[1], bool)
    stays[velocities] = False
    arrays = (
        windows.first_rows,
        windows.last_rows,
        actions[steps],
        values(dataset, settings)[steps],
        dataset.observation_rows,
        rewards(dataset, settings.terminal_reward),
        ~dataset.terminations,
        dataset.observations,
        is_at_rest,
        stays,
    )
    return Data(*(th.as_tensor(array, device=device) for array in arrays))


def make_windows(dataset: OfflineDataset, settings: WindowSettings) -> Windows:
    """The windows of a dataset.

    :raises ValueError: as ``prepare_data()``
    """
    obs_dim = dataset.observations.shape[1]
    bad = [index for index in settings.velocity_indices if not 0 <= index < obs_dim]
    if bad:
        raise ValueError(f"`velocity_indices` {bad} are no indices of the flattened observations, of which there are {obs_dim}.")
    reach, longest = (settings.horizon - 1) * settings.stride, int(dataset.episode_lengths.max())
    if reach > longest:
        raise ValueError(
            f"A plan of `horizon` = {settings.horizon} states, `stride` = {settings.stride} steps apart, reaches {reach} steps "
            f"ahead, and the longest episode has {longest}: take a shorter horizon or stride."
        )
    return dataset.windows(settings.horizon, settings.stride, settings.pad)


def rewards(dataset: OfflineDataset, terminal_reward: float | None) -> np.ndarray:
    """Rewards, with another one at each termination if one is given, float32, ``(n_steps,)``."""
    if terminal_reward is None:
        return dataset.rewards
    changed: np.ndarray = np.where(dataset.terminations, np.float32(terminal_reward), dataset.rewards)
    return changed


def values(dataset: OfflineDataset, settings: WindowSettings) -> np.ndarray:
    """Discounted return from each step on, without an end, float32, ``(n_steps,)``.

    After a termination nothing follows. After a truncation the episode would have gone on, which the recorded rewards do not show:
    where windows go on with the final observation (``pad="last"``), so does the final reward, for ever; where they do not, the
    episode's mean reward stands for what was not seen. A return that is cut off there would make the same state worth less the
    later it is visited.
    """
    changed = dataclasses.replace(dataset, rewards=rewards(dataset, settings.terminal_reward))
    lengths, ends = dataset.episode_lengths, dataset.episode_starts[1:]
    final = changed.rewards[ends - 1] if settings.pad == "last" else changed.episode_returns / lengths
    tails = np.where(dataset.terminations[ends - 1], 0.0, final / (1 - settings.discount))
    remaining = np.repeat(ends, lengths) - np.arange(dataset.n_steps)
    beyond = settings.discount**remaining * np.repeat(tails, lengths)
    result: np.ndarray = (changed.returns_to_go(settings.discount) + beyond).astype(np.float32)
    return result


def check_velocity_indices(velocity_indices: Sequence[int]) -> tuple[int, ...]:
    """The indices as integers.

    :raises ValueError: if they repeat one, or one is not an integer
    """
    if isinstance(velocity_indices, (int, str)):
        raise ValueError(f"`velocity_indices` must be a list of integers, got {velocity_indices!r}.")
    indices = tuple(int(index) for index in velocity_indices)
    if len(set(indices)) < len(indices) or any(int(index) != index for index in velocity_indices):
        raise ValueError(f"`velocity_indices` must be different integers, got {list(velocity_indices)}.")
    return indices
