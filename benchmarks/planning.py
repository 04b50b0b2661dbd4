"""Planning: train PG on a task's dataset, and evaluate every guidance of the one model beside the data and its controller.

    python benchmarks/planning.py run --task umaze --seeds 0 1 2      (train and evaluate, seed by seed)
    python benchmarks/planning.py time --task umaze      (milliseconds per env step)
    python benchmarks/planning.py paths --task umaze     (plans and executed paths, to be drawn)
    python benchmarks/planning.py plans --task umaze --seeds 0 1 2     (whether plans go through walls, and come by the goal)

The dataset must be on disk (`sb3-diffrl dataset make sb3-diffrl/pointmaze/umaze-v0`). What is there already is left as it
is, so a command that was stopped goes on when it is repeated. Models go to ``models/planning/``; ``results/planning/<task>-s<seed>-
<method>.csv`` has a row per episode: the sum of its rewards, the score of the papers for mazes (every step after the first reward
counts, whether the point stays or not), whether there was a reward, and the discounted value of the first plan by the critic.
"""

import argparse
import csv
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch as th
from planning_tasks import TASKS, Controller, HideGoal, Task, prepare, use_normed_residual
from provenance import metadata

from sb3_diffrl import OfflineDataset
from sb3_diffrl.bc import DiffusionBC
from sb3_diffrl.common import CosineSchedule
from sb3_diffrl.pg import PG

RESULTS = Path(__file__).parent / "results" / "planning"
MODELS = Path(__file__).parent / "models" / "planning"
GUIDANCES = ("none", "cg", "cfg", "pg", "mcss")
# The prior's mean, and a sample of it; plans of random noise, and of its mean (zeros).
METHODS = ("pg", "pg-sampled", "pg-as-learnt", "pg-sampled-as-learnt", "none", "none-zero", "cg", "cfg", "mcss")
# With as many denoising steps as the prior learnt with
AS_LEARNT = "-as-learnt"
DETERMINISTIC = ("pg", "pg-as-learnt", "none-zero", "bc")
# Selection among 50 plans at each step costs as much as all else together.
EPISODES = {"mcss": 20}


def train(name: str, task: Task, seeds: list[int], models: Path, out: Path) -> None:
    """Train PG (and, for locomotion, DiffusionBC) with each seed."""
    left = [seed for seed in seeds if not (models / f"{name}-s{seed}.zip").exists()]
    if not left:
        return
    data, make_env = prepare(task, read(task.dataset_id))
    settings = dict(task.settings)
    learning_rate = settings.pop("learning_rate")
    steps = task.planner_steps + task.prior_steps
    for seed in left:
        start = time.process_time()
        model = PG(
            "MlpPolicy",
            env=make_env(),
            dataset=data,
            learning_rate=CosineSchedule(learning_rate),
            seed=seed,
            device="cpu",
            train_for=("cg", "cfg"),
            planner_fraction=task.planner_steps / steps,
            **settings,
        )
        model.learn(steps)
        cpu_seconds = time.process_time() - start
        model.save(models / f"{name}-s{seed}.zip")
        arguments = {"task": task._asdict(), "seed": seed, "learning_rate": f"cosine from {learning_rate}"}
        described = metadata(arguments, f"python benchmarks/planning.py train --task {name} --seeds {seed}")
        returns = data.episode_returns
        described["training_cpu_seconds"] = cpu_seconds
        described["data"] = {
            "mean_return": float(returns.mean()),
            "std_return": float(returns.std()),
            "episodes": data.n_episodes,
            "steps": data.n_steps,
            "reward_per_step": float(data.rewards.mean()),
        }
        (out / f"{name}-s{seed}.json").write_text(json.dumps(described, indent=2) + "\n")
        print(f"{name} seed {seed}: trained in {cpu_seconds:.0f} s of CPU time", flush=True)


@functools.cache
def read(dataset_id: str) -> OfflineDataset:
    """A dataset, read once."""
    return OfflineDataset.load(dataset_id)


def train_clone(name: str, task: Task, seeds: list[int], models: Path) -> None:
    """Train DiffusionBC with each seed."""
    left = [seed for seed in seeds if not (models / f"{name}-bc-s{seed}.zip").exists()]
    data = read(task.dataset_id) if left else None
    for seed in left:
        model = DiffusionBC(
            "MlpPolicy", dataset=data, learning_rate=CosineSchedule(1e-3), prediction_type="sample", seed=seed, device="cpu"
        )
        model.learn(15_000).save(models / f"{name}-bc-s{seed}.zip")


