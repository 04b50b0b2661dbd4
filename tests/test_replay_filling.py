"""Replay buffers filled from datasets: the same contents as if the model had collected the episodes itself."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_diffrl import NCLQL
from sb3_diffrl.offline.recording import record_dataset
from sb3_diffrl.offline.replay import fill_replay_buffer

from .envs import RandomEnv
from .minari_data import Tape, opened, write_episodes

ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
pytestmark = [pytest.mark.usefixtures("datasets_in_tmp_path"), pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")]


def tiny(**kwargs: Any) -> dict[str, Any]:
    return {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "buffer_size": 100, "learning_starts": 1000, **kwargs}


class Ends(RandomEnv):
    """Episodes of 3, 4, 5, 3, ... steps; every other one terminates, the others run out of time. The reward counts steps."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, action_space)
        self.episode, self.life = -1, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        self.length = 3 + self.episode % 3
        return super().reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, _, over, info = super().step(action)
        self.life += 1
        terminates = self.episode % 2 == 0
        return obs, float(self.life), over and terminates, over and not terminates, info


BOX, ACTIONS = spaces.Box(-1, 1, (3,), np.float64), spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
DICT = spaces.Dict({"x": spaces.Box(-1, 1, (2,)), "n": spaces.Discrete(3)})
IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)


def contents(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """Everything stored, by name."""
    size = buffer.size()
    arrays: dict[str, np.ndarray] = {}
    for name in ARRAYS:
        values = getattr(buffer, name)
        parts = {f"{name} {key}": value for key, value in values.items()} if isinstance(values, dict) else {name: values}
        arrays |= {key: value[:size] for key, value in parts.items()}
    if isinstance(buffer, HerReplayBuffer):
        arrays |= {"ep_start": buffer.ep_start[:size], "ep_length": buffer.ep_length[:size]}
    return arrays


def assert_same_contents(buffer: ReplayBuffer, expected: ReplayBuffer) -> None:
    assert type(buffer) is type(expected)
    ours, theirs = contents(buffer), contents(expected)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype
        np.testing.assert_allclose(values, theirs[name], rtol=1e-6, atol=1e-6, err_msg=name)


def buffer_of(model: OffPolicyAlgorithm) -> ReplayBuffer:
    assert model.replay_buffer is not None
    return model.replay_buffer


@pytest.mark.parametrize(
    ("algorithm", "policy", "observation_space", "kwargs", "buffer_class"),
    [
        (SAC, "MlpPolicy", BOX, {}, ReplayBuffer),
        (TD3, "MlpPolicy", BOX, {}, ReplayBuffer),
        (NCLQL, "MlpPolicy", BOX, {}, ReplayBuffer),
        (SAC, "MlpPolicy", BOX, {"n_steps": 3}, NStepReplayBuffer),
        (NCLQL, "MlpPolicy", BOX, {"n_steps": 3}, NStepReplayBuffer),
        (SAC, "MultiInputPolicy", DICT, {}, DictReplayBuffer),
        (SAC, "MlpPolicy", spaces.Discrete(4), {}, ReplayBuffer),
        (SAC, "MlpPolicy", BOX, {"replay_buffer_kwargs": {"handle_timeout_termination": False}}, ReplayBuffer),
        (DQN, "MlpPolicy", BOX, {"train_freq": 1}, ReplayBuffer),
    ],
    ids=["SAC", "TD3", "NCLQL", "n-step", "n-step NCLQL", "dict", "discrete obs", "no time-outs", "discrete actions"],
)
def test_the_buffer_is_that_of_a_model_which_collected_the_episodes_itself(
    algorithm: type[OffPolicyAlgorithm],
    policy: str,
    observation_space: spaces.Space[Any],
    kwargs: dict[str, Any],
    buffer_class: type[ReplayBuffer],
) -> None:
    action_space = spaces.Discrete(3) if algorithm is DQN else ACTIONS
    tape = Tape(Ends(observation_space, action_space))
    collector: Any = algorithm(policy, tape, **tiny(**kwargs))
    collector.learn(3 + 4 + 5 + 3 + 4)  # ends with a time-out
    tape.write("test/tape-v0")

    model: Any = algorithm(policy, Ends(observation_space, action_space), **tiny(**kwargs))
    assert fill_replay_buffer(model, "test/tape-v0") == 19
    assert type(model.replay_buffer) is buffer_class
    assert_same_contents(model.replay_buffer, collector.replay_buffer)


def test_a_model_learns_on_from_the_data() -> None:
    record_dataset(None, "Pendulum-v1", "test/pendulum-v0", n_steps=50)
    model = SAC("MlpPolicy", "Pendulum-v1", **tiny(learning_starts=0, batch_size=8))
    fill_replay_buffer(model, "test/pendulum-v0")
    model.learn(5)
    assert model._n_updates == 5
    assert buffer_of(model).size() == 55


def test_images_are_stored_as_the_model_sees_them() -> None:
    tape = Tape(Ends(IMAGE, ACTIONS))
    kwargs = {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 2}}, "buffer_size": 20}
    collector = SAC("CnnPolicy", tape, **tiny(**kwargs))
    collector.learn(7)
    tape.write("test/image-v0")
    model = SAC("CnnPolicy", Ends(IMAGE, ACTIONS), **tiny(**kwargs))
    assert isinstance(model.env, VecTransposeImage)
    fill_replay_buffer(model, "test/image-v0")
    assert_same_contents(buffer_of(model), buffer_of(collector))


