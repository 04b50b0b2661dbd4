"""LQL and NC-LQL as SB3 algorithms."""

import copy
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffrl import LQL, NCLQL
from sb3_diffrl.lql import LangevinPolicy
from sb3_diffrl.lql.critic import LangevinCritic

from .envs import RandomEnv, box_env

ALGORITHMS = pytest.mark.parametrize("algorithm", [LQL, NCLQL])

# Chains of a few steps: these tests are about the plumbing.
TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16, 16]},
    "n_langevin_steps": 2,
    "learning_starts": 20,
    "batch_size": 16,
    "buffer_size": 1000,
    "device": "cpu",
}
METRICS = ("td_loss", "smoothing_loss", "q_mean", "grad_norm", "action_saturation", "action_spread")


def make(algorithm: type[LQL], env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> LQL:
    if algorithm is NCLQL:
        kwargs.setdefault("n_levels", 3)
    return algorithm(policy, env, **{**TINY, **kwargs})


def weights(model: LQL) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@ALGORITHMS
def test_learns_from_a_string_and_predicts(algorithm: type[LQL]) -> None:
    model = make(algorithm, "Pendulum-v1", seed=0)
    before = weights(model)
    model.learn(40)
    assert model.num_timesteps == 40
    assert not th.equal(weights(model), before)
    action, state = model.predict(np.zeros(3, dtype=np.float32))
    assert action.shape == (1,)
    assert action.dtype == np.float32
    assert state is None
    batch, _ = model.predict(np.zeros((4, 3), dtype=np.float32))
    assert batch.shape == (4, 1)


@ALGORITHMS
@pytest.mark.parametrize(("reward_scale", "handle_timeouts"), [(1.0, True), (0.2, True), (1.0, False)])
def test_time_limits_bootstrap(algorithm: type[LQL], reward_scale: float, handle_timeouts: bool) -> None:
    """On an endless task of reward one, cut every eight steps, the value is 1 / (1 - gamma) if and only if time-outs bootstrap."""
    gamma = 0.9
    env = RandomEnv(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)), reward=1.0, length=8)
    model = make(
        algorithm,
        env,
        gamma=gamma,
        tau=0.3,
        learning_rate=5e-3,
        reward_scale=reward_scale,
        batch_size=32,
        replay_buffer_kwargs={"handle_timeout_termination": handle_timeouts},
        seed=1,
    ).learn(300)
    obs = th.rand(50, 2) * 2 - 1
    value = th.cat(model.critic(obs, model.policy.sample_actions(obs)), dim=1).mean().item()
    expected = 1 / (1 - gamma)
    assert (abs(value - expected) < 0.05 * expected) == handle_timeouts


@ALGORITHMS
def test_actions_are_nearly_the_best_of_a_learned_critic(algorithm: type[LQL]) -> None:
    """On a bandit with the arg-max off the centre, the chain finds what a grid search of the critic finds."""

    class Bandit(RandomEnv):
        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, _, _, _, info = super().step(action)
            return obs, -float(np.square(action - np.array([0.5, -0.3])).sum()), True, False, info

    env = Bandit(spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (2,)))
    # The default chain: fewer levels over the same range of noise end in long steps that do not refine.
    kwargs = {key: value for key, value in TINY.items() if key != "n_langevin_steps"}
    model = algorithm("MlpPolicy", env, seed=0, **{**kwargs, "learning_rate": 1e-2, "learning_starts": 300}).learn(300)
    model.train(gradient_steps=200, batch_size=64)

    obs = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    actions = model.predict(obs, deterministic=True)[0]
    grid = th.cartesian_prod(th.linspace(-1, 1, 41), th.linspace(-1, 1, 41))
    gaps = []
    for row, action in zip(th.as_tensor(obs), th.as_tensor(actions), strict=True):
        values = th.stack(model.critic(row.expand(len(grid), 1), grid)).sum(dim=0).detach()
        chosen = th.stack(model.critic(row[None], action[None])).sum(dim=0).detach()
        gaps.append(float((values.max() - chosen) / (values.max() - values.min())))
    assert np.median(gaps) < 0.02
    assert np.mean(gaps) < 0.1  # a chain may end in another mode of a critic that is not the bandit yet


