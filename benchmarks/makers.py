"""Figures behind the dataset makers: their training runs, the datasets they made, and the reference scores.

    python benchmarks/makers.py mazes
    python benchmarks/makers.py policies --cache <folder of the training runs>
    python benchmarks/makers.py runs --cache <folder of the training runs>
    python benchmarks/makers.py datasets

``mazes`` measures the reference scores of PointMaze in its evaluation environments: uniformly random actions, and the
controller without noise. ``policies`` evaluates the policies of the locomotion runs, with their most likely actions and with
sampled ones, as the datasets have them. ``runs`` copies the runs' learning curves and settings here. ``datasets`` describes what
lies in Minari's folder. All write to ``results/makers``.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import minari
import numpy as np
from minari.utils import RandomPolicy
from provenance import metadata
from stable_baselines3.common.base_class import BaseAlgorithm
from tqdm import tqdm

from sb3_diffrl.offline.makers import DATASET_IDS
from sb3_diffrl.offline.makers.locomotion import PLANS, default_cache
from sb3_diffrl.offline.makers.pointmaze import MAZES, WaypointController, evaluation_spec, register_mazes
from sb3_diffrl.offline.makers.training import ALGORITHMS, CURVE, EXPERT, MEDIUM

RESULTS = Path(__file__).parent / "results" / "makers"
COLUMNS = ["task", "policy", "episodes", "mean_return", "std_return", "standard_error", "success_rate"]
Policy = Callable[[Any], np.ndarray]


def rollouts(env: gym.Env[Any, Any], policy: Policy, n_episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, and in PointMaze whether the goal was reached, of the episodes with seeds 0, 1, ...; ``(n_episodes,)`` each."""
    returns, reached = np.zeros(n_episodes), np.zeros(n_episodes, bool)
    for seed in tqdm(range(n_episodes), unit="episode"):
        observation, _ = env.reset(seed=seed)
        done = False
        while not done:
            observation, reward, terminated, truncated, info = env.step(policy(observation))
            returns[seed] += float(reward)
            reached[seed] |= bool(info.get("success", False))
            done = terminated or truncated
    return returns, reached


def measured(task: str, env: gym.Env[Any, Any], name: str, policy: Policy, n_episodes: int) -> list[Any]:
    env.action_space.seed(0)
    returns, reached = rollouts(env, policy, n_episodes)
    error = returns.std(ddof=1) / np.sqrt(n_episodes)
    success = f"{reached.mean():.3f}" if task in MAZES else ""
    row = [task, name, n_episodes, f"{returns.mean():.2f}", f"{returns.std():.2f}", f"{error:.2f}", success]
    print(*row, flush=True)
    return row


def mazes(n_episodes: int) -> None:
    register_mazes()
    rows = []
    for task, maze in MAZES.items():
        env: Any = gym.make(evaluation_spec(maze))
        rows.append(measured(task, env, "random", RandomPolicy(env), n_episodes))
        rows.append(measured(task, env, "controller", WaypointController(env.unwrapped.maze), n_episodes))
    write("mazes", COLUMNS, rows)


def policies(cache: Path, n_episodes: int) -> None:
    rows = []
    for name, plan in PLANS.items():
        for file in (MEDIUM, EXPERT):
            path = cache / f"{name}-s{plan.seed}" / file
            if path.exists():
                env, model = gym.make(plan.env_id), ALGORITHMS[plan.algorithm].load(path, device="cpu", seed=0)
                for most_likely in (True, False):
                    act = partial(action, model, most_likely)
                    label = f"{path.stem}, {'most likely' if most_likely else 'sampled'} actions"
                    rows.append(measured(plan.env_id, env, label, act, n_episodes))
    write("policies", COLUMNS, rows)


def action(model: BaseAlgorithm, deterministic: bool, observation: np.ndarray) -> np.ndarray:
    return model.predict(observation, deterministic=deterministic)[0]


def runs(cache: Path) -> None:
    for folder in sorted(path.parent for path in cache.glob(f"*/{MEDIUM}") if "quick" not in path.parent.name):
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{folder.name}.csv").write_text((folder / CURVE).read_text())
        plan = json.loads((folder / "plan.json").read_text())
        name, tier = folder.name.split("-s")[0], "expert" if (folder / EXPERT).exists() else "medium"
        described = metadata(plan, f"sb3-diffrl dataset make sb3-diffrl/{name}/{tier}-v0 --seed {plan['seed']}")
        (RESULTS / f"{folder.name}.json").write_text(json.dumps(described, indent=2) + "\n")
        print(folder.name)


def datasets() -> None:
    rows = []
    for dataset_id in DATASET_IDS:
        if dataset_id in minari.list_local_datasets():
            dataset = minari.load_dataset(dataset_id)
            returns = np.array([episode.rewards.sum() for episode in dataset])
            lengths = np.array([len(episode) for episode in dataset])
            described = dataset.storage.metadata
            rows.append(
                [
                    dataset_id,
                    dataset.total_steps,
                    dataset.total_episodes,
                    f"{lengths.mean():.1f}",
                    f"{returns.mean():.2f}",
                    f"{returns.std():.2f}",
                    f"{described['dataset_size']:.1f}",
                    described["provenance"]["seed"],
                ]
            )
    columns = ["dataset", "steps", "episodes", "mean_length", "mean_return", "std_return", "megabytes", "seed"]
    write("datasets", columns, rows)


def write(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    command = " ".join(["python benchmarks/makers.py", *sys.argv[1:]])
    (RESULTS / f"{name}.json").write_text(json.dumps(metadata({}, command), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mazes", "policies", "runs", "datasets"])
    parser.add_argument("--episodes", type=int, help="episodes measured, 500 in mazes and 100 of policies by default")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the training runs")
    args = parser.parse_args()
    if args.what == "mazes":
        mazes(args.episodes or 500)
    elif args.what == "policies":
        policies(args.cache, args.episodes or 100)
    elif args.what == "runs":
        runs(args.cache)
    else:
        datasets()


if __name__ == "__main__":
    main()
