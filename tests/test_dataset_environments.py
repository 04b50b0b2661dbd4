"""The environment that a dataset was recorded in: rebuilt to be evaluated in, unless that would write files."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from sb3_diffrl.offline.datasets import OfflineDataset
from sb3_diffrl.offline.recording import record_dataset
from sb3_diffrl.offline.writing import DatasetWriter

from .minari_data import ACTION_SPACE, OBS_SPACE, write_episodes

pytestmark = pytest.mark.usefixtures("datasets_in_tmp_path")


def test_the_environment_is_rebuilt_for_evaluation() -> None:
    record_dataset(None, "Pendulum-v1", "test/pendulum-v0", n_steps=5, eval_env=gym.make("Pendulum-v1", g=3.0))
    dataset = OfflineDataset.load("test/pendulum-v0")
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "Pendulum-v1"
    evaluation, collection = dataset.recover_environment(), dataset.recover_environment(eval_env=False)
    assert evaluation.unwrapped.g == 3  # type: ignore[attr-defined]
    assert collection.unwrapped.g == 10  # type: ignore[attr-defined]


def test_an_environment_that_cannot_be_rebuilt_is_told_with_the_reason() -> None:
    write_episodes("test/unknown-v0", [2])
    with pytest.raises(ValueError, match="environment of dataset 'test/unknown-v0' cannot be rebuilt"):
        OfflineDataset.load("test/unknown-v0").recover_environment()
    gym.register("Gone-v0", entry_point="a_module_that_is_not_there:Env")
    spec = gym.spec("Gone-v0")
    with DatasetWriter("test/gone-v0", OBS_SPACE, ACTION_SPACE, env_spec=spec) as writer:
        writer.add_episode(np.zeros((2, 2)), np.zeros((1, 1)), [0], [True], [False])
        writer.publish()
    del gym.registry["Gone-v0"]
    with pytest.raises(ValueError, match="a_module_that_is_not_there"):
        OfflineDataset.load("test/gone-v0").recover_environment()


class Louder(gym.RewardWrapper[Any, Any], gym.utils.RecordConstructorArgs):
    """A wrapper of the user's own."""

    def __init__(self, env: gym.Env[Any, Any], factor: float) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, factor=factor)
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: Any) -> float:
        return self.factor * float(reward)


def test_a_wrapper_of_ones_own_is_rebuilt() -> None:
    dataset = record_dataset(None, Louder(gym.make("Pendulum-v1"), 3.0), "test/louder-v0", n_steps=5)
    env = OfflineDataset.load(dataset.id).recover_environment()
    assert isinstance(env, Louder)
    assert env.factor == 3


class Filming(gym.wrappers.RecordVideo):
    """Writes files like what it inherits from."""


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("minari.data_collector:DataCollector", "only those of gymnasium"),
        ("minari:DataCollector", "only those of gymnasium"),
        (f"{__name__}:Filming", "writes files"),
    ],
)
def test_a_wrapper_that_writes_files_is_refused(
    entry_point: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = gym.spec("Pendulum-v1")
    wrapper = WrapperSpec(entry_point.partition(":")[2], entry_point, {"video_folder": "mark"} if "Filming" in entry_point else {})
    spec = EnvSpec(made.id, made.entry_point, additional_wrappers=(wrapper,))
    with DatasetWriter("test/wrapped-v0", OBS_SPACE, ACTION_SPACE, env_spec=spec) as writer:
        writer.add_episode(np.zeros((2, 2)), np.zeros((1, 1)), [0], [True], [False])
        writer.publish()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=reason):
        OfflineDataset.load("test/wrapped-v0").recover_environment()
    assert sorted(tmp_path.rglob("*")) == before
