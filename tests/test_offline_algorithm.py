"""What every offline agent does as Stable-Baselines3's algorithms do, shown on DiffusionBC."""

import io
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffrl import DiffusionBC
from sb3_diffrl.common import CosineSchedule, NonFiniteError
from sb3_diffrl.offline import Normalizer, OfflineDataset, record_dataset

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [16]}, "batch_size": 8, "device": "cpu", "seed": 0}


@pytest.fixture
def dataset_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    record_dataset(None, "Pendulum-v1", "test/pendulum/random-v0", n_steps=450, seed=0)
    return "test/pendulum/random-v0"


def make_dataset(n_episodes: int = 5, length: int = 20, action_space: spaces.Space[Any] | None = None) -> OfflineDataset:
    rng = np.random.default_rng(0)
    n = n_episodes * length
    ends = np.arange(1, n + 1) % length == 0
    return OfflineDataset(
        rng.normal(3, 2, (n + n_episodes, 3)).astype(np.float32),
        rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        np.zeros(n, bool),
        ends,
        np.arange(0, n + 1, length),
        spaces.Box(-np.inf, np.inf, (3,)),
        spaces.Box(-1, 1, (2,)) if action_space is None else action_space,
    )


def weights(model: DiffusionBC) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def assert_same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not th.equal(a[name], b[name])] == []


class StopAt(BaseCallback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        return self.num_timesteps < self.step


def test_learn_counts_gradient_steps_and_calls_back_after_each() -> None:
    seen = []

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            seen.append((self.num_timesteps, self.model._n_updates))
            return True

    with pytest.warns(UserWarning, match="without an environment to evaluate in"):
        DiffusionBC("MlpPolicy", dataset=make_dataset(), **TINY).learn(7, Count())
    assert seen == [(i, i) for i in range(1, 8)]


def test_spaces_and_evaluation_env_come_from_the_dataset(dataset_id: str) -> None:
    model = DiffusionBC("MlpPolicy", dataset=dataset_id, **TINY).learn(5)
    assert model.observation_space == gym.make("Pendulum-v1").observation_space
    env = model.get_env()
    assert env is not None
    mean, _ = evaluate_policy(model, env, 1)
    assert -2000 < np.mean(mean) < 0


def test_callbacks_of_stable_baselines3_work(dataset_id: str, tmp_path: Path) -> None:
    model = DiffusionBC("MlpPolicy", dataset=dataset_id, tensorboard_log=str(tmp_path / "tb"), **TINY)
    checkpoints = CheckpointCallback(5, str(tmp_path / "checkpoints"))
    stop = StopTrainingOnRewardThreshold(-1e6)
    evaluations = EvalCallback(
        Monitor(gym.make("Pendulum-v1")),
        stop,
        n_eval_episodes=1,
        eval_freq=15,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="rich is experimental")
        model.learn(100, CallbackList([checkpoints, evaluations]), log_interval=5, progress_bar=True)
    assert model.num_timesteps == 15  # stopped at the first evaluation
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"rl_model_{i}_steps.zip" for i in (5, 10, 15)}
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [15]
    assert DiffusionBC.load(tmp_path / "best_model").num_timesteps == 15
    (run,) = (tmp_path / "tb").iterdir()
    assert run.name == "DiffusionBC_1"


