"""How the cost of NC-LQL grows: one update and ``predict`` as one size at a time leaves HalfCheetah's.

    python benchmarks/growth.py

Sizes from which it starts: 17 observations, 6 actions, batch 256, two critics of 3 x 256, 10 levels x 2 steps; two threads. Each
point is the median of ``--repeats`` warm calls; the points are measured in a random order, three times over, and the median of the
three counts. Run it while nothing else runs. Writes ``results/growth.csv`` (a row a point and pass) and ``growth.json``.
"""

import argparse
import csv
import json
import random
import statistics
import time
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from contest import RESULTS
from gymnasium import spaces
from provenance import metadata
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_diffrl import NCLQL

THREADS, PASSES, WARM_UP = 2, 3, 2


class Sizes(NamedTuple):
    """What an update or a prediction is made of."""

    obs_dim: int = 17
    action_dim: int = 6
    batch: int = 256
    width: int = 256
    n_critics: int = 2
    n_levels: int = 10
    n_steps: int = 2


#: Size, its values for one update, and its label in the figure.
UPDATES: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512, 1024),
    "width": (32, 64, 128, 256, 512),
    "n_critics": (1, 2, 4, 8),
    "n_levels": (2, 5, 10, 20, 40),
    "action_dim": (1, 6, 17, 32, 64),
    "obs_dim": (4, 17, 111, 400),
}
PREDICTIONS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)


class Sized(gym.Env[np.ndarray, np.ndarray]):
    """An environment of given sizes, which is never stepped."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space, self.action_space = spaces.Box(-9, 9, (obs_dim,)), spaces.Box(-1, 1, (action_dim,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return self.observation_space.sample(), {}


def make(sizes: Sizes) -> NCLQL:
    return NCLQL(
        "MlpPolicy",
        Sized(sizes.obs_dim, sizes.action_dim),
        buffer_size=1,
        n_levels=sizes.n_levels,
        n_langevin_steps=sizes.n_steps,
        policy_kwargs={"net_arch": [sizes.width] * 3, "n_critics": sizes.n_critics},
        device="cpu",
        seed=0,
    )


def median_ms(task: Any, repeats: int) -> float:
    times = []
    for i in range(WARM_UP + repeats):
        begin = time.perf_counter()
        task()
        if i >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def update_ms(sizes: Sizes, repeats: int) -> float:
    model = make(sizes)
    n = sizes.batch
    observations, next_observations = th.randn(2, n, sizes.obs_dim)
    actions = 2 * th.rand(n, sizes.action_dim) - 1
    data = ReplayBufferSamples(observations, actions, next_observations, th.zeros(n, 1), th.randn(n, 1))
    return median_ms(lambda: model.update(data, model.draw(n)), repeats)


def predict_ms(sizes: Sizes, repeats: int) -> float:
    model = make(sizes)
    obs = np.random.default_rng(0).normal(size=(sizes.batch, sizes.obs_dim)).astype(np.float32)
    return median_ms(lambda: model.predict(obs), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    th.set_num_threads(THREADS)
    points = [("update", name, value) for name, values in UPDATES.items() for value in values]
    points += [("predict", "batch", value) for value in PREDICTIONS]
    rows = []
    for i in range(PASSES):
        random.Random(i).shuffle(points)
        for task, name, value in points:
            sizes = Sizes()._replace(**{name: value})
            ms = update_ms(sizes, args.repeats) if task == "update" else predict_ms(sizes, args.repeats)
            rows.append((i, task, name, value, round(ms, 4)))
            print(*rows[-1], flush=True)
    with (RESULTS / "growth.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pass", "task", "size", "value", "median_ms"])
        writer.writerows(rows)
    arguments = {"sizes": Sizes()._asdict(), "threads": THREADS, "passes": PASSES, "repeats": args.repeats}
    described = metadata(arguments, f"python benchmarks/growth.py --repeats {args.repeats}")
    (RESULTS / "growth.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
