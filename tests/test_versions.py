"""A model of every released version loads, and acts as it did."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_diffrl import NCLQL, DiffusionBC

from .envs import box_env

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.filterwarnings("ignore:The file was saved with other versions")
@pytest.mark.parametrize("version", ["0.1.0"])
@pytest.mark.parametrize(
    ("name", "algorithm", "obs_dim", "expected"),
    [("nclql", NCLQL, 5, [0.98259842, 1.0, 1.0]), ("diffusion_bc", DiffusionBC, 3, [1.0, -0.59731227])],
    ids=["nclql", "diffusion_bc"],
)
def test_a_model_of_a_released_version_acts_as_it_did(
    version: str, name: str, algorithm: Any, obs_dim: int, expected: list[float]
) -> None:
    model = algorithm.load(GOLDEN / f"{name}-{version}.zip", device="cpu")
    np.testing.assert_allclose(model.predict(np.ones(obs_dim, np.float32), deterministic=True)[0], expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The file was saved with other versions")
def test_training_of_a_released_version_goes_on() -> None:
    model = NCLQL.load(GOLDEN / "nclql-0.1.0.zip", env=box_env(), device="cpu")
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 40
