"""How far the critic's value is from the return that its policy then gets, and how the policy acts.

    python benchmarks/value_error.py MODEL.zip [MODEL.zip ...] --env Hopper-v5

Appends to ``results/value_error.csv`` a row for each model: over stochastic episodes, the mean of the smallest critic at the
visited states and actions and the discounted return from there (both in units of the env's rewards, the last states of time-
limited episodes left out), the share of action coordinates within 5% of a bound, and the spread of repeated samples at a state.
"""

import argparse
import csv
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch as th

from sb3_diffrl import NCLQL

RESULTS = Path(__file__).parent / "results"
# Beyond this many steps the discounted rest of an episode is a few percent of the value.
HORIZON = 300


def episode(model: NCLQL, env: gym.Env[np.ndarray, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Observations, scaled actions and rewards of one episode, and whether it terminated."""
    obs, _ = env.reset(seed=seed)
    observations, actions, rewards = [], [], []
    done = terminated = False
    while not done:
        action, _ = model.predict(obs)
        observations.append(obs)
        actions.append(model.policy.scale_action(action))
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(float(reward))
        done = terminated or truncated
    return np.array(observations), np.array(actions), np.array(rewards), terminated


def examine(model: NCLQL, env_id: str, n_episodes: int) -> dict[str, float]:
    th.manual_seed(0)
    env = gym.make(env_id)
    values, returns, saturated, lengths, spreads = [], [], [], [], []
    for seed in range(n_episodes):
        obs, actions, rewards, terminated = episode(model, env, 50_000 + seed)
        to_go, rest = np.zeros(len(rewards)), 0.0
        for t in range(len(rewards) - 1, -1, -1):
            to_go[t] = rest = rewards[t] + model.gamma * rest
        keep = slice(None) if terminated else slice(0, -HORIZON)
        obs_tensor = model.policy.obs_to_tensor(obs[keep])[0]
        with th.no_grad():
            q_values = th.cat(model.critic(obs_tensor, th.as_tensor(actions[keep], dtype=th.float32)), dim=1)
        values.append(q_values.amin(dim=1).numpy())
        returns.append(to_go[keep])
        saturated.append((np.abs(actions) >= 0.95).mean())
        spreads.append(model.action_spread(obs_tensor[:: max(1, len(obs) // 16)]))  # type: ignore[index]
        lengths.append(len(rewards))
    return {
        "episode_length": float(np.mean(lengths)),
        "value": float(np.concatenate(values).mean()),
        "discounted_return": float(np.concatenate(returns).mean()),
        "action_saturation": float(np.mean(saturated)),
        "action_spread": float(np.mean(spreads)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--env", required=True)
    parser.add_argument("--episodes", type=int, default=5)
    args = parser.parse_args()
    th.set_num_threads(1)
    out = RESULTS / "value_error.csv"
    rows = [examine(NCLQL.load(path, device="cpu"), args.env, args.episodes) for path in args.models]
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["env", "model", *rows[0]])
        if fresh:
            writer.writeheader()
        for path, row in zip(args.models, rows, strict=True):
            described = {"env": args.env, "model": path.stem, **{key: f"{value:.4g}" for key, value in row.items()}}
            writer.writerow(described)
            print(described)


if __name__ == "__main__":
    main()
