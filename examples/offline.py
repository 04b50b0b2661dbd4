"""From an online agent to a dataset to an offline agent: train SAC, record it as a Minari dataset, clone it, compare.

python examples/offline.py            (or: python examples/offline.py --help)

The dataset goes where Minari keeps its own (MINARI_DATASETS_PATH, or a folder in the home directory).
"""

import argparse
from pathlib import Path

import gymnasium as gym
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_diffrl import DiffusionBC, record_dataset

ENV, DATASET = "Pendulum-v1", "sb3-diffrl-examples/pendulum/sac-v0"


def main() -> None:
    """Train, record, clone, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sac-steps", type=int, default=3_000, help="env steps of the online agent")
    parser.add_argument("--data-steps", type=int, default=3_000, help="env steps to record")
    parser.add_argument("--clone-steps", type=int, default=1_500, help="gradient steps of the offline agent")
    parser.add_argument("--episodes", type=int, default=10, help="episodes of an evaluation")
    parser.add_argument("--out", type=Path, default=Path("offline"), help="folder for the model")
    args = parser.parse_args()
    th.set_num_threads(1)  # small networks

    print(f"1. SAC learns {ENV} online")
    small = {"net_arch": [64, 64]}
    expert = SAC("MlpPolicy", ENV, learning_rate=3e-3, batch_size=64, tau=0.02, policy_kwargs=small, seed=0, device="cpu")
    expert.learn(args.sac_steps, progress_bar=True)

    print(f"2. Its episodes become the dataset {DATASET}")
    dataset = record_dataset(expert, ENV, DATASET, n_steps=args.data_steps, seed=0, overwrite=True, progress_bar=True)

    print("3. DiffusionBC clones it, from the dataset alone")
    clone = DiffusionBC(
        "MlpPolicy", dataset=DATASET, learning_rate=1e-3, policy_kwargs={"net_arch": [128, 128]}, seed=0, device="cpu"
    )
    clone.learn(args.clone_steps, progress_bar=True)
    args.out.mkdir(parents=True, exist_ok=True)
    clone.save(args.out / "clone")

    env = Monitor(gym.make(ENV))
    for name, model in (("SAC", expert), ("DiffusionBC", clone)):
        env.reset(seed=1)
        mean, std = evaluate_policy(model, env, args.episodes)
        print(f"{name:12s} {mean:8.1f} +- {std:.1f}")
    print(f"Dataset: {dataset.total_steps} steps, mean return {dataset.storage.metadata['provenance']['mean_return']:.1f}")


if __name__ == "__main__":
    main()
