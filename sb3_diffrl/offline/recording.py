"""Minari out: a policy's episodes become a dataset."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_diffrl.common import check_count
from sb3_diffrl.offline.evaluation import reference_scores
from sb3_diffrl.offline.writing import DataFormat, DatasetWriter, check_new_id, recoverable_spec
from sb3_diffrl.saving import versions as versions

Policy = BaseAlgorithm | Callable[[Any], Any] | None
EnvSource = str | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]]


def record_dataset(
    model: Policy,
    env: EnvSource,
    dataset_id: str,
    *,
    n_episodes: int | None = None,
    n_steps: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
    action_noise: ActionNoise | None = None,
    record_infos: bool = False,
    data_format: DataFormat = "hdf5",
    overwrite: bool = False,
    progress_bar: bool = False,
    eval_env: str | EnvSpec | gym.Env[Any, Any] | None = None,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    algorithm_name: str | None = None,
    description: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> minari.MinariDataset:
    """Let a policy act in an environment and keep what happens as a Minari dataset.

    Nothing is left behind if recording fails or is interrupted. The metadata's ``provenance`` holds algorithm, versions, seed, and
    the mean and standard deviation of the returns of whole episodes. Observations, rewards and actions are the env's own: where a
    model was trained with ``VecNormalize``, they are recorded before normalisation.

    :param model: a model of Stable-Baselines3 or with its ``predict``; a function of an observation; or ``None`` for uniformly
        random actions
    :param env: id of a registered environment, an environment, or a function that makes one
    :param dataset_id: ``namespace/env/name-v0``
    :param n_episodes: number of episodes to record
    :param n_steps: number of steps to record, instead: exactly as many, the last episode is cut and marked as truncated
    :param seed: seeds the env (each episode from a seed of its own, which is recorded), the policy and its noise; the global random
        generators are put back as they were
    :param deterministic: passed to the model's ``predict``
    :param action_noise: SB3's, added to the action in the action space scaled to [-1, 1], as in training
    :param record_infos: also record the numbers in the infos, see ``DatasetWriter.add_episode``
    :param data_format: ``"hdf5"``, or ``"arrow"`` (needs pyarrow)
    :param overwrite: replace a dataset of this id, once the new one is whole
    :param progress_bar: show one
    :param eval_env: environment to evaluate in, if it is not ``env``
    :param ref_min_score: mean return of a random policy in the evaluation env, see ``normalized_score()``; by default the one in
        ``REFERENCES``, if any
    :param ref_max_score: mean return of an expert, likewise
    :param algorithm_name: by default the name of the model's class
    :param description: what the dataset is
    :param metadata: further entries of Minari's metadata, such as ``author`` (a set), ``code_permalink`` or ``requirements`` (list)
    :param provenance: further entries of the metadata's ``provenance``
    :return: the dataset, as on disk
    :raises FileExistsError: if there is a dataset of this id and ``overwrite`` is false, before anything is done
    :raises ValueError: if the id or the arguments are wrong, an action is outside the action space, or a number is not finite
    """
    check_new_id(dataset_id, overwrite)
    n_episodes = None if n_episodes is None else check_count("n_episodes", n_episodes)
    n_steps = None if n_steps is None else check_count("n_steps", n_steps)
    if (n_episodes is None) == (n_steps is None):
        raise ValueError(f"Give a positive `n_episodes` or `n_steps`, and not both: they are {n_episodes} and {n_steps}.")
    made, owned = _make_env(env)
    name = algorithm_name or _name(model)
    try:
        spec, eval_spec = recoverable_spec(made), _spec(eval_env)
        with (
            DatasetWriter(
                dataset_id, made.observation_space, made.action_space, env_spec=spec, data_format=data_format, overwrite=overwrite
            ) as writer,
            _seeded(seed) as rng,
        ):
            returns = []
            for episode in _episodes(
                _Actor(model, made, deterministic, action_noise), made, rng, n_episodes, n_steps, progress_bar
            ):
                writer.add_episode(
                    episode.observations,
                    episode.actions,
                    episode.rewards,
                    episode.terminations,
                    episode.truncations,
                    episode.infos if record_infos else None,
                    episode.seed,
                )
                if not episode.was_cut:
                    returns.append(float(np.sum(episode.rewards)))
            own_provenance = {
                "algorithm": name,
                "versions": versions(),
                "seed": seed,
                "deterministic": deterministic,
                "action_noise": None if action_noise is None else repr(action_noise),
                "n_whole_episodes": len(returns),
                "mean_return": float(np.mean(returns)) if returns else None,
                "std_return": float(np.std(returns)) if returns else None,
            }
            entries = {
                "algorithm_name": name,
                "description": description,
                "eval_env_spec": None if eval_spec is None else eval_spec.to_json(),
                **_references(eval_spec or spec, ref_min_score, ref_max_score),
                **{key: value for key, value in (metadata or {}).items() if key not in ("dataset_id", "minari_version")},
                "provenance": {**own_provenance, **(provenance or {})},
            }
            return writer.publish({key: value for key, value in entries.items() if value is not None})
    finally:
        if owned:
            made.close()


def _references(spec: EnvSpec | None, low: float | None, high: float | None) -> dict[str, float | None]:
    known_low, known_high = reference_scores(spec)
    return {"ref_min_score": known_low if low is None else float(low), "ref_max_score": known_high if high is None else float(high)}


@dataclass
class _Episode:
    seed: int
    observations: list[Any]
    infos: list[dict[str, Any]]
    actions: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminations: list[bool] = field(default_factory=list)
    truncations: list[bool] = field(default_factory=list)
    was_cut: bool = False


def _episodes(
    actor: "_Actor",
    env: gym.Env[Any, Any],
    rng: np.random.Generator,
    n_episodes: int | None,
    n_steps: int | None,
    progress_bar: bool,
) -> Iterator[_Episode]:
    actor.seed(rng)
    count, goal = 0, n_episodes or n_steps or 0
    with tqdm(total=goal, unit="episode" if n_steps is None else "step", disable=not progress_bar) as bar:
        while count < goal:
            episode = _episode(actor, env, int(rng.integers(2**31)), None if n_steps is None else goal - count)
            done = 1 if n_steps is None else len(episode.rewards)
            count += done
            bar.update(done)
            yield episode


def _episode(actor: "_Actor", env: gym.Env[Any, Any], seed: int, max_steps: int | None) -> _Episode:
    observation, info = env.reset(seed=seed)
    actor.reset()
    # Copies: envs and policies may write the next observation, info or action into the same arrays.
    episode = _Episode(seed, [deepcopy(observation)], [deepcopy(info)])
    while True:
        action = deepcopy(actor(observation))
        if not env.action_space.contains(action):
            raise ValueError(
                f"Step {len(episode.rewards)} of the episode with seed {seed}: the action {action} is not in the action space "
                f"{env.action_space}. Clip it, or mend the policy."
            )
        taken = deepcopy(action)
        observation, reward, terminated, truncated, info = env.step(action)
        episode.was_cut = not (terminated or truncated) and len(episode.rewards) + 1 == max_steps
        episode.observations.append(deepcopy(observation))
        episode.actions.append(taken)
        episode.rewards.append(float(reward))
        episode.terminations.append(bool(terminated))
        episode.truncations.append(bool(truncated) or episode.was_cut)
        episode.infos.append(deepcopy(info))
        if terminated or truncated or episode.was_cut:
            return episode


class _Actor:
    """A model, a function or nothing, as a policy with a beginning of episodes."""

    def __init__(self, model: Policy, env: gym.Env[Any, Any], deterministic: bool, action_noise: ActionNoise | None) -> None:
        self.model, self.space, self.deterministic, self.action_noise = model, env.action_space, deterministic, action_noise
        self.normalize = model.get_vec_normalize_env() if isinstance(model, BaseAlgorithm) else None
        self.state: Any = None
        self.starts = True
        if action_noise is not None and not (isinstance(self.space, spaces.Box) and self.space.is_bounded()):
            raise ValueError(f"`action_noise` needs a bounded Box action space, this one is {self.space}.")
        if isinstance(model, BaseAlgorithm) and model.action_space != self.space:
            raise ValueError(f"The model's action space {model.action_space} is not the env's, {self.space}.")

    def seed(self, rng: np.random.Generator) -> None:
        self.space.seed(int(rng.integers(2**31)))
        if isinstance(self.model, BaseAlgorithm):
            self.model.action_space.seed(int(rng.integers(2**31)))

    def reset(self) -> None:
        self.state, self.starts = None, True
        if self.action_noise is not None:
            self.action_noise.reset()

    def __call__(self, observation: Any) -> Any:
        action = self._noiseless(observation)
        if self.action_noise is not None:
            assert isinstance(self.space, spaces.Box)
            low, high = self.space.low, self.space.high
            scaled = np.clip(2 * (action - low) / (high - low) - 1 + self.action_noise(), -1, 1)
            action = np.clip(low + (scaled + 1) * (high - low) / 2, low, high).astype(self.space.dtype)
        return action

    def _noiseless(self, observation: Any) -> Any:
        if self.model is None:
            return self.space.sample()
        if hasattr(self.model, "predict"):
            seen = observation if self.normalize is None else self.normalize.normalize_obs(observation)
            start, self.starts = np.array([self.starts]), False
            action, self.state = self.model.predict(seen, self.state, start, self.deterministic)
        else:
            action = self.model(observation)
        if isinstance(action, (dict, tuple)):
            return action
        converted = np.asarray(action, self.space.dtype)
        # What is no whole number stays as it is, to be refused.
        return converted if np.issubdtype(converted.dtype, np.floating) or np.array_equal(converted, action) else action


def _make_env(env: EnvSource) -> tuple[gym.Env[Any, Any], bool]:
    # The env, and whether to close it
    if isinstance(env, gym.Env):
        return env, False
    if isinstance(env, VecEnv):
        raise TypeError("Give an env's id, a Gymnasium env or a function that makes one: episodes are recorded in a single env.")
    return (gym.make(env), True) if isinstance(env, str) else (env(), True)


def _spec(env: str | EnvSpec | gym.Env[Any, Any] | None) -> EnvSpec | None:
    if isinstance(env, gym.Env):
        return recoverable_spec(env)
    return gym.spec(env) if isinstance(env, str) else env


def _name(model: Policy) -> str:
    if model is None:
        return "random"
    if isinstance(model, BaseAlgorithm) or not hasattr(model, "__name__"):
        return type(model).__name__
    return str(model.__name__)


@contextmanager
def _seeded(seed: int | None) -> Iterator[np.random.Generator]:
    # A generator for the seeds of episodes; with a seed, SB3's global generators start from it inside the block.
    if seed is None:
        yield np.random.default_rng()
        return
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with th.random.fork_rng():
        set_random_seed(seed)
        try:
            yield np.random.default_rng(seed)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