@ALGORITHMS
@pytest.mark.parametrize(
    ("low", "high", "shape", "dtype"),
    [
        (-2.0, 2.0, (1,), np.float32),
        (-0.1, 7.3, (2, 3), np.float32),
        (3.0, 3.5, (2,), np.float64),
        (-1e-3, 1e4, (2, 1, 2), np.float64),
    ],
)
def test_actions_lie_in_the_space(algorithm: type[LQL], low: float, high: float, shape: tuple[int, ...], dtype: Any) -> None:
    action_space = spaces.Box(low, high, shape, dtype)
    env = RandomEnv(spaces.Box(-1, 1, (3,)), action_space)
    model = make(algorithm, env).learn(60)
    assert all(action_space.contains(action) for action in env.actions)
    for deterministic in (False, True):
        action, _ = model.predict(env.observation_space.sample(), deterministic=deterministic)
        assert action_space.contains(action)
    assert np.abs(model.replay_buffer.actions).max() <= 1  # type: ignore[union-attr]


@ALGORITHMS
def test_save_and_load_keep_everything(algorithm: type[LQL], tmp_path: Path) -> None:
    model = make(algorithm, "Pendulum-v1", seed=0, tau=0.1).learn(40)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    assert loaded.policy.sampler == model.policy.sampler
    assert loaded.policy_kwargs == TINY["policy_kwargs"]
    moments = model.critic.optimizer.state_dict()["state"][0]["exp_avg"]
    th.testing.assert_close(loaded.critic.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert loaded.replay_buffer.size() == 40  # type: ignore[union-attr]
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60
    # Without an env, and with a changed argument
    assert algorithm.load(tmp_path / "model", n_particles=3, device="cpu").policy.sampler.n_particles == 3


@ALGORITHMS
def test_policy_saves_and_loads_alone(algorithm: type[LQL], tmp_path: Path) -> None:
    model = make(algorithm, "Pendulum-v1", n_particles=2, inverse_temperature=123.0).learn(30)
    model.policy.save(str(tmp_path / "policy.pt"))
    policy = LangevinPolicy.load(str(tmp_path / "policy.pt"), device="cpu")
    assert policy.sampler == model.policy.sampler
    obs = np.ones((3, 3), dtype=np.float32)
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@ALGORITHMS
def test_set_env(algorithm: type[LQL]) -> None:
    model = make(algorithm, "Pendulum-v1").learn(30)
    model.set_env(gym.make("Pendulum-v1"))
    model.learn(30)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(box_env())


@ALGORITHMS
def test_a_seed_reproduces_a_run_to_the_bit(algorithm: type[LQL]) -> None:
    first, second, other = (weights(make(algorithm, "Pendulum-v1", seed=seed).learn(60)) for seed in (3, 3, 4))
    assert th.equal(first, second)
    assert not th.equal(first, other)


@ALGORITHMS
def test_logging_does_not_change_a_run(algorithm: type[LQL]) -> None:
    env = [box_env(), box_env()]
    runs = [make(algorithm, env[i], seed=3).learn(80, log_interval=interval) for i, interval in enumerate((1, 1000))]
    assert th.equal(weights(runs[0]), weights(runs[1]))


@ALGORITHMS
@pytest.mark.parametrize(
    "kwargs",
    [
        {"train_freq": 4, "gradient_steps": -1},
        {"train_freq": (1, "episode"), "gradient_steps": 2},
        {"n_steps": 3},
        {"action_noise": NormalActionNoise(np.zeros(3), 0.1 * np.ones(3))},
        {"learning_rate": lambda progress: 1e-3 * progress},
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        {"policy_kwargs": {"net_arch": [8], "n_critics": 1}},
        {"policy_kwargs": {"net_arch": [8], "n_critics": 5, "activation_fn": th.nn.ELU}},
        {"policy_kwargs": {"net_arch": [8], "optimizer_class": th.optim.SGD}},
        {"n_particles": 4},
        {"normalize_grad": False, "inverse_temperature": 1.0},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_options(algorithm: type[LQL], kwargs: dict[str, Any]) -> None:
    model = make(algorithm, box_env(), **kwargs)
    before = weights(model)
    model.learn(80)
    assert model._n_updates > 0
    assert not th.equal(weights(model), before)
    assert th.isfinite(weights(model)).all()


@ALGORITHMS
def test_n_step_returns_use_their_discounts(algorithm: type[LQL]) -> None:
    model = make(algorithm, box_env(), n_steps=3, gamma=0.5, seed=0).learn(60)
    replay_data = model.replay_buffer.sample(64)  # type: ignore[union-attr]
    discounts = replay_data.discounts
    assert discounts is not None
    assert 0.125 in discounts
    next_actions = model.policy.sample_actions(replay_data.next_observations)
    q_values = model._q_values(replay_data)
    next_q = model.critic_target.q_values(replay_data.next_observations, next_actions).amin(dim=0)[:, None]
    target = model.reward_scale * replay_data.rewards + discounts * (1 - replay_data.dones) * next_q
    expected = (q_values.T - target).square().mean()
    loss, metrics = model._td_loss(q_values, replay_data, next_actions)
    th.testing.assert_close(metrics["td_loss"], expected.detach())
    th.testing.assert_close(loss, 2 * expected)


def test_n_step_returns_go_on_after_loading_without_a_warning(tmp_path: Path) -> None:
    make(NCLQL, box_env(), n_steps=3, gamma=0.5, seed=0).save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = NCLQL.load(tmp_path / "model", env=box_env(), device="cpu")
    discounts = loaded.learn(60).replay_buffer.sample(64).discounts  # type: ignore[union-attr]
    assert discounts is not None
    assert 0.125 in discounts


def test_an_n_step_buffer_of_the_users_own_is_kept() -> None:
    kwargs: dict[str, Any] = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 1, "gamma": 0.99}}
    assert isinstance(make(NCLQL, box_env(), **kwargs).replay_buffer, NStepReplayBuffer)


def test_a_target_that_is_put_in_its_place_follows() -> None:
    model = make(NCLQL, box_env())
    model.learn(20)
    target = copy.deepcopy(model.critic_target)
    model.critic_target = model.policy.critic_target = target
    before = [parameter.clone() for parameter in target.parameters()]
    model.learn(40)
    assert not any(th.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


@ALGORITHMS
@pytest.mark.parametrize("normalize", [False, True])
def test_several_envs(algorithm: type[LQL], normalize: bool, tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=3, seed=0)
    eval_env = make_vec_env("Pendulum-v1", n_envs=1, seed=1)
    if normalize:
        env, eval_env = VecNormalize(env), VecNormalize(eval_env, training=False)
    model = make(algorithm, env, gradient_steps=-1, action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)))
    callback = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=10, log_path=str(tmp_path), verbose=0)
    model.learn(60, callback=callback)
    assert model.get_env() is env
    assert (tmp_path / "evaluations.npz").exists()