def test_an_episode_that_was_cut_is_bootstrapped() -> None:
    write_episodes("test/cut-v0", [2, 3], ["terminated", "open"])
    env = RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,)))
    model = SAC("MlpPolicy", env, **tiny())
    fill_replay_buffer(model, "test/cut-v0")
    buffer = buffer_of(model)
    np.testing.assert_array_equal(buffer.dones[:5, 0], [0, 1, 0, 0, 1])
    np.testing.assert_array_equal(buffer.timeouts[:5, 0], [0, 0, 0, 0, 1])
    np.testing.assert_allclose(buffer.actions[:5, 0, 0], [0, 0.05, 0, 0.05, 0.1], rtol=1e-5)  # the box is [-2, 2]


@pytest.mark.parametrize("n_envs", [2, 3])
def test_several_envs_share_the_dataset_without_joining_episodes(n_envs: int) -> None:
    write_episodes("test/one-v0", [4, 1, 6])
    write_episodes("test/two-v0", [7, 2], first=3)
    env = DummyVecEnv([lambda: RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,)))] * n_envs)
    model = SAC("MlpPolicy", env, **tiny())
    rows = 20 // n_envs
    assert fill_replay_buffer(model, ["test/one-v0", "test/two-v0"]) == rows * n_envs
    buffer = buffer_of(model)
    expected = [(e, t, t + 1 == length) for e, length in enumerate([4, 1, 6, 7, 2]) for t in range(length)]
    for i in range(n_envs):
        part = expected[i * rows : (i + 1) * rows]
        np.testing.assert_array_equal(buffer.observations[:rows, i], [(e, t) for e, t, _ in part])
        np.testing.assert_array_equal(buffer.next_observations[:rows, i], [(e, t + 1) for e, t, _ in part])
        ends = np.array([end for *_, end in part])
        dones = buffer.dones[:rows, i] * (1 - buffer.timeouts[:rows, i])
        np.testing.assert_array_equal(dones, ends)
        assert buffer.dones[rows - 1, i] == 1


def test_only_the_first_steps_are_taken_if_asked() -> None:
    write_episodes("test/long-v0", [4, 6])
    env = RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,)))
    model = SAC("MlpPolicy", env, **tiny(buffer_size=7))
    with pytest.raises(ValueError, match=r"room for 7 steps \(1 envs\), the data are 10: make the model with `buffer_size=10`"):
        fill_replay_buffer(model, "test/long-v0")
    assert buffer_of(model).size() == 0
    assert fill_replay_buffer(model, "test/long-v0", max_steps=7) == 7
    buffer = buffer_of(model)
    assert buffer.full
    assert (buffer.dones[6, 0], buffer.timeouts[6, 0]) == (1, 1)


def test_normalisation_statistics_stay_as_they_are_and_data_are_stored_raw() -> None:
    write_episodes("test/raw-v0", [5])
    env = RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,)))
    normalize = VecNormalize(DummyVecEnv([lambda: env]))
    model = SAC("MlpPolicy", normalize, **tiny())
    statistics: Any = normalize.obs_rms
    before = statistics.mean.copy()
    fill_replay_buffer(model, "test/raw-v0")
    np.testing.assert_array_equal(buffer_of(model).observations[:5, 0], [(0, t) for t in range(5)])
    np.testing.assert_array_equal(statistics.mean, before)


def test_actions_outside_the_box_are_clipped_with_a_count() -> None:
    dataset = write_episodes("test/far-v0", [5])
    with opened(dataset) as file:
        file["episode_0/actions"][3] = 3
    env = RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,)))
    model = SAC("MlpPolicy", env, **tiny())
    with pytest.warns(UserWarning, match="1 actions"):
        fill_replay_buffer(model, "test/far-v0")
    assert buffer_of(model).actions[3, 0, 0] == 1


