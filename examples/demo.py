"""Train NC-LQL on Pendulum-v1 until it swings up and balances, evaluate it, and save the model and its learning curve.

make demo            (or: python examples/demo.py --help)
"""

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")  # draws to a file: no screen needed

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_diffrl import NCLQL

ENV = "Pendulum-v1"
SOLVED = -200.0


def random_return(n_episodes: int, seed: int) -> float:
    """Mean return of uniformly random actions."""
    env = gym.make(ENV)
    env.action_space.seed(seed)
    returns = []
    for episode in range(n_episodes):
        env.reset(seed=seed + episode)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def plot(monitor: Monitor, random: float, path: Path) -> None:
    """Return of each training episode against env steps."""
    steps = np.cumsum(monitor.get_episode_lengths())
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, monitor.get_episode_rewards(), marker="o", markersize=3, label="NC-LQL, training episodes")
    axes.axhline(random, color="grey", linestyle=":", label="random policy")
    axes.axhline(SOLVED, color="green", linestyle="--", label="solved")
    axes.set(xlabel="env steps", ylabel="return", title=f"{ENV}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6_000, help="env steps to train for")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the model and the curve")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # networks this small run fastest on one core

    monitor = Monitor(gym.make(ENV))
    model = NCLQL(
        "MlpPolicy",
        monitor,
        learning_starts=1_000,
        batch_size=64,
        tau=0.02,
        policy_kwargs={"net_arch": [64, 64, 64]},
        seed=args.seed,
        device="cpu",
    )
    model.learn(args.steps, progress_bar=True)

    random = random_return(args.episodes, seed=1_000)
    returns, _ = evaluate_policy(model, Monitor(gym.make(ENV)), n_eval_episodes=args.episodes, return_episode_rewards=True)
    mean, std = np.mean(returns), np.std(returns)
    model.save(args.out / "nclql_pendulum")
    plot(monitor, random, args.out / "learning_curve.png")
    print(f"random policy  {random:8.1f}")
    print(f"NC-LQL         {mean:8.1f} +- {std:.1f}  ({'solved' if mean > SOLVED else 'not solved'}: above {SOLVED:.0f})")
    print(f"saved {args.out / 'nclql_pendulum.zip'} and {args.out / 'learning_curve.png'}")


if __name__ == "__main__":
    main()
