"""Plans of a diffusion planner, drawn over the maze."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from matplotlib.patches import Rectangle
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_diffrl.planner.diffusion_planner import DiffusionPlanner


def plot_plans(
    model: DiffusionPlanner,
    env: VecEnv,
    path: str | Path,
    n_plans: int = 16,
    n_starts: int = 4,
    seed: int = 0,
    xy: tuple[int, int] = (0, 1),
) -> Path:
    """Draw plans from several starts, over the walls if the env is a maze of Gymnasium-Robotics.

    :param model: a trained ``DiffusionPlanner`` or ``PG``
    :param env: where starts come from
    :param path: file to write
    :param n_plans: plans drawn from each start, by the model's guidance
    :param n_starts: starts, resets of the env
    :param seed: of starts and plans
    :param xy: entries of the flattened observation along the axes
    """
    assert isinstance(env, DummyVecEnv) or hasattr(env, "venv"), "a vectorised env in this process"
    env.seed(seed)
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    maze = _draw_walls(axes, env)
    th.manual_seed(seed)
    for start in range(n_starts):
        obs: Any = env.reset()
        with th.no_grad():
            tensor, _ = model.policy.obs_to_tensor(obs)
            assert isinstance(tensor, th.Tensor)
            plans = model.policy.normalizer.denormalize(model.policy.plan(tensor[:1].repeat(n_plans, 1)))
        # (n_plans, horizon, obs_dim) -> (n_plans, horizon, 2)
        ways = plans[..., list(xy)].cpu().numpy()
        axes.plot(*ways.transpose(2, 1, 0), color=f"C{start}", alpha=0.4, linewidth=1)
        axes.plot(*ways[0, 0], "o", color=f"C{start}", markeredgecolor="black", label="start" if start == 0 else None)
        if isinstance(obs, dict) and "desired_goal" in obs:
            goal = np.asarray(obs["desired_goal"])[0]
            axes.plot(
                goal[0], goal[1], "*", color="gold", markersize=16, markeredgecolor="black", label="goal" if start == 0 else None
            )
    axes.set(title=f"{n_plans} plans from each of {n_starts} starts, guidance {model.policy.guidance}", aspect="equal")
    if maze:
        axes.set(xticks=[], yticks=[])
    axes.legend(loc="upper right", fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_walls(axes: Any, env: VecEnv) -> bool:
    maze = getattr(env.get_attr("unwrapped")[0], "maze", None)
    if maze is None:
        return False
    size = maze.maze_size_scaling
    for row, cells in enumerate(maze.maze_map):
        for column, cell in enumerate(cells):
            x, y = maze.cell_rowcol_to_xy(np.array([row, column]))
            if cell == 1:
                axes.add_patch(Rectangle((x - size / 2, y - size / 2), size, size, color="0.75"))
    height, width = np.shape(maze.maze_map)
    axes.set(xlim=(-width * size / 2, width * size / 2), ylim=(-height * size / 2, height * size / 2))
    return True
