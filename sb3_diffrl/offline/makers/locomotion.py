"""Locomotion datasets: policies of stated returns, from training runs on this machine."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
from minari.storage import get_dataset_path

from sb3_diffrl.offline.evaluation import reference_scores
from sb3_diffrl.offline.makers.training import ALGORITHMS, EXPERT, MEDIUM, REPLAY, Evaluation, TrainingPlan, train
from sb3_diffrl.offline.recording import record_dataset, versions
from sb3_diffrl.offline.writing import DatasetWriter, check_new_id

Name = Literal["hopper", "halfcheetah", "walker2d"]
Tier = Literal["random", "medium", "medium-replay", "expert"]
TIERS: tuple[Tier, ...] = ("random", "medium", "medium-replay", "expert")
N_STEPS, QUICK_N_STEPS = 200_000, 2_000
DESCRIPTIONS: dict[Tier, str] = {
    "random": "Uniformly random actions.",
    "medium": "Actions sampled from the first policy of a training run that reached the medium level.",
    "medium-replay": "All transitions that training saw up to the medium policy, from its replay buffer.",
    "expert": "Actions sampled from the first policy of a training run that reached the expert level.",
}

SMALL_SAC: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 64,
    "learning_starts": 5_000,
    "policy_kwargs": {"net_arch": [64, 64, 64]},
}

PLANS: dict[Name, TrainingPlan] = {
    "halfcheetah": TrainingPlan("HalfCheetah-v5", "SAC", SMALL_SAC, medium_return=3000, expert_return=6000, max_steps=300_000),
    "hopper": TrainingPlan(
        "Hopper-v5", "SAC", {"learning_starts": 5_000}, medium_return=1000, expert_return=3000, max_steps=500_000
    ),
    "walker2d": TrainingPlan("Walker2d-v5", "SAC", SMALL_SAC, medium_return=1000, expert_return=3000, max_steps=500_000),
}


def make_locomotion(
    name: Name,
    tier: Tier,
    dataset_id: str,
    *,
    n_steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    progress_bar: bool = True,
) -> minari.MinariDataset:
    """Make a dataset of one tier, after a training run to its level if the cache holds none.

    :param name: which of ``PLANS``
    :param tier: see ``DESCRIPTIONS``
    :param dataset_id: id to write to
    :param n_steps: size, ``N_STEPS`` by default; of ``medium-replay`` the newest are kept, by default all
    :param seed: seed of the training run, and of recording
    :param quick: train for two short stretches whatever the returns are, and record ``QUICK_N_STEPS``: for tests and demonstrations
    :param overwrite: replace a dataset of this id
    :param cache: folder of the training runs, ``default_cache()`` by default
    :param progress_bar: whether to show one
    :raises ValueError: if more steps of ``medium-replay`` are asked for than training took
    :raises LevelNotReachedError: if training did not reach its levels
    """
    check_new_id(dataset_id, overwrite)
    plan = replace(_quick_plan(PLANS[name]) if quick else PLANS[name], seed=seed)
    label = "A QUICK STAND-IN for tests and demonstrations, not the dataset of that name: hardly trained. " if quick else ""
    description = f"{label}{plan.env_id}. {DESCRIPTIONS[tier]}"
    n_recorded = n_steps or (QUICK_N_STEPS if quick else N_STEPS)
    if tier == "random":
        return record_dataset(
            None,
            plan.env_id,
            dataset_id,
            n_steps=n_recorded,
            seed=seed,
            description=description,
            overwrite=overwrite,
            progress_bar=progress_bar,
        )
    folder = (cache or default_cache()) / f"{name}{'-quick' if quick else ''}-s{seed}"
    curve = train(plan, folder, "expert" if tier == "expert" else "medium", progress_bar)
    provenance = {"training": asdict(plan), "evaluation": _policy_evaluation(plan, curve, tier)._asdict()}
    if tier == "medium-replay":
        return _write_replay(folder / REPLAY, plan, dataset_id, n_steps, overwrite, description, provenance)
    return record_dataset(
        ALGORITHMS[plan.algorithm].load(folder / (MEDIUM if tier == "medium" else EXPERT), device="cpu"),
        plan.env_id,
        dataset_id,
        n_steps=n_recorded,
        seed=seed,
        description=description,
        overwrite=overwrite,
        progress_bar=progress_bar,
        provenance=provenance,
    )


def _quick_plan(plan: TrainingPlan) -> TrainingPlan:
    """A run of seconds in the same environment, which takes what it gets."""
    arguments = {**plan.arguments, "learning_starts": 100, "train_freq": 4, "policy_kwargs": {"net_arch": [32, 32]}}
    short = replace(plan, arguments=arguments, medium_return=None, expert_return=None)
    return replace(short, max_steps=480, stretch_steps=240, n_eval_episodes=2)


def default_cache() -> Path:
    """A folder beside the datasets which Minari does not list."""
    return Path(get_dataset_path()) / ".sb3-diffrl" / "training"


def _policy_evaluation(plan: TrainingPlan, curve: list[Evaluation], tier: Tier) -> Evaluation:
    """The evaluation by which the tier's policy was chosen."""
    medium = next(i for i, e in enumerate(curve) if e.reaches(plan.medium_return))
    return next(e for e in curve[medium + 1 :] if e.reaches(plan.expert_return)) if tier == "expert" else curve[medium]


