"""Prior Guidance: the prior's law, whose gradient reaches what, what it learns, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_diffrl.common import CosineSchedule
from sb3_diffrl.offline import OfflineDataset
from sb3_diffrl.pg import PG
from sb3_diffrl.pg.policies import gaussian_kl, squash, squashed_kl
from sb3_diffrl.planner import DiffusionPlanner
from tests.test_planner import TINY, StopAt13, assert_same, make_dataset, make_planner

pytestmark = pytest.mark.filterwarnings("ignore:Training goes on without an environment")

TINY_PG = {**TINY, "policy_kwargs": {**TINY["policy_kwargs"], "prior_width": 16}}
PRIOR = ("prior", "latent_critic")


def make_pg(dataset: OfflineDataset | None = None, **kwargs: Any) -> PG:
    data = make_dataset(lengths=(20, 30)) if dataset is None else dataset
    return PG("MlpPolicy", dataset=data, **{**TINY_PG, **kwargs})


def weights(model: DiffusionPlanner, of_prior: bool) -> dict[str, th.Tensor]:
    """Copies of the tensors that belong to the prior, or of all others."""
    return {name: value.clone() for name, value in model.policy.state_dict().items() if name.startswith(PRIOR) == of_prior}


# ---------------------------------------------------------------------- the prior's law


def test_the_divergence_is_the_closed_form() -> None:
    mean, log_std = th.randn(5, 3), th.randn(5, 3)
    normal = th.distributions.Normal(mean, log_std.exp())
    standard = th.distributions.Normal(th.zeros(()), th.ones(()))
    th.testing.assert_close(gaussian_kl(mean, log_std), th.distributions.kl_divergence(normal, standard))


def test_the_squashed_latents_divergence_is_that_of_its_density() -> None:
    """The mean of the one-sample estimates is the integral of p log(p / q) over z = 2 tanh(u), by change of variables."""
    mean, log_std = th.tensor(0.4, dtype=th.float64), th.tensor(-0.7, dtype=th.float64)
    u = mean + log_std.exp() * th.randn(400_000, dtype=th.float64, generator=th.Generator().manual_seed(0))
    z = th.linspace(-2, 2, 40_001, dtype=th.float64)[1:-1]
    density = th.distributions.Normal(mean, log_std.exp()).log_prob(th.atanh(z / 2)) - th.log(2 * (1 - (z / 2) ** 2))  # type: ignore[no-untyped-call]
    standard = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    integral = th.trapezoid(density.exp() * (density - standard), z)
    th.testing.assert_close(squashed_kl(u, mean, log_std).mean(), integral, atol=3e-3, rtol=0)
    assert squash(u).abs().max() <= 2


def test_the_prior_begins_as_the_planners_noise() -> None:
    model = make_pg(squash=False)
    mean, log_std = model.policy.prior(th.randn(4, 2))
    assert mean.shape == (4, 3, 2)
    assert not mean.any()
    assert not log_std.any()
    obs = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    by_prior = model.plan(obs, deterministic=True)
    model.guidance = "none"
    np.testing.assert_allclose(by_prior, model.plan(obs, deterministic=True), atol=1e-6)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 3 * 2 * 2.0), ("mean", 2 * 2.0)])
def test_the_reductions_of_the_divergence(reduction: Any, expected: float) -> None:
    """Mean 2 and standard deviation 1 in each of 3 x 2 entries: 2 nats an entry."""
    model = make_pg(squash=False, kl_reduction=reduction, alpha=0.0)
    with th.no_grad():
        model.policy.prior.head[-1].bias[:2] = 2.0  # type: ignore[operator]
    assert float(model._prior_loss(th.randn(16, 2))[1]["kl"]) == pytest.approx(expected)


def test_the_values_norm_does_not_depend_on_where_zero_is() -> None:
    value = th.randn(64)
    norms = {name: make_pg(normalize_value=name)._value_norm for name in ("std", "abs", "none")}
    th.testing.assert_close(norms["std"](value + 100), norms["std"](value))
    th.testing.assert_close(norms["std"](3 * value), 3 * norms["std"](value))
    assert norms["abs"](value + 100) > 50 * norms["abs"](value)
    assert norms["none"](value) == 1


# ---------------------------------------------------------------------- gradients


def test_the_latent_critics_gradient_reaches_the_prior_and_nothing_else() -> None:
    model = make_pg(alpha=0.0)
    policy = model.policy
    model.learn(20)  # the networks begin with layers of zeros, which let nothing through
    policy.zero_grad()
    model._prior_loss(th.randn(16, 2))[0].backward()  # type: ignore[no-untyped-call]
    reached = {name for name, parameter in policy.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {name.split(".")[0] for name in reached} == {"prior"}
    assert {name for name, _ in policy.named_parameters() if name.startswith("prior.")} - reached <= {"prior.gru.weight_ih_l0"}
    policy.zero_grad()
    model._latent_critic_loss(th.randn(16, 2))[0].backward()  # type: ignore[no-untyped-call]
    reached = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in reached} == {"latent_critic"}


def test_each_stage_trains_its_own_and_nothing_else() -> None:
    model = make_pg(planner_fraction=0.5)
    before = {of_prior: weights(model, of_prior) for of_prior in (True, False)}
    model.learn(20, lambda locals_, _: locals_["self"].num_timesteps < 10)
    assert_same(before[True], weights(model, of_prior=True))
    planner = weights(model, of_prior=False)
    trained = [
        name for name in planner if name.startswith("planner.denoiser.") and not th.equal(planner[name], before[False][name])
    ]
    assert trained
    model.learn(10, reset_num_timesteps=False)
    assert_same(planner, weights(model, of_prior=False))
    prior = weights(model, of_prior=True)
    assert [name for name in prior if "weight" in name and th.equal(prior[name], before[True][name])] == []


# ---------------------------------------------------------------------- learning


def two_ways() -> OfflineDataset:
    """From 0 the state goes up or down by 1 a step, at random; up is worth 1 a step and down nothing."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], 100)
    n = 4
    observations = np.concatenate([sign * np.arange(n + 1) for sign in signs])[:, None]
    rewards = np.repeat((signs > 0).astype(float), n)
    data = make_dataset(observations, rewards, lengths=(n,) * len(signs))
    actions = np.repeat(signs, n)[:, None].astype(np.float32)
    return OfflineDataset(
        data.observations,
        actions,
        data.rewards,
        data.terminations,
        data.truncations,
        data.episode_starts,
        data.observation_space,
        spaces.Box(-1, 1, (1,)),
    )