# Hindsight


def bits() -> BitFlippingEnv:
    return BitFlippingEnv(n_bits=2, continuous=True, max_steps=3)


@pytest.mark.parametrize("copy_info_dict", [False, True])
def test_hindsight_goals_come_from_the_data_as_from_collected_episodes(copy_info_dict: bool) -> None:
    kwargs = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"copy_info_dict": copy_info_dict}}
    tape = Tape(bits())
    collector = SAC("MultiInputPolicy", tape, **tiny(**kwargs))
    collector.learn(30)
    while not buffer_of(collector).dones[buffer_of(collector).pos - 1].all():
        collector.learn(1, reset_num_timesteps=False)
    record = Replayer(tape)
    record_dataset(record.act, record, "test/bits-v0", n_steps=buffer_of(collector).size(), record_infos=True)
    model = SAC("MultiInputPolicy", bits(), **tiny(**kwargs))
    fill_replay_buffer(model, "test/bits-v0")
    buffer = buffer_of(model)
    assert_same_contents(buffer, buffer_of(collector))
    samples = []
    for other in (buffer, buffer_of(collector)):
        np.random.seed(0)  # noqa: NPY002
        samples.append(other.sample(64))
    assert (samples[0].rewards == samples[1].rewards).all()
    assert (samples[0].rewards == 0).any()
    assert (samples[0].rewards == -1).any()
    if copy_info_dict:
        assert isinstance(buffer, HerReplayBuffer)
        assert all(info["n"] == i for i, info in enumerate(buffer.infos[: buffer.size(), 0]))


class Replayer(gym.Env[Any, Any]):
    """Gives what is on a tape, with the step's number as an info."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.episode, self.steps, self.life = tape, -1, 0, -1
        self.observation_space, self.action_space = tape.observation_space, tape.action_space

    def act(self, observation: Any) -> Any:
        return self.tape.actions[self.episode][self.steps]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.steps = self.episode + 1, 0
        return self.tape.observations[self.episode][0], {"n": -1}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.life += 1
        reward, terminated, truncated = self.tape.results[self.episode][self.steps - 1]
        return self.tape.observations[self.episode][self.steps], reward, terminated, truncated, {"n": self.life}


def test_hindsight_is_refused_where_it_would_be_wrong() -> None:
    record_dataset(None, bits(), "test/bits-v0", n_steps=9)
    kwargs = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"copy_info_dict": True}}
    model = SAC("MultiInputPolicy", bits(), **tiny(**kwargs))
    with pytest.raises(ValueError, match="record_infos=True"):
        fill_replay_buffer(model, "test/bits-v0")

    class OtherReward(BitFlippingEnv):
        def compute_reward(self, *args: Any) -> Any:
            return super().compute_reward(*args) - 1

    env = OtherReward(n_bits=2, continuous=True, max_steps=3)
    model = SAC("MultiInputPolicy", env, **tiny(replay_buffer_class=HerReplayBuffer))
    with pytest.raises(ValueError, match="gives the recorded reward in 0% of the steps"):
        fill_replay_buffer(model, "test/bits-v0")


# Bad input


def test_data_of_another_task_are_refused() -> None:
    write_episodes("test/other-v0", [3])
    with pytest.raises(ValueError, match="observation space of dataset 'test/other-v0' is not that of the model"):
        fill_replay_buffer(SAC("MlpPolicy", "Pendulum-v1", **tiny()), "test/other-v0")
    record_dataset(None, "Pendulum-v1", "test/pendulum-v0", n_steps=3)
    stacked = VecFrameStack(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), 2)
    with pytest.raises(ValueError, match="with the same wrappers"):
        fill_replay_buffer(SAC("MlpPolicy", stacked, **tiny()), "test/pendulum-v0")


def test_a_buffer_that_is_in_use_is_left_alone() -> None:
    record_dataset(None, "Pendulum-v1", "test/pendulum-v0", n_steps=5)
    model = SAC("MlpPolicy", "Pendulum-v1", **tiny())
    fill_replay_buffer(model, "test/pendulum-v0")
    with pytest.raises(ValueError, match="already has 5 steps"):
        fill_replay_buffer(model, "test/pendulum-v0")


def test_damaged_data_leave_the_buffer_empty() -> None:
    dataset = write_episodes("test/fault-v0", [3, 3])
    with opened(dataset) as file:
        file["episode_1/rewards"][1] = np.nan
    env = RandomEnv(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,)))
    model = SAC("MlpPolicy", env, **tiny())
    with pytest.raises(ValueError, match="episode 1, step 1"):
        fill_replay_buffer(model, "test/fault-v0")
    assert buffer_of(model).size() == 0
