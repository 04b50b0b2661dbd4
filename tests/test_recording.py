"""Recording: real Minari datasets of what a policy did."""

import random
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import RescaleAction, TransformReward
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffrl import NCLQL
from sb3_diffrl.offline.evaluation import REFERENCES, normalized_score
from sb3_diffrl.offline.recording import record_dataset
from sb3_diffrl.offline.writing import ARROW_ROWS, DataFormat, DatasetWriter, recoverable_spec

from .envs import FaultyEnv, RandomEnv, box_env
from .minari_data import ACTION_SPACE, OBS_SPACE, Tape, same, write_episodes


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def tiny() -> dict[str, Any]:
    return {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "buffer_size": 100}


def pendulum(length: int = 12) -> gym.Env[Any, Any]:
    return gym.make("Pendulum-v1", max_episode_steps=length)


# Policies


@pytest.mark.parametrize("algorithm", [SAC, NCLQL])
def test_a_model_is_recorded_as_it_predicts(algorithm: type[SAC] | type[NCLQL]) -> None:
    kwargs = {"n_langevin_steps": 2} if algorithm is NCLQL else {}
    model = algorithm("MlpPolicy", "Pendulum-v1", **tiny(), **kwargs)  # type: ignore[arg-type]
    dataset = record_dataset(model, pendulum(), "test/model-v0", n_episodes=2, deterministic=True)
    for episode in dataset:
        predicted, _ = model.predict(episode.observations[:-1].astype(np.float32), deterministic=True)
        np.testing.assert_allclose(episode.actions, predicted, rtol=1e-4, atol=1e-4)
    assert dataset.storage.metadata["algorithm_name"] == algorithm.__name__


def test_a_model_trained_on_normalised_observations_sees_them_and_the_dataset_does_not() -> None:
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = SAC("MlpPolicy", env, learning_starts=500, **tiny())
    model.learn(50)
    dataset = record_dataset(model, pendulum(), "test/normalized-v0", n_episodes=1, deterministic=True)
    episode = dataset[0]
    np.testing.assert_allclose(np.square(episode.observations[:, :2]).sum(axis=1), 1, rtol=1e-5)  # cosine and sine
    seen = env.normalize_obs(episode.observations[:-1])
    assert np.abs(seen - episode.observations[:-1]).max() > 0.1
    np.testing.assert_allclose(episode.actions, model.predict(seen, deterministic=True)[0], rtol=1e-5, atol=1e-5)


def test_a_function_and_its_name_are_recorded() -> None:
    def brake(observation: np.ndarray) -> list[float]:
        return [float(-observation[2] / 8)]

    dataset = record_dataset(brake, "Pendulum-v1", "test/function-v0", n_steps=20)
    episode = dataset[0]
    np.testing.assert_allclose(episode.actions[:, 0], -episode.observations[:-1, 2] / 8, rtol=1e-6)
    assert dataset.storage.metadata["algorithm_name"] == "brake"


def test_discrete_actions_are_recorded() -> None:
    model = DQN("MlpPolicy", "CartPole-v1", **tiny())
    dataset = record_dataset(model, "CartPole-v1", "test/discrete-v0", n_episodes=2, seed=0)
    assert dataset[0].actions.dtype == np.int64
    assert dataset[0].terminations[-1]


def test_a_recurrent_policy_starts_afresh_in_each_episode() -> None:
    model = RecurrentPPO("MlpLstmPolicy", "Pendulum-v1", n_steps=8, device="cpu", policy_kwargs={"lstm_hidden_size": 4})
    dataset = record_dataset(model, pendulum(5), "test/recurrent-v0", n_episodes=2, deterministic=True)
    for episode in dataset:
        state = None
        for t in range(5):
            action, state = model.predict(episode.observations[t], state, np.array([t == 0]), deterministic=True)
            np.testing.assert_allclose(episode.actions[t], action, rtol=1e-5)


def test_action_noise_is_added_in_the_scaled_box() -> None:
    noise = NormalActionNoise(np.full(1, 0.25), np.zeros(1))
    dataset = record_dataset(lambda _: np.ones(1), pendulum(), "test/noise-v0", n_steps=4, action_noise=noise)
    np.testing.assert_allclose(dataset[0].actions, 1.5)  # the box is [-2, 2]
    dataset = record_dataset(lambda _: np.full(1, 1.9), pendulum(), "test/clipped-v0", n_steps=4, action_noise=noise)
    np.testing.assert_array_equal(dataset[0].actions, 2)


