"""What benchmarks/planning.py plans for: mazes whose goal is not observed, and locomotion."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_diffrl import OfflineDataset
from sb3_diffrl.diffusion.attention import attention
from sb3_diffrl.diffusion.transformer import ALL, Block, modulate
from sb3_diffrl.offline.makers.pointmaze import WaypointController, register_mazes
from sb3_diffrl.planner import PRESETS

register_mazes()

# Goals drawn for the reward of a maze whose goal is not observed.
N_GOALS = 64


class Task(NamedTuple):
    """A task of the benchmark.

    :param dataset_id: what is learnt from
    :param hides_goal: as in D4RL's Maze2D, plans are for position and velocity alone, and rewards are for the evaluation's goal
    :param settings: of ``PG``
    :param planner_steps: gradient steps of the planner
    :param prior_steps: gradient steps of the prior
    :param num_inference_steps: denoising steps of a plan in the evaluation
    :param to_the_goal: as DV does, learn only from what comes before the goal is reached, and end there
    :param normed_residual: transformers as in the reference, whose blocks add to their *normed* input
    """

    dataset_id: str
    hides_goal: bool
    settings: dict[str, Any]
    planner_steps: int
    prior_steps: int
    num_inference_steps: int = 20
    to_the_goal: bool = False
    normed_residual: bool = False


_MAZE = PRESETS["pointmaze"]["cpu"]
_WIDE_PRIOR = {"policy_kwargs": {**_MAZE["policy_kwargs"], "prior_width": 256}}
_RELATIVE, _PLAN = {"relative": True}, {"prediction_type": "sample"}
_NEAR = {**_MAZE, **_WIDE_PRIOR, "horizon": 8}
# Chosen on seed 100
_FAR = {**_MAZE, **_WIDE_PRIOR, **_RELATIVE, **_PLAN, "stride": 20, "discount": 0.997, "value_weight": 2.0, "alpha": 0.1}
_FAR["squash"] = False
# Tried on seed 100, where PG's default of 0.01 scored below zero.
_RUN = {**PRESETS["locomotion"]["cpu"], "alpha": 0.3}
_UMAZE, _MEDIUM = "sb3-diffrl/pointmaze/umaze-v0", "sb3-diffrl/pointmaze/medium-v0"
TASKS = {
    "umaze": Task(_UMAZE, True, _MAZE, 8_000, 5_000),
    "medium": Task(_MEDIUM, True, _FAR, 12_000, 4_000),
    "umaze-goal": Task(_UMAZE, False, _MAZE, 8_000, 5_000),
    "medium-goal": Task(_MEDIUM, False, _FAR, 12_000, 4_000),
    "medium-goal-preset": Task(_MEDIUM, False, _MAZE, 8_000, 5_000),
    # What the planner denoises and predicts, with shorter plans
    "umaze-states": Task(_UMAZE, True, _NEAR, 4_000, 2_000, 10),
    "umaze-displacements": Task(_UMAZE, True, {**_NEAR, **_RELATIVE, **_PLAN}, 4_000, 2_000, 10),
    "umaze-displacements-epsilon": Task(_UMAZE, True, {**_NEAR, **_RELATIVE}, 4_000, 2_000, 10),
    "umaze-sample": Task(_UMAZE, True, {**_NEAR, **_PLAN}, 4_000, 2_000, 10),
    # As umaze-states, with the faults of the reference: windows that end at the goal, at rest there (not a fault) or moving on the
    # spot, and blocks of the transformer that add to what is normed
    "umaze-to-goal-at-rest": Task(_UMAZE, True, _NEAR, 4_000, 2_000, 10, to_the_goal=True),
    "umaze-to-goal-moving": Task(_UMAZE, True, {**_NEAR, "velocity_indices": ()}, 4_000, 2_000, 10, to_the_goal=True),
    "umaze-normed-residual": Task(_UMAZE, True, _NEAR, 4_000, 2_000, 10, normed_residual=True),
    # As umaze-states, with uniform and with learned timesteps, run one after the other
    "umaze-uniform": Task(_UMAZE, True, _NEAR, 4_000, 2_000, 10),
    "umaze-adaptive": Task(_UMAZE, True, {**_NEAR, "timestep_sampler": "adaptive"}, 4_000, 2_000, 10),
    "halfcheetah-medium": Task("sb3-diffrl/halfcheetah/medium-v0", False, _RUN, 4_000, 2_000),
    "halfcheetah-medium-replay": Task("sb3-diffrl/halfcheetah/medium-replay-v0", False, _RUN, 4_000, 2_000),
    # Number of steps and alpha tried on seed 100
    "hopper-medium-replay": Task("sb3-diffrl/hopper/medium-replay-v0", False, {**_RUN, "alpha": 0.1}, 16_000, 3_000),
    "hopper-medium": Task("sb3-diffrl/hopper/medium-v0", False, {**_RUN, "alpha": 0.1}, 16_000, 3_000),
}


class HideGoal(gym.ObservationWrapper[np.ndarray, np.ndarray, Any]):
    """Shows a maze's position and velocity, and not its goal."""

    def __init__(self, env: gym.Env[Any, np.ndarray]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        self.observation_space = env.observation_space["observation"]

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return observation["observation"]


def for_hidden_goal(dataset: OfflineDataset, env: Any) -> OfflineDataset:
    """A maze's dataset, without the journeys' own goals and with rewards for the goal of the evaluation.

    The environment moves that goal within its cell at each reset, and a planner does not see it: the reward is the mean over
    ``N_GOALS`` of them.

    :param env: the evaluation environment
    """
    goals = np.stack([env.reset(seed=i)[0]["desired_goal"] for i in range(N_GOALS)])
    after = dataset.observations[dataset.observation_rows + 1, :2]
    rewards = np.zeros(dataset.n_steps, np.float32)
    for goal in goals:
        rewards += env.unwrapped.compute_reward(after, goal[None], {}).astype(np.float32) / N_GOALS
    observations = np.ascontiguousarray(dataset.observations[:, :4])
    assert isinstance(dataset.observation_space, spaces.Dict)
    space = dataset.observation_space["observation"]
    return dataclasses.replace(dataset, observations=observations, rewards=rewards, observation_space=space, sources=())


def up_to_the_goal(dataset: OfflineDataset, longest: int = 800) -> OfflineDataset:
    """What comes before the goal is reached, from the last time it was left, as episodes that end there.

    :param longest: steps that are kept of each
    """
    hits, starts = dataset.rewards > 0.5, []
    # A journey that begins at the goal does not lead there
    ends = np.flatnonzero(hits[1:] & ~hits[:-1] & ~np.isin(np.arange(1, len(hits)), dataset.episode_starts)) + 1
    for end in ends:
        earliest = dataset.episode_starts[np.searchsorted(dataset.episode_starts, end, side="right") - 1]
        left = np.flatnonzero(hits[earliest:end])
        starts.append(max(earliest + left[-1] + 1 if len(left) else earliest, end + 1 - longest))
    steps = np.concatenate([np.arange(start, end + 1) for start, end in zip(starts, ends, strict=True)])
    rows = dataset.observation_rows
    seen = np.concatenate([np.arange(rows[start], rows[end] + 2) for start, end in zip(starts, ends, strict=True)])
    lengths = ends + 1 - np.array(starts)
    truncations = np.zeros(len(steps), bool)
    truncations[np.cumsum(lengths) - 1] = True
    return dataclasses.replace(
        dataset,
        observations=dataset.observations[seen],
        actions=dataset.actions[steps],
        rewards=dataset.rewards[steps],
        terminations=np.zeros(len(steps), bool),
        truncations=truncations,
        episode_starts=np.concatenate([[0], np.cumsum(lengths)]),
    )


def use_normed_residual() -> None:
    """Make every transformer's block add to its normed input, as the reference's do."""

    def forward(self: Block, x: th.Tensor, vectors: tuple[th.Tensor, ...], steps: slice = ALL) -> th.Tensor:
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = vectors
        x = modulate(self.attention_norm(x), shift_attention, scale_attention)
        key_value, x = self.key_value(x), x[:, steps].contiguous()
        x = th.addcmul(x, gate_attention, self.attention_out(attention(self.query(x), key_value, self.head_dim)))
        x = modulate(self.mlp_norm(x), shift_mlp, scale_mlp)
        return th.addcmul(x, gate_mlp, self.mlp(x))

    Block.forward = forward  # type: ignore[method-assign]


def prepare(task: Task, dataset: OfflineDataset) -> tuple[OfflineDataset, Callable[[], gym.Env[Any, Any]]]:
    """The data that a task is learnt from, and what makes its evaluation environment.

    :param dataset: as it is on disk
    """

    def make() -> gym.Env[Any, Any]:
        env = dataset.recover_environment(eval_env=True)
        return HideGoal(env) if task.hides_goal else env

    data = for_hidden_goal(dataset, dataset.recover_environment(eval_env=True)) if task.hides_goal else dataset
    return up_to_the_goal(data) if task.to_the_goal else data, make


class Controller:
    """The controller that made the mazes' datasets, without noise, as a model that ``predict()``s."""

    def __init__(self, env: Any) -> None:
        self.controller = WaypointController(env.unwrapped.maze)

    def predict(self, observations: dict[str, np.ndarray], deterministic: bool = True) -> tuple[np.ndarray, None]:
        """See ``BaseAlgorithm.predict()``."""
        del deterministic
        rows = [{key: value[i] for key, value in observations.items()} for i in range(len(observations["observation"]))]
        return np.stack([self.controller(row) for row in rows]), None
