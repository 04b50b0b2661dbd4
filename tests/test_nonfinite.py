"""NaN and infinite numbers: found in the step they come in, named, never learned from; extreme but finite ones are learned from."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, ConvertCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_diffrl import LQL, NCLQL, DiffusionBC, OfflineDataset
from sb3_diffrl.common import MAX_SKIPPED, NonFiniteError
from sb3_diffrl.native.vectors import total_norm
from sb3_diffrl.offline.offline_algorithm import OfflineAlgorithm
from sb3_diffrl.pg import PG
from sb3_diffrl.planner import DiffusionPlanner

from .envs import FaultyEnv, RandomEnv, box_env

TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "n_langevin_steps": 1,
    "learning_starts": 5,
    "batch_size": 8,
    "buffer_size": 1000,
    "device": "cpu",
    "seed": 0,
}
ONLINE = pytest.mark.parametrize("algorithm", [LQL, NCLQL])
pytestmark = pytest.mark.filterwarnings("ignore:Training goes on without an environment")


def all_finite(model: Any) -> bool:
    tensors = [*model.policy.state_dict().values()]
    optimizers = [model.critic.optimizer] if isinstance(model, LQL) else model._optimizers()
    for optimizer in optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, th.Tensor)]
    return all(bool(th.isfinite(tensor).all()) for tensor in tensors)


@ONLINE
@pytest.mark.parametrize("fault", ["reward", "observation"])
@pytest.mark.parametrize("at", [3, 17, 20])
def test_a_faulty_step_is_skipped_and_counted(algorithm: type[LQL], fault: str, at: int) -> None:
    env = DummyVecEnv([lambda: FaultyEnv("none", 0.0, 0), lambda: FaultyEnv(fault, np.nan, at)])
    model = algorithm("MlpPolicy", env, on_nonfinite="skip", **TINY).learn(100)
    assert model.n_skipped == 1
    assert model.num_timesteps == 100
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 50
    assert np.isfinite(model.replay_buffer.observations).all()
    assert np.isfinite(model.replay_buffer.rewards).all()
    # What comes after the skipped step is another episode
    assert model.replay_buffer.dones[at - 2].all()
    assert all_finite(model)


@ONLINE
def test_an_env_that_gives_nothing_else_is_raised_in_the_end(algorithm: type[LQL]) -> None:
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), reward=np.inf)
    model = algorithm("MlpPolicy", env, on_nonfinite="skip", **TINY)
    with pytest.raises(NonFiniteError, match="env 0 gave a non-finite reward: inf"):
        model.learn(10)
    assert model.n_skipped == MAX_SKIPPED


@ONLINE
@pytest.mark.parametrize("reward", [1e25, -3e38])
def test_rewards_whose_squares_overflow_are_named_and_poison_nothing(algorithm: type[LQL], reward: float) -> None:
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), reward=reward)
    model = algorithm("MlpPolicy", env, **TINY)
    before = [parameter.clone() for parameter in model.critic.parameters()]
    with pytest.raises(NonFiniteError, match=r"The loss is inf \(td_loss inf\) at env step 6; .*on_nonfinite"):
        model.learn(100)
    assert all(th.equal(*pair) for pair in zip(before, model.critic.parameters(), strict=True))
    assert all_finite(model)


@ONLINE
def test_a_gradient_that_overflows_is_named(algorithm: type[LQL], monkeypatch: pytest.MonkeyPatch) -> None:
    model = algorithm("MlpPolicy", box_env(), **TINY)
    name, parameter = next(iter(model.critic.named_parameters()))
    parameter.register_hook(lambda gradient: gradient * np.nan)  # type: ignore[no-untyped-call]
    with pytest.raises(NonFiniteError, match=rf"gradient is not finite.*in {name}\) at env step 6"):
        model.learn(100)
    assert all_finite(model)


@ONLINE
def test_a_gradient_now_and_then_is_skipped(algorithm: type[LQL]) -> None:
    model = algorithm("MlpPolicy", box_env(), on_nonfinite="skip", **TINY)
    calls = iter(range(1000))
    parameter = next(model.critic.parameters())
    parameter.register_hook(lambda g: g * (np.inf if next(calls) % 7 == 3 else 1))  # type: ignore[no-untyped-call]
    model.learn(60)
    assert 5 <= model.n_skipped <= 30
    assert all_finite(model)
    assert model.logger is not None


@ONLINE
@pytest.mark.parametrize("reward", [1e-30, 0.0, 1.0, 1e8])
def test_extreme_and_constant_rewards_are_learned_from(algorithm: type[LQL], reward: float) -> None:
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), reward=reward)
    model = algorithm("MlpPolicy", env, **TINY).learn(60)
    assert all_finite(model)
    assert env.action_space.contains(model.predict(env.observation_space.sample())[0])


@ONLINE
@pytest.mark.parametrize(
    "space",
    [
        *(spaces.Box(-1, 1, (3,), np.float16), spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1e6, 1e6, (3,), np.float64)),
        *(spaces.Box(-5, 5, (3,), np.int32), spaces.Box(-5, 5, (3,), np.int64), spaces.Box(0.5, 0.5, (3,)), spaces.Discrete(4)),
        *(spaces.Box(0, 255, (3,), np.uint8), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)),
    ],
    ids=repr,
)
def test_observations_of_every_type_are_learned_from(algorithm: type[LQL], space: spaces.Space[Any]) -> None:
    env = RandomEnv(space, spaces.Box(-1, 1, (2,)))
    model = algorithm("MlpPolicy", env, **TINY).learn(30)
    assert all_finite(model)
    action, _ = model.predict(space.sample())
    assert env.action_space.contains(action)


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_fault_of_the_evaluations_env_is_not_the_trainings(on_nonfinite: Any) -> None:
    evaluated = FaultyEnv("observation", np.nan, at=3)
    callback = EvalCallback(evaluated, eval_freq=30, n_eval_episodes=1, verbose=0, warn=False)
    model = NCLQL("MlpPolicy", box_env(3, 2), **TINY, on_nonfinite=on_nonfinite)
    with pytest.raises(NonFiniteError, match="observation 0 is nan") as error:
        model.learn(60, callback)
    assert "env step" not in str(error.value)
    assert model.n_skipped == 0
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 29


@pytest.mark.parametrize("part", ["td_loss", "smoothing_loss"])
def test_the_part_of_an_online_loss_is_named(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NCLQL("MlpPolicy", box_env(3, 2), **TINY).learn(30)
    method = f"_{part}"
    whole = getattr(model, method)
    monkeypatch.setattr(model, method, lambda *args: (whole(*args)[0] * float("nan"), whole(*args)[1]))
    with pytest.raises(NonFiniteError, match=f"{part} nan"):
        model.train(1, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_learning_rate_that_is_none_is_named_before_it_is_used(value: float) -> None:
    model = NCLQL("MlpPolicy", box_env(3, 2), learning_rate=lambda progress: 1e-3 if progress > 0.5 else value, **TINY)
    with pytest.raises(ValueError, match=re.escape(f"`learning_rate` gave {value}")):
        model.learn(100)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_weights_that_a_step_too_long_has_poisoned_are_not_called_whole() -> None:
    model = NCLQL("MlpPolicy", box_env(3, 2), learning_rate=1e38, **TINY)
    with pytest.raises(NonFiniteError, match="the weights are not finite either"):
        model.learn(100)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predict_names_the_observation(value: float) -> None:
    obs = np.zeros((4, 5), np.float32)
    obs[2, 1] = value
    model = NCLQL("MlpPolicy", box_env(), **TINY)
    with pytest.raises(NonFiniteError, match=rf"observation 2 is {value} at index \[1\]"):
        model.predict(obs)
    clone = DiffusionBC("MlpPolicy", dataset=dataset(), policy_kwargs={"net_arch": [8]}, device="cpu")
    with pytest.raises(NonFiniteError, match=rf"observation 2 is {value} at index \[1\]"):
        clone.predict(obs[:, :3])


def test_an_action_that_is_not_finite_reaches_no_env() -> None:
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    model = NCLQL("MlpPolicy", env, **{**TINY, "policy_kwargs": {"net_arch": [8], "backend": "autograd"}, "learning_starts": 0})
    for parameter in model.critic.parameters():
        parameter.data.fill_(np.nan)
    with pytest.raises(NonFiniteError, match=r"At env step 0, the policy's action 0 is \[nan nan\]"):
        model.learn(10)
    assert env.actions == []


@pytest.mark.parametrize("value", ["ignore", None, ""])
def test_other_policies_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'raise' or 'skip'"):
        NCLQL("MlpPolicy", box_env(), on_nonfinite=value, **TINY)


# ---------------------------------------------------------------------- offline


def dataset(scale: float = 1.0, reward: float = 1.0) -> OfflineDataset:
    rng = np.random.default_rng(0)
    observations = (scale * rng.normal(size=(88, 3))).astype(np.float32)
    observations[:, 1] = 0.25  # a coordinate without variance
    actions, ends = rng.uniform(-1, 1, (80, 2)).astype(np.float32), np.arange(1, 81) % 10 == 0
    box = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,))
    rewards = np.full(80, reward, np.float32)
    return OfflineDataset(observations, actions, rewards, np.zeros(80, bool), ends, np.arange(0, 81, 10), *box)


SMALL = {"d_model": 16, "depth": 1, "critic_depth": 1, "head_dim": 8, "time_embedding_dim": 8, "net_arch": [8]}
OFFLINE: dict[str, tuple[type[OfflineAlgorithm], dict[str, Any]]] = {
    "DiffusionBC": (DiffusionBC, {"policy_kwargs": {"net_arch": [8]}}),
    "DiffusionPlanner": (DiffusionPlanner, {"policy_kwargs": SMALL}),
    "PG": (PG, {"policy_kwargs": SMALL}),
}


def offline(name: str, data: OfflineDataset, **more: Any) -> Any:
    cls, kwargs = OFFLINE[name]
    return cls("MlpPolicy", dataset=data, batch_size=4, device="cpu", seed=0, **kwargs, **more)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_gradient_step_that_is_not_finite_is_named_or_skipped(name: str) -> None:
    model = offline(name, dataset())
    calls = iter(range(1000))
    optimise = model._optimise

    def sometimes(loss: th.Tensor, *rest: Any) -> th.Tensor:
        norm: th.Tensor = optimise(loss * (np.nan if next(calls) % 5 == 2 else 1.0), *rest)
        return norm

    model._optimise = sometimes
    with pytest.raises(NonFiniteError, match=r"loss is nan at gradient step 3;.*No model was saved before\."):
        model.learn(10)
    assert model.num_timesteps == 2
    model.on_nonfinite = "skip"
    model.learn(20)
    assert model.n_skipped == 4
    assert model.num_timesteps == 20
    assert all_finite(model)


def poison_gradients(model: Any) -> None:
    for parameter in model.policy.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * np.nan)


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_agents_take_the_policy_as_an_argument(name: str, tmp_path: Path) -> None:
    model = offline(name, dataset(), on_nonfinite="skip")
    poison_gradients(model)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(7)
    assert model.n_skipped == model.num_timesteps == 7
    assert all(th.equal(*pair) for pair in zip(before, model.policy.parameters(), strict=True))
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert loaded.on_nonfinite == "skip"
    assert loaded.n_skipped == 7
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'raise' or 'skip'"):
        offline(name, dataset(), on_nonfinite="ignore")


@pytest.mark.parametrize("name", ["NCLQL", *OFFLINE])
def test_the_error_names_the_last_good_checkpoint(name: str, tmp_path: Path) -> None:
    model = NCLQL("MlpPolicy", box_env(), **TINY) if name == "NCLQL" else offline(name, dataset())
    checkpoints = CheckpointCallback(8, str(tmp_path))

    def poison(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        if model.num_timesteps == 20:
            poison_gradients(model)
        return True

    with pytest.raises(NonFiniteError, match=r"step 2[01];.*The last model that was saved is (.*), of step 16\.") as error:
        model.learn(40, [checkpoints, ConvertCallback(poison)])
    found = re.search(r"is ([^ ]*), of step", str(error.value))
    assert found is not None
    loaded = type(model).load(found[1], device="cpu")
    assert loaded.num_timesteps == 16
    assert loaded.last_save == model.last_save


def test_the_part_of_the_loss_is_named() -> None:
    model = offline("DiffusionPlanner", dataset())
    model.data.values[:] = np.nan
    with pytest.raises(NonFiniteError, match=r"loss is nan \((planner_loss nan, )?critic_loss nan\) at gradient step 1"):
        model.learn(1)
    assert all_finite(model)


@pytest.mark.parametrize("sampler", ["loss_second_moment", "speed", "adaptive", "adaptive+min_snr"])
def test_what_a_timestep_sampler_has_learned_is_not_poisoned(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offline("DiffusionBC", dataset(), timestep_sampler=sampler, on_nonfinite="skip")
    calls, loss = iter(range(1000)), model.policy.loss

    def sometimes(*args: Any) -> th.Tensor:
        losses: th.Tensor = loss(*args)
        return losses * np.nan if next(calls) % 10 == 3 else losses

    monkeypatch.setattr(model.policy, "loss", sometimes)
    model.learn(60)
    assert model.n_skipped == 6
    tensors = [value for value in model.policy.timestep_sampler.state_dict().values() if isinstance(value, th.Tensor)]
    assert all(bool(th.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.int64])
def test_offline_observations_of_every_type_are_learned_from(name: str, dtype: Any) -> None:
    bound = 100 if np.issubdtype(dtype, np.integer) else np.inf
    data = dataclasses.replace(dataset(), observation_space=spaces.Box(-bound, bound, (3,), dtype))
    model = offline(name, data).learn(3)
    assert all_finite(model)
    action, _ = model.predict(np.ones((2, 3), dtype))
    assert action.dtype == np.float32
    assert np.isfinite(action).all()


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize(("scale", "reward"), [(1e-6, 1e-20), (1.0, 0.0), (1e6, 1e8)])
def test_extreme_data_and_constant_coordinates_are_learned_from(name: str, scale: float, reward: float) -> None:
    model = offline(name, dataset(scale, reward)).learn(6)
    assert all_finite(model)
    action, _ = model.predict(scale * np.ones((3, 3), np.float32))
    assert np.isfinite(action).all()


@pytest.mark.parametrize("sizes", [[], [1], [3, 0, 40], [4095, 4096, 4097, 10_000]])
def test_the_compiled_norm_equals_torchs(sizes: list[int]) -> None:
    tensors = [th.randn(size) for size in sizes]
    expected = th.nn.utils.get_total_norm([tensor.double() for tensor in tensors]).float()
    th.testing.assert_close(total_norm(tensors), expected, rtol=1e-6, atol=0)
    th.testing.assert_close(total_norm([th.randn(6, 4).T, *tensors]).isfinite(), th.tensor(True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25])
@pytest.mark.parametrize("place", [0, 70, 4096, 9_999])
def test_one_number_that_is_not_finite_makes_the_norm_so(value: float, place: int) -> None:
    tensors = [th.randn(50), th.randn(100, 100)]
    tensors[1].view(-1)[place] = value
    assert not th.isfinite(total_norm(tensors))