class Episode(NamedTuple):
    """``n`` steps and ``n + 1`` observations, see ``DatasetWriter.add_episode``."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


def _write_replay(
    path: Path,
    plan: TrainingPlan,
    dataset_id: str,
    n_steps: int | None,
    overwrite: bool,
    description: str,
    provenance: dict[str, Any],
) -> minari.MinariDataset:
    """Write stored transitions as episodes, the newest ``n_steps`` of them."""
    with np.load(path) as arrays:
        transitions = dict(arrays)
    available = len(transitions["rewards"])
    if n_steps is not None and n_steps > available:
        raise ValueError(f"{dataset_id} has {available} steps, all that training took: ask for at most as many, not {n_steps}.")
    env = gym.make(plan.env_id)
    low, high = reference_scores(env.spec)
    returns = []
    with DatasetWriter(dataset_id, env.observation_space, env.action_space, env_spec=env.spec, overwrite=overwrite) as writer:
        for episode in newest(list(replay_episodes(transitions)), n_steps or available):
            writer.add_episode(*episode)
            returns.append(float(episode.rewards.sum()))
        metadata = {
            "algorithm_name": plan.algorithm,
            "description": description,
            "ref_min_score": low,
            "ref_max_score": high,
            "provenance": {
                "algorithm": plan.algorithm,
                "versions": versions(),
                "seed": plan.seed,
                "mean_return": float(np.mean(returns)),
                "std_return": float(np.std(returns)),
                **provenance,
            },
        }
        return writer.publish({key: value for key, value in metadata.items() if value is not None})


def replay_episodes(transitions: dict[str, np.ndarray]) -> Iterator[Episode]:
    """Cut transitions into episodes.

    An episode also ends where the next transition begins elsewhere: there a stretch of training ended, and it counts as truncated.

    :param transitions: arrays ``(steps, ...)``, as training stores them
    """
    observations, following, actions, rewards, terminations, truncations = (
        transitions[key] for key in ("observations", "next_observations", "actions", "rewards", "terminations", "truncations")
    )
    continues = (following[:-1] == observations[1:]).all(axis=1) & ~terminations[:-1] & ~truncations[:-1]
    start = 0
    for end in np.append(np.flatnonzero(~continues), len(rewards) - 1):
        steps = slice(start, end + 1)
        cut = truncations[steps].copy()
        cut[-1] = not terminations[end]
        yield Episode(
            np.append(observations[steps], following[end : end + 1], axis=0),
            actions[steps],
            rewards[steps],
            terminations[steps],
            cut,
        )
        start = end + 1


def newest(episodes: list[Episode], n_steps: int) -> list[Episode]:
    """The last ``n_steps`` steps; the oldest episode left may lack its beginning."""
    kept: list[Episode] = []
    for episode in reversed(episodes):
        if n_steps == 0:
            break
        n = min(n_steps, len(episode.rewards))
        kept.append(Episode(episode.observations[-n - 1 :], *(array[-n:] for array in episode[1:])))
        n_steps -= n
    return kept[::-1]
