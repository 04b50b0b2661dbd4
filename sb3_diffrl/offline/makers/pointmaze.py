"""PointMaze datasets: a noisy controller goes from goal to goal through a maze, as in D4RL's Maze2D."""

from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm

from sb3_diffrl.offline.recording import versions
from sb3_diffrl.offline.writing import DatasetWriter, check_new_id

Name = Literal["umaze", "medium", "large"]
Cell = tuple[int, int]
Observation = dict[str, np.ndarray]

N_STEPS, QUICK_N_STEPS = 1_000_000, 2_000
DESCRIPTION = (
    "A point goes from one random goal to the next, by a PD controller along shortest paths with noise on its actions. An episode "
    "ends, as truncated, when it has come to rest at its goal, and the next begins there. Reward 1 at each step within 0.45 of the "
    "goal."
)
# Standard deviation of the noise on the data's actions, as D4RL's.
NOISE = 0.5
# The point has come to rest at its goal when it is nearer than this, and slower (units of length, and per second).
REST = 0.1


class Maze(NamedTuple):
    """One of the mazes.

    :param env_id: environment, as registered in Gymnasium
    :param goal: cell (row, column) of the evaluation's goal, which is that of Minari's ``D4RL/pointmaze`` datasets
    :param random_return: mean return of uniformly random actions in the evaluation environment
    :param expert_return: mean return of the controller without noise there; both measured by ``benchmarks/makers.py``
    """

    env_id: str
    goal: Cell
    random_return: float
    expert_return: float


MAZES: dict[Name, Maze] = {
    "umaze": Maze("PointMaze_UMaze-v3", (1, 1), 11.8, 230.2),
    "medium": Maze("PointMaze_Medium-v3", (6, 6), 10.3, 471.6),
    "large": Maze("PointMaze_Large-v3", (7, 9), 6.2, 621.1),
}