@pytest.fixture(scope="module")
def planner() -> DiffusionPlanner:
    """Has learnt from ``two_ways()``."""
    model = make_planner(
        two_ways(),
        horizon=3,
        discount=0.5,
        pad="last",
        batch_size=64,
        learning_rate=CosineSchedule(5e-3),
        ema_decay=0.98,
        num_inference_steps=10,
        clip_sample=3.0,
        policy_kwargs={**TINY["policy_kwargs"], "d_model": 32, "head_dim": 16},
    )
    return model.learn(400)


def train_prior(planner: DiffusionPlanner, n: int = 150, **kwargs: Any) -> PG:
    settings = {"alpha": 0.01, "batch_size": 64, "seed": 0, "device": "cpu", "learning_rate": CosineSchedule(3e-3), "tau": 0.02}
    model = PG("MlpPolicy", planner=planner, policy_kwargs={"prior_width": 16}, **{**settings, **kwargs})
    return model.learn(n)


START = np.zeros((64, 1), np.float32)


def value_from_start(model: DiffusionPlanner, guidance: str) -> float:
    th.manual_seed(0)
    model.guidance = guidance
    return float(model.value(model.plan(START)).mean())


def test_plans_of_the_prior_are_worth_as_much_as_the_best_of_many(planner: DiffusionPlanner) -> None:
    model = train_prior(planner)
    values = {name: value_from_start(model, name) for name in ("none", "mcss", "pg")}
    assert values["pg"] > values["none"] + 0.5  # of 0 to 2
    assert values["pg"] > values["mcss"] - 0.2
    model.guidance = "pg"
    plan = model.plan(START, deterministic=True)[0, :, 0]
    np.testing.assert_allclose(plan, [0, 1, 2], atol=0.3)
    assert model.predict(START[0], deterministic=True)[0] > 0.5