def test_logs_hold_the_means_since_the_last_ones(tmp_path: Path) -> None:
    from stable_baselines3.common.logger import configure

    model = DiffusionBC("MlpPolicy", dataset=make_dataset(), learning_rate=CosineSchedule(1e-3), **TINY)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    losses = []
    update = model.update

    def noted() -> dict[str, th.Tensor]:
        metrics = update()
        losses.append(metrics["loss"].item())
        return metrics

    model.update = noted  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="without an environment"):
        model.learn(8, log_interval=4)
    table = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    np.testing.assert_allclose(table["trainloss"], [np.mean(losses[:4]), np.mean(losses[4:])], rtol=1e-5)
    assert table["timetotal_timesteps"].tolist() == [4, 8]
    # The rate of the last step before each log: progress 5/8 and 1/8 remaining
    expected = [1e-3 * 0.5 * (1 - np.cos(np.pi * left)) for left in (5 / 8, 1 / 8)]
    np.testing.assert_allclose(table["trainlearning_rate"], expected, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_stopped_saved_loaded_and_continued_run_equals_one_that_never_stopped(
    dataset_id: str, tmp_path: Path, solver: Any
) -> None:
    def make() -> DiffusionBC:
        return DiffusionBC("MlpPolicy", dataset=dataset_id, learning_rate=CosineSchedule(3e-3), solver=solver, **TINY)

    straight = make().learn(30)
    make().learn(30, StopAt(13)).save(tmp_path / "half")
    th.manual_seed(12345)  # whatever else happened in between
    resumed = DiffusionBC.load(tmp_path / "half", device="cpu").learn(17, reset_num_timesteps=False)
    assert resumed.num_timesteps == 30
    assert_same(weights(straight), weights(resumed))
    for a, b in zip(straight.policy.optimizer.state.values(), resumed.policy.optimizer.state.values(), strict=True):
        assert_same(a, b)


def test_evaluating_does_not_change_a_run(dataset_id: str) -> None:
    plain = DiffusionBC("MlpPolicy", dataset=dataset_id, **TINY).learn(20)
    evaluated = DiffusionBC("MlpPolicy", dataset=dataset_id, **TINY)
    evaluated.learn(
        20, EvalCallback(Monitor(gym.make("Pendulum-v1")), n_eval_episodes=1, eval_freq=5, deterministic=False, verbose=0)
    )
    assert_same(weights(plain), weights(evaluated))


def test_seeds_decide_the_run(dataset_id: str) -> None:
    runs = [weights(DiffusionBC("MlpPolicy", dataset=dataset_id, **{**TINY, "seed": seed}).learn(5)) for seed in (1, 1, 2)]
    assert_same(runs[0], runs[1])
    assert not th.equal(runs[0]["model.denoiser.net.0.weight"], runs[2]["model.denoiser.net.0.weight"])


def test_save_and_load_without_the_data(dataset_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiffusionBC("MlpPolicy", dataset=dataset_id, **TINY).learn(5)
    buffer = io.BytesIO()
    model.save(buffer)
    obs = np.ones((4, 3), np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    buffer.seek(0)
    loaded = DiffusionBC.load(buffer, device="cpu")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    assert list(loaded.dataset_ids) == [dataset_id]
    with pytest.raises(FileNotFoundError, match="test/pendulum/random-v0"):
        loaded.learn(1)
    with_env = DiffusionBC.load(io.BytesIO(buffer.getvalue()), env=gym.make("Pendulum-v1"), device="cpu")
    assert np.mean(evaluate_policy(with_env, with_env.get_env(), 1)[0]) < 0  # type: ignore[arg-type]


def test_the_file_does_not_grow_with_the_data() -> None:
    sizes = []
    for n_episodes in (2, 200):
        buffer = io.BytesIO()
        DiffusionBC("MlpPolicy", dataset=make_dataset(n_episodes), **TINY).save(buffer)
        sizes.append(buffer.tell())
    assert abs(sizes[1] - sizes[0]) < 2000


def test_parameters_can_be_taken_and_given() -> None:
    with pytest.warns(UserWarning, match="without an environment"):
        first = DiffusionBC("MlpPolicy", dataset=make_dataset(), **TINY).learn(3)
    second = DiffusionBC("MlpPolicy", dataset=make_dataset(), **{**TINY, "seed": 1})
    assert set(first.get_parameters()) == {"policy", "policy.optimizer"}
    second.set_parameters(first.get_parameters())  # type: ignore[arg-type]
    assert_same(weights(first), weights(second))


def test_other_data_under_the_same_id_are_noticed(dataset_id: str, tmp_path: Path) -> None:
    part = minari.load_dataset(dataset_id).filter_episodes(lambda episode: episode.id == 0)
    model = DiffusionBC("MlpPolicy", dataset=part, **TINY).learn(2)
    model.save(tmp_path / "model")
    loaded = DiffusionBC.load(tmp_path / "model", device="cpu")
    with pytest.raises(ValueError, match=r"trained on 200 steps .* of which 450"):
        loaded.learn(1)
    loaded.set_dataset(part)
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded.num_timesteps == 3


def test_data_without_an_id_are_asked_for(tmp_path: Path) -> None:
    DiffusionBC("MlpPolicy", dataset=make_dataset(), **TINY).save(tmp_path / "model")
    with pytest.raises(ValueError, match="set_dataset"):
        DiffusionBC.load(tmp_path / "model").learn(1)


def test_without_an_environment_training_goes_on_and_stepping_says_why() -> None:
    model = DiffusionBC("MlpPolicy", dataset=make_dataset(), **TINY)
    with pytest.warns(UserWarning, match="Training goes on without an environment"):
        model.learn(2)
    with pytest.raises(RuntimeError, match="no environment to step: This dataset was not read from disk"):
        evaluate_policy(model, model.get_env(), 1)  # type: ignore[arg-type]


def test_an_env_of_other_spaces_is_refused(dataset_id: str) -> None:
    for action in (
        lambda: DiffusionBC("MlpPolicy", "MountainCarContinuous-v0", dataset=dataset_id, **TINY),
        lambda: DiffusionBC("MlpPolicy", dataset=dataset_id, **TINY).set_env(gym.make("MountainCarContinuous-v0")),
    ):
        with pytest.raises(ValueError, match="observation space of the environment is not that of the dataset"):
            action()


def test_several_envs_or_normalised_ones_are_refused(dataset_id: str) -> None:
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)
    with pytest.raises(ValueError, match="takes one environment, not 2"):
        DiffusionBC("MlpPolicy", env, dataset=dataset_id, **TINY)
    with pytest.raises(ValueError, match="without VecNormalize"):
        DiffusionBC("MlpPolicy", VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")])), dataset=dataset_id, **TINY)


def test_no_dataset_is_an_error() -> None:
    with pytest.raises(ValueError, match="Give a `dataset`"):
        DiffusionBC("MlpPolicy", "Pendulum-v1")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(2), "not a Box"),
        (spaces.Box(-np.inf, np.inf, (2,)), "not bounded"),
        (spaces.Box(np.array([-1, 1], np.float32), np.array([1, 1], np.float32)), r"not below their high, at \[\(1,\)\]"),
    ],
)
def test_actions_that_cannot_be_scaled_are_refused(space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionBC("MlpPolicy", dataset=make_dataset(action_space=space), **TINY)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = DiffusionBC("MlpPolicy", dataset=make_dataset(), **TINY)
    before = weights(model)
    model.data.actions[:] = th.nan
    with (
        pytest.warns(UserWarning, match="without an environment"),
        pytest.raises(NonFiniteError, match="loss is nan at gradient step 1"),
    ):
        model.learn(5)
    assert_same(before, weights(model))


def test_normaliser_standardises_the_data_and_travels_with_the_model(tmp_path: Path) -> None:
    dataset = make_dataset()
    model = DiffusionBC("MlpPolicy", dataset=dataset, **TINY)
    normalised = model.policy.normalizer.normalize(th.as_tensor(dataset.observations))
    th.testing.assert_close(normalised.mean(0), th.zeros(3), atol=1e-5, rtol=0)
    th.testing.assert_close(normalised.std(0, correction=0), th.ones(3), atol=1e-5, rtol=0)
    model.save(tmp_path / "model")
    assert th.equal(DiffusionBC.load(tmp_path / "model").policy.normalizer.mean, model.policy.normalizer.mean)


def test_a_model_is_loaded_for_other_data(dataset_id: str, tmp_path: Path) -> None:
    model = DiffusionBC("MlpPolicy", dataset=dataset_id, device="cpu", seed=0)
    model.save(tmp_path / "model")
    other = "test/pendulum/other-v0"
    record_dataset(None, "Pendulum-v1", other, n_steps=200, seed=1)
    loaded = DiffusionBC.load(tmp_path / "model", dataset=other, device="cpu")
    assert loaded.dataset.ids == (other,)
    assert loaded.dataset.n_steps == 200


def test_the_rebuilt_env_begins_where_the_seed_says(dataset_id: str) -> None:
    def first(seed: int) -> np.ndarray:
        env = DiffusionBC("MlpPolicy", dataset=dataset_id, device="cpu", seed=seed).get_env()
        assert env is not None
        return np.asarray(env.reset())

    np.testing.assert_array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))


def test_an_observation_of_another_shape_is_refused(dataset_id: str) -> None:
    model = DiffusionBC("MlpPolicy", dataset=dataset_id, device="cpu", seed=0)
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        model.predict(np.array([0.5]))


def test_a_nearly_constant_coordinate_is_only_shifted() -> None:
    vectors = np.full((100, 1), 0.42, np.float32)
    vectors[::2] = np.nextafter(np.float32(0.42), np.float32(1))
    normalizer = Normalizer(1).fit(vectors)
    assert float(normalizer.normalize(th.tensor([[0.421]]))) == pytest.approx(0.001, rel=1e-2)
