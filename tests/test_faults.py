"""Wrong arguments, wrong spaces and broken environments: what the user is told, and what is kept."""

from pathlib import Path
from typing import Any

import faults
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_diffrl import LQL, NCLQL
from sb3_diffrl.lql import NonFiniteError

from .envs import FaultyEnv, RandomEnv

TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "n_langevin_steps": 1,
    "learning_starts": 5,
    "batch_size": 8,
    "device": "cpu",
}

ALGORITHMS = pytest.mark.parametrize("algorithm", [LQL, NCLQL])


@ALGORITHMS
@pytest.mark.parametrize(
    ("action_space", "error", "message"),
    [
        (spaces.Discrete(3), AssertionError, "Discrete"),
        (spaces.MultiBinary(3), AssertionError, "MultiBinary"),
        (spaces.Box(-np.inf, np.inf, (2,)), AssertionError, "finite lower and upper bound"),
        (spaces.Box(np.array([0, 1], np.float32), np.array([1, 1], np.float32)), ValueError, r"\[\(1,\)\]"),
        (spaces.Box(-5, 5, (2,), np.int32), ValueError, "integers"),
        (spaces.Box(-3e38, 3e38, (2,)), ValueError, "too wide"),
    ],
)
def test_unsupported_action_spaces_are_refused(
    algorithm: type[LQL], action_space: spaces.Space[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        algorithm("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), action_space))


@pytest.mark.parametrize("name", ["sampler", "reward_scale"])
def test_arguments_of_the_algorithm_are_refused_in_policy_kwargs(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is not for `policy_kwargs`"):
        NCLQL("MlpPolicy", "Pendulum-v1", policy_kwargs={name: 1.0})


@ALGORITHMS
def test_no_critic_is_refused(algorithm: type[LQL]) -> None:
    with pytest.raises(ValueError, match="n_critics"):
        algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={"n_critics": 0})


def state(model: LQL) -> list[th.Tensor]:
    moments = [entry["exp_avg"] for entry in model.critic.optimizer.state_dict()["state"].values()]
    return [tensor.clone() for tensor in (*model.policy.parameters(), *moments)]


class Recorder:
    """Remembers the model as it was after each step and each round of training."""

    def __init__(self, model: LQL) -> None:
        self.model, self.train, self.steps, self.state = model, model.train, 0, state(model)
        model.train = self.record_training  # type: ignore[method-assign]

    def record_training(self, *args: Any, **kwargs: Any) -> None:
        self.train(*args, **kwargs)
        self.state = state(self.model)

    def __call__(self, _locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        self.steps += 1
        return True


@ALGORITHMS
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("fault", ["reward", "observation"])
@pytest.mark.parametrize("at", [3, 17, 20])  # during the random steps, during training, at the end of an episode
@pytest.mark.parametrize("normalize", [False, True])
def test_a_fault_names_env_and_step_and_loses_nothing(
    algorithm: type[LQL], value: float, fault: str, at: int, normalize: bool
) -> None:
    env: VecEnv = DummyVecEnv([lambda: FaultyEnv("none", 0.0, 0), lambda: FaultyEnv(fault, value, at)])
    model = algorithm("MlpPolicy", VecNormalize(env) if normalize else env, **TINY)
    recorder = Recorder(model)
    with pytest.raises(NonFiniteError, match=f"At env step {2 * (at - 1)}, env 1 gave a non-finite .*{fault}") as error:
        model.learn(100, callback=recorder)
    assert str(value) in str(error.value)
    # All whole steps are kept, the faulty one is not, no callback saw it, and nothing was learned from it
    buffer = model.replay_buffer
    assert buffer is not None
    assert buffer.size() == at - 1 == recorder.steps
    assert np.isfinite(buffer.next_observations).all()
    assert np.isfinite(buffer.rewards).all()
    assert all(th.equal(*pair) for pair in zip(state(model), recorder.state, strict=True))
    # The model still works, and goes on
    assert np.isfinite(model.predict(np.zeros(3, np.float32))[0]).all()
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 2 * (at - 1) + 20


def test_an_observation_beyond_single_precision_is_a_fault() -> None:
    env = RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-1, 1, (1,)))
    env.observation_space.sample = lambda *_: np.array([0.0, 1e300])  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"1e\+300 at index \[1\]"):
        NCLQL("MlpPolicy", env, **TINY).learn(10)


class Counting(RandomEnv):
    """Observes its episode's number and step; the third step of its second episode gives a NaN reward."""

    episode = -1

    def observation(self) -> np.ndarray:
        return np.array([self.episode, self.steps], np.float32)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self.episode += 1
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, _, terminated, truncated, info = super().step(action)
        faulty = (self.episode, self.steps) == (1, 3)
        return self.observation(), np.nan if faulty else float(10**self.episode), terminated, truncated, info


@pytest.mark.parametrize(
    "kwargs",
    [{"n_steps": 3}, {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}],
    ids=["n_steps", "optimize_memory_usage"],
)
def test_what_is_stored_after_a_fault_is_another_episode(kwargs: dict[str, Any]) -> None:
    env = Counting(spaces.Box(-100, 100, (2,)), spaces.Box(-1, 1, (1,)), length=5)
    model = NCLQL("MlpPolicy", env, **{**TINY, **kwargs, "buffer_size": 100})
    with pytest.raises(NonFiniteError):
        model.learn(100)
    model.learn(10, reset_num_timesteps=False)
    data = model.replay_buffer.sample(500)  # type: ignore[union-attr]
    crossing = data.observations[:, 0] != data.next_observations[:, 0]
    assert not crossing[data.dones.flatten() == 0].any()
    # An n-step return adds up rewards of one episode: those of episode 2 are 100 each
    first = data.observations[:, 0] == 1
    assert data.rewards[first].max() < 100


class Count:
    """Callback: the number of observations in the running statistics after each step."""

    def __init__(self, statistics: RunningMeanStd) -> None:
        self.statistics, self.last = statistics, 0.0

    def __call__(self, _locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        self.last = self.statistics.count
        return True


def observation_statistics(env: VecNormalize) -> RunningMeanStd:
    assert isinstance(env.obs_rms, RunningMeanStd)
    return env.obs_rms


def test_a_fault_leaves_running_statistics_alone() -> None:
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv("observation", np.nan, 12)]))
    model = NCLQL("MlpPolicy", env, **TINY)
    callback = Count(observation_statistics(env))
    with pytest.raises(NonFiniteError, match="env 0"):
        model.learn(100, callback=callback)
    assert observation_statistics(env).count == callback.last
    assert np.isfinite(observation_statistics(env).mean).all()
    assert np.isfinite(env.ret_rms.var)
    model.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_faulty_reset_is_caught(normalize: bool) -> None:
    class FaultyReset(RandomEnv):
        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            obs, info = super().reset(**kwargs)
            obs[0] = np.nan
            return obs, info

    env = DummyVecEnv([lambda: FaultyReset(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))])
    wrapped: VecEnv = VecNormalize(env) if normalize else env
    with pytest.raises(NonFiniteError, match="env 0 gave a non-finite observation"):
        NCLQL("MlpPolicy", wrapped, **TINY).learn(10)
    if isinstance(wrapped, VecNormalize):
        assert np.isfinite(observation_statistics(wrapped).mean).all()