def roll_out(model: Any, env: gym.vector.VectorEnv, n_steps: int, seed: int, deterministic: bool) -> dict[str, np.ndarray]:
    """One episode of at most ``n_steps`` steps in each of the environments, planned for together.

    :return: columns of the CSV, each ``(n_envs,)``
    """
    observations, _ = env.reset(seed=[1000 * seed + i for i in range(env.num_envs)])  # type: ignore[arg-type]
    th.manual_seed(seed)
    values = model.value(model.plan(observations, deterministic)) if hasattr(model, "plan") else np.full(env.num_envs, np.nan)
    returns, first = np.zeros(env.num_envs), np.full(env.num_envs, n_steps)
    alive = np.ones(env.num_envs, bool)
    for step in range(n_steps):
        observations, rewards, terminations, _, _ = env.step(model.predict(observations, deterministic=deterministic)[0])
        returns += np.where(alive, rewards, 0.0)
        first = np.where((rewards > 0) & (first == n_steps), step, first)
        alive &= ~terminations
        if not alive.any():
            break
    return {"return": returns, "latched": n_steps - first, "success": (first < n_steps).astype(int), "plan_value": values}


def evaluate(name: str, task: Task, seeds: list[int], args: argparse.Namespace) -> None:
    """Evaluate every guidance of every seed's model, DiffusionBC where there is one, and the controller."""
    dataset = open_task(task)
    methods = [*(("bc", "bc-sampled") if is_run(task) else ("controller",)), *METHODS]
    for seed in seeds:
        for method in methods if args.methods is None else args.methods:
            path = args.out / f"{name}-s{seed}-{method}.csv"
            if path.exists():
                continue
            n_episodes = min(args.episodes, EPISODES.get(method, args.episodes))
            model, env = load_method(name, task, seed, method, dataset, n_episodes, args.models)
            n_steps = dataset.recover_environment(eval_env=True).spec.max_episode_steps
            start = time.process_time()
            rows = roll_out(model, env, n_steps, seed, deterministic=method in DETERMINISTIC)
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["episode", *rows])
                writer.writerows(
                    [i, *row] for i, row in enumerate(zip(*(column.tolist() for column in rows.values()), strict=True))
                )
            took = time.process_time() - start
            print(f"{name} seed {seed} {method}: return {rows['return'].mean():.1f}, {took:.0f} s of CPU time", flush=True)


def load_method(
    name: str, task: Task, seed: int, method: str, dataset: Any, n_episodes: int, models: Path
) -> tuple[Any, gym.vector.VectorEnv]:
    """A model that plans by one method, and environments for it."""
    hides_goal = task.hides_goal and method != "controller"
    spec = dataset.recover_environment(eval_env=True).spec

    def make_env() -> gym.Env[Any, Any]:
        env = gym.make(spec)
        return HideGoal(env) if hides_goal else env

    env = gym.vector.SyncVectorEnv([make_env for _ in range(n_episodes)])
    if method == "controller":
        return Controller(make_env()), env
    if method.startswith("bc"):
        return DiffusionBC.load(models / f"{name}-bc-s{seed}.zip", device="cpu"), env
    model = PG.load(models / f"{name}-s{seed}.zip", device="cpu")
    model.guidance = method.split("-")[0]
    model.policy.num_inference_steps = model.prior_inference_steps if method.endswith(AS_LEARNT) else task.num_inference_steps
    return model, env


def open_task(task: Task) -> Any:
    """The dataset on disk, unread: it knows its evaluation environment."""
    import minari

    return minari.load_dataset(task.dataset_id)


def is_run(task: Task) -> bool:
    """Whether the task is locomotion."""
    return "pointmaze" not in task.dataset_id


def time_methods(name: str, task: Task, seed: int, args: argparse.Namespace) -> None:
    """Milliseconds of CPU time per env step of one environment, medians, the methods in turn."""
    dataset = open_task(task)
    times: dict[str, list[float]] = {method: [] for method in GUIDANCES}
    model, env = load_method(name, task, seed, "none", dataset, 1, args.models)
    observations, _ = env.reset(seed=seed)
    for repeat in range(args.repeats + 1):
        for method in GUIDANCES:
            model.guidance = method
            start = time.process_time()
            model.predict(observations, deterministic=True)
            if repeat:  # the first warms up
                times[method].append(1000 * (time.process_time() - start))
    described = metadata({"task": task._asdict(), "seed": seed}, f"python benchmarks/planning.py time --task {name}")
    described["median_ms"] = {method: float(np.median(values)) for method, values in times.items()}
    described["quartiles_ms"] = {method: np.quantile(values, (0.25, 0.75)).tolist() for method, values in times.items()}
    (args.out / f"{name}-time.json").write_text(json.dumps(described, indent=2) + "\n")
    print(described["median_ms"])


