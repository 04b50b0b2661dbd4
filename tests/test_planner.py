"""The planner: windows and values, what it learns, how it plans, and what it refuses."""

import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_diffrl.common import CosineSchedule, NonFiniteError
from sb3_diffrl.offline import OfflineDataset
from sb3_diffrl.offline.spaces import ObservationFlattener
from sb3_diffrl.pg import PG
from sb3_diffrl.planner import PRESETS, DiffusionPlanner
from sb3_diffrl.planner.data import WindowSettings, prepare_data, values

pytestmark = pytest.mark.filterwarnings("ignore:Training goes on without an environment")

TINY: dict[str, Any] = {
    "policy_kwargs": {"d_model": 16, "head_dim": 8, "depth": 1, "critic_depth": 1, "net_arch": [32]},
    "batch_size": 16,
    "ema_decay": 0.9,
    "num_inference_steps": 5,
    "device": "cpu",
    "seed": 0,
}
SETTINGS = WindowSettings(3, 2, 0.9, "last", (), None)


def make_dataset(
    observations: np.ndarray | None = None,
    rewards: np.ndarray | None = None,
    lengths: tuple[int, ...] = (5, 9),
    is_terminated: bool = False,
    space: spaces.Space[Any] | None = None,
) -> OfflineDataset:
    """Episodes of these lengths; unless given, observation ``t`` of episode ``e`` is ``(10 e + t, -t)``."""
    n, starts = sum(lengths), np.concatenate([[0], np.cumsum(lengths)])
    if observations is None:
        columns = [np.stack([10 * e + np.arange(k + 1), -np.arange(k + 1)], 1) for e, k in enumerate(lengths)]
        observations = np.concatenate(columns)
    ends = np.isin(np.arange(1, n + 1), starts[1:])
    return OfflineDataset(
        observations.astype(np.float32),
        np.linspace(-1, 1, 2 * n).reshape(n, 2).astype(np.float32),
        (np.arange(n) if rewards is None else rewards).astype(np.float32),
        ends if is_terminated else np.zeros(n, bool),
        np.zeros(n, bool) if is_terminated else ends,
        starts,
        spaces.Box(-np.inf, np.inf, observations.shape[1:]) if space is None else space,
        spaces.Box(-1, 1, (2,)),
    )


def make_planner(dataset: OfflineDataset | None = None, **kwargs: Any) -> DiffusionPlanner:
    data = make_dataset(lengths=(20, 30)) if dataset is None else dataset
    return DiffusionPlanner("MlpPolicy", dataset=data, **{**TINY, **kwargs})


def assert_same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not th.equal(a[name], b[name])] == []


# ---------------------------------------------------------------------- data


def test_beyond_an_episode_its_final_observation_stays_at_rest() -> None:
    dataset = make_dataset()
    settings = SETTINGS._replace(velocity_indices=(1,))
    data = prepare_data(dataset, dataset.actions, settings, th.device("cpu"))
    # Step 4 is the last of the first episode, whose final observation is (5, -5); step 12 is two before the second's end.
    batch = data.gather(th.tensor([0, 4, 12]), 3, 2)
    expected = [[[0, 0], [2, -2], [4, -4]], [[4, -4], [5, 0], [5, 0]], [[17, -7], [19, -9], [19, 0]]]
    assert batch.windows.tolist() == expected
    # In motion, the action of step 4 did not lead to rest; that of step 12 did lead to the final observation.
    assert batch.is_true.tolist() == [True, False, True]
    assert prepare_data(dataset, dataset.actions, SETTINGS, th.device("cpu")).gather(th.tensor([4]), 3, 2).is_true.all()


def test_actions_that_did_not_lead_to_the_padding_teach_no_inverse_dynamics() -> None:
    model = make_planner(make_dataset(lengths=(20, 30)), pad="last", velocity_indices=(1,), stride=7)
    batch = model.sample_batch()
    assert 0 < batch.is_true.sum() < len(batch.is_true)
    spoilt = batch._replace(actions=th.where(batch.is_true[:, None], batch.actions, 123.0))
    losses = []
    for each in (batch, spoilt):
        model.generator.manual_seed(0)
        losses.append(model._inverse_dynamics_loss(each)[0])
    assert th.equal(*losses)