def test_a_fault_in_a_dict_observation_names_its_key() -> None:
    class FaultyGoal(gym.ObservationWrapper):
        def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
            self.calls = getattr(self, "calls", 0) + 1
            return {**observation, "achieved_goal": observation["achieved_goal"] * (np.nan if self.calls == 10 else 1.0)}

    env = BitFlippingEnv(n_bits=4, continuous=True)
    floats = spaces.Dict({key: spaces.Box(0, 1, (4,)) for key in ("observation", "achieved_goal", "desired_goal")})
    env.observation_space = floats
    model = NCLQL("MultiInputPolicy", FaultyGoal(env), replay_buffer_class=HerReplayBuffer, **TINY)
    with pytest.raises(NonFiniteError, match="'achieved_goal'"):
        model.learn(100)
    model.learn(20, reset_num_timesteps=False)


def test_an_unset_env_is_named(tmp_path: Any) -> None:
    NCLQL("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "model")
    with pytest.raises(AssertionError, match="set_env"):
        NCLQL.load(tmp_path / "model").learn(10)


def test_the_trials_of_killed_processes_notice_a_checkpoint_that_is_lost_or_old(tmp_path: Path) -> None:
    model = faults.make("NCLQL").learn(5, faults.Checkpoint(tmp_path))
    old_buffer = (tmp_path / "buffer.pkl").read_bytes()
    model.learn(6, faults.Checkpoint(tmp_path), reset_num_timesteps=False)
    files = {path: path.read_bytes() for path in (tmp_path / "checkpoint.zip", tmp_path / "buffer.pkl")}
    assert [step for step, _ in faults.completed(tmp_path)] == list(range(1, 12))

    def is_whole(last: int, buffer: bytes | None = None) -> bool:
        for path, content in files.items():
            path.write_bytes(content)
        (tmp_path / "buffer.pkl").write_bytes(buffer or files[tmp_path / "buffer.pkl"])
        return bool(faults.finish("NCLQL", tmp_path, last)["whole"])

    assert is_whole(11)
    assert is_whole(10)  # the process died before it noted the last one
    assert not is_whole(12)
    assert not is_whole(11, old_buffer)
    with pytest.raises(FileNotFoundError):
        faults.finish("NCLQL", tmp_path / "empty", 11)
