"""Figures of the documentation's gallery that need a trained agent, or rliable: drawn by ``sb3_diffrl.plots``.

    python benchmarks/gallery.py

Landscapes are of the agents that ``run_learning.py`` leaves in ``models/``; those that are not there are left out, and said. Curves
and profiles are of ``results/learning/`` and ``results/zoo/``.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th

from sb3_diffrl import NCLQL
from sb3_diffrl.plots import plot_curves, plot_profiles, plot_q_landscape, read_curves

HERE = Path(__file__).parent
FIGURES = HERE.parent / "docs" / "figures"
MODELS = HERE / "models"
# Returns from which tasks count as solved
SOLVED = {
    "MountainCarContinuous-v0": 90.0,
    "LunarLanderContinuous-v3": 200.0,
    "BipedalWalker-v3": 300.0,
    "InvertedDoublePendulum-v5": 9100.0,
    "Reacher-v5": -3.75,
}
# (model, env, dimensions of the action, step of an episode at which to look, seed of the env)
LANDSCAPES = [
    ("nclql-pendulum-Pendulum-v1-s0", "Pendulum-v1", (0,), 100, 0),
    ("nclql-small-HalfCheetah-v5-s0", "HalfCheetah-v5", (0, 3), 50, 0),
]


def observation(model: NCLQL, env_id: str, step: int, seed: int) -> np.ndarray:
    env = gym.make(env_id)
    obs, _ = env.reset(seed=seed)
    for _ in range(step):
        obs, *_ = env.step(model.predict(obs, deterministic=True)[0])
    return np.asarray(obs)[None]


def main() -> None:
    th.set_num_threads(1)
    for name, env_id, dims, step, seed in LANDSCAPES:
        if not (MODELS / f"{name}.zip").exists():
            print(f"{name}: no model, left out (python benchmarks/run_learning.py trains it)")
            continue
        # Our own file, and perhaps an old one.
        model = NCLQL.load(MODELS / name, device="cpu", trusted=True)
        obs = observation(model, env_id, step, seed)
        for ending in ("png", "gif"):
            path = FIGURES / f"landscape-{env_id}.{ending}"
            plot_q_landscape(model, obs, path, dims, 32, seed, f"{env_id}, step {step} of an episode")
            print(path.name)
    small = [curve for curve in read_curves([HERE / "results" / "learning"]) if curve.label in ("nclql-small", "sac-small-lr1e-3")]
    labels = {"nclql-small": "NC-LQL", "sac-small-lr1e-3": "SAC"}
    small = [curve.__class__(labels[curve.label], curve.task, curve.run, curve.steps, curve.returns) for curve in small]
    print(plot_curves(small, FIGURES / "gallery-curves.png").name)
    print(plot_profiles(small, FIGURES / "gallery-profiles.png")[0].name)
    if (HERE / "results" / "zoo").is_dir():
        zoo = read_curves([HERE / "results" / "zoo"])
        print(plot_curves(zoo, FIGURES / "zoo-curves.png", SOLVED).name)


if __name__ == "__main__":
    main()
