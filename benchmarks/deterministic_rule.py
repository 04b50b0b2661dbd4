"""Which action should ``deterministic=True`` return? Evaluates trained models under several rules.

    python benchmarks/deterministic_rule.py MODEL.zip [MODEL.zip ...] --env HalfCheetah-v5

Appends to ``results/deterministic_rule.csv`` a row for each episode. The rules:

* ``sample``: the stochastic policy, for comparison;
* ``shared noise``: one start and one noise sequence for every observation (the package's rule, here in single precision);
* ``hashed noise``: start and noise drawn from a generator seeded by the observation, so different at each;
* ``no noise``: the chain from the box's centre without noise;
* ``best of 8``: eight chains with shared noise, the best by the smallest critic.
"""

import argparse
import csv
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_diffrl import NCLQL
from sb3_diffrl.lql import LangevinPolicy
from sb3_diffrl.lql.langevin import ChainDraws

RESULTS = Path(__file__).parent / "results"
Rule = Callable[[LangevinPolicy, th.Tensor], th.Tensor]


def shared(policy: LangevinPolicy, obs: th.Tensor) -> ChainDraws:
    generator = th.Generator().manual_seed(0)
    start, noise = policy.sampler.draw(policy.sampler.n_particles, policy.critic.action_dim, generator=generator)
    return ChainDraws(start.repeat_interleave(len(obs), 0), noise.repeat_interleave(len(obs), 2))


def hashed(policy: LangevinPolicy, obs: th.Tensor) -> ChainDraws:
    seeds = [zlib.crc32(row.tobytes()) for row in obs.numpy()]
    draws = [policy.sampler.draw(1, policy.critic.action_dim, generator=th.Generator().manual_seed(seed)) for seed in seeds]
    return ChainDraws(th.cat([draw.start for draw in draws]), th.cat([draw.noise for draw in draws], dim=2))


def best_of_8(policy: LangevinPolicy, obs: th.Tensor) -> th.Tensor:
    sampler = policy.sampler
    policy.sampler = replace(sampler, n_particles=8)
    actions = policy.sample_actions(obs, shared(policy, obs))
    policy.sampler = sampler
    return actions


def no_noise(policy: LangevinPolicy, obs: th.Tensor) -> th.Tensor:
    start, noise = shared(policy, obs)
    return policy.sample_actions(obs, ChainDraws(th.zeros_like(start), th.zeros_like(noise)))


RULES: dict[str, Rule] = {
    "sample": lambda policy, obs: policy.sample_actions(obs),
    "shared noise": lambda policy, obs: policy.sample_actions(obs, shared(policy, obs)),
    "hashed noise": lambda policy, obs: policy.sample_actions(obs, hashed(policy, obs)),
    "no noise": no_noise,
    "best of 8": best_of_8,
}


def evaluate(model: NCLQL, env_id: str, rule: str, n_episodes: int) -> list[float]:
    env = make_vec_env(env_id, n_envs=n_episodes, seed=77_000)
    model.policy.deterministic_actions = lambda obs: RULES[rule](model.policy, obs)  # type: ignore[method-assign,arg-type]
    th.manual_seed(0)
    returns, _ = evaluate_policy(model, env, n_episodes, deterministic=True, return_episode_rewards=True, warn=False)
    return list(returns)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--env", required=True)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "deterministic_rule.csv")
    args = parser.parse_args()
    th.set_num_threads(1)
    fresh = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["env", "model", "rule", "episode", "return"])
        for path in args.models:
            for rule in RULES:
                returns = evaluate(NCLQL.load(path, device="cpu"), args.env, rule, args.episodes)
                writer.writerows([args.env, path.stem, rule, i, f"{value:.3f}"] for i, value in enumerate(returns))
                file.flush()
                print(f"{path.stem:30s} {rule:15s} {np.mean(returns):9.1f} +- {np.std(returns):.1f}", flush=True)


if __name__ == "__main__":
    main()