def test_action_noise_starts_afresh_in_each_episode() -> None:
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.zeros(1), theta=1.0, dt=0.5, initial_noise=np.ones(1))
    dataset = record_dataset(lambda _: np.zeros(1), pendulum(3), "test/ou-v0", n_episodes=2, action_noise=noise)
    for episode in dataset:
        np.testing.assert_allclose(episode.actions[:, 0], [1, 0.5, 0.25])


# How much, and from which seed


def test_exactly_as_many_steps_as_asked_are_recorded_and_the_cut_is_a_truncation() -> None:
    dataset = record_dataset(None, pendulum(12), "test/steps-v0", n_steps=30)
    assert [len(episode) for episode in dataset] == [12, 12, 6]
    for episode in dataset:
        np.testing.assert_array_equal(episode.truncations, np.arange(len(episode)) == len(episode) - 1)
        assert not episode.terminations.any()
    provenance = dataset.storage.metadata["provenance"]
    returns = [episode.rewards.sum() for episode in dataset][:2]
    assert provenance["n_whole_episodes"] == 2
    np.testing.assert_allclose((provenance["mean_return"], provenance["std_return"]), (np.mean(returns), np.std(returns)))


def test_an_end_that_falls_on_the_last_step_is_no_cut() -> None:
    dataset = record_dataset(None, pendulum(10), "test/exact-v0", n_steps=20)
    assert dataset.storage.metadata["provenance"]["n_whole_episodes"] == 2


def test_a_seed_decides_everything_and_disturbs_nothing() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", **tiny())
    noise = NormalActionNoise(np.zeros(1), np.full(1, 0.1))

    def record(name: str, seed: int) -> minari.MinariDataset:
        return record_dataset(model, pendulum(), f"test/{name}-v0", n_episodes=2, seed=seed, action_noise=noise)

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    th.manual_seed(1)
    expected = random.random(), np.random.random(), th.rand(1)  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    th.manual_seed(1)
    one = record("one", 3)
    assert (random.random(), np.random.random(), th.rand(1)) == expected  # noqa: NPY002
    assert same(one, record("again", 3))
    assert not same(one, record("other", 4))


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_each_episode_can_be_played_again_from_its_seed(data_format: DataFormat) -> None:
    dataset = record_dataset(None, pendulum(), "test/replay-v0", n_episodes=3, data_format=data_format)
    env = dataset.recover_environment()
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    assert len(set(seeds)) == 3
    for seed, episode in zip(seeds, dataset, strict=True):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], episode.observations[0])
        rewards = [env.step(action)[1] for action in episode.actions]
        np.testing.assert_array_equal(rewards, episode.rewards)


# What is stored


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_halfcheetah_is_recorded_with_its_infos(data_format: DataFormat) -> None:
    dataset = record_dataset(
        None, "HalfCheetah-v5", "test/cheetah-v0", n_steps=10, seed=0, record_infos=True, data_format=data_format
    )
    infos = dataset[0].infos
    assert set(infos) == {"x_position", "x_velocity", "reward_forward", "reward_ctrl"}
    assert all(len(values) == 11 for values in infos.values())
    assert [key for key in sorted(infos) if np.isnan(infos[key][0])] == ["reward_ctrl", "reward_forward", "x_velocity"]
    np.testing.assert_allclose(infos["reward_forward"][1:] + infos["reward_ctrl"][1:], dataset[0].rewards)
    np.testing.assert_allclose(np.diff(infos["x_position"]) / 0.05, infos["x_velocity"][1:])


class Talkative(RandomEnv):
    """Infos of every kind, which come and go."""

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        info = {"n": self.steps, "nested": {"v": np.full(2, self.steps)}, "text": "left out", "shape": np.zeros(self.steps)}
        if self.steps > 1:
            info["late"] = True
        return obs, reward, terminated, truncated, info


