"""Share of a gradient step that goes into gathering its minibatch, from a dataset of a million transitions.

    python benchmarks/batch_share.py

17 observations, 6 actions, 1000 episodes of 1000 steps, random numbers; one thread. Writes ``results/batch_share.json``: the share,
in medians over steps, for DiffusionBC and for the planner at its `cpu` and `paper` sizes for locomotion.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch as th
from provenance import metadata
from synthetic import random_dataset

from sb3_diffrl.bc import DiffusionBC
from sb3_diffrl.planner import PRESETS, DiffusionPlanner

RESULTS = Path(__file__).parent / "results"
N_EPISODES, LENGTH, OBS_DIM, ACTION_DIM = 1000, 1000, 17, 6


def measure(model: Any, n_steps: int) -> dict[str, float]:
    """Median milliseconds of a step and of its minibatch, and the median of their ratio."""
    model.learn(3)
    gather, steps, batches = model.sample_batch, [], []

    def timed() -> Any:
        start = time.process_time()
        batch = gather()
        batches.append(1000 * (time.process_time() - start))
        return batch

    model.sample_batch = timed
    for _ in range(n_steps):
        start = time.process_time()
        model.update()
        steps.append(1000 * (time.process_time() - start))
    share = statistics.median(batch / step for batch, step in zip(batches, steps, strict=True))
    return {"step_ms": statistics.median(steps), "batch_ms": statistics.median(batches), "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    th.set_num_threads(1)
    dataset = random_dataset(N_EPISODES, LENGTH, OBS_DIM, ACTION_DIM)
    models: dict[str, Any] = {"DiffusionBC": lambda: DiffusionBC("MlpPolicy", dataset=dataset, device="cpu", seed=0)}
    for size in ("cpu", "paper"):
        settings = PRESETS["locomotion"][size]
        models[f"DiffusionPlanner, {size}"] = lambda settings=settings: DiffusionPlanner(
            "MlpPolicy", dataset=dataset, device="cpu", seed=0, **settings
        )
    described = metadata({"episodes": N_EPISODES, "length": LENGTH, "steps": args.steps}, "python benchmarks/batch_share.py")
    described["results"] = {name: measure(make(), args.steps) for name, make in models.items()}
    (RESULTS / "batch_share.json").write_text(json.dumps(described, indent=2) + "\n")
    print(json.dumps(described["results"], indent=2))


if __name__ == "__main__":
    main()