def test_with_a_very_large_alpha_it_plans_as_without_guidance(planner: DiffusionPlanner) -> None:
    model = train_prior(planner, alpha=1e4, squash=False)
    assert value_from_start(model, "pg") == pytest.approx(value_from_start(model, "none"), abs=0.1)
    obs = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
    by_prior = model.plan(obs, deterministic=True)
    model.guidance = "none"
    np.testing.assert_allclose(by_prior, model.plan(obs, deterministic=True), atol=0.2)


def test_with_a_frozen_random_prior_the_value_falls(planner: DiffusionPlanner) -> None:
    learnt = train_prior(planner)
    frozen = train_prior(planner, n=1)
    with th.no_grad():
        frozen.policy.prior_target.head[-1].weight.normal_(generator=th.Generator().manual_seed(0))  # type: ignore[operator]
    assert value_from_start(frozen, "pg") < value_from_start(learnt, "pg") - 0.5


def test_a_prior_on_the_planner_of_another_pg_begins_anew(planner: DiffusionPlanner) -> None:
    first = train_prior(planner, n=3)
    model = PG("MlpPolicy", planner=first, device="cpu", seed=0)
    for prior in (model.policy.prior, model.policy.prior_target):
        assert all((part == 0).all() for part in prior(th.randn(4, 1)))
    for name, value in planner.policy.state_dict().items():
        assert th.equal(model.policy.state_dict()[name], value) or "timestep_sampler" in name


@pytest.mark.parametrize("guidance", ["none", "mcss", "pg"])
def test_it_takes_the_planners_guidances(planner: DiffusionPlanner, guidance: str) -> None:
    model = train_prior(planner, n=1)
    assert model.guidance == "pg"
    model.guidance = guidance
    together = model.predict(START[:5] + np.arange(5, dtype=np.float32)[:, None], deterministic=True)[0]
    single = model.predict(START[3] + 3, deterministic=True)[0]
    np.testing.assert_allclose(together[3], single, atol=1e-5)
    if guidance != "pg":
        planner.guidance = guidance
        np.testing.assert_allclose(planner.predict(START[3] + 3, deterministic=True)[0], single, atol=1e-5)


