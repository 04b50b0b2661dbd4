"""Killed, interrupted, saved, loaded: what is there is whole, and a run goes on where it was."""

import copy
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import faults
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize
from synthetic import random_dataset

from sb3_diffrl import LQL, NCLQL, DiffusionBC, OfflineDataset, record_dataset
from sb3_diffrl.pg import PG
from sb3_diffrl.planner import DiffusionPlanner

from .envs import box_env

TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "learning_starts": 20,
    "batch_size": 8,
    "buffer_size": 300,
    "device": "cpu",
    "seed": 3,
}


@pytest.fixture
def _datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    record_dataset(None, "Pendulum-v1", faults.DATASET, n_steps=400, seed=0)


@pytest.mark.usefixtures("_datasets")
@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_killed_process_leaves_a_whole_file_and_the_run_goes_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "STEPS", 16)
    expected = faults.reference(kind)
    row = faults.trial(kind, 0, expected)
    assert row["error"] == ""
    assert row["ok"]
    assert row["final_step"] == (300 if kind == "recording" else 16)


def weights(model: LQL) -> list[th.Tensor]:
    moments = [value for state in model.critic.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*model.policy.state_dict().values(), *moments)]


@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 3}, {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}], ids=str)
@pytest.mark.parametrize("algorithm", [LQL, NCLQL])
@pytest.mark.parametrize("first", [7, 230])  # before the first update; in the second episode
def test_an_online_run_goes_on_to_the_bit_with_buffer_and_env(
    algorithm: type[LQL], first: int, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    whole = algorithm("MlpPolicy", "Pendulum-v1", **TINY, **kwargs).learn(first).learn(50, reset_num_timesteps=False)

    half = algorithm("MlpPolicy", "Pendulum-v1", **TINY, **kwargs).learn(first)
    half.save(tmp_path / "model")
    half.save_replay_buffer(tmp_path / "buffer")
    env = copy.deepcopy(half.get_env())
    th.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    resumed = algorithm.load(tmp_path / "model", env=env, force_reset=False, device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(50, reset_num_timesteps=False)

    assert resumed.num_timesteps == whole.num_timesteps == first + 50
    assert all(th.equal(*pair) for pair in zip(weights(whole), weights(resumed), strict=True))
    assert whole.replay_buffer is not None
    assert resumed.replay_buffer is not None
    np.testing.assert_array_equal(whole.replay_buffer.observations, resumed.replay_buffer.observations)


def test_another_seed_takes_precedence_over_the_saved_random_state(tmp_path: Path) -> None:
    LQL("MlpPolicy", "Pendulum-v1", **TINY).learn(5).save(tmp_path / "model")
    first, second = (LQL.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu", seed=seed) for seed in (3, 4))
    draws = []
    for model in (first, second):
        th.manual_seed(model.seed or 0)
        model.learn(1, reset_num_timesteps=False)
        draws.append(th.rand(1).item())
    assert draws[1] == pytest.approx(th.rand(1, generator=th.Generator().manual_seed(4)).item())
    assert draws[0] != draws[1]


@pytest.mark.parametrize("delay", [0.01, 0.05, 0.15, 0.4])
def test_ctrl_c_leaves_a_model_that_saves_and_goes_on(delay: float, tmp_path: Path) -> None:
    model = NCLQL("MlpPolicy", box_env(), **TINY)
    signal.setitimer(signal.ITIMER_REAL, delay)
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.learn(100_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    model.save(tmp_path / "model")
    loaded = NCLQL.load(tmp_path / "model", env=box_env(), device="cpu")
    assert loaded.num_timesteps == model.num_timesteps
    for each in (model, loaded):
        each.learn(30, reset_num_timesteps=False)
        assert all(bool(th.isfinite(tensor).all()) for tensor in weights(each))


@pytest.mark.usefixtures("_datasets")
def test_an_interrupted_offline_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = faults.digest(faults.make("DiffusionBC").learn(12))
    model = faults.make("DiffusionBC")

    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 5:
                raise KeyboardInterrupt
            return True

    with pytest.raises(KeyboardInterrupt):
        model.learn(12, Interrupt())
    model.save(tmp_path / "model")
    assert faults.digest(faults.ALGORITHMS["DiffusionBC"].load(tmp_path / "model").learn(7, reset_num_timesteps=False)) == whole


@pytest.mark.usefixtures("_datasets")
def test_a_killed_recording_leaves_the_former_dataset(tmp_path: Path) -> None:
    def policy(obs: np.ndarray) -> np.ndarray:
        policy.calls += 1  # type: ignore[attr-defined]
        if policy.calls == 250:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(1, np.float32)

    policy.calls = 0  # type: ignore[attr-defined]
    child = faults.forked(
        lambda: record_dataset(policy, "Pendulum-v1", faults.DATASET, n_steps=400, overwrite=True), tmp_path / "result"
    )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = OfflineDataset.load(faults.DATASET)
    assert np.ptp(dataset.actions) > 1  # the random ones of before


@pytest.mark.parametrize("n_envs", [1, 2])
def test_an_online_run_with_normalisation_goes_on_to_the_bit(n_envs: int, tmp_path: Path) -> None:
    def make() -> NCLQL:
        env = VecNormalize(make_vec_env("Pendulum-v1", n_envs, seed=0))
        return NCLQL("MlpPolicy", env, **TINY).learn(60)

    whole = make().learn(40, reset_num_timesteps=False)
    half = make()
    half.save(tmp_path / "model")
    half.save_replay_buffer(tmp_path / "buffer")
    normalize = half.get_vec_normalize_env()
    assert normalize is not None
    normalize.save(str(tmp_path / "statistics"))
    env = VecNormalize.load(str(tmp_path / "statistics"), copy.deepcopy(normalize.venv))
    resumed = NCLQL.load(tmp_path / "model", env=env, force_reset=False, device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(40, reset_num_timesteps=False)
    assert all(th.equal(*pair) for pair in zip(weights(whole), weights(resumed), strict=True))


@pytest.mark.usefixtures("_datasets")
def test_other_data_of_the_same_name_and_size_are_noticed(tmp_path: Path) -> None:
    planner = faults.make("DiffusionPlanner").learn(2)
    planner.save(tmp_path / "planner")
    assert PG("MlpPolicy", planner=tmp_path / "planner").dataset_checksum == planner.dataset_checksum
    record_dataset(None, "Pendulum-v1", faults.DATASET, n_steps=400, seed=1, overwrite=True)

    resumed = DiffusionPlanner.load(tmp_path / "planner", device="cpu")
    with pytest.raises(ValueError, match="not those that the model was trained on: there are as many steps, but other numbers"):
        resumed.learn(1)
    with pytest.raises(ValueError, match="not those that the model was trained on"):
        PG("MlpPolicy", planner=tmp_path / "planner")
    with pytest.raises(ValueError, match="other data of the same name and size: their checksum differs"):
        PG("MlpPolicy", dataset=faults.DATASET, planner=tmp_path / "planner")
    resumed.set_dataset(faults.DATASET)  # the user's own word
    resumed.learn(1)
    # A file that does not say what it learned from is taken at its word.
    old = DiffusionPlanner.load(tmp_path / "planner", device="cpu", custom_objects={"dataset_checksum": 0})
    assert old.dataset.n_steps == 400


@pytest.mark.parametrize("name", ["NCLQL", "DiffusionBC"])
def test_learning_goes_on_where_ctrl_c_has_left_torch_without_gradients(name: str) -> None:
    if name == "NCLQL":
        model: Any = NCLQL("MlpPolicy", "Pendulum-v1", learning_starts=5, policy_kwargs={"net_arch": [8]}, device="cpu")
    else:
        model = DiffusionBC("MlpPolicy", dataset=random_dataset(2, 50, 3, 1), policy_kwargs={"net_arch": (8,)}, device="cpu")
    with th.no_grad():
        model.learn(10)
    assert model.num_timesteps == 10
