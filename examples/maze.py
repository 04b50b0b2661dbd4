"""Plan through a maze: make a dataset, train Prior Guidance on it, draw its plans, and walk.

python examples/maze.py            (or: python examples/maze.py --help)

Under a minute, so plans are rough: docs/algorithms/pg.md has what more training gives. The dataset goes where Minari keeps its own
(MINARI_DATASETS_PATH, or a folder in the home directory).
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import minari
import numpy as np
import torch as th
from matplotlib.patches import Rectangle

from sb3_diffrl import PG, make_dataset
from sb3_diffrl.planner import PRESETS

DATASET = "sb3-diffrl/pointmaze/umaze-quick-v0"


def draw_maze(axes: Any, maze: Any) -> None:
    """Draw a PointMaze's walls."""
    for i, row in enumerate(maze.maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                x, y = maze.cell_rowcol_to_xy(np.array([i, j]))
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color="0.8"))
    axes.set_aspect("equal")


def walk(model: PG, env: Any, n_steps: int) -> tuple[np.ndarray, float]:
    """Act by the model: the positions ``(n_steps + 1, 2)``, and the sum of rewards."""
    observation, _ = env.reset(seed=0)
    path, score = [observation["achieved_goal"]], 0.0
    for _ in range(n_steps):
        observation, reward, _, _, _ = env.step(model.predict(observation, deterministic=True)[0])
        path.append(observation["achieved_goal"])
        score += float(reward)
    return np.array(path), score


def main() -> None:
    """Make the data, train, draw, walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-steps", type=int, default=5_000, help="env steps of the dataset")
    parser.add_argument("--steps", type=int, default=600, help="gradient steps, half of them the planner's")
    parser.add_argument("--env-steps", type=int, default=150, help="steps of the walk")
    parser.add_argument("--out", type=Path, default=Path("planning"), help="folder for the model and the picture")
    args = parser.parse_args()
    th.set_num_threads(1)  # small networks
    args.out.mkdir(parents=True, exist_ok=True)

    print("1. A controller goes from goal to goal: the dataset")
    make_dataset("sb3-diffrl/pointmaze/umaze-v0", quick=True, n_steps=args.data_steps, overwrite=True, progress_bar=False)

    print("2. PG learns to plan, then which noise becomes plans of high value")
    small = {"policy_kwargs": {"d_model": 32, "head_dim": 16, "net_arch": (64, 64)}, "ema_decay": 0.98, "horizon": 8}
    settings = {**PRESETS["pointmaze"]["cpu"], **small, "learning_rate": 3e-3, "num_inference_steps": 10}
    model = PG("MlpPolicy", dataset=DATASET, seed=0, device="cpu", **settings)
    model.learn(args.steps, progress_bar=True)
    model.save(args.out / "pg")

    print("3. It plans, and walks")
    env: Any = minari.load_dataset(DATASET).recover_environment(eval_env=True)
    observation, _ = env.reset(seed=0)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    draw_maze(axes, env.unwrapped.maze)
    for guidance in ("none", "pg"):
        model.guidance = guidance
        path, score = walk(model, env, args.env_steps)
        (line,) = axes.plot(*path.T, label=f"{guidance}: reward {score:.0f}")
        axes.plot(*model.plan(observation)[0, :, :2].T, "o--", color=line.get_color(), markersize=3, linewidth=0.7)
        print(f"{guidance:5s} reward {score:.0f} in {args.env_steps} steps")
    axes.plot(*observation["desired_goal"], "*", color="k", markersize=12)
    axes.set_title("Paths (lines) and first plans (dots)")
    axes.legend()
    figure.savefig(args.out / "plans.png", dpi=130)


if __name__ == "__main__":
    main()
