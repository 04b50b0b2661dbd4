"""Datasets for online algorithms: their replay buffers filled before learning."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import minari
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecTransposeImage, unwrap_vec_wrapper
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from tqdm import tqdm

from sb3_diffrl.offline.reading import DatasetSource, infos_at, open_datasets, read_episodes
from sb3_diffrl.offline.spaces import check_same_spaces

# Rewards that the env must confirm for hindsight goals: a task that sets a new goal midway may give a few under the next one.
CONFIRMED_REWARDS = 0.9


def fill_replay_buffer(
    model: OffPolicyAlgorithm,
    dataset: DatasetSource | Sequence[DatasetSource],
    *,
    max_steps: int | None = None,
    progress_bar: bool = False,
) -> int:
    """Put a dataset into a model's empty replay buffer, as if the model had collected it.

    Transitions go through the buffer's own ``add()``: actions scaled to [-1, 1]; observations and rewards as recorded, which is
    what a buffer holds under ``VecNormalize`` too (its statistics stay as they are); time-outs told from terminations, if the
    buffer knows the difference. With several envs the dataset is cut in as many parts, one for each. The last step of each part
    counts as a time-out, so that what is collected afterwards is another episode. Set ``learning_starts=0`` to learn from the
    first online step on.

    :param model: any off-policy algorithm of Stable-Baselines3, with its env
    :param dataset: an id, a ``MinariDataset`` or a list of either; with infos for a ``HerReplayBuffer`` that copies them
    :param max_steps: put in only the first so many steps
    :param progress_bar: show one
    :return: number of transitions put in: all, up to a remainder of the division by the number of envs
    :raises ValueError: if the data are damaged or of other spaces than the model's, the buffer is not empty or too small, or it is
        a ``HerReplayBuffer`` and the env's ``compute_reward`` does not give the recorded rewards; nothing is put in then
    """
    sources = open_datasets(dataset)
    buffer = model.replay_buffer
    if buffer is None or buffer.size() > 0:
        state = (
            "has no replay buffer" if buffer is None else f"already has {buffer.size() * buffer.n_envs} steps in its replay buffer"
        )
        raise ValueError(f"The model {state}: fill a new one, before `learn()`. Several datasets go in together, as a list.")
    transpose = None if model.env is None else unwrap_vec_wrapper(model.env, VecTransposeImage)
    observation_space = model.observation_space if transpose is None else transpose.venv.observation_space
    named = f"dataset {sources[0].id!r}"
    check_same_spaces(
        "the model", (observation_space, model.action_space), named, (sources[0].observation_space, sources[0].action_space)
    )
    # All is read once before anything is put in.
    lengths = [[len(episode) for episode in read_episodes(source)] for source in sources]
    n_steps = sum(map(sum, lengths))
    rows = min(n_steps, n_steps if max_steps is None else max_steps) // buffer.n_envs
    if not 1 <= rows <= buffer.buffer_size:
        raise ValueError(
            f"The replay buffer has room for {buffer.buffer_size * buffer.n_envs} steps ({buffer.n_envs} envs), the data are "
            f"{n_steps}: make the model with `buffer_size={n_steps}` and no more envs, or take fewer with a positive `max_steps`."
        )
    if isinstance(buffer, HerReplayBuffer):
        _check_hindsight(buffer, sources[0])

    parts = [_Part(model, buffer, sources, lengths, start=i * rows, n_steps=rows) for i in range(buffer.n_envs)]
    for steps in tqdm(zip(*parts, strict=True), total=rows, unit="step", disable=not progress_bar):
        observations, next_observations = (_concatenate([step[i] for step in steps]) for i in (0, 1))
        if transpose is not None:
            observations, next_observations = map(transpose.transpose_observations, (observations, next_observations))
        buffer.add(
            observations,
            next_observations,
            np.concatenate([step.action for step in steps]),
            np.array([step.reward for step in steps]),
            np.array([step.done for step in steps]),
            [step.info for step in steps],
        )
    n_clipped = sum(part.n_clipped for part in parts)
    if n_clipped:
        warnings.warn(f"{n_clipped} actions in {named} are outside the action space and were clipped to it.", stacklevel=2)
    return rows * buffer.n_envs


class _Step(NamedTuple):
    observation: Any  # a batch of one, as are the next two
    next_observation: Any
    action: np.ndarray
    reward: float
    done: bool
    info: dict[str, Any]


class _Part:
    """Consecutive steps of the datasets, across their episodes."""

    def __init__(
        self,
        model: OffPolicyAlgorithm,
        buffer: ReplayBuffer,
        sources: Sequence[minari.MinariDataset],
        lengths: Sequence[Sequence[int]],
        start: int,
        n_steps: int,
    ) -> None:
        self.model, self.sources, self.lengths, self.start, self.n_steps = model, sources, lengths, start, n_steps
        self.copies_infos = isinstance(buffer, HerReplayBuffer) and buffer.copy_info_dict
        self.n_clipped = 0

    def __iter__(self) -> Iterator[_Step]:
        left = self.n_steps
        for episode, first in self._episodes():
            actions = self._scale(episode.actions)
            for i in range(first, len(episode)):
                left -= 1
                terminated = bool(episode.terminations[i])
                truncated = not terminated and (bool(episode.truncations[i]) or left == 0)
                yield _Step(
                    _row(episode.observations, i),
                    _row(episode.observations, i + 1),
                    actions[i : i + 1],
                    float(episode.rewards[i]),
                    terminated or truncated,
                    {**(infos_at(episode, i + 1) if self.copies_infos else {}), "TimeLimit.truncated": truncated},
                )
                if left == 0:
                    return

    def _episodes(self) -> Iterator[tuple[minari.EpisodeData, int]]:
        # Episodes from the one that holds the first step, and where to begin in each
        skip = self.start
        for source, lengths in zip(self.sources, self.lengths, strict=True):
            ends = np.cumsum(lengths)
            first = int(np.searchsorted(ends, skip, side="right"))
            if first == len(lengths):
                skip -= int(ends[-1])
                continue
            skip -= int(ends[first]) - lengths[first]
            for episode in read_episodes(source, first):
                yield episode, skip
                skip = 0

    def _scale(self, actions: Any) -> np.ndarray:
        if not isinstance(self.model.action_space, spaces.Box):
            return np.asarray(actions)
        scaled = self.model.policy.scale_action(np.asarray(actions))
        self.n_clipped += int((np.abs(scaled).reshape(len(scaled), -1).max(axis=1) > 1 + 1e-4).sum())
        return scaled.clip(-1, 1)


def _check_hindsight(buffer: HerReplayBuffer, source: minari.MinariDataset) -> None:
    # Hindsight goals are rewarded by the env: what it says must be what was recorded.
    episode = next(read_episodes(source))
    if buffer.copy_info_dict and not episode.infos:
        raise ValueError(
            f"The buffer copies infos and dataset {source.id!r} has none: record it with `record_infos=True`, or leave out "
            "`copy_info_dict`."
        )
    infos = [infos_at(episode, i + 1) if buffer.copy_info_dict else {} for i in range(len(episode))]
    goals = episode.observations["achieved_goal"][1:], episode.observations["desired_goal"][:-1]
    assert buffer.env is not None
    rewards = buffer.env.env_method("compute_reward", *goals, infos, indices=[0])[0]
    agreed = float(np.isclose(rewards, episode.rewards, rtol=1e-4, atol=1e-4).mean())
    if agreed < CONFIRMED_REWARDS:
        raise ValueError(
            f"The env's `compute_reward` gives the recorded reward in {agreed:.0%} of the steps of {source.id!r}'s first episode: "
            "hindsight goals would be rewarded otherwise than real ones. Use the dataset's own env, or another buffer."
        )


def _row(tree: Any, i: int) -> Any:
    return {key: _row(part, i) for key, part in tree.items()} if isinstance(tree, dict) else tree[i : i + 1]


def _concatenate(trees: Sequence[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _concatenate([tree[key] for tree in trees]) for key in trees[0]}
    return trees[0] if len(trees) == 1 else np.concatenate(trees)