def test_values_of_windows_go_on_after_a_truncation() -> None:
    """Closed forms of the geometric series: the final reward 4 for ever, the mean reward 2 for ever, or nothing."""
    rewards = np.array([0.0, 1, 2, 3, 4])
    after = {"last": 4 / (1 - 0.9), "none": 2 / (1 - 0.9), "terminated": 0.0}
    for kind, tail in after.items():
        dataset = make_dataset(rewards=rewards, lengths=(5,), is_terminated=kind == "terminated")
        expected = [sum(0.9**k * r for k, r in enumerate(rewards[t:])) + 0.9 ** (5 - t) * tail for t in range(5)]
        settings = SETTINGS._replace(pad="none" if kind == "none" else "last")
        np.testing.assert_allclose(values(dataset, settings), expected, rtol=1e-6)


def test_a_state_that_lasts_is_worth_the_same_whenever_it_is_visited() -> None:
    for pad in ("last", "none"):
        dataset = make_dataset(rewards=np.full(14, 3.0))
        np.testing.assert_allclose(values(dataset, SETTINGS._replace(pad=pad)), 30.0, rtol=1e-5)


def test_the_reward_of_a_termination_can_be_replaced() -> None:
    dataset = make_dataset(rewards=np.ones(14), is_terminated=True)
    found = values(dataset, SETTINGS._replace(terminal_reward=-100.0))
    np.testing.assert_allclose(found[[3, 4]], [1 - 90, -100], rtol=1e-6)
    unended = values(make_dataset(rewards=np.ones(14)), SETTINGS._replace(terminal_reward=-100.0))
    np.testing.assert_allclose(unended, 10, rtol=1e-5)


