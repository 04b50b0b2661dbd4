"""Writes the model files of a release: ``python -m tests.golden.make_models``, once, when the version is set.

Nothing changes the files of a version that is out: ``test_versions.py`` loads them ever after.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_diffrl import NCLQL, DiffusionBC, __version__
from sb3_diffrl.common import CosineSchedule

from ..envs import box_env
from ..test_saving import tiny_dataset

FOLDER = Path(__file__).parent


def make(name: str) -> Any:
    """A tiny model of either kind, with an object of the package's own in its settings."""
    if name == "diffusion_bc":
        kwargs = {"net_arch": [4], "time_embedding_dim": 4}
        sampler = "loss_second_moment+min_snr"
        model = DiffusionBC(
            "MlpPolicy", dataset=tiny_dataset(), batch_size=16, timestep_sampler=sampler, policy_kwargs=kwargs, seed=0, device="cpu"
        )
        return model.learn(1000)  # its actions leave the bounds
    settings: dict[str, Any] = {"buffer_size": 50, "batch_size": 8, "learning_starts": 5, "n_langevin_steps": 2}
    settings |= {"learning_rate": CosineSchedule(1e-3), "policy_kwargs": {"net_arch": [4], "activation_fn": th.nn.ReLU}}
    return NCLQL("MlpPolicy", box_env(), **settings, seed=0, device="cpu").learn(20)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["nclql", "diffusion_bc"]:
        model = make(name)
        model.save(FOLDER / f"{name}-{__version__}.zip")
        obs = np.ones(model.observation_space.shape, np.float32)
        print(name, model.predict(obs, deterministic=True)[0].tolist(), "for test_versions.py")
