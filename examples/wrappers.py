"""Evaluate an agent in a stack of Gymnasium wrappers, and film it, without a screen.

python examples/wrappers.py            (or: python examples/wrappers.py --help)
"""

import argparse
import os
import sys
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo renders without a screen; "osmesa" needs no graphics driver

import gymnasium as gym
import torch as th
from gymnasium import wrappers
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_diffrl import NCLQL


def main() -> None:
    """Train for a moment, evaluate, film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedPendulum-v5")
    parser.add_argument("--steps", type=int, default=2_000, help="env steps to train for")
    parser.add_argument("--episodes", type=int, default=3, help="episodes to evaluate and film")
    parser.add_argument("--length", type=int, default=200, help="steps after which an episode ends")
    parser.add_argument("--out", type=Path, default=Path("wrappers"), help="folder of the videos")
    args = parser.parse_args()
    th.set_num_threads(1)  # small networks

    # Wrappers that change spaces belong in training, too: the agent sees how much of the episode has passed.
    def make(render_mode: str | None = None) -> gym.Env:
        return wrappers.TimeAwareObservation(wrappers.TimeLimit(gym.make(args.env, render_mode=render_mode), args.length))

    model = NCLQL(
        "MlpPolicy",
        Monitor(make()),
        batch_size=64,
        tau=0.02,
        learning_starts=min(500, args.steps // 2),
        policy_kwargs={"net_arch": [64, 64, 64]},
        seed=0,
        device="cpu",
    )
    model.learn(args.steps, progress_bar=True)

    counted = wrappers.RecordEpisodeStatistics(make("rgb_array"))
    filmed = wrappers.RecordVideo(counted, str(args.out), episode_trigger=lambda episode: episode < args.episodes)
    # Monitor outermost: an episode is what the wrappers make of it.
    monitor = Monitor(filmed)
    mean, std = evaluate_policy(model, monitor, args.episodes)
    monitor.close()  # the last video is written
    print(f"return {mean:.1f} +- {std:.1f}, lengths {list(counted.length_queue)[: args.episodes]}")
    print("\n".join(str(path) for path in sorted(args.out.glob("*.mp4"))))


if __name__ == "__main__":
    main()