def test_infos_that_come_and_go_are_filled_and_others_are_left_out_with_a_warning() -> None:
    env = Talkative(spaces.Box(-1, 1, (1,)), ACTION_SPACE, length=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = record_dataset(None, env, "test/talk-v0", n_episodes=2, record_infos=True)
    assert sum("Info 'text' is left out" in str(warning.message) for warning in caught) == 1
    for episode in dataset:
        np.testing.assert_array_equal(episode.infos["n"], [np.nan, 1, 2, 3])
        np.testing.assert_array_equal(episode.infos["nested"]["v"], [[np.nan, np.nan], [1, 1], [2, 2], [3, 3]])
        np.testing.assert_array_equal(episode.infos["late"], [False, False, True, True])
        assert "text" not in episode.infos


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")
def test_images_are_stored_without_loss() -> None:
    env = Tape(RandomEnv(spaces.Box(0, 255, (40, 40, 3), np.uint8), ACTION_SPACE, length=3))
    dataset = record_dataset(None, env, "test/image-v0", n_episodes=1)
    np.testing.assert_array_equal(dataset[0].observations, env.observations[0])


def test_provenance_names_what_decides_the_data() -> None:
    dataset = record_dataset(
        None, "Pendulum-v1", "test/named-v0", n_steps=3, seed=7, description="three steps", provenance={"level": "random"}
    )
    metadata = minari.load_dataset("test/named-v0").storage.metadata
    assert metadata["description"] == "three steps"
    assert metadata["provenance"]["level"] == metadata["provenance"]["algorithm"] == metadata["algorithm_name"] == "random"
    assert metadata["provenance"]["seed"] == 7
    assert {"sb3_diffrl", "stable-baselines3", "gymnasium", "minari", "mujoco", "torch"} <= set(metadata["provenance"]["versions"])
    assert metadata["provenance"]["mean_return"] is None
    assert minari.list_local_datasets()["test/named-v0"]["total_steps"] == dataset.total_steps == 3


def test_reference_scores_make_minaris_normalised_score_work() -> None:
    dataset = record_dataset(None, "Pendulum-v1", "test/scores-v0", n_steps=3, ref_min_score=-1000, ref_max_score=-200)
    np.testing.assert_allclose(minari.get_normalized_score(dataset, np.array([-1000, -600, -200])), [0, 0.5, 1])
    np.testing.assert_allclose(normalized_score("test/scores-v0", [-1000, -600, -200]), [0, 0.5, 1])


def test_known_references_are_stored_unless_others_are_given() -> None:
    known = REFERENCES["Pendulum-v1"]["random"]["mean_return"]
    assert record_dataset(None, "Pendulum-v1", "test/known-v0", n_steps=3).storage.metadata["ref_min_score"] == known
    given = record_dataset(None, "Pendulum-v1", "test/given-v0", n_steps=3, ref_min_score=-1)
    assert given.storage.metadata["ref_min_score"] == -1
    other_task = gym.make("Pendulum-v1", g=3.0)
    assert "ref_min_score" not in record_dataset(None, other_task, "test/other-v0", n_steps=3).storage.metadata


def test_minaris_collector_writes_the_same_data() -> None:
    pytest.importorskip("jax", reason="minari.DataCollector needs jax")
    ours = record_dataset(None, pendulum(), "test/ours-v0", n_steps=30, seed=5)
    collector = minari.DataCollector(pendulum())
    seeds = [metadata["seed"] for metadata in ours.storage.get_episode_metadata(ours.episode_indices)]
    for seed, episode in zip(seeds, ours, strict=True):
        collector.reset(seed=seed)
        for action in episode.actions:
            collector.step(action)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = collector.create_dataset("test/theirs-v0")
    assert same(ours, theirs)
    assert all(np.array_equal(a.truncations, b.truncations) for a, b in zip(ours, theirs, strict=True))
    episodes = [list(dataset.storage.get_episode_metadata(range(3))) for dataset in (ours, theirs)]
    assert episodes[0] == episodes[1]
    assert set(theirs.storage.metadata) - set(ours.storage.metadata) <= {"dataset_size"}


# Environments


class Small(RandomEnv):
    def __init__(self) -> None:
        super().__init__(OBS_SPACE, ACTION_SPACE)


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_the_environment_is_rebuilt_with_its_wrappers_but_not_its_monitor() -> None:
    env = Monitor(RescaleAction(pendulum(7), -1.0, 1.0))  # type: ignore[arg-type]
    spec = recoverable_spec(env)
    assert spec is not None
    dataset = record_dataset(None, env, "test/wrapped-v0", n_steps=3)
    rebuilt = dataset.recover_environment()
    assert rebuilt.action_space == spaces.Box(-1, 1, (1,))
    assert dataset.env_spec is not None
    assert dataset.env_spec.max_episode_steps == 7


def test_a_window_that_was_watched_does_not_open_again() -> None:
    dataset = record_dataset(None, gym.make("Pendulum-v1", render_mode="rgb_array"), "test/watched-v0", n_steps=3)
    assert dataset.recover_environment().render_mode is None


def test_an_environment_that_cannot_be_rebuilt_is_recorded_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="not registered"):
        assert record_dataset(None, box_env(), "test/unregistered-v0", n_steps=3).env_spec is None
    with pytest.warns(UserWarning, match="not JSON serializable"):
        dataset = record_dataset(None, TransformReward(pendulum(), lambda reward: 2 * float(reward)), "test/callable-v0", n_steps=3)
    assert dataset.env_spec is None
    with pytest.warns(UserWarning, match=r"\['Tape'\] do not record their arguments"):
        assert record_dataset(None, Tape(pendulum()), "test/tape-v0", n_steps=3).env_spec is None


