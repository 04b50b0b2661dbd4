"""What a GPU gives: NC-LQL's update, `predict` and whole loop by what computes them, and the planners at the papers' sizes.

    python benchmarks/gpu.py

NC-LQL has HalfCheetah's sizes: 17 observations, 6 actions, batch 256, two critics of 3 x 256, 10 levels x 2 steps. An update is
one of a call of ``train()`` with many, minibatches from the replay buffer included; a loop's step is one of ``learn()`` with one
env and one update. The planners have their ``paper`` presets, on random data. Each number is the median of ``--rounds``, warm.
Writes ``results/gpu.csv`` (a row a round and task) and ``gpu.json``.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from contest import RESULTS
from provenance import metadata
from synthetic import random_dataset

from sb3_diffrl import NCLQL
from sb3_diffrl.pg import PG
from sb3_diffrl.planner import PRESETS

UPDATES, STEPS, CALLS = 200, 200, 50
# How each is made: keyword arguments of the policy
MAKES: dict[str, dict[str, Any]] = {
    "torch": {"backend": "torch"},
    "kernel": {"backend": "native"},
    "graphs": {"backend": "cuda_graphs"},
    "graphs-bf16": {"backend": "cuda_graphs", "chain_dtype": "bfloat16"},
}
# Observations and actions of the papers' tasks; AntMaze's and Kitchen's goals are part of the observation
SIZES = {"pointmaze": (4, 2), "antmaze": (29, 8), "kitchen": (60, 9), "locomotion": (17, 6)}

Task = tuple[str, str, int, Callable[[], object]]


def nclql_tasks(name: str, policy_kwargs: dict[str, Any], device: str) -> Iterator[Task]:
    model = NCLQL(
        "MlpPolicy", gym.make("HalfCheetah-v5"), learning_starts=1_000, device=device, seed=0, policy_kwargs=policy_kwargs
    )
    model.learn(1_010)
    obs = np.random.default_rng(0).normal(size=(4096, 17)).astype(np.float32)
    yield name, "update", UPDATES, lambda: model.train(UPDATES, 256)
    for batch in (1, 256, 4096):
        yield name, f"predict {batch}", CALLS, lambda batch=batch: [model.predict(obs[:batch]) for _ in range(CALLS)]  # type: ignore[misc]
    yield name, "predict 1, deterministic", CALLS, lambda: [model.predict(obs[:1], deterministic=True) for _ in range(CALLS)]
    yield name, "step of the loop", STEPS, lambda: model.learn(STEPS, reset_num_timesteps=False)


def planner_tasks(domain: str, device: str) -> Iterator[Task]:
    obs_dim, action_dim = SIZES[domain]
    settings = PRESETS[domain]["paper"]  # type: ignore[index]
    dataset = random_dataset(20, 1_500, obs_dim, action_dim)
    model = PG("MlpPolicy", dataset=dataset, device=device, seed=0, **settings)
    obs = np.random.default_rng(0).normal(size=(50, obs_dim)).astype(np.float32)
    few = 10

    def update(trains_prior: bool) -> None:
        model.trains_prior = trains_prior
        for _ in range(few):
            model.update()

    def predict(guidance: str, batch: int) -> None:
        model.guidance = guidance
        for _ in range(few):
            model.predict(obs[:batch])

    yield domain, "planner update", few, lambda: update(False)
    yield domain, "prior update", few, lambda: update(True)
    yield domain, "pg", few, lambda: predict("pg", 1)
    yield domain, "pg of 50", few, lambda: predict("pg", 50)
    yield domain, "mcss-50", few, lambda: predict("mcss", 1)


def measure(tasks: Iterator[Task], rounds: int) -> Iterator[tuple[str, str, int, float]]:
    for name, task, count, run in tasks:
        run()
        for i in range(rounds):
            begin = time.perf_counter()
            run()
            if th.cuda.is_available():
                th.cuda.synchronize()
            yield name, task, i, 1e3 * (time.perf_counter() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--makes", nargs="*", choices=MAKES, default=[*MAKES])
    parser.add_argument("--domains", nargs="*", choices=SIZES, default=[*SIZES])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    rows = []
    for name in args.makes:
        rows += list(measure(nclql_tasks(name, MAKES[name], args.device), args.rounds))
    for domain in args.domains:
        rows += list(measure(planner_tasks(domain, args.device), args.rounds))
    medians: dict[tuple[str, str], list[float]] = {}
    for name, task, _, ms in rows:
        medians.setdefault((name, task), []).append(ms)
    for (name, task), values in medians.items():
        print(f"{name:12} {task:26} {statistics.median(values):9.3f} ms")
    with (RESULTS / "gpu.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "task", "round", "ms"])
        writer.writerows((name, task, i, f"{ms:.4f}") for name, task, i, ms in rows)
    described = metadata({"rounds": args.rounds}, f"python benchmarks/gpu.py --rounds {args.rounds}")
    described["hardware"]["gpu"] = th.cuda.get_device_name() if th.cuda.is_available() else None
    (RESULTS / "gpu.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
