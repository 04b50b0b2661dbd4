"""The diffusion policy: what it clones, and how it answers."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_diffrl import DiffusionBC
from sb3_diffrl.common import CosineSchedule
from sb3_diffrl.offline import OfflineDataset

SETTINGS: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [64, 64]},
    "batch_size": 128,
    "learning_rate": 1e-3,
    "device": "cpu",
    "seed": 0,
}


def one_step_episodes(observations: np.ndarray, actions: np.ndarray, space: spaces.Box) -> OfflineDataset:
    n = len(actions)
    return OfflineDataset(
        np.repeat(observations, 2, axis=0).astype(np.float32),
        actions.astype(np.float32),
        np.zeros(n, np.float32),
        np.ones(n, bool),
        np.zeros(n, bool),
        np.arange(n + 1),
        spaces.Box(-np.inf, np.inf, observations.shape[1:]),
        space,
    )


def two_mode_dataset() -> OfflineDataset:
    """In each state the expert goes to +g(s) or -g(s) with equal chance; their mean, 0, is never right."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (4000, 1))
    actions = rng.choice([-1, 1], (4000, 1)) * (0.6 + 0.2 * observations) + 0.05 * rng.normal(size=(4000, 1))
    return one_step_episodes(observations, actions, spaces.Box(-1, 1, (1,)))


@pytest.mark.parametrize(
    ("prediction_type", "beta_schedule", "solver"),
    [("epsilon", "squaredcos_cap_v2", "ddim"), ("sample", "linear", "ddpm"), ("v_prediction", "vp", "ddim")],
)
def test_both_modes_are_cloned_where_a_gaussian_averages_them(prediction_type: Any, beta_schedule: Any, solver: Any) -> None:
    dataset = two_mode_dataset()
    model = DiffusionBC(
        "MlpPolicy",
        dataset=dataset,
        learning_rate=CosineSchedule(5e-3),
        batch_size=128,
        policy_kwargs={"net_arch": [64, 64, 64], "activation_fn": nn.ReLU, "time_embedding_dim": 16},
        prediction_type=prediction_type,
        beta_schedule=beta_schedule,
        solver=solver,
        num_inference_steps=50,
        ema_decay=0.98,
        device="cpu",
        seed=0,
    )
    with pytest.warns(UserWarning, match="without an environment"):
        model.learn(1500)
    # The best Gaussian with these means and deviations, in closed form
    gaussian = np.random.default_rng(1).normal(dataset.actions.mean(), dataset.actions.std(), 2000)
    assert (np.abs(gaussian) < 0.3).mean() > 0.3
    for obs in (-0.8, 0.0, 0.8):
        actions, _ = model.predict(np.full((500, 1), obs, np.float32))
        goal = 0.6 + 0.2 * obs
        assert (np.abs(actions) < goal / 2).mean() < 0.1  # hardly ever between the modes
        assert 0.3 < (actions > 0).mean() < 0.7  # both of them
        assert abs(np.median(np.abs(actions)) - goal) < 0.1  # at the right place, which depends on the state


UNEVEN = spaces.Box(np.array([-2, 5], np.float64), np.array([1, 5.5], np.float64), dtype=np.float64)


def make_model(action_space: spaces.Box = UNEVEN, **kwargs: Any) -> DiffusionBC:
    rng = np.random.default_rng(0)
    actions = rng.uniform(action_space.low, action_space.high, (50, *action_space.shape)).reshape(50, -1)
    dataset = one_step_episodes(rng.normal(size=(50, 3)), actions, action_space)
    return DiffusionBC("MlpPolicy", dataset=dataset, **{**SETTINGS, **kwargs})


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_same_observation_same_action_whatever_the_batch(solver: Any) -> None:
    model = make_model(solver=solver, prediction_type="sample")
    obs = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    together, _ = model.predict(obs, deterministic=True)
    again, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(together, again)
    for i in range(7):
        # Products of other sizes round otherwise; nothing else may differ.
        np.testing.assert_allclose(model.predict(obs[i], deterministic=True)[0], together[i], atol=1e-5)
    assert (model.predict(obs)[0] != model.predict(obs)[0]).all()


def test_actions_are_in_the_space_and_of_its_type() -> None:
    model = make_model()
    space = model.action_space
    actions, _ = model.predict(np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32))
    assert actions.dtype == np.float64
    assert all(space.contains(action) for action in actions)
    assert model.predict(np.zeros(3, np.float32))[0].shape == (2,)


def test_actions_of_any_shape() -> None:
    model = make_model(spaces.Box(-1, 1, (2, 3)))
    assert model.predict(np.zeros((4, 3), np.float32))[0].shape == (4, 2, 3)


def test_clones_actions_in_the_envs_units() -> None:
    """One action in every state: the clone answers it, through scaling there and back."""
    rng = np.random.default_rng(0)
    dataset = one_step_episodes(rng.normal(size=(500, 3)), np.tile([0.4, 5.1], (500, 1)), UNEVEN)
    model = DiffusionBC("MlpPolicy", dataset=dataset, ema_decay=0.98, **{**SETTINGS, "learning_rate": 3e-3})
    for _ in range(500):
        model.update()
    actions, _ = model.predict(rng.normal(size=(200, 3)).astype(np.float32))
    np.testing.assert_allclose(np.median(actions, axis=0), [0.4, 5.1], atol=0.05)


@pytest.mark.parametrize("on", ["model", "policy"])
def test_sampler_settings_can_be_changed_after_training_and_are_saved(on: str, tmp_path: Any) -> None:
    model = make_model(prediction_type="sample")
    obs = np.zeros(3, np.float32)
    before, _ = model.predict(obs, deterministic=True)
    changed: Any = model if on == "model" else model.policy
    changed.num_inference_steps = 3
    changed.solver = "ddpm"
    after, _ = model.predict(obs, deterministic=True)
    assert not np.array_equal(after, before)
    model.save(tmp_path / "model")
    loaded = DiffusionBC.load(tmp_path / "model", device="cpu")
    assert (loaded.num_inference_steps, loaded.policy.solver) == (3, "ddpm")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], after)


def test_the_policy_alone_is_saved_and_loaded(tmp_path: Any) -> None:
    model = make_model(solver="ddpm", num_inference_steps=4)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy")
    assert isinstance(loaded, BasePolicy)
    obs = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 60}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"beta_schedule": "cosine"}, "Unknown noise schedule 'cosine'"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"solver": "euler"}, "solver"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_the_average_of_the_weights_acts() -> None:
    model = make_model(ema_decay=0.5)
    obs = np.ones(3, np.float32)
    before, _ = model.predict(obs, deterministic=True)
    with th.no_grad():
        for parameter in model.policy.model.denoiser.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], before)
    learning, acting = (next(iter(net.parameters())) for net in (model.policy.model.denoiser, model.policy.model.denoiser_ema))
    start = acting.clone()
    model.policy.model.update_ema()  # the first copies
    with th.no_grad():
        learning.add_(2.0)
    model.policy.model.update_ema()
    # Young averages follow fast: the decay is (1 + n) / (10 + n) at first
    th.testing.assert_close(acting, start + 1.0 + (1 - 2 / 11) * 2.0)
    for _ in range(20):
        model.policy.model.update_ema()
    with th.no_grad():
        learning.add_(4.0)
    model.policy.model.update_ema()
    th.testing.assert_close(acting, start + 3.0 + 0.5 * 4.0, rtol=0, atol=1e-4)