def test_a_registered_class_is_rebuilt_by_its_name() -> None:
    gym.register("Small-v0", entry_point=Small)  # type: ignore[arg-type]
    try:
        dataset = record_dataset(None, "Small-v0", "test/small-v0", n_steps=3)
    finally:
        del gym.registry["Small-v0"]
    assert isinstance(dataset.recover_environment().unwrapped, Small)


def test_an_env_that_was_made_here_is_closed_and_a_users_is_not() -> None:
    class Closable(RandomEnv):
        closed = False

        def close(self) -> None:
            self.closed = True

    made: list[Closable] = []

    def make() -> Closable:
        made.append(Closable(OBS_SPACE, ACTION_SPACE))
        return made[-1]

    users = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record_dataset(None, users, "test/users-v0", n_steps=3)
        record_dataset(None, make, "test/made-v0", n_steps=3)
    assert [env.closed for env in made] == [False, True]


# Wrong arguments


@pytest.mark.parametrize("kwargs", [{}, {"n_episodes": 1, "n_steps": 1}, {"n_episodes": 0}, {"n_steps": -1}, {"n_steps": 10.5}])
def test_either_episodes_or_steps_are_asked_for(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"`n_episodes`|`n_steps`"):
        record_dataset(None, "Pendulum-v1", "test/count-v0", n_episodes=kwargs.get("n_episodes"), n_steps=kwargs.get("n_steps"))


def test_what_cannot_be_recorded_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"action \[3\.\] is not in the action space"):
        record_dataset(lambda _: np.full(1, 3), "Pendulum-v1", "test/far-v0", n_steps=3)
    with pytest.raises(ValueError, match="is not in the action space"):
        record_dataset(lambda _: np.full(1, np.nan), "Pendulum-v1", "test/nan-v0", n_steps=3)
    with pytest.raises(ValueError, match="The model's action space"):
        record_dataset(SAC("MlpPolicy", box_env(), **tiny()), "Pendulum-v1", "test/space-v0", n_steps=3)
    with pytest.raises(ValueError, match="namespace/name-v0"):
        record_dataset(None, "Pendulum-v1", "test/unversioned", n_steps=3)
    with pytest.raises(ValueError, match="bounded Box"):
        record_dataset(None, "CartPole-v1", "test/noise-v0", n_steps=3, action_noise=NormalActionNoise(np.zeros(1), np.ones(1)))
    with pytest.raises(TypeError, match="single env"):
        record_dataset(None, DummyVecEnv([pendulum]), "test/vec-v0", n_steps=3)  # type: ignore[arg-type]
    assert minari.list_local_datasets() == {}


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")
@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_a_faulty_env_is_not_recorded(fault: str) -> None:
    with pytest.raises(ValueError, match=f"Episode 1, step {3 if fault == 'observation' else 2}: {fault}s has the value nan"):
        record_dataset(None, FaultyEnv(fault, np.nan, 23), "test/faulty-v0", n_steps=100)


