"""Behaviour cloning: train DiffusionBC on a dataset with one seed, and write what its evaluations gave beside the data's return.

    python benchmarks/cloning.py --dataset sb3-diffrl/halfcheetah/expert-v0 --seed 0

The dataset must be on disk (`sb3-diffrl dataset make sb3-diffrl/halfcheetah/expert-v0`). Writes
``results/cloning/<env>-<tier>-s<seed>.csv`` (a row an evaluated episode, actions drawn), ``...-deterministic.csv`` (the
fixed-noise chain), and a ``.json`` each.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch as th
from learning import Evaluation
from provenance import metadata
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffrl import DiffusionBC, OfflineDataset
from sb3_diffrl.common import CosineSchedule

RESULTS = Path(__file__).parent / "results" / "cloning"
# Chosen on seed 1000
SETTINGS: dict[str, Any] = {
    "batch_size": 256,
    "ema_decay": 0.995,
    "prediction_type": "sample",
    "policy_kwargs": {"net_arch": [256, 256, 256]},
}
LEARNING_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--eval-freq", type=int, default=20_000)
    parser.add_argument("--eval-episodes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    th.set_num_threads(1)
    dataset = OfflineDataset.load(args.dataset)
    assert dataset.env_spec is not None
    _, env, tier = args.dataset.removesuffix("-v0").split("/")
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{env}-{tier}-s{args.seed}"
    command = f"python benchmarks/cloning.py --dataset {args.dataset} --seed {args.seed} --steps {args.steps}"
    command += f" --eval-freq {args.eval_freq} --eval-episodes {args.eval_episodes}"
    arguments = {"dataset": args.dataset, "seed": args.seed, "learning_rate": f"cosine from {LEARNING_RATE}", **SETTINGS}
    described = metadata(arguments, command)
    returns = dataset.episode_returns
    described["data"] = {
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std()),
        "episodes": dataset.n_episodes,
        "steps": dataset.n_steps,
        "provenance": dataset.sources[0].storage.metadata.get("provenance"),
    }
    model = DiffusionBC(
        "MlpPolicy", dataset=dataset, learning_rate=CosineSchedule(LEARNING_RATE), seed=args.seed, device="cpu", **SETTINGS
    )
    evaluations: list[BaseCallback] = []
    for rule, deterministic in (("", False), ("-deterministic", True)):
        path = args.out / f"{name}{rule}.csv"
        path.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n")
        evaluations.append(
            Evaluation(path, dataset.env_spec.id, args.seed, args.eval_freq, args.eval_episodes, deterministic=deterministic)
        )
    model.learn(args.steps, evaluations)


if __name__ == "__main__":
    main()