def test_a_continued_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    """Stopped in the second stage; the first is covered by the planner's test."""
    dataset = make_dataset(lengths=(20, 30))

    def make() -> PG:
        return make_pg(dataset, planner_fraction=0.4, learning_rate=CosineSchedule(1e-3))

    straight = make().learn(20)
    make().learn(20, StopAt13()).save(tmp_path / "half")
    th.manual_seed(12345)
    loaded = PG.load(tmp_path / "half", device="cpu")
    loaded.set_dataset(dataset)
    loaded.learn(7, reset_num_timesteps=False)
    assert_same(straight.policy.state_dict(), loaded.policy.state_dict())
    obs = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(straight.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_a_planner_on_disk_is_taken_over(tmp_path: Path) -> None:
    dataset = make_dataset(lengths=(20, 30))
    planner = make_planner(dataset, critic="td", train_for=("cfg",)).learn(5)
    planner.save(tmp_path / "planner")
    model = PG("MlpPolicy", dataset=dataset, planner=tmp_path / "planner", device="cpu", seed=0, batch_size=16)
    assert (model.critic, model.train_for, model.horizon) == ("td", ("cfg",), 4)
    assert_same(weights(planner, of_prior=False), weights(model, of_prior=False))
    model.learn(3)
    assert_same(weights(planner, of_prior=False), weights(model, of_prior=False))


def test_the_planner_of_a_pg_on_disk_is_taken_over_without_its_prior(tmp_path: Path) -> None:
    dataset = make_dataset(lengths=(20, 30))
    trained = make_pg(dataset).learn(20)
    trained.save(tmp_path / "pg")
    model = PG("MlpPolicy", dataset=dataset, planner=tmp_path / "pg", device="cpu", seed=0, batch_size=16)
    assert_same(weights(trained, of_prior=False), weights(model, of_prior=False))
    untrained = PG("MlpPolicy", dataset=dataset, planner=trained, device="cpu", seed=0, batch_size=16)
    assert_same(weights(untrained, of_prior=True), weights(model, of_prior=True))


# ---------------------------------------------------------------------- bad input


def test_what_fits_a_planner_is_taken_and_what_does_not_is_refused_by_name() -> None:
    fitting = {"pad": "last", "velocity_indices": [1]}
    planner = make_planner(make_dataset(lengths=(20, 30)), **fitting, train_for=("cg", "cfg"))

    def make(**kwargs: Any) -> PG:
        return PG("MlpPolicy", planner=planner, device="cpu", seed=0, batch_size=16, **kwargs)

    assert make(**fitting).velocity_indices == (1,)
    narrow = make(policy_kwargs={"net_arch": (32,), "prior_width": 24})
    assert narrow.policy.prior_width == 24
    assert PG("MlpPolicy", planner=narrow, policy_kwargs={"prior_width": 32}).policy.prior_width == 32
    assert make(guidance="cfg").train_for == ("cg", "cfg")
    planner.policy.num_inference_steps = 3
    assert make().policy.num_inference_steps == 3
    for name, value in {"head_dim": 16, "activation_fn": th.nn.ReLU, "d_model": 32}.items():
        with pytest.raises(ValueError, match=rf"policy_kwargs\['{name}'\]"):
            make(policy_kwargs={name: value})
    for other in (3, object()):
        with pytest.raises(ValueError, match="`planner` is a DiffusionPlanner, a PG, or the path of one"):
            PG("MlpPolicy", planner=other)  # type: ignore[arg-type]


def test_priors_on_a_saved_planner_begin_differently_without_a_seed(tmp_path: Path) -> None:
    dataset = make_dataset(lengths=(20, 30))
    make_planner(dataset).save(tmp_path / "planner")
    made = [PG("MlpPolicy", dataset=dataset, planner=tmp_path / "planner", device="cpu") for _ in range(2)]
    first, second = (next(model.policy.prior.parameters()) for model in made)
    assert not th.equal(first, second)


def test_a_planner_that_does_not_fit_is_refused() -> None:
    dataset = make_dataset(lengths=(20, 30))
    planner = make_planner(dataset)
    with pytest.raises(ValueError, match="`stride` is 2, and the planner was trained with 1: leave `stride` out"):
        PG("MlpPolicy", planner=planner, stride=2)
    with pytest.raises(ValueError, match=r"policy_kwargs\['d_model'\] is 32, and the planner was made with 16"):
        PG("MlpPolicy", planner=planner, policy_kwargs={"d_model": 32})
    with pytest.raises(ValueError, match="learnt from 50 steps of data without an id, not from 41"):
        PG("MlpPolicy", planner=planner, dataset=make_dataset(lengths=(20, 21)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"planner_fraction": 1.5}, r"`planner_fraction` must be in \[0, 1\], got 1.5"),
        ({"alpha": -1.0}, "`alpha` must be a finite number of at least 0, got -1.0"),
        ({"alpha": float("nan")}, "`alpha` must be a finite number"),
        ({"tau": 2.0}, "`tau` must be above 0 and at most 1"),
        ({"batch_size": 1}, "with `batch_size` = 1 take `normalize_value`"),
        ({"train_for": "cfg"}, "`train_for` is a list of guidances among 'cg' and 'cfg', got 'cfg'"),
        ({"train_for": ("cgf",)}, "`train_for` is a list of guidances"),
        ({"temperature": -1.0}, "`temperature` must be a finite number of at least 0"),
        ({"cfg_target": 300.0}, "`cfg_target` must be a finite number from -1 to 1"),
        ({"terminal_reward": float("nan")}, "`terminal_reward` must be a finite number"),
        ({"num_action_steps": 60}, "`num_action_steps` must be at most 50"),
        ({"velocity_indices": 1}, "`velocity_indices` must be a list of integers"),
        ({"policy_kwargs": {"n_candidates": 3}}, "'n_candidates', which is an argument of PG itself"),
        ({"kl_reduction": "max"}, "Unknown `kl_reduction` 'max', choose 'sum' or 'mean'"),
        ({"kl_of": "u"}, "Unknown `kl_of` 'u', choose 'latent' or 'unsquashed'"),
        ({"normalize_value": "max"}, "Unknown `normalize_value` 'max', choose 'std' or 'abs' or 'none'"),
        ({"tau": 0.0}, "`tau` must be"),
        ({"prior_inference_steps": 0}, "`prior_inference_steps` must be"),
        ({"guidance": "best"}, "Unknown `guidance` 'best'"),
        ({"guidance": "cfg", "cfg_dropout": 0.0}, "`cfg_dropout` = 0 never trains"),
        ({"horizon": 60}, "reaches 59 steps ahead, and the longest episode has 30"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pg(**kwargs)