@ALGORITHMS
def test_images(algorithm: type[LQL]) -> None:
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
    kwargs = {"features_extractor_kwargs": {"features_dim": 16}, "net_arch": [16]}
    model = make(algorithm, env, "CnnPolicy", policy_kwargs=kwargs, buffer_size=100)
    before = model.critic.features_extractor.linear[0].weight.clone()  # type: ignore[index,union-attr]
    model.learn(40)
    assert not th.equal(before, model.critic.features_extractor.linear[0].weight)  # type: ignore[index,union-attr]
    assert len(set(model.policy.state_dict())) == len(list(model.policy.parameters()))


@ALGORITHMS
def test_dict_observations(algorithm: type[LQL]) -> None:
    env = SimpleMultiObsEnv(random_start=True, discrete_actions=False)
    kwargs = {"features_extractor_kwargs": {"cnn_output_dim": 8}, "net_arch": [16]}
    model = make(algorithm, env, "MultiInputPolicy", policy_kwargs=kwargs, buffer_size=200).learn(60)
    obs = {key: np.stack([space.sample() for _ in range(3)]) for key, space in env.observation_space.items()}  # type: ignore[attr-defined]
    together, _ = model.predict(obs, deterministic=True)
    alone = [model.predict({key: value[i] for key, value in obs.items()}, deterministic=True)[0] for i in range(3)]
    np.testing.assert_array_equal(together, np.stack(alone))


@ALGORITHMS
def test_hindsight_replay(algorithm: type[LQL], tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True) for _ in range(2)])
    model = make(
        algorithm, env, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"n_sampled_goal": 2}
    )
    model.learn(60)
    model.save_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= 80