class WaypointController:
    """Goes along a shortest path over the maze's cells: a PD controller towards the centre of the next cell, or the goal in it.

    It has no memory: the action depends on the observation alone.

    :param maze: the environment's ``maze``
    :param noise: standard deviation of Gaussian noise on the action, which is clipped to [-1, 1] thereafter
    :param seed: seed of the noise
    """

    # D4RL's gains, in actions per unit of length and per unit of velocity.
    proportional, derivative = 10.0, 1.0

    def __init__(self, maze: Any, noise: float = 0.0, seed: int | None = None) -> None:
        self.maze = maze
        self.noise = noise
        self.rng = np.random.default_rng(seed)
        self.steps = next_cells(maze.maze_map)

    def __call__(self, observation: Observation) -> np.ndarray:
        """Action ``(2,)`` for one observation of the environment."""
        position, goal = observation["achieved_goal"], observation["desired_goal"]
        error = self.waypoint(position, goal) - position
        action = self.proportional * error - self.derivative * observation["observation"][2:]
        if self.noise:
            action += self.noise * self.rng.standard_normal(2)
        return np.clip(action, -1, 1).astype(np.float32)

    def waypoint(self, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Where to go next, ``(2,)``: two neighbouring cells are a convex room, so the way there is free."""
        here, there = self._cell(position), self._cell(goal)
        cell = self.steps[there][here]
        return goal if cell == there else self.maze.cell_rowcol_to_xy(np.array(cell))

    def _cell(self, position: np.ndarray) -> Cell:
        row, column = self.maze.cell_xy_to_rowcol(position)
        return int(row), int(column)


def next_cells(maze_map: list[list[int | str]]) -> dict[Cell, dict[Cell, Cell]]:
    """For each goal cell and each cell, the next cell on a shortest path, by breadth-first search from the goal."""
    free = {(i, j) for i, row in enumerate(maze_map) for j, kind in enumerate(row) if kind != 1}
    return {goal: _search(goal, free) for goal in free}


def _search(goal: Cell, free: set[Cell]) -> dict[Cell, Cell]:
    following = {goal: goal}
    queue = deque([goal])
    while queue:
        i, j = cell = queue.popleft()
        for neighbour in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if neighbour in free and neighbour not in following:
                following[neighbour] = cell
                queue.append(neighbour)
    return following


class Journey(NamedTuple):
    """The way to one goal: ``n`` steps, ``n + 1`` observations.

    :param observations: each of them a row of three arrays ``(n + 1, 4)``, ``(n + 1, 2)`` and ``(n + 1, 2)``
    :param actions: ``(n, 2)``
    :param rewards: ``(n,)``, 1 within the environment's radius of the goal
    """

    observations: Observation
    actions: np.ndarray
    rewards: np.ndarray


def journeys(spec: EnvSpec, n_steps: int, seed: int) -> Iterator[Journey]:
    """Goes from goal to goal, without a stop in between, until ``n_steps`` steps are done.

    A journey ends at rest at its goal, or after the environment's time limit. Then a new goal is drawn, and the next
    journey begins where the point is.

    :param spec: a PointMaze environment, continuing and with ``reset_target=False``
    :param n_steps: steps of all journeys together; the last one is cut
    :param seed: seed of the start, the goals and the noise
    """
    env: Any = gym.make(spec).unwrapped
    controller = WaypointController(env.maze, NOISE, seed)
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards = [observation], [], []
    for step in range(1, n_steps + 1):
        action = controller(observation)
        observation, reward, _, _, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        if at_rest(observation) or len(actions) == spec.max_episode_steps or step == n_steps:
            columns = {key: np.stack([row[key] for row in observations]) for key in observation}
            yield Journey(columns, np.stack(actions), np.array(rewards))
            observation = {**observation, "desired_goal": draw_goal(env, observation["achieved_goal"])}
            observations, actions, rewards = [observation], [], []
    env.close()


def at_rest(observation: Observation) -> bool:
    """Whether the point has come to rest at its goal."""
    distance = np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"])
    return bool(distance < REST and np.linalg.norm(observation["observation"][2:]) < REST)


def draw_goal(env: Any, position: np.ndarray) -> np.ndarray:
    """Give the environment a new goal which the point has not reached yet, ``(2,)``."""
    while True:
        env.goal = env.add_xy_position_noise(env.generate_target_goal())
        if env.compute_reward(position, env.goal, {}) == 0:
            env.update_target_site_pos()
            return np.array(env.goal)


def collection_spec(maze: Maze) -> EnvSpec:
    """The environment that data are collected in: random starts and goals, reward 1 at each step within the goal's radius."""
    spec = deepcopy(gym.spec(maze.env_id))
    spec.kwargs |= {"continuing_task": True, "reset_target": False}
    return spec


def evaluation_spec(maze: Maze) -> EnvSpec:
    """The same with one goal cell. Gymnasium-Robotics moves the goal by up to 0.25 within the cell at each reset."""
    spec = collection_spec(maze)
    spec.kwargs["maze_map"] = deepcopy(spec.kwargs["maze_map"])
    row, column = maze.goal
    spec.kwargs["maze_map"][row][column] = "g"
    return spec


def make_pointmaze(
    name: Name,
    dataset_id: str,
    *,
    n_steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> minari.MinariDataset:
    """Make a dataset of one maze.

    :param name: which of ``MAZES``
    :param dataset_id: id to write to
    :param n_steps: size, ``N_STEPS`` by default
    :param seed: seed of the start, the goals and the noise
    :param quick: record ``QUICK_N_STEPS``: for tests and demonstrations
    :param overwrite: replace a dataset of this id
    :param progress_bar: whether to show one
    :raises ImportError: if Gymnasium-Robotics is not installed
    """
    check_new_id(dataset_id, overwrite)
    register_mazes()
    maze = MAZES[name]
    spec = collection_spec(maze)
    n_steps = n_steps or (QUICK_N_STEPS if quick else N_STEPS)
    label = "A QUICK STAND-IN for tests and demonstrations, not the dataset of that name: few steps. " if quick else ""
    env = gym.make(spec)
    writer = DatasetWriter(dataset_id, env.observation_space, env.action_space, env_spec=env.spec, overwrite=overwrite)
    with writer, tqdm(total=n_steps, unit="step", disable=not progress_bar) as bar:
        returns = []
        for journey in journeys(spec, n_steps, seed):
            n = len(journey.rewards)
            cut = np.arange(n) == n - 1
            writer.add_episode(journey.observations, journey.actions, journey.rewards, np.zeros(n, bool), cut)
            returns.append(float(journey.rewards.sum()))
            bar.update(n)
        metadata = {
            "algorithm_name": WaypointController.__name__,
            "description": f"{label}{DESCRIPTION}",
            "eval_env_spec": evaluation_spec(maze).to_json(),
            "ref_min_score": maze.random_return,
            "ref_max_score": maze.expert_return,
            "requirements": ["gymnasium-robotics>=1.4.2,<2"],
            "provenance": {
                "algorithm": WaypointController.__name__,
                "versions": versions(),
                "seed": seed,
                "noise": NOISE,
                "rest": REST,
                "mean_return": float(np.mean(returns)),
                "std_return": float(np.std(returns)),
            },
        }
        env.close()
        return writer.publish(metadata)


def register_mazes() -> None:
    """Register Gymnasium-Robotics' environments.

    :raises ImportError: if it is not installed
    """
    try:
        import gymnasium_robotics
    except ImportError as error:
        raise ImportError('PointMaze needs gymnasium-robotics: pip install "sb3_diffrl[robotics]"') from error
    gym.register_envs(gymnasium_robotics)