def test_spaces_that_minari_cannot_store_are_refused() -> None:
    with pytest.raises(ValueError, match="Minari cannot store the observation space"):
        DatasetWriter("test/graph-v0", spaces.Graph(ACTION_SPACE, None), ACTION_SPACE)


def test_a_writer_checks_its_episodes() -> None:
    observations, actions = np.zeros((3, 2)), np.zeros((2, 1))
    with DatasetWriter("test/checked-v0", OBS_SPACE, ACTION_SPACE) as writer:
        with pytest.raises(ValueError, match="No episode was added"):
            writer.publish()
        with pytest.raises(ValueError, match="no steps"):
            writer.add_episode(observations[:1], actions[:0], [], [], [])
        with pytest.raises(ValueError, match="2 observations, in place of 3"):
            writer.add_episode(observations[:2], actions, [0, 0], [False, True], [False, False])
        with pytest.raises(ValueError, match="goes on after its end in step 0"):
            writer.add_episode(observations, actions, [0, 0], [True, False], [False, False])
        with pytest.raises(ValueError, match="2 infos, in place of 3"):
            writer.add_episode(observations, actions, [0, 0], [False, True], [False, False], [{}, {}])
        writer.add_episode(observations, actions, [0, 0], [False, True], [False, False])
        assert writer.publish().total_steps == 2
    with DatasetWriter("test/long-v0", OBS_SPACE, ACTION_SPACE, data_format="arrow") as writer:
        flags = np.zeros(ARROW_ROWS, bool)
        with pytest.raises(ValueError, match="Use hdf5"):
            writer.add_episode(np.zeros((ARROW_ROWS + 1, 2)), np.zeros((ARROW_ROWS, 1)), flags, flags, flags)


def test_a_dataset_that_appeared_meanwhile_is_kept() -> None:
    with DatasetWriter("test/race-v0", OBS_SPACE, ACTION_SPACE) as writer:
        writer.add_episode(np.zeros((2, 2)), np.zeros((1, 1)), [0], [True], [False])
        write_episodes("test/race-v0", [5])
        with pytest.raises(FileExistsError):
            writer.publish()
    assert minari.load_dataset("test/race-v0").total_steps == 5


def test_a_namespace_is_no_place_for_a_dataset() -> None:
    write_episodes("test/deep-v0/er-v0", [2])
    with pytest.raises(FileExistsError, match="is no dataset"):
        write_episodes("test/deep-v0", [2])


class Reusing(gym.Env[np.ndarray, np.ndarray]):
    """Writes every observation and info into the same array."""

    observation_space = spaces.Box(-100, 100, (1,), np.float64)
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = np.zeros(1)
        return self.state, {"x": 0}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.state += 1
        return self.state, 0.0, False, bool(self.state[0] == 4), {"x": float(self.state[0]) / 8}


@pytest.mark.filterwarnings("ignore")
def test_arrays_that_env_and_policy_use_again_are_copied() -> None:
    action = np.zeros(1, np.float32)

    def policy(observation: np.ndarray) -> np.ndarray:
        action[:] = observation / 10
        return action

    dataset = record_dataset(policy, Reusing(), "test/reusing-v0", n_episodes=3, seed=0, record_infos=True)
    for episode in dataset:
        np.testing.assert_array_equal(episode.observations[:, 0], np.arange(5))
        np.testing.assert_allclose(episode.actions[:, 0], np.arange(4) / 10, rtol=1e-6)
        np.testing.assert_array_equal(episode.infos["x"][1:], np.arange(1, 5) / 8)


def test_a_fraction_is_no_discrete_action() -> None:
    with pytest.raises(ValueError, match="not in the action space"):
        record_dataset(lambda _: 0.9, "CartPole-v1", "test/cartpole-v0", n_steps=5)


def test_metadata_cannot_change_the_id() -> None:
    dataset = record_dataset(
        None, "Pendulum-v1", "test/pendulum-v0", n_steps=5, metadata={"dataset_id": "other/x-v0", "author": {"me"}}
    )
    assert dataset.id == "test/pendulum-v0"