def test_values_are_scaled_to_the_datasets_range() -> None:
    model = make_planner()
    data, policy = model.data, model.policy
    scaled = (data.values - policy.value_center) / policy.value_scale
    th.testing.assert_close(th.stack([scaled.min(), scaled.max()]), th.tensor([-1.0, 1.0]))
    windows = model.policy.normalizer.denormalize(model.sample_batch().windows).numpy()
    assert model.value(windows).shape == (16,)  # in the env's units
    th.testing.assert_close(th.as_tensor(model.value(windows)).mean(), policy.value_center, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- planning


@pytest.mark.parametrize(("relative", "prediction_type"), [(False, "epsilon"), (True, "sample"), (True, "v_prediction")])
def test_the_present_state_is_held_exactly_and_the_goal_in_every_state(relative: bool, prediction_type: str) -> None:
    box = spaces.Box(-np.inf, np.inf, (2,))
    space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
    rng = np.random.default_rng(0)
    data = make_dataset(rng.normal(size=(52, 6)), lengths=(20, 30), space=space)
    model = make_planner(data, train_for=("cg", "cfg"), relative=relative, prediction_type=prediction_type)
    model.learn(3)
    obs = {key: rng.normal(size=(6, 2)).astype(np.float32) for key in space.spaces}
    flat = th.as_tensor(np.concatenate([obs[key] for key in ("observation", "achieved_goal", "desired_goal")], axis=1))
    state = model.policy.normalizer.normalize(flat)
    for name in ("none", "mcss", "cg", "cfg"):
        model.guidance = name
        for deterministic in (True, False):
            plan = model.policy.plan(flat, deterministic)
            assert th.equal(plan[:, 0], state)
            assert th.equal(plan[:, :, 4:], state[:, None, 4:].expand(-1, 4, -1))
            assert th.equal(model.policy.encode(plan)[:, :, 4:6], plan[:, :, 4:])  # a goal is no displacement
    assert model.plan(obs).shape == (6, 4, 6)
    one = {key: value[0] for key, value in obs.items()}
    assert model.plan(one).shape == (1, 4, 6)
    assert model.predict(one)[0].shape == (2,)
    assert model.predict(obs)[0].shape == (6, 2)


class ExactGaussian(th.nn.Module):
    """The noise in noisy plans of a linear-Gaussian system x' = a x + b + N(0, s^2), given the first state."""

    def __init__(self, process: Any, horizon: int, a: float, b: float, s: float) -> None:
        super().__init__()
        self.schedule, self.a, self.b = process.schedule, a, b
        k = th.arange(1, horizon, dtype=th.float64)
        # x_k = a^k x_0 + sum_{j <= k} a^(k - j) (b + noise_j)
        effect = th.tril(a ** (k[:, None] - k[None]))
        self.power, self.shift, self.covariance = a**k, b * effect.sum(1), s**2 * effect @ effect.T

    def mean(self, first: th.Tensor) -> th.Tensor:
        return first.double() * self.power + self.shift

    def forward(self, x_t: th.Tensor, time: th.Tensor, cond: None = None) -> th.Tensor:
        alpha, sigma = (f(time[:1]).double() for f in (self.schedule.alpha, self.schedule.sigma))
        marginal = alpha**2 * self.covariance + sigma**2 * th.eye(len(self.power), dtype=th.float64)
        error = x_t[:, 1:, 0].double() - alpha * self.mean(x_t[:, 0])
        noise = sigma * th.linalg.solve(marginal, error.T).T
        return th.nn.functional.pad(noise, (1, 0))[..., None].float()


def test_with_the_exact_score_of_a_linear_gaussian_system_it_plans_the_conditional_mean() -> None:
    dataset = make_dataset(np.random.default_rng(0).normal(size=(52, 1)), lengths=(20, 30))
    model = make_planner(dataset, num_inference_steps=200)
    exact = ExactGaussian(model.policy.planner.process, 4, a=0.8, b=0.5, s=0.3)
    model.policy.planner.denoiser_ema.module = exact
    state = th.tensor([[-2.0], [0.0], [1.5]])
    plan = model.policy.denoise(model.policy.draw_latent(3, deterministic=True), state)[:, 1:, 0].double()
    th.testing.assert_close(plan, exact.mean(state), atol=0.02, rtol=0)
    # Samples have the system's mean and covariance
    samples = model.policy.denoise(model.policy.draw_latent(4000), state[:1].expand(4000, -1))[:, 1:, 0].double()
    th.testing.assert_close(samples.mean(0), exact.mean(state)[0], atol=0.04, rtol=0)
    th.testing.assert_close(samples.T.cov(), exact.covariance, atol=0.02, rtol=0)


def test_displacements_have_the_units_of_the_data() -> None:
    # Coordinate 0 is a random walk, whose displacement after n steps has the standard deviation sqrt(n); coordinate 1 stands still
    walk = np.random.default_rng(0).normal(size=(4_001, 1)).cumsum(0)
    dataset = make_dataset(np.concatenate([walk, np.full_like(walk, 3.0)], axis=1), lengths=(4_000,))
    policy = make_planner(dataset, horizon=4, stride=5, relative=True).policy
    scale = policy.plan_scale * policy.normalizer.std
    th.testing.assert_close(scale[1:, 0], th.tensor([5.0, 10.0, 15.0]).sqrt(), rtol=0.1, atol=0)
    assert th.equal(policy.plan_scale[:, 1], th.ones(4))
    plan = th.randn(6, 4, 2)
    encoded = policy.encode(plan)
    assert th.equal(encoded[:, 0, :2], plan[:, 0])
    assert th.equal(encoded[:, :, 2:], plan[:, :1].expand(-1, 4, -1))  # beside each, where it is from
    th.testing.assert_close(encoded[:, 2, 0], (plan[:, 2, 0] - plan[:, 0, 0]) / policy.plan_scale[2, 0])
    th.testing.assert_close(policy.decode(encoded), plan)
    absolute = make_planner(dataset).policy
    assert absolute.encode(plan) is plan


def test_deterministic_plans_depend_on_the_observation_alone() -> None:
    model = make_planner().learn(3)
    obs = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    for name in ("none", "mcss"):
        model.guidance = name
        together = model.plan(obs, deterministic=True)
        np.testing.assert_allclose(model.plan(obs[3], deterministic=True)[0], together[3], atol=1e-4)
        actions = model.predict(obs, deterministic=True)[0]
        np.testing.assert_array_equal(actions, model.predict(obs, deterministic=True)[0])
        assert (model.predict(obs)[0] != model.predict(obs)[0]).any()


def test_plans_stay_within_their_bound() -> None:
    observation = np.full((1, 2), 1e3, np.float32)
    plans = {}
    for bound in (None, 0.5):
        policy = make_planner(clip_sample=bound).policy
        plans[bound] = policy.plan(th.as_tensor(observation))
    assert plans[None][:, 1:].abs().max() > 0.5
    assert plans[0.5][:, 1:].abs().max() <= 0.5
    assert th.equal(plans[0.5][:, 0], plans[None][:, 0])  # the present state is held as it is


def point_mass_dataset(n_episodes: int, cut_in_motion: bool) -> OfflineDataset:
    """A point on a line that a noisy controller takes to 0, where it comes to rest, or where recording ends at full speed."""
    rng = np.random.default_rng(0)
    observations, actions, rewards, lengths = [], [], [], []
    for _ in range(n_episodes):
        x, v, steps = rng.uniform(-2, 2), 0.0, 0
        observations.append([x, v])
        while steps < 60 and not (abs(x) < 0.3 if cut_in_motion else abs(x) < 0.05 and abs(v) < 0.1):
            a = float(np.clip(-4 * x - 2 * v + 0.3 * rng.normal(), -1, 1))
            x, v = step_point_mass(x, v, a)
            observations.append([x, v])
            actions.append(a)
            rewards.append(float(abs(x) < 0.3))
            steps += 1
        if steps == 0:
            observations.pop()
        else:
            lengths.append(steps)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    n = int(starts[-1])
    return OfflineDataset(
        np.array(observations, np.float32),
        np.array(actions, np.float32)[:, None],
        np.array(rewards, np.float32),
        np.zeros(n, bool),
        np.isin(np.arange(1, n + 1), starts[1:]),
        starts,
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(-1, 1, (1,)),
    )


def step_point_mass(x: float, v: float, a: float) -> tuple[float, float]:
    v = v + 0.2 * a
    return x + 0.2 * v, v


def test_it_comes_to_rest_at_the_goal_and_stays() -> None:
    """Padding by a final state in motion makes plans pass through the goal, or stop short of it."""
    dataset = point_mass_dataset(150, cut_in_motion=False)
    settings = {"horizon": 4, "stride": 5, "pad": "last", "velocity_indices": (1,), "discount": 0.95, "batch_size": 128}
    sizes = {"d_model": 32, "head_dim": 16, "depth": 1, "critic_depth": 1, "net_arch": [64, 64]}
    model = make_planner(dataset, **settings, policy_kwargs=sizes, learning_rate=CosineSchedule(5e-3), ema_decay=0.98)
    model.learn(500)
    x, v = np.linspace(-2, 2, 9), np.zeros(9)
    inside = []
    for _ in range(50):
        action = model.predict(np.stack([x, v], axis=1).astype(np.float32), deterministic=True)[0][:, 0]
        v = v + 0.2 * action
        x = x + 0.2 * v
        inside.append(np.abs(x) < 0.3)
    assert np.mean(inside[25:]) > 0.95  # arrived, and stayed
    assert np.abs(v).max() < 0.2


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("critic", ["horizon", "td"])
def test_it_learns_what_is_to_be_learnt(critic: Any) -> None:
    """x moves on by 1 a step and the reward is x: every loss falls, plans move on, and values are those of the series."""
    n, discount = 40, 0.8
    x = np.tile(np.arange(n + 1.0), 8)
    dataset = make_dataset(x[:, None], np.tile(np.arange(n, dtype=float), 8), lengths=(n,) * 8, is_terminated=True)
    model = make_planner(
        dataset,
        horizon=3,
        stride=2,
        discount=discount,
        critic=critic,
        learning_rate=CosineSchedule(1e-2),
        batch_size=64,
        ema_decay=0.98,
        num_inference_steps=20,
    )
    model.learn(400)
    plan = model.plan(np.array([[5.0], [20.0]], np.float32), deterministic=True)[..., 0]
    np.testing.assert_allclose(plan, [[5, 7, 9], [20, 22, 24]], atol=1.0)
    if critic == "horizon":
        true = values(dataset, model.window_settings)
        found = model.value(np.array([[[5.0], [7], [9]], [[20.0], [22], [24]]], np.float32))
        np.testing.assert_allclose(found, true[[5, 20]], atol=0.1 * true.max())


def test_td_value_of_an_endless_reward_is_the_geometric_series() -> None:
    rewards = np.where(np.arange(40) < 20, 0.0, 1.0)
    observations = np.concatenate([np.zeros(21), np.ones(21)])[:, None]
    model = make_planner(
        make_dataset(observations, rewards, lengths=(20, 20)), horizon=2, critic="td", discount=0.5, learning_rate=3e-3
    )
    model.learn(600)
    plans = np.array([[[0.0], [0.0]], [[1.0], [1.0]]], np.float32)
    np.testing.assert_allclose(model.value(plans), [0, 2], atol=0.15)


def test_td_values_see_the_steps_that_no_window_begins_with_terminations_above_all() -> None:
    """States 0, 1, .. of a row; each step is worth 1 and the last, which terminates, -10."""
    n, discount = 8, 0.5
    dataset = make_dataset(np.tile(np.arange(n + 1.0), 4)[:, None], np.ones(4 * n), lengths=(n,) * 4, is_terminated=True)
    settings: dict[str, Any] = {"horizon": 4, "stride": 2, "discount": discount, "terminal_reward": -10.0, "batch_size": 32}
    model = make_planner(dataset, critic="td", learning_rate=3e-3, **settings)
    assert len(model.data.first_rows) < len(model.data.step_rows) == 4 * n
    model.learn(1500)
    expected = [-10.0]
    for _ in range(n - 1):
        expected.insert(0, 1 + discount * expected[0])
    plans = np.repeat(np.arange(float(n)), 4).reshape(n, 4, 1).astype(np.float32)
    np.testing.assert_allclose(model.value(plans), expected, atol=1.0)


def test_values_are_of_plans_in_any_precision_and_of_the_right_shape() -> None:
    model = make_planner()
    plans = model.plan(np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(model.value(plans.astype(np.float64)), model.value(plans))
    for wrong in (plans[:, :2], plans[0], plans[..., :1]):
        with pytest.raises(ValueError, match=r"Plans are \(batch, 4, 2\)"):
            model.value(wrong)


@pytest.mark.parametrize("on", ["model", "policy"])
def test_how_it_samples_may_be_changed_on_a_trained_model_and_is_saved(on: str, tmp_path: Path) -> None:
    model = make_planner(train_for=("cg", "cfg"))
    changed: dict[str, Any] = {"n_candidates": 7, "cg_scale": 3.0, "cfg_scale": 1.5, "cfg_target": 0.5, "num_inference_steps": 2}
    changed |= {"num_action_steps": 3, "temperature": 0.0, "guidance": "mcss"}
    for name, value in changed.items():
        setattr(model if on == "model" else model.policy, name, value)
    assert {name: getattr(model, name) for name in changed} == {name: getattr(model.policy, name) for name in changed} == changed
    model.save(tmp_path / "model")
    loaded = DiffusionPlanner.load(tmp_path / "model", device="cpu")
    assert {name: getattr(loaded.policy, name) for name in changed} == changed
    assert DiffusionPlanner.load(tmp_path / "model", device="cpu", guidance="cg").guidance == "cg"
    with pytest.raises(ValueError, match="Unknown `guidance` 'best'"):
        DiffusionPlanner.load(tmp_path / "model", device="cpu", guidance="best")
    untrained = make_planner()
    untrained.save(tmp_path / "untrained")
    with pytest.raises(ValueError, match="not trained for the guidance 'cfg'"):
        DiffusionPlanner.load(tmp_path / "untrained", device="cpu", guidance="cfg")


def test_model_and_policy_can_be_pickled() -> None:
    model = make_planner()
    obs = np.ones((3, 2), np.float32)
    policy = pickle.loads(pickle.dumps(model.policy))
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_weights_favour_windows_of_high_value() -> None:
    model = make_planner(value_weight=2.0)
    batch = model.sample_batch()
    losses = []
    for value in (-1.0, 1.0):
        model.generator.manual_seed(0)
        losses.append(model._planner_loss(batch._replace(values=th.full((16,), value)))[0])
    th.testing.assert_close(losses[0] / losses[1], th.tensor(math.exp(-4)))


class StopAt13:
    def __call__(self, locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        return bool(locals_["self"].num_timesteps < 13)


@pytest.mark.parametrize("critic", ["horizon", "td"])
def test_a_continued_run_equals_one_that_never_stopped(tmp_path: Path, critic: Any) -> None:
    dataset = make_dataset(lengths=(20, 30))

    def make() -> DiffusionPlanner:
        return make_planner(dataset, critic=critic, train_for=("cg", "cfg"), learning_rate=CosineSchedule(1e-3))

    straight = make().learn(20)
    make().learn(20, StopAt13()).save(tmp_path / "half")
    th.manual_seed(12345)
    resumed = DiffusionPlanner.load(tmp_path / "half", device="cpu")
    resumed.set_dataset(dataset)
    resumed.learn(7, reset_num_timesteps=False)
    assert resumed.num_timesteps == 20
    assert_same(straight.policy.state_dict(), resumed.policy.state_dict())


def test_a_saved_model_plans_as_before(tmp_path: Path) -> None:
    model = make_planner(train_for=("cg",), guidance="mcss").learn(3)
    model.guidance = "none"
    model.save(tmp_path / "model")
    loaded = DiffusionPlanner.load(tmp_path / "model", device="cpu")
    obs = np.ones((3, 2), np.float32)
    assert loaded.guidance == "none"
    np.testing.assert_array_equal(loaded.plan(obs, deterministic=True), model.plan(obs, deterministic=True))
    loaded.guidance = "cg"
    assert loaded.plan(obs).shape == (3, 4, 2)
    other = make_planner(train_for=("cg",), seed=1)
    other.set_parameters(model.get_parameters())  # type: ignore[arg-type]
    assert_same(other.policy.state_dict(), model.policy.state_dict())


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizon": 8, "stride": 5}, "reaches 35 steps ahead, and the longest episode has 30"),
        ({"horizon": 8, "stride": 5, "pad": "last"}, "reaches 35 steps ahead, and the longest episode has 30"),
        ({"horizon": 1}, "`horizon` must be at least 2"),
        ({"stride": 0}, "`stride` must be an integer of at least 1"),
        ({"discount": 1.0}, "`discount` must be at least 0 and below 1"),
        ({"pad": "first"}, "`pad` is 'none' or 'last'"),
        ({"velocity_indices": (2,)}, r"`velocity_indices` \[2\] are no indices"),
        ({"guidance": "best"}, "Unknown `guidance` 'best', choose 'none', 'mcss', 'cg', 'cfg'"),
        ({"guidance": "pg"}, "use the class `PG`"),
        ({"guidance": "cfg", "cfg_dropout": 0.0}, "`cfg_dropout` = 0 never trains"),
        ({"critic": "q"}, "Unknown `critic` 'q', choose 'horizon' or 'td'"),
        ({"n_candidates": 0}, "`n_candidates` must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_planner(**kwargs)


def test_a_guidance_that_was_not_trained_is_refused() -> None:
    model = make_planner()
    for name in ("cg", "cfg"):
        with pytest.raises(ValueError, match=rf"not trained for the guidance '{name}', but for 'none', 'mcss'"):
            model.guidance = name
    assert model.guidance == "none"


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = make_planner()
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.data.observations[:] = th.nan
    with pytest.raises(NonFiniteError, match=r"loss is nan .*critic_loss nan.* at gradient step 1"):
        model.learn(2)
    assert_same(before, model.policy.state_dict())


@pytest.mark.parametrize(
    ("domain", "env_id"), [("kitchen", "FrankaKitchen-v1"), ("antmaze", "AntMaze_UMaze-v5"), ("pointmaze", "PointMaze_UMaze-v3")]
)
def test_presets_fit_the_domains_they_are_for(domain: Any, env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
    from sb3_diffrl.offline import record_dataset

    gym.register_envs(gymnasium_robotics)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    recorded = record_dataset(None, env_id, f"test/{domain}/random-v0", n_steps=260, seed=0)
    preset = {**PRESETS[domain]["cpu"], "policy_kwargs": TINY["policy_kwargs"], "batch_size": 4}
    model = PG("MlpPolicy", dataset=recorded, device="cpu", **preset).learn(4)  # both stages
    env = model.get_env()
    assert env is not None
    obs = env.reset()
    assert model.plan(obs).shape == (1, preset["horizon"], model.policy.obs_dim)
    env.step(model.predict(obs)[0])  # type: ignore[arg-type]
    # Environments whose observations are nested come flattened; the model takes them either way.
    raw = recorded.recover_environment().reset(seed=0)[0]
    np.testing.assert_array_equal(
        model.plan(raw, deterministic=True), model.plan(model.policy.flatten(raw, False), deterministic=True)
    )
    for size in PRESETS[domain].values():
        assert set(size) <= set(vars(model)) | {"learning_rate", "policy_kwargs"}


@pytest.mark.parametrize(
    ("domain", "env_id", "robot"),
    [("pointmaze", "PointMaze_UMaze-v3", "point_env"), ("antmaze", "AntMaze_UMaze-v5", "ant_env"),
     ("kitchen", "FrankaKitchen-v1", None)],
)  # fmt: skip
def test_presets_name_every_velocity_and_agents_see_where_they_are(domain: Any, env_id: str, robot: str | None) -> None:
    gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    env: Any = gym.make(env_id)
    simulation = (getattr(env.unwrapped, robot) if robot else env.unwrapped).data
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        observation, *_ = env.step(env.action_space.sample())
    seen = ObservationFlattener(env.observation_space)(observation, batched=False)[0]
    indices = list(PRESETS[domain]["cpu"]["velocity_indices"])
    assert len(indices) == len(simulation.qvel)
    # The kitchen's observations are noisy
    np.testing.assert_allclose(np.sort(seen[indices]), np.sort(simulation.qvel), rtol=0, atol=0.5 if domain == "kitchen" else 1e-5)
    for position in simulation.qpos[:2]:
        assert np.abs(seen - position).min() < 0.05


@pytest.mark.parametrize("name", ["speed", "loss_second_moment", "adaptive+min_snr"])
def test_timestep_samplers_serve_the_planner_and_the_inverse_dynamics(name: str, tmp_path: Path) -> None:
    from sb3_diffrl.timesteps import AdaptiveTimestepSampler, LossSecondMomentSampler, TimestepSampler

    quick: dict[str, TimestepSampler] = {"adaptive+min_snr": AdaptiveTimestepSampler(update_frequency=2, weighting="min_snr")}
    quick["loss_second_moment"] = LossSecondMomentSampler(history=1)
    dataset = make_dataset(lengths=(20, 30))
    model = make_planner(dataset, train_for=("cfg",), timestep_sampler=quick.get(name, name))
    samplers = model.policy.timestep_sampler, model.policy.action_timestep_sampler
    owned = {id(parameter) for group in model.policy.optimizer.param_groups for parameter in group["params"]}
    assert not owned & {id(parameter) for sampler in samplers for parameter in sampler.parameters()}
    metrics = [model.update() for _ in range(6)]
    if name.startswith("adaptive"):
        assert {"planner_reward", "action_reward"} <= set(metrics[1])
    model.save(tmp_path / "model")
    loaded = DiffusionPlanner.load(tmp_path / "model", device="cpu")
    loaded.set_dataset(dataset)
    for each in (model, loaded):
        each.update()
    tensors = [
        {key: value for key, value in each.policy.state_dict().items() if isinstance(value, th.Tensor)} for each in (model, loaded)
    ]
    assert_same(*tensors)
    assert model.policy.timestep_sampler.sample(model.sample_batch().windows).t.dtype == th.float32
    assert model.policy.action_timestep_sampler.sample(model.sample_batch().actions).t.dtype == th.int64
