"""From an environment to a dataset to an agent to a file and back to actions."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_diffrl import DiffusionBC, record_dataset
from sb3_diffrl.offline.writing import DataFormat

from .envs import RandomEnv

ACTIONS = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 5], np.float32))
SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (3, 2), np.float64),
    "goal": spaces.Dict(
        {
            "observation": spaces.Box(-1, 1, (3,), np.float64),
            "achieved_goal": spaces.Box(-9, 9, (2,)),
            "desired_goal": spaces.Box(-9, 9, (2,)),
        }
    ),
    "mixed": spaces.Dict({"z": spaces.Box(0, 1, (2,)), "a": spaces.Discrete(3), "many": spaces.MultiBinary(4)}),
    "tuple": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,))]),
}


class Env(RandomEnv):
    """Registered, so that it can be rebuilt from its specification."""

    def __init__(self, kind: str) -> None:
        super().__init__(SPACES[kind], ACTIONS)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize("kind", SPACES)
def test_record_train_save_load_predict(
    kind: str, data_format: DataFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env_id = f"RoundTrip-{kind}-v0"
    if env_id not in gym.registry:
        gym.register(env_id, f"{__name__}:Env", kwargs={"kind": kind})
    record_dataset(None, env_id, "test/round/trip-v0", n_steps=90, seed=0, data_format=data_format)
    model = DiffusionBC(
        "MlpPolicy", dataset="test/round/trip-v0", policy_kwargs={"net_arch": [16]}, batch_size=8, seed=0, device="cpu"
    )
    model.learn(5)
    model.save(tmp_path / "model")
    loaded = DiffusionBC.load(tmp_path / "model", device="cpu")

    obs = SPACES[kind].sample()
    action, _ = loaded.predict(obs, deterministic=True)
    assert ACTIONS.contains(action)
    np.testing.assert_array_equal(action, model.predict(obs, deterministic=True)[0])

    venv = DummyVecEnv([lambda: Monitor(gym.make(env_id)) for _ in range(3)])
    actions, _ = loaded.predict(venv.reset())  # type: ignore[arg-type]
    assert actions.shape == (3, 2)
    assert evaluate_policy(loaded, venv, 3) == (20.0, 0.0)
    assert evaluate_policy(loaded, loaded.get_env(), 1) == (20.0, 0.0)  # type: ignore[arg-type]
