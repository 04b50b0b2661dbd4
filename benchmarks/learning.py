"""Learning curves: train one agent on one task with one seed, and write what its evaluations gave.

    python benchmarks/learning.py --setup nclql-small --env HalfCheetah-v5 --seed 0

Writes ``results/learning/<setup>-<env>-s<seed>.csv`` (a row an evaluated episode) and a ``.json`` beside it with the command, the
versions, the hardware and the agent's arguments. ``figures.py`` makes the tables and figures.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch as th
from provenance import metadata
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_diffrl import NCLQL

RESULTS = Path(__file__).parent / "results" / "learning"
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"nclql": NCLQL, "sac": SAC}

# The reduced set-up of the reference's curves: three hidden layers of 64, batches of 64, 5000 random steps.
SMALL: dict[str, Any] = {"batch_size": 64, "learning_starts": 5_000, "policy_kwargs": {"net_arch": [64, 64, 64]}}
# The same, with chains that multiply in bfloat16
SMALL_BF16: dict[str, Any] = {**SMALL, "policy_kwargs": {"net_arch": [64, 64, 64], "chain_dtype": "bfloat16"}}
# The authors' settings, where they are not the package's defaults
PAPER: dict[str, Any] = {"learning_rate": 1e-4}
PENDULUM: dict[str, Any] = {"batch_size": 64, "learning_starts": 1_000, "policy_kwargs": {"net_arch": [64, 64, 64]}, "tau": 0.02}

# name: (algorithm, arguments)
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    # Full size, for a GPU: --device cuda --override '{"policy_kwargs": {"backend": "cuda_graphs"}}'
    "nclql": ("nclql", {"learning_starts": 5_000}),
    "nclql-small": ("nclql", SMALL),
    "nclql-small-bf16": ("nclql", SMALL_BF16),
    "nclql-small-paper": ("nclql", {**SMALL, **PAPER}),
    "sac-small": ("sac", SMALL),
    "sac-small-lr1e-3": ("sac", {**SMALL, "learning_rate": 1e-3}),
    "nclql-pendulum": ("nclql", PENDULUM),
}


class Evaluation(BaseCallback):
    """Evaluates the policy every ``freq`` steps, and writes a row for each episode."""

    def __init__(self, path: Path, env_id: str, seed: int, freq: int, n_episodes: int, deterministic: bool = True) -> None:
        super().__init__()
        self.deterministic = deterministic
        self.path, self.freq, self.n_episodes = path, freq, n_episodes
        self.eval_env = make_vec_env(env_id, n_envs=n_episodes, seed=10_000 + 1_000 * seed)
        self.start = time.perf_counter()
        self.evaluating = 0.0

    def _on_training_start(self) -> None:
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(["step", "episode", "return", "length", "train_seconds"])

    def _on_step(self) -> bool:
        if self.num_timesteps % self.freq == 0:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        begin = time.perf_counter()
        seconds = begin - self.start - self.evaluating
        returns, lengths = evaluate_policy(
            self.model, self.eval_env, self.n_episodes, self.deterministic, return_episode_rewards=True, warn=False
        )
        with self.path.open("a", newline="") as file:
            for episode, (value, length) in enumerate(zip(np.array(returns), np.array(lengths), strict=True)):
                csv.writer(file).writerow([self.num_timesteps, episode, f"{value:.3f}", length, f"{seconds:.1f}"])
        self.model.policy.set_training_mode(False)
        self.evaluating += time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=SETUPS, required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--eval-freq", type=int, default=5_000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--override", type=json.loads, default={}, help="JSON of further arguments of the agent")
    parser.add_argument("--name", help="name of the result files, <setup>-<env>-s<seed> by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--save-model", type=Path, help="where to save the trained model")
    args = parser.parse_args()

    th.set_num_threads(1)
    algorithm, kwargs = SETUPS[args.setup]
    kwargs = {**kwargs, **args.override}
    name = args.name or f"{args.setup}-{args.env}-s{args.seed}"
    args.out.mkdir(parents=True, exist_ok=True)
    model = ALGORITHMS[algorithm]("MlpPolicy", args.env, seed=args.seed, device=args.device, **kwargs)
    described = {"algorithm": algorithm, "env": args.env, "seed": args.seed, "steps": args.steps, **kwargs}
    command = f"python benchmarks/learning.py --setup {args.setup} --env {args.env} --seed {args.seed} --steps {args.steps}"
    command += f" --eval-freq {args.eval_freq} --eval-episodes {args.eval_episodes}"
    command += f" --device {args.device}" if args.device != "cpu" else ""
    command += f" --override '{json.dumps(args.override)}'" if args.override else ""
    (args.out / f"{name}.json").write_text(json.dumps(metadata(described, command), indent=2) + "\n")
    callback = Evaluation(args.out / f"{name}.csv", args.env, args.seed, args.eval_freq, args.eval_episodes)
    model.learn(args.steps, callback=callback)
    if args.save_model:
        model.save(args.save_model)


if __name__ == "__main__":
    main()
