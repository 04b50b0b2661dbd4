"""The two ends of the normalised scores' scale, `sb3_diffrl/offline/references.json`.

    python benchmarks/reference_scores.py random                     # uniformly random actions, 100 episodes in each env
    python benchmarks/reference_scores.py expert ENV_ID DATASET_ID   # the mean return of a recorded expert's whole episodes

Each entry holds mean and standard deviation of the undiscounted returns, the number of episodes, seeds and versions. Entries of
other envs are left as they are. The random one takes about five minutes on one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np

import sb3_diffrl.offline
from sb3_diffrl.offline.recording import versions

ENVS = [
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "InvertedPendulum-v5",
    "Pendulum-v1",
    "Swimmer-v5",
    "Walker2d-v5",
]
FILE = Path(sb3_diffrl.offline.__file__).with_name("references.json")


def random_returns(env_id: str, n_episodes: int, seed: int) -> list[float]:
    """Undiscounted return of each episode; the env is seeded once, with the actions."""
    env = gym.make(env_id)
    env.action_space.seed(seed)
    returns = []
    for i in range(n_episodes):
        env.reset(seed=seed if i == 0 else None)
        done, total = False, 0.0
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    env.close()
    return returns


def write(env_id: str, end: str, entry: dict[str, Any]) -> None:
    references = json.loads(FILE.read_text())
    references.setdefault(env_id, {})[end] = entry
    FILE.write_text(json.dumps(references, indent=2, sort_keys=True) + "\n")
    print(f"{env_id}: {end} {entry['mean_return']:.1f} +- {entry['std_return']:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="end", required=True)
    random = commands.add_parser("random")
    random.add_argument("--n-episodes", type=int, default=100)
    random.add_argument("--seed", type=int, default=0)
    random.add_argument("--envs", nargs="+", default=ENVS)
    expert = commands.add_parser("expert")
    expert.add_argument("env_id")
    expert.add_argument("dataset_id")
    args = parser.parse_args()
    if args.end == "expert":
        provenance = dict(minari.load_dataset(args.dataset_id).storage.metadata["provenance"])
        write(args.env_id, "expert", {"dataset": args.dataset_id, "n_episodes": provenance.pop("n_whole_episodes"), **provenance})
        return
    for env_id in args.envs:
        returns = random_returns(env_id, args.n_episodes, args.seed)
        scores = {"mean_return": float(np.mean(returns)), "std_return": float(np.std(returns))}
        write(env_id, "random", {**scores, "n_episodes": args.n_episodes, "seed": args.seed, "versions": versions()})


if __name__ == "__main__":
    main()