def first_plans(
    name: str, task: Task, seed: int, method: str, dataset: Any, args: argparse.Namespace, env_seed: int = 77_000
) -> tuple[Any, gym.vector.VectorEnv, np.ndarray, np.ndarray]:
    """A model, ``args.starts`` environments that it stands at the start of, what it sees there, and what it plans.

    :return: model, environments, observations ``(starts, obs_dim)``, plans ``(starts, horizon, obs_dim)``
    """
    model, env = load_method(name, task, seed, method, dataset, args.starts, args.models)
    observations, _ = env.reset(seed=[env_seed + i for i in range(args.starts)])  # type: ignore[arg-type]
    th.manual_seed(seed)
    return model, env, observations, model.plan(observations, method in DETERMINISTIC)


def record_paths(name: str, task: Task, seed: int, args: argparse.Namespace) -> None:
    """First plans and executed paths of each guidance in one maze, from the same starts."""
    dataset = open_task(task)
    described = metadata({"task": task._asdict(), "seed": seed}, f"python benchmarks/planning.py paths --task {name}")
    described["methods"] = {}
    for method in METHODS:
        model, env, observations, plans = first_plans(name, task, seed, method, dataset, args)
        path = [observations]
        for _ in range(args.path_steps):
            observations = env.step(model.predict(observations, deterministic=method in DETERMINISTIC)[0])[0]
            path.append(observations)
        # (steps + 1, starts, obs_dim) -> (starts, steps + 1, 2)
        walked = np.stack(path)[:, :, :2].swapaxes(0, 1)
        described["methods"][method] = {"plans": plans[:, :, :2].round(3).tolist(), "paths": walked.round(3).tolist()}
    maze = dataset.recover_environment(eval_env=True).unwrapped.maze
    described["maze"] = maze.maze_map
    cells = np.argwhere(np.array(maze.maze_map, dtype=str) == "g")
    described["goals"] = [maze.cell_rowcol_to_xy(cell).tolist() for cell in cells]
    (args.out / f"{name}-paths.json").write_text(json.dumps(described) + "\n")


def examine_plans(name: str, task: Task, seeds: list[int], args: argparse.Namespace) -> None:
    """Shares of the first plans of a maze that have a state in a wall, and that come by the goal."""
    dataset = open_task(task)
    maze = dataset.recover_environment(eval_env=True).unwrapped.maze
    walls, goals = (np.array(maze.maze_map, dtype=str) == cell for cell in ("1", "g"))
    (goal,) = np.argwhere(goals)
    for seed in seeds:
        command = f"python benchmarks/planning.py plans --task {name} --seeds {seed}"
        described = metadata({"task": task._asdict(), "seed": seed}, f"{command} --starts {args.starts}")
        described["results"] = {}
        for method in METHODS:
            model, _, _, plans = first_plans(name, task, seed, method, dataset, args, env_seed=88_000)
            # (starts, horizon, obs_dim) -> rows and columns of the maze, (starts, horizon)
            rows = ((maze.y_map_center - plans[:, :, 1]) / maze.maze_size_scaling).astype(int).clip(0, walls.shape[0] - 1)
            columns = ((plans[:, :, 0] + maze.x_map_center) / maze.maze_size_scaling).astype(int).clip(0, walls.shape[1] - 1)
            described["results"][method] = {
                "with_a_state_in_a_wall": float(walls[rows, columns].any(axis=1).mean()),
                "by_the_goal": float(((rows == goal[0]) & (columns == goal[1])).any(axis=1).mean()),
                "value": float(np.mean(model.value(plans))),
            }
        (args.out / f"{name}-s{seed}-plans.json").write_text(json.dumps(described, indent=2) + "\n")
        print(name, seed, described["results"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "train", "evaluate", "time", "paths", "plans"])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--methods", nargs="+", help="of those to evaluate; all by default")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--path-steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, default=MODELS)
    args = parser.parse_args()
    th.set_num_threads(1)
    task = TASKS[args.task]
    if task.normed_residual:
        use_normed_residual()
    for folder in (args.out, args.models):
        folder.mkdir(parents=True, exist_ok=True)
    if args.command == "time":
        time_methods(args.task, task, args.seeds[0], args)
        return
    if args.command == "paths":
        record_paths(args.task, task, args.seeds[0], args)
        return
    if args.command == "plans":
        examine_plans(args.task, task, args.seeds, args)
        return
    for seed in args.seeds:
        if args.command != "evaluate":
            train(args.task, task, [seed], args.models, args.out)
            if is_run(task):
                train_clone(args.task, task, [seed], args.models)
        if args.command != "train":
            evaluate(args.task, task, [seed], args)


if __name__ == "__main__":
    main()