@ALGORITHMS
def test_logs_metrics_to_every_format(algorithm: type[LQL], tmp_path: Path) -> None:
    model = make(algorithm, box_env(), seed=0, tensorboard_log=str(tmp_path / "tb"))
    model.set_logger(configure(str(tmp_path / "csv"), ["csv"]))
    model.learn(100, log_interval=1)
    header, *rows = (tmp_path / "csv" / "progress.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    for name in METRICS:
        if name == "smoothing_loss" and algorithm is LQL:
            assert f"train/{name}" not in last
            continue
        value = float(last[f"train/{name}"])
        assert np.isfinite(value)
    assert 0 <= float(last["train/action_saturation"]) <= 1
    assert float(last["train/action_spread"]) > 0
    make(algorithm, box_env(), tensorboard_log=str(tmp_path / "tb")).learn(40, tb_log_name="run", progress_bar=False)
    assert list((tmp_path / "tb" / "run_1").glob("events*"))


@ALGORITHMS
def test_a_model_can_be_copied_and_its_settings_changed(algorithm: type[LQL], tmp_path: Path) -> None:
    model = make(algorithm, "Pendulum-v1").learn(30)
    model = copy.deepcopy(model)
    model.n_particles, model.inverse_temperature = np.int64(3), 7.0  # type: ignore[assignment]
    model.learn(5, reset_num_timesteps=False)
    assert (model.policy.sampler.n_particles, model.policy.sampler.inverse_temperature) == (3, 7.0)
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model", device="cpu").policy.sampler == model.policy.sampler
    model.train(gradient_steps=0)


@pytest.mark.parametrize("activation_fn", [th.nn.Mish, th.nn.ELU])
def test_predict_works_in_inference_mode(activation_fn: type[th.nn.Module]) -> None:
    model = make(NCLQL, box_env(), policy_kwargs={"net_arch": [8], "activation_fn": activation_fn})
    with th.inference_mode():
        assert model.predict(np.zeros((2, 5), dtype=np.float32))[0].shape == (2, 3)


def test_spread_is_the_samples_standard_deviation() -> None:
    model = make(NCLQL, box_env())
    obs = th.randn(4, 5)
    width = model.critic.action_dim

    def alternate(obs: th.Tensor, generator: th.Generator) -> th.Tensor:
        return (th.linspace(-1, 1, 2).repeat(len(obs) // 2)[:, None] * obs[:, :1].sign()).expand(-1, width)

    model.policy.sample_actions = alternate  # type: ignore[method-assign,assignment]
    assert model.action_spread(obs, n_samples=8) == pytest.approx(np.std([-1, 1] * 4, ddof=1))


@ALGORITHMS
def test_checkpoints_and_progress_bar(algorithm: type[LQL], tmp_path: Path) -> None:
    callback = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True)
    model = make(algorithm, "Pendulum-v1").learn(40, callback=callback, progress_bar=True)
    assert (len(list(tmp_path.glob("*.zip"))), model.num_timesteps) == (2, 40)
    algorithm.load(tmp_path / "rl_model_40_steps", device="cpu")


# The rule of deterministic actions


@ALGORITHMS
@pytest.mark.parametrize("n_particles", [1, 3])
def test_deterministic_action_depends_on_the_observation_alone(algorithm: type[LQL], n_particles: int) -> None:
    model = algorithm("MlpPolicy", box_env(17, 6), n_particles=n_particles, policy_kwargs={"net_arch": [64, 64]}, device="cpu")
    obs = np.random.default_rng(0).normal(size=(64, 17)).astype(np.float32)
    together, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], together)
    th.manual_seed(123)
    order = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(model.predict(obs[order], deterministic=True)[0], together[order])
    for size in (1, 3, 31):
        np.testing.assert_array_equal(model.predict(obs[:size], deterministic=True)[0], together[:size])
    alone = np.stack([model.predict(row, deterministic=True)[0] for row in obs])
    np.testing.assert_array_equal(alone, together)
    # Large batches compute in torch and small ones in numpy
    wide = algorithm("MlpPolicy", box_env(17, 6), n_particles=n_particles, policy_kwargs={"net_arch": [256]}, device="cpu")
    obs = np.random.default_rng(2).normal(size=(80, 17)).astype(np.float32)
    np.testing.assert_array_equal(wide.predict(obs, deterministic=True)[0][:5], wide.predict(obs[:5], deterministic=True)[0])
    # Not by ignoring the observation
    assert together.std(axis=0).min() > 1e-4


class OwnCritic(LangevinCritic):
    """A user's own critic: the automatic gradient applies."""


class OwnPolicy(LangevinPolicy):
    """A policy with a critic of the user's own."""

    critic_class = OwnCritic


def test_deterministic_rule_holds_for_a_custom_critic() -> None:
    model = NCLQL(OwnPolicy, box_env(), **{**TINY, "policy_kwargs": {}}).learn(40)
    obs = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    together, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(np.stack([model.predict(row, deterministic=True)[0] for row in obs]), together)


def test_stochastic_actions_differ_between_calls() -> None:
    model = make(NCLQL, box_env(), seed=0)
    obs = np.zeros((1, 5), dtype=np.float32)
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])


def test_one_noise_level_is_lql() -> None:
    """NC-LQL with a single level takes no smoothing step, and its update is LQL's."""
    kwargs = {**TINY, "seed": 0, "n_langevin_steps": 4, "step_size": 1e-3}
    lql = LQL("MlpPolicy", box_env(), **kwargs).learn(40)
    nclql = NCLQL("MlpPolicy", box_env(), n_levels=1, **kwargs).learn(40)
    assert th.equal(weights(lql), weights(nclql))
